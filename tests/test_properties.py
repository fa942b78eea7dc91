"""Whatever the architecture and the masks: wrapped, fused, unwrapped and compact models agree."""

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mnp_fast

from .architectures import IMAGE, SITES, networks, silenced

# The same examples in every run, as many as take seconds.
examples = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def images(count, dtype=torch.float64):
    return torch.randn(count, *IMAGE, dtype=dtype, generator=torch.Generator().manual_seed(1))


def assert_close(actual, expected, tolerance=1e-9):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * (1e-3 + expected.abs().max())


def wrapped(model, site, data, **options):
    """The model with random masks on it."""
    masked = mnp_fast.wrap(model, site, **options)
    masks = mnp_fast.masks(masked)
    for name, value in data.draw(silenced(masks), label="masks").items():
        masks[name].data.copy_(value)
    return masked


def sites(model):
    normed = any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    return st.sampled_from([site for site in SITES if normed or site != "norm"])


def weights(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


@examples
@given(networks(), st.data())
def test_masks_can_be_folded_and_channels_removed(model, data):
    site, x = data.draw(sites(model), label="site"), images(3)
    assert_close(mnp_fast.wrap(model, site)(x), model(x))
    masked = wrapped(model, site, data)
    expected = masked(x)
    assert_close(mnp_fast.unwrap(masked)(x), expected)
    small = mnp_fast.compact(masked, (images(2),))
    assert_close(small(x), expected)
    assert weights(small) <= weights(model)


@examples
@given(networks(max_pools=False), st.data())
def test_fused_gradients_are_those_of_the_layers_apart(model, data):
    site = data.draw(sites(model), label="site")
    fused, apart = wrapped(model, site, data), mnp_fast.wrap(model, site, fuse=False)
    apart.load_state_dict(fused.state_dict())
    found = []
    for masked in (fused, apart):
        x = images(2).requires_grad_()
        y = masked(x)
        leaves = [x, *masked.parameters()]
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)])
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other)


@examples
@given(networks(), st.data())
def test_single_precision(model, data):
    algorithm = data.draw(st.sampled_from(["auto", "direct", "winograd2", "winograd4"]))
    exact = wrapped(model, data.draw(sites(model), label="site"), data, algorithm=algorithm)
    masked = copy.deepcopy(exact).float()
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    x = images(5).float().contiguous(memory_format=layout)
    expected = mnp_fast.unwrap(exact)(x.double())
    assert_close(masked(x).double(), expected, 1e-4)
    assert_close(mnp_fast.compact(masked, (x[:2],))(x).double(), expected, 1e-4)
