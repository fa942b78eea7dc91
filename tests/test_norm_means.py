import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.architectures import ARCHITECTURES, build
from mnp_fast import masks, wrap
from mnp_fast.norm_means import NormMeans

from .trained import small_net


def randomize(model):
    torch.manual_seed(4)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.double().eval().requires_grad_(False)


def norms_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def watched(model, images):
    """The same by hooks on the norms of a plain network."""
    found = {}

    def hook(norm, inputs):
        found[norm] = inputs[0].mean([0, *range(2, inputs[0].dim())])

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(hook)
    logits = model(images)
    return logits, torch.cat([found[m] for m in model.modules() if isinstance(m, _BatchNorm)])


class NotTraced(nn.Module):
    """Its `forward` depends on values, so that it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, images):
        return self.net(images) if images.sum() != 0 else self.net(images + 1)


class Apart(nn.Module):
    """A norm behind a linear layer and one behind a pool, neither part of a block with it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.pool, self.behind = nn.AdaptiveAvgPool2d(1), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        x = self.pool(self.norm(self.conv(images)).relu()).flatten(1)
        return self.head(self.behind(x).relu())


CASES = {
    **{name: lambda name=name: build(name, 4, 0) for name in ARCHITECTURES},
    "small": small_net,
    "not traced": NotTraced,
    "apart": Apart,
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_means_and_gradients_are_those_of_the_plain_network(name, fuse):
    plain = randomize(CASES[name]())
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    masked = wrap(plain, fuse=fuse, example_inputs=(images.detach(),)).requires_grad_(False)
    found = NormMeans(masked, norms_of(plain))(images)
    expected = watched(plain, images)
    weights = [torch.randn_like(part) for part in expected]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)
    grads = [
        torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, parts, strict=True)), images)
        for parts in (found, expected)
    ]
    torch.testing.assert_close(*grads)


def test_a_fused_network_computes_no_convolution_twice():
    plain = randomize(small_net())
    means = NormMeans(wrap(plain).requires_grad_(False), norms_of(plain))
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    with torch.profiler.profile() as profile:
        means(images)
    assert not [event.key for event in profile.key_averages() if "conv" in event.key]


@pytest.mark.parametrize("site", ["auto", "neuron", "norm", "filter"])
def test_masks_below_one_count(site):
    plain = randomize(small_net())
    fused, apart = (wrap(plain, site, fuse=fuse).requires_grad_(False) for fuse in (True, False))
    torch.manual_seed(5)
    for one, other in zip(masks(fused).values(), masks(apart).values(), strict=True):
        one.uniform_(0, 1)
        one[0] = 0
        other.copy_(one)
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    found, expected = (NormMeans(model, norms_of(plain))(images) for model in (fused, apart))
    unmasked = NormMeans(plain, norms_of(plain))(images)
    for mine, other, without in zip(found, expected, unmasked, strict=True):
        torch.testing.assert_close(mine, other)
        assert not torch.allclose(mine, without)


def test_only_the_norms_named_in_their_order():
    plain = randomize(small_net())
    names, images = norms_of(plain), torch.randn(5, 3, 16, 16, dtype=torch.float64)
    whole = NormMeans(wrap(plain), names)(images)[1]
    sizes = [plain.get_submodule(name).num_features for name in names]
    parts = dict(zip(names, whole.split(sizes), strict=True))
    found = NormMeans(wrap(plain), names[::-1])(images)[1]
    torch.testing.assert_close(found, torch.cat([parts[name] for name in names[::-1]]))


def test_hooks_of_others_run_and_none_stay():
    plain = randomize(small_net())
    masked, seen = wrap(plain), []
    means = NormMeans(masked, norms_of(plain))
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    expected = means(images)
    handle = masked[0].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(means(images), expected)
    assert seen == [1]
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in masked.modules())
