"""Exact ablation, compared with a loop over neurons."""

import io
import sys

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import mnp_fast
from mnp_fast.data import CleanSet
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.stats import ablation
from mnp_fast.stats.tail import Tail

from .models import MODELS, Dynamic, randomize
from .ops.cases import relative_error
from .test_stats import Tokens, images


class Branches(nn.Module):
    """What a tail must understand: concatenation, products, pools, views, 1-D layers after them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2, groups=2)
        self.right = nn.Conv2d(8, 4, 1, stride=2)
        self.slope = nn.PReLU(10)
        self.gate = nn.Conv2d(10, 10, 1)
        self.wide = nn.Conv2d(10, 5, 3, padding=1, padding_mode="reflect")
        self.hidden = nn.Linear(5 * 2 * 2, 7)
        self.fc = nn.Linear(7, 4)

    def forward(self, x, scale=1.0):
        x = F.relu_(self.norm(self.stem(x)))
        x = torch.cat([F.gelu(self.left(x)), self.right(x)], dim=1)
        x = self.slope(x) + 0.5
        gate = torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = F.max_pool2d(x * gate + x, 2)
        x = F.avg_pool2d(torch.tanh(self.wide(x)), x.size(3) // 2)
        x = torch.relu(self.hidden(x.view(x.size(0), -1)))
        return self.fc(x)


class Sequence(nn.Module):
    """One-dimensional convolutions, a norm on them, and a batch norm of features."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(2),
            nn.Conv1d(3, 6, 5, stride=4),
            nn.BatchNorm1d(6),
            nn.ReLU(inplace=True),
            nn.Conv1d(6, 4, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * 63, 9),
            nn.BatchNorm1d(9),
            nn.SiLU(inplace=True),
            nn.Linear(9, 4),
        )
        for norm in (self.layers[2], self.layers[8]):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        return self.layers(x)


def attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(256, 8), layer, nn.Flatten(), nn.Linear(24, 4))


CASES = {
    **MODELS,
    "resnet": lambda: ResNet18(4),
    "branches": Branches,
    "sequence": Sequence,
    "tokens": Tokens,
    "tokens on the other axis": lambda: Tokens(1),
    "dynamic": Dynamic,
    "attention": attention,
}
BY_TAIL = {"resnet", "pre-activation", "no norm", "fully convolutional", "shared", "branches",
           "sequence"}  # fmt: skip


def wrapped(name, site="auto", dtype=torch.float64):
    """With masks between 0 and 1, a third of them 0."""
    model = randomize(CASES[name]()).to(dtype).eval()
    masked = mnp_fast.wrap(model, site, example_inputs=(torch.zeros(2, 3, 16, 16, dtype=dtype),))
    for mask in mnp_fast.masks(masked).values():
        nn.init.uniform_(mask)
        mask.data[::3] = 0
    return masked


@torch.no_grad()
def naive(masked, data, batch_size):
    """One run of the network for every neuron."""

    def losses():
        batches = zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True)
        return torch.cat(
            [F.cross_entropy(masked(x).double(), y, reduction="none") for x, y in batches]
        )

    before, result = losses(), {}
    for name, mask in mnp_fast.masks(masked).items():
        columns = []
        for neuron in range(len(mask)):
            kept = mask[neuron].clone()
            mask[neuron] = 0
            columns.append(losses() - before)
            mask[neuron] = kept
        result[name] = torch.stack(columns, 1)
    return result


def assert_same(found, expected, tolerance=1e-9):
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape
        assert relative_error(found[name], expected[name]) <= tolerance, name


@pytest.mark.parametrize("site", ["auto", "neuron", "filter"])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_a_loop_over_neurons(name, site):
    masked, data = wrapped(name, site), images()
    found = ablation(masked, data, batch_size=4)
    assert_same(found, naive(masked, data, 4))
    for name, mask in mnp_fast.masks(masked).items():
        assert (found[name][:, mask == 0] == 0).all()
        assert found[name].abs().max() > 0


@pytest.mark.parametrize("name", CASES)
def test_which_models_have_a_tail(name):
    masked, data = wrapped(name), images()
    try:
        tail = Tail(masked)
    except Exception:
        assert name not in BY_TAIL
        return
    with torch.no_grad():
        known = tail.known(data.images)
    can_run = {layer: tail.can_run(layer, known) for layer in mnp_fast.masks(masked)}
    assert all(can_run.values()) == (name in BY_TAIL), can_run


@pytest.mark.parametrize("name", BY_TAIL)
def test_float32(name):
    masked = wrapped(name, dtype=torch.float32)
    for mask in mnp_fast.masks(masked).values():
        mask.data.fill_(1)
    data = CleanSet(torch.randn(9, 3, 16, 16), torch.arange(9) % 3)
    found = ablation(masked, data)
    exact = naive(masked.double(), CleanSet(data.images.double(), data.labels), 9)
    # Losses are rounded to about 1e-6 nats, whatever the algorithm; changes can be smaller.
    for name, expected in exact.items():
        assert (found[name] - expected).abs().max() <= 5e-6, name


def test_a_hook_is_not_left_out():
    masked, data = wrapped("resnet"), images()
    masked.layers[2].register_forward_hook(lambda module, args, y: y.flip(1))
    assert_same(ablation(masked, data, batch_size=3), naive(masked, data, 3))


def test_pairs_come_in_batches(monkeypatch):
    masked, data = wrapped("resnet"), images()
    expected = ablation(masked, data)
    monkeypatch.setattr("mnp_fast.stats.tail.VALUES", 3000)
    assert_same(ablation(masked, data, batch_size=2), expected)


def test_samples_whose_channel_is_the_same_are_left_out():
    """A ReLU hides what happens below 0: no run is needed to see that."""
    masked, data = wrapped("resnet"), images()
    with torch.no_grad():
        masked.layers[1][0].bn1.bias.fill_(-1e3)
        known = (tail := Tail(masked)).known(data.images)
        pairs = list(tail.silenced(known, "layers.1.0.bn1", torch.arange(8)))
    assert pairs == []
    assert (ablation(masked, data)["layers.1.0.bn1"] == 0).all()


def test_some_neurons():
    masked, data = wrapped("resnet"), images()
    expected = ablation(masked, data)["layers.0.1.bn1"]
    found = ablation(masked, data, neurons={"layers.0.1.bn1": torch.tensor([3, 1])})
    assert relative_error(found["layers.0.1.bn1"][:, [1, 3]], expected[:, [1, 3]]) <= 1e-9
    assert found["layers.0.1.bn1"][:, [0, 2]].isnan().all()
    assert found["bn1"].isnan().all()


def test_the_model_stays_as_it_is():
    masked, data = wrapped("resnet"), images()
    state = {name: value.clone() for name, value in masked.state_dict().items()}
    ablation(masked, data)
    assert all(torch.equal(value, state[name]) for name, value in masked.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in masked.parameters())


def test_precision_ends_a_neuron_early():
    masked, data = wrapped("no norm"), images(60)
    exact = ablation(masked, data, batch_size=10)["hidden"]
    errors = exact.std(0) / len(data) ** 0.5
    precision = 1.5 * errors[errors > 0].median().item()
    found = ablation(masked, data, batch_size=10, precision=precision)["hidden"]
    measured = found.isfinite()
    counts = measured.sum(0)
    assert set(counts.tolist()) <= set(range(10, 61, 10))
    assert counts.min() < 60 < counts.sum()
    assert relative_error(found[measured], exact[measured]) <= 1e-9
    for neuron in (counts < 60).nonzero()[:, 0]:
        rows = found[measured[:, neuron], neuron]
        assert rows.std() / len(rows) ** 0.5 <= precision
    again = ablation(masked, data, batch_size=10, precision=precision)["hidden"]
    assert torch.equal(again.nan_to_num(9), found.nan_to_num(9))


def test_interrupted_and_resumed(tmp_path, monkeypatch):
    masked, data, file = wrapped("branches"), images(), tmp_path / "ablation.pt"
    expected = ablation(masked, data, batch_size=3)
    monkeypatch.setattr("mnp_fast.stats.tail.VALUES", 3000)
    module = sys.modules["mnp_fast.stats.ablation"]
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    real, calls = module._Silencer.changes, []

    def interrupted(self, *args):
        calls.append(args[1])
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(module._Silencer, "changes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablation(masked, data, batch_size=3, checkpoint=file)
    assert file.exists()
    assert_same(ablation(masked, data, batch_size=3, checkpoint=file), expected)
    steps = 3 * len(expected)
    assert len(calls) == steps + 1  # the one that was interrupted ran twice
    assert_same(ablation(masked, data, batch_size=3, checkpoint=file), expected)
    assert len(calls) == steps + 1
    with pytest.raises(ValueError, match="belongs to another run"):
        ablation(masked, data, batch_size=2, checkpoint=file)


def test_progress_is_shown():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    ablation(wrapped("no norm"), images(), console=console)
    assert "Ablating" in file.getvalue()
    assert "100%" in file.getvalue()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: (nn.Linear(2, 2), {}), "masked: Linear has no masks"),
        (lambda m: (m.train(), {}), "masked must be in eval mode"),
        (lambda m: (m, {"batch_size": 0}), "batch_size must be at least 1, not 0"),
        (lambda m: (m, {"precision": 0.0}), "precision must be positive and finite, not 0.0"),
        (
            lambda m: (m, {"neurons": {"conv": torch.tensor([0, 5])}}),
            "'conv' has 5 neurons.* 0 to 5",
        ),
        (lambda m: (m, {"neurons": {"fc": torch.tensor([1])}}), "'fc' has 0 neurons"),
    ],
)
def test_bad_input_is_named(spoil, message):
    model, options = spoil(wrapped("no norm"))
    with pytest.raises(ValueError, match=message):
        ablation(model, images(), **options)
