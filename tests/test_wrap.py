import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mnp_fast
from mnp_fast.layers import MaskedBatchNorm2d, MaskedConv2d, MaskedLinear

from .models import MODELS, Dynamic, NoNorm, PreActivation, Shared, fully_convolutional, randomize
from .ops.cases import relative_error

# Sites each model has something to mask at.
CASES = [
    (name, site)
    for name in MODELS
    for site in ("auto", "neuron", "norm", "filter")
    if (name, site) != ("no norm", "norm")
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def build(name, dtype=torch.float64, training=False):
    model = randomize(MODELS[name]()).to(dtype).train(training)
    return model, torch.randn(4, 3, 16, 16, dtype=dtype)


def randomize_masks(masked):
    for mask in mnp_fast.masks(masked).values():
        nn.init.uniform_(mask)
        mask.data[::3] = 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "site"), CASES)
def test_outputs_are_equal_while_masks_are_1(name, site, training, dtype):
    model, x = build(name, dtype, training)
    before = copy.deepcopy(model.state_dict())
    masked = mnp_fast.wrap(model, site)
    assert type(masked) is type(model)
    assert masked.training == training
    expected, actual = copy.deepcopy(model)(x), masked(x)
    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("mask" in k for k in model.state_dict())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "site"), CASES)
def test_unwrap_folds_the_masks(name, site, training):
    model, x = build(name, training=training)
    masked = mnp_fast.wrap(model, site)
    randomize_masks(masked)
    plain = mnp_fast.unwrap(masked)
    assert type(plain) is type(model)
    assert not any("mnp_fast.layers" in type(m).__module__ for m in plain.modules())
    assert list(plain.state_dict()) == list(model.state_dict()) or name == "bare norms"
    assert relative_error(plain(x), masked(x)) <= 1e-10


def test_masks_are_what_multiplying_weights_by_hand_gives():
    """By hand, site by site, on convolution + norm + linear."""

    def network():
        torch.manual_seed(1)
        return randomize(
            nn.Sequential(
                nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
                nn.Linear(5 * 4 * 4, 6), nn.ReLU(), nn.Linear(6, 2),
            )
        ).double().eval()  # fmt: skip

    x = torch.randn(3, 3, 6, 6).double()
    m5, m6 = torch.rand(5).double(), torch.rand(6).double()
    for site in ("neuron", "norm", "filter"):
        masked, by_hand = mnp_fast.wrap(network(), site), network()
        masks = mnp_fast.masks(masked)
        assert (
            list(masks)
            == {
                "neuron": ["1", "4"],
                "norm": ["1"],
                "filter": ["0", "4"],
            }[site]
        )
        first, *rest = masks.values()
        with torch.no_grad():
            first.copy_(m5)
            if site == "filter":
                by_hand[0].weight *= m5[:, None, None, None]
            else:
                by_hand[1].weight *= m5
            if site == "neuron":
                by_hand[1].bias *= m5
            for mask in rest:
                mask.copy_(m6)
                by_hand[4].weight *= m6[:, None]
                if site == "neuron":
                    by_hand[4].bias *= m6
        assert relative_error(masked(x), by_hand(x)) <= 1e-12


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "site"), CASES)
def test_mask_gradients_are_those_of_folded_weights(name, site, training):
    """Autograd through the plain network whose weights are products with the masks."""
    model, x = build(name, training=training)
    masked = mnp_fast.wrap(model, site)
    randomize_masks(masked)
    masks = mnp_fast.masks(masked)
    loss = masked(x).square().sum()
    actual = torch.autograd.grad(loss, list(masks.values()))
    plain = mnp_fast.unwrap(mnp_fast.wrap(model, site))  # masks 1; bare norms get weights
    for parameter in model.parameters():
        assert parameter.grad is None

    def folded_loss(*values):
        weights = dict(plain.named_parameters())
        replaced = {}
        for (layer_name, mask), value in zip(masks.items(), values, strict=True):
            layer = masked.get_submodule(layer_name)
            folded = ["weight", "bias"] if layer.site == "neuron" else ["weight"]
            for kind in folded:
                key = f"{layer_name}.{kind}"
                if weights.get(key) is not None:
                    w = weights[key]
                    replaced[key] = w * value.reshape(-1, *(1,) * (w.dim() - 1))
            assert value.shape == mask.shape
        return torch.func.functional_call(plain, replaced, (x,)).square().sum()

    values = [m.detach().clone().requires_grad_() for m in masks.values()]
    expected = torch.autograd.grad(folded_loss(*values), values)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= 1e-8


def test_pairs_follow_the_data_flow():
    masked = mnp_fast.wrap(PreActivation())
    owners = {name: masked.get_submodule(name).weight_owner for name in mnp_fast.masks(masked)}
    assert owners == {"bn1": "", "bn2": "conv1", "stem": "", "conv2": ""}


def test_ambiguous_norms_are_not_paired():
    masked = mnp_fast.wrap(Shared())
    owners = {
        name: masked.get_submodule(name).weight_owner
        for name in mnp_fast.masks(masked)
        if name.startswith("bn")
    }
    assert owners == {"bn_a": "", "bn_b": "", "bn_c": "", "bn_d": "twice"}


def test_output_layers_get_no_mask():
    assert list(mnp_fast.masks(mnp_fast.wrap(NoNorm()))) == [
        "conv", "grouped", "circular", "hidden",
    ]  # fmt: skip
    assert list(mnp_fast.masks(mnp_fast.wrap(fully_convolutional()))) == ["1"]


def test_untraceable_models_need_example_inputs():
    model = Dynamic()
    with pytest.raises(ValueError, match="example_inputs"):
        mnp_fast.wrap(model)
    x = torch.randn(2, 3, 8, 8)
    masked = mnp_fast.wrap(model, example_inputs=(x,))
    assert masked.training
    assert masked.get_submodule("bn").weight_owner == "conv"
    assert list(mnp_fast.masks(masked)) == ["bn"]
    assert relative_error(masked.eval()(x), model.eval()(x)) <= 1e-5


def test_state_dict_of_the_plain_model_loads():
    model, x = build("resnet")
    masked = mnp_fast.wrap(MODELS["resnet"]().double().eval())
    randomize_masks(masked)
    masks = {k: v.clone() for k, v in mnp_fast.masks(masked).items()}
    masked.load_state_dict(model.state_dict())
    assert all(torch.equal(v, masks[k]) for k, v in mnp_fast.masks(masked).items())
    for mask in mnp_fast.masks(masked).values():
        mask.data.fill_(1)
    assert relative_error(masked(x), model(x)) <= 1e-10


def test_own_state_dict_round_trip():
    model, x = build("resnet")
    masked = mnp_fast.wrap(model)
    randomize_masks(masked)
    other = mnp_fast.wrap(MODELS["resnet"]().double().eval())
    other.load_state_dict(masked.state_dict())
    assert torch.equal(other(x), masked(x))
    with pytest.raises(RuntimeError, match="size mismatch for bn1.mask"):
        other.load_state_dict({**masked.state_dict(), "bn1.mask": torch.ones(3)})


def test_copies_and_pickles():
    model, x = build("resnet", torch.float32)
    masked = mnp_fast.wrap(model)
    randomize_masks(masked)
    for other in (copy.deepcopy(masked), pickle.loads(pickle.dumps(masked))):
        assert torch.equal(other(x), masked(x))
        nn.init.ones_(other.bn1.mask)
        assert not torch.equal(other(x), masked(x))


def test_hooks_and_names_survive():
    model, x = build("resnet", torch.float32)
    calls = []
    model.bn1.register_forward_hook(lambda *_: calls.append("bn1"))
    masked = mnp_fast.wrap(model)
    assert dict(masked.named_modules()).keys() == dict(model.named_modules()).keys()
    masked(x)
    assert calls == ["bn1"]


def test_unwrapped_model_runs_without_mnp_fast(tmp_path):
    """In a process that cannot import the package."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    masked = mnp_fast.wrap(model)
    randomize_masks(masked)
    x = torch.randn(2, 3, 8, 8)
    buffer = io.BytesIO()
    torch.save((mnp_fast.unwrap(masked), x, masked(x).detach()), buffer)
    (tmp_path / "plain.pt").write_bytes(buffer.getvalue())
    code = (
        "import sys; sys.modules['mnp_fast'] = None; import torch;"
        f"m, x, y = torch.load({str(tmp_path / 'plain.pt')!r}, weights_only=False);"
        "assert torch.allclose(m(x), y, atol=1e-6); print('ran')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ran\n", done.stderr


def test_tied_weights_keep_their_values_when_one_is_folded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.fc(F.relu(self.b(F.relu(self.a(x)))))

    masked = mnp_fast.wrap(Tied())
    assert masked.a.weight is masked.b.weight
    randomize_masks(masked)
    x = torch.randn(3, 4)
    assert relative_error(mnp_fast.unwrap(masked)(x), masked(x)) <= 1e-6


def test_compiles_without_graph_breaks():
    model, x = build("resnet", torch.float32)
    masked = mnp_fast.wrap(model)
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    loss = compiled(x).square().sum()
    expected = masked(x).square().sum()
    masks = list(mnp_fast.masks(masked).values())
    for a, e in zip(
        torch.autograd.grad(loss, masks), torch.autograd.grad(expected, masks), strict=True
    ):
        assert relative_error(a, e) <= 1e-4


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not str"):
        mnp_fast.wrap("model")
    with pytest.raises(ValueError, match="site must be one of .* not 'weights'"):
        mnp_fast.wrap(MODELS["resnet"](), "weights")
    with pytest.raises(ValueError, match="wrapped already"):
        mnp_fast.wrap(mnp_fast.wrap(MODELS["resnet"]()))
    with pytest.raises(ValueError, match="nothing to mask"):
        mnp_fast.wrap(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    with pytest.raises(ValueError, match="nothing to mask at site 'norm'"):
        mnp_fast.wrap(NoNorm(), "norm")
    with pytest.raises(ValueError, match="has no masks"):
        mnp_fast.unwrap(NoNorm())


@pytest.mark.parametrize(
    ("masked", "plain", "arguments", "shape"),
    [
        (MaskedConv2d, nn.Conv2d, (3, 4, 3), (2, 3, 6, 6)),
        (MaskedConv2d, nn.Conv2d, (3, 4, 3), (3, 6, 6)),
        (MaskedLinear, nn.Linear, (5, 4), (5,)),
        (MaskedLinear, nn.Linear, (5, 4), (2, 3, 5)),
        (MaskedBatchNorm2d, nn.BatchNorm2d, (3,), (2, 3, 4, 4)),
    ],
)
def test_layers_are_drop_in(masked, plain, arguments, shape):
    theirs = plain(*arguments)
    for site in masked.sites:
        mine = masked(*arguments, site=site)
        mine.load_state_dict(theirs.state_dict())
        x = torch.randn(shape)
        assert relative_error(mine(x), copy.deepcopy(theirs)(x)) <= 1e-6
        assert f"site='{site}'" in repr(mine)
    with pytest.raises(ValueError, match="site of"):
        masked(*arguments, site="channel")
    with pytest.raises(TypeError, match="masks"):
        masked.adopt(nn.ReLU(), masked.sites[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_the_model_is_kept(layout):
    model, x = build("resnet", torch.float32)
    masked = mnp_fast.wrap(model).to(memory_format=layout)
    assert relative_error(masked(x.contiguous(memory_format=layout)), model(x)) <= 1e-5
    y = masked.bn1(masked.conv1(x.contiguous(memory_format=layout)))
    assert y.is_contiguous(memory_format=layout)


def test_algorithm_reaches_the_convolutions_that_allow_it():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2), nn.Conv2d(16, 8, 1),
        nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 3 * 3, 2),
    )  # fmt: skip
    masked = mnp_fast.wrap(model, algorithm="winograd4")
    chosen = ["winograd4", "winograd4", "auto", "winograd4"]
    assert [masked[i].algorithm for i in range(4)] == chosen
    exact = mnp_fast.wrap(model, algorithm="winograd2")
    assert [exact[i].algorithm for i in range(4)] == ["winograd2", "winograd2", "auto", "auto"]
    x = torch.randn(2, 3, 8, 8)
    assert relative_error(masked(x), model(x)) <= 1e-5
    assert [mnp_fast.wrap(model, algorithm="direct")[i].algorithm for i in range(3)] == [
        "direct"
    ] * 3
    assert mnp_fast.wrap(model)[0].algorithm == "auto"
    plain = mnp_fast.unwrap(masked)
    assert not hasattr(plain[0], "algorithm")
    assert relative_error(plain(x), masked(x)) <= 1e-5
    with pytest.raises(ValueError, match="algorithm must be one of"):
        mnp_fast.wrap(model, algorithm="fft")
