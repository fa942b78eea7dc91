import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mnp_fast
from mnp_fast.data import CleanSet
from mnp_fast.fusion import fused_blocks
from mnp_fast.stats import saliency

from .models import MODELS, bare_norms, randomize, resnet
from .ops.cases import relative_error


class Tokens(nn.Module):
    """Linear layers over positions, one called twice; `samples` is the axis of the samples."""

    def __init__(self, samples=0):
        super().__init__()
        self.samples = samples
        self.embed = nn.Linear(3 * 16, 6)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        x = x.reshape(x.shape[0], 16, 3 * 16).movedim(0, self.samples)
        x = torch.tanh(self.embed(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.fc(torch.tanh(self.head(input=x.movedim(self.samples, 0).mean(1))))


class Attention(nn.Module):
    """Attention over positions, once with and once without a bias and its own order of axes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * 16, 12)
        self.first = nn.MultiheadAttention(12, 4, bias=False)
        self.second = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.tanh(self.embed(x.reshape(x.shape[0], 16, 3 * 16)))
        y = x.movedim(0, 1)
        x = x + self.first(y, y, y, need_weights=False)[0].movedim(0, 1)
        y, weights = self.second(key=x.flip(1), value=x, query=x[:, :5])
        return self.fc(y.mean(1) + weights.sum((1, 2))[:, None])


CASES = {name: model for name, model in MODELS.items() if name != "bare norms"} | {
    "tokens": Tokens,
    "attention": Attention,
}
SITES = ("auto", "neuron", "filter")


def wrapped(model, **options):
    """With masks between 0 and 1, a third of them 0."""
    masked = mnp_fast.wrap(randomize(model).double().eval(), **options)
    for mask in mnp_fast.masks(masked).values():
        nn.init.uniform_(mask)
        mask.data[::3] = 0
    return masked


def images(count=7):
    return CleanSet(torch.randn(count, 3, 16, 16).double(), torch.arange(count) % 3)


def naive(masked, data):
    """From the gradients of one sample after the other."""
    parameters = mnp_fast.masks(masked)
    changes = {name: [] for name in parameters}
    for image, label in zip(data.images, data.labels, strict=True):
        loss = F.cross_entropy(masked(image[None]), label[None])
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for (name, mask), grad in zip(parameters.items(), grads, strict=True):
            changes[name].append(mask.detach() * grad)
    return {
        name: (
            abs(sum(rows) / len(data)),
            sum(abs(row) for row in rows) / len(data),
            sum(row**2 for row in rows) / len(data),
        )
        for name, rows in changes.items()
    }


def assert_same(actual, expected, tolerance=1e-10):
    assert list(actual) == list(expected)
    for name in expected:
        for mine, other in zip(actual[name], expected[name], strict=True):
            assert mine.shape == other.shape
            assert relative_error(mine, other) <= tolerance, name


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_a_loop_over_samples(name, site, fuse):
    masked = wrapped(CASES[name](), site=site, fuse=fuse)
    assert bool(fused_blocks(masked)) == (fuse and name not in ("tokens", "attention"))
    data = images()
    found = saliency(masked, data, batch_size=4)
    assert_same(found, naive(masked, data))
    for layer in found.values():
        assert (layer.taylor[::3] == 0).all()
        assert layer.fisher.max() > 0
        assert (layer.taylor <= layer.taylor_sample * (1 + 1e-12)).all()


def test_taylor_is_the_slope_towards_mask_0():
    masked, data, step = wrapped(resnet()), images(), 1e-6
    found = saliency(masked, data, 7)["layers.1.0.bn1"].taylor
    mask = mnp_fast.masks(masked)["layers.1.0.bn1"]
    for neuron in (1, 2, 4):
        losses = []
        for factor in (1 - step, 1 + step):
            with torch.no_grad():
                kept = mask[neuron].item()
                mask[neuron] = kept * factor
                losses.append(F.cross_entropy(masked(data.images), data.labels).item())
                mask[neuron] = kept
        slope = abs(losses[1] - losses[0]) / (2 * step)
        assert found[neuron].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", ["resnet", "no norm", "tokens", "attention"])
def test_batch_size_and_order_do_not_matter(name):
    masked, data = wrapped(CASES[name]()), images()
    expected = saliency(masked, data, 100)
    for size in (1, 2, 7):
        assert_same(saliency(masked, data, size), expected)
    order = torch.randperm(len(data))
    assert_same(saliency(masked, CleanSet(data.images[order], data.labels[order]), 3), expected)


def test_permuted_neurons_permute_the_results():
    model, data, order = (
        randomize(
            nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 14), nn.Flatten()
            )
        )
        .double()
        .eval(),
        images(),
        torch.randperm(8),
    )
    before = saliency(mnp_fast.wrap(model), data, 4)["1"]
    with torch.no_grad():
        for tensor in (*model[0].parameters(), *model[1].parameters(), *model[1].buffers()):
            if tensor.dim():
                tensor.copy_(tensor[order].clone())
        model[3].weight.copy_(model[3].weight[:, order].clone())
    after = saliency(mnp_fast.wrap(model), data, 4)["1"]
    assert_same({"1": after}, {"1": [kind[order] for kind in before]})


def test_samples_on_another_axis_have_taylor_only():
    first, second = (wrapped(Tokens(axis)) for axis in (0, 1))
    second.load_state_dict(first.state_dict())
    data = images()
    expected, found = (saliency(masked, data, 3) for masked in (first, second))
    for name in ("embed", "twice"):
        assert relative_error(found[name].taylor, expected[name].taylor) <= 1e-10
        assert found[name].taylor_sample.isnan().all()
        assert found[name].fisher.isnan().all()
    assert_same({"head": found["head"]}, {"head": expected["head"]})


def test_norms_over_the_batch():
    """The gradient of the batch's loss is the sum over samples, who interact."""
    masked, data = wrapped(bare_norms()), images()
    parameters = mnp_fast.masks(masked)
    loss = F.cross_entropy(masked(data.images), data.labels)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    found = saliency(masked, data, len(data))
    for layer, mask, grad in zip(found.values(), parameters.values(), grads, strict=True):
        assert relative_error(layer.taylor, (mask * grad).abs()) <= 1e-10


def test_a_layer_that_does_not_matter_has_no_saliency():
    class Spare(Tokens):
        def __init__(self):
            super().__init__()
            self.spare, self.end = nn.Linear(16, 6), nn.Linear(6, 6)

        def forward(self, x):
            self.end(self.spare(x[:, 0, 0]))
            return super().forward(x)

    masked = wrapped(Spare(), example_inputs=(torch.zeros(2, 3, 16, 16).double(),))
    assert all((kind == 0).all() for kind in saliency(masked, images(), 4)["spare"])


def test_the_model_stays_as_it_is():
    masked, data = wrapped(resnet()), images()
    masked.fc.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in masked.state_dict().items()}
    parameters = {name: (id(p), p.requires_grad, p.grad) for name, p in masked.named_parameters()}
    with torch.no_grad():
        saliency(masked, data, 4)
    assert all(torch.equal(value, state[name]) for name, value in masked.state_dict().items())
    now = {name: (id(p), p.requires_grad, p.grad) for name, p in masked.named_parameters()}
    assert now == parameters
    assert fused_blocks(masked)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: (nn.Linear(2, 2), 4), "masked: Linear has no masks"),
        (lambda m: (m.train(), 4), "masked must be in eval mode"),
        (lambda m: (m, 0), "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_input_is_named(spoil, message):
    model, batch_size = spoil(wrapped(resnet()))
    with pytest.raises(ValueError, match=message):
        saliency(model, images(), batch_size)
