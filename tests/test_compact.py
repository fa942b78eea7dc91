import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mnp_fast
from mnp_fast.demo.resnet import ResNet18

from .models import MODELS, Dynamic, NormAct, TimmNormAct, randomize
from .test_coverage import transformer

SITES = ("auto", "neuron", "norm", "filter")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def sequence(*parts):
    """Layers and functions, in eval mode and float64."""
    modules = [part if isinstance(part, nn.Module) else Lambda(part) for part in parts]
    return randomize(nn.Sequential(*modules)).double().eval()


def head(channels):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)


def masked_with(model, site, dead, **options):
    """Wrapped, with masks of 0 where `dead` has indices by name of the layer."""
    masked = mnp_fast.wrap(model, site, **options)
    masks = mnp_fast.masks(masked)
    for name, indices in dead.items():
        masks[name].data[indices] = 0
    return masked


def compacted(masked, x=X, varies=True):
    """The compact model, after checking it on other inputs than those it was made with."""
    before = copy.deepcopy(masked.state_dict())
    small = mnp_fast.compact(masked, (x,))
    assert all(torch.equal(value, before[name]) for name, value in masked.state_dict().items())
    assert type(small) is type(masked)
    assert not any(type(m).__module__ == "mnp_fast.layers" for m in small.modules())
    new = torch.randn(5, *x.shape[1:], dtype=x.dtype)
    expected = copy.deepcopy(masked).eval()(new)
    limit = TOLERANCE[x.dtype] * expected.abs().max()
    assert (small(new) - expected).abs().max() <= limit
    assert not varies or expected.std(0).max() > 10 * limit
    return small


def widths(model):
    """Inputs and outputs of every convolution and linear layer."""
    return {
        name: tuple(module.weight.shape[:2])[::-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal(name, site, dtype):
    if (name, site) == ("no norm", "norm"):
        site = "auto"
    model = randomize(MODELS[name]()).to(dtype)
    masked = mnp_fast.wrap(model, site)
    for mask in mnp_fast.masks(masked).values():
        mask.data[1::2] = 0
        mask.data[2::4] = 0.5
    small = compacted(
        masked, torch.randn(2, 3, 16, 16, dtype=dtype), varies=name != "fully convolutional"
    )
    assert not small.training
    assert masked.training
    assert size(small) < size(model)


@pytest.mark.parametrize("site", ["neuron", "norm"])
def test_residual_streams(site):
    """Inner channels always go; those of a stream where all that are added are dead."""
    model = randomize(ResNet18(8)).double().eval()
    inner = {f"layers.{i}.{j}.bn1": range(0, 8 << i, 2) for i in range(4) for j in range(2)}
    streams = {"bn1": range(6)}
    for i in range(4):
        streams |= {f"layers.{i}.{j}.bn2": range(6) for j in range(2)}
        streams |= {f"layers.{i}.0.shortcut.1": range(6)} if i else {}
    small = compacted(masked_with(model, site, inner | streams))
    for i in range(4):
        found = small.layers[i][1].conv1.weight.shape
        if site == "neuron":
            assert found[:2] == ((8 << i) // 2, (8 << i) - 6)
        else:  # constants that meet padding: one of them stays, or one for each who reads them
            assert found[0] in ((8 << i) // 2, (8 << i) // 2 + 1)
            assert (8 << i) - 6 <= found[1] <= (8 << i) - 2
    del streams["layers.1.1.bn2"]
    kept = compacted(masked_with(model, "neuron", inner | streams))
    assert kept.layers[1][0].conv1.weight.shape[:2] == (8, 2)
    assert kept.layers[1][1].conv1.weight.shape[:2] == (8, 16)


class Views(nn.Module):
    """A VGG-like network whose features are flattened in one of several ways."""

    def __init__(self, flatten):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 4 * 4, 8)
        self.fc = nn.Linear(8, 3)
        self.flatten = flatten

    def forward(self, x):
        x = F.max_pool2d(torch.sigmoid(self.conv(x)), 2)
        return self.fc(F.relu(self.hidden(self.flatten(x)), inplace=True))


@pytest.mark.parametrize(
    ("flatten", "features"),
    [
        (nn.Flatten(), 4 * 16),
        (lambda x: x.flatten(1), 4 * 16),
        (lambda x: torch.flatten(x, start_dim=1), 4 * 16),
        (lambda x: x.view(x.size(0), -1), 4 * 16),
        (lambda x: x.reshape((x.shape[0], -1)), 4 * 16),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), 4 * 16),
        (lambda x: x.transpose(1, 3).flatten(1), 4 * 16),
        # Sizes that are written down, or read, cannot shrink.
        (lambda x: x.view(-1, 6 * 16), 6 * 16),
        (lambda x: x.view(x.size(0), 6, -1).flatten(1), 6 * 16),
        (lambda x: x.view(x.shape[0], x.shape[1] * 16), 6 * 16),
    ],
)
def test_flatten_into_linear(flatten, features):
    model = Views(flatten).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    # Sigmoid of 0 is a constant that the linear layer's bias takes.
    small = compacted(masked_with(model, "auto", {"conv": [0, 3], "hidden": [7]}), x)
    assert widths(small) == {"conv": (3, features // 16), "hidden": (features, 7), "fc": (7, 3)}


class Dense(nn.Module):
    """Concatenation, as in DenseNets: norms read channels of several layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 5, 3, padding=1)
        self.bn_all = nn.BatchNorm2d(9)
        self.c = nn.Conv2d(9, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        a = self.bn(self.a(x))
        x = torch.cat([a, self.b(a)], dim=1)
        x = torch.relu_(self.bn_all(x))
        return self.fc(self.c(x).mean([2, 3]))


def test_concatenation():
    model = randomize(Dense()).double().eval()
    small = compacted(masked_with(model, "neuron", {"bn_all": [1, 4, 5, 8], "c": [0]}))
    # Channel 1 of `a` is read by `b` too, and stays; 4, 5 and 8 are channels 0, 1 and 4 of `b`.
    assert widths(small) == {"a": (3, 4), "b": (4, 2), "c": (6, 5), "fc": (5, 3)}
    assert torch.equal(small.bn_all.running_var, model.bn_all.running_var[[0, 1, 2, 3, 6, 7]])
    small = compacted(masked_with(model, "neuron", {"bn_all": [1], "bn": [1]}))
    assert widths(small)["a"] == (3, 3)


def test_depthwise():
    """A dead channel of a depthwise convolution takes the channel with it that only it reads."""
    model = sequence(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), *head(5),
    )  # fmt: skip
    small = compacted(masked_with(model, "norm", {"4": [0, 1, 7], "7": [2]}))
    assert widths(small)["0"] == (3, 5)
    assert (small[3].groups, small[3].in_channels, small[3].out_channels) == (5, 5, 5)
    assert widths(small)["6"] == (5, 4)
    # A constant that is not 0 is none behind the border of the depthwise convolution.
    model[1].bias.data.copy_(torch.tensor([1.0, -1] * 4))
    small = compacted(masked_with(model, "norm", {"1": [0, 1, 2]}))
    assert small[3].groups == 7


def test_grouped_convolutions_keep_equal_groups():
    model = sequence(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 9, 3, groups=3), nn.ReLU(), *head(9)
    )
    small = compacted(masked_with(model, "neuron", {"0": [0, 1, 4, 5, 6, 8], "2": [0, 3, 4, 6]}))
    # Of 4 inputs a group 2, 3 and 1 are dead; of 3 neurons 1, 2 and 1.
    assert (small[2].groups, *small[2].weight.shape[:2]) == (3, 6, 3)
    small = compacted(masked_with(model, "neuron", {"0": range(4, 8), "2": range(3, 6)}))
    assert (small[2].groups, *small[2].weight.shape[:2]) == (2, 6, 4)
    small = compacted(masked_with(model, "neuron", {"2": range(3, 6)}))
    assert (small[0].out_channels, small[2].groups) == (8, 2)  # nobody reads the second group


def constants(reader, channels=6):
    """Four of six channels are constants: 1, -2, 0 and 3."""
    model = sequence(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), reader, nn.Tanh(), *head(channels))
    model[1].bias.data[:4] = torch.tensor([1.0, -2, 0, 3])
    return masked_with(model, "norm", {"1": range(4)})


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({"bias": False}, 2),
        ({"padding": "valid"}, 2),
        ({"padding": 1, "padding_mode": "circular"}, 2),
        ({"padding": "same", "padding_mode": "reflect"}, 2),
        ({"padding": 1, "stride": 2}, 3),
        ({"padding": "same", "bias": False}, 3),
        ({"padding": (0, 2)}, 3),
    ],
)
def test_constants_and_borders(options, inputs):
    """They go into the bias, or, where zeros are padded, into the weights of one that stays."""
    small = compacted(constants(nn.Conv2d(6, 6, 3, **options)))
    assert small[2].in_channels == inputs
    assert small[1].num_features == inputs
    folded_into_bias = inputs == 2
    assert (small[2].bias is None) == (options.get("bias") is False and not folded_into_bias)


def test_zeros_need_no_carrier():
    model = sequence(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), *head(6))
    assert widths(compacted(masked_with(model, "neuron", {"0": [1, 2]})))["2"] == (4, 6)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (nn.AvgPool2d(2), 2),
        (nn.AvgPool2d(3, 1, 1), 5),  # zeros are averaged in: only the constant 0 remains one
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), 2),
        (nn.MaxPool2d(3, 1, 1), 2),
        (nn.ZeroPad2d(1), 5),
        (nn.ReplicationPad2d(1), 2),
        (nn.Upsample(scale_factor=1.5, mode="bilinear"), 2),
        (lambda x: F.interpolate(x, scale_factor=2), 2),
        (lambda x: F.avg_pool2d(x, 3, 1, 1, divisor_override=2), 5),
        (lambda x: 1 - x / 2, 2),
        (lambda x: F.leaky_relu(x, 0.1), 2),
        (lambda x: F.dropout(x, 0.5, training=False), 2),
        (lambda x: x.clamp(min=-1).contiguous(), 2),
        (lambda x: x[:, :, None].flatten(2).unflatten(2, x.shape[2:]), 6),  # not known
        (nn.GroupNorm(2, 6), 6),
        (lambda x: torch.softmax(x, 1), 6),
        (lambda x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[0]], 1), 4),  # 0 and 3 alone can go
        (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), 5),  # 0 and 1, and one of the rest, stay
    ],
)
def test_functions_of_constants(function, inputs):
    conv = nn.Conv2d(6, 6, 1)
    model = constants(nn.Sequential(*(part for part in sequence(function, conv))))
    assert compacted(model)[2][1].in_channels == inputs


def test_carriers_are_exact_where_constants_differ_in_size():
    model = sequence(
        nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, padding=1), nn.Tanh(), *head(4)
    ).float()
    model[1].bias.data[:4] = torch.tensor([1e-20, 1e-3, 3.0, -1.0])
    small = compacted(masked_with(model, "norm", {"1": range(4)}), X.float())
    assert small[1].num_features == 2
    assert 3.0 in small[1].bias


class Gated(nn.Module):
    """Squeeze-and-excitation, and a gate of one channel for all."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Linear(6, 4)
        self.up = nn.Linear(4, 6)
        self.gate = nn.Conv2d(6, 1, 1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        y = F.relu(self.down(x.mean((2, 3))))
        x = x * torch.sigmoid(self.up(y))[:, :, None, None]
        x = self.gate(x).sigmoid() * x
        return self.fc(self.conv2(x).mean((-1, -2)))


def test_gates():
    small = compacted(masked_with(Gated().double(), "neuron", {"conv": [0, 5], "down": [1]}))
    assert widths(small) == {
        "conv": (3, 4), "down": (4, 3), "up": (3, 4), "gate": (4, 1), "conv2": (4, 4), "fc": (4, 3),
    }  # fmt: skip


def test_hidden_units_of_transformers():
    """They go; the stream, which norms read as a whole, stays as wide as it is."""
    model = transformer(nn.MultiheadAttention(12, 4, batch_first=True)).double()
    dead = {"0.1.fc1": range(0, 20, 2), "0.1.attention.out_proj": [1], "0.2.fc1": range(5)}
    masked = masked_with(model, "neuron", dead | {"0.2.fc2": range(3)})
    found = widths(compacted(masked, torch.randn(2, 7, 5, dtype=torch.float64)))
    assert {name: found[f"0.{name}"] for name in ("1.fc1", "1.fc2", "2.fc1", "2.fc2")} == {
        "1.fc1": (12, 10), "1.fc2": (10, 12), "2.fc1": (12, 15), "2.fc2": (15, 12),
    }  # fmt: skip


LAYERS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", LAYERS)
def test_transposed_convolutions_of_all_dimensions(dims, groups):
    """A constant that one of them reads becomes none, so that one stays and carries the others."""
    conv, transposed, norm, pool, average = LAYERS[dims]
    model = sequence(
        conv(3, 8, 3, padding=1), norm(8), nn.SiLU(),
        transposed(8, 6, 2, stride=2, groups=groups), norm(6), nn.ReLU(), pool(2),
        transposed(6, 4, 3, padding=1), nn.Tanh(), average(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    dead = {"1": [0, 1, 4, 5], "4": [0, 3], "7": [2]}
    x = torch.randn(2, 3, *(5, 4, 6)[:dims], dtype=torch.float64)
    # Zeros go; of a layer of two groups, one channel of each.
    small = compacted(masked_with(model, "neuron", dead), x)
    assert (small[0].out_channels, small[3].in_channels) == (4, 4)
    assert (small[3].out_channels, small[7].in_channels, small[7].out_channels) == (4, 4, 3)
    assert (small[3].groups, small[11].in_features) == (groups, 3)
    for place, bias in (("1", [1.0, -2, 0.5, 3]), ("4", [1.0, -2])):
        model.get_submodule(place).bias.data[dead[place]] = torch.tensor(bias).double()
    del dead["7"]
    small = compacted(masked_with(model, "norm", dead), x)
    assert (small[0].out_channels, small[3].in_channels) == (4 + groups, 4 + groups)
    assert (small[3].groups, small[7].in_channels) == (groups, 6 if groups == 2 else 5)


def test_layers_with_one_weight_are_cut_each_for_itself():
    model = sequence(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), *head(6),
    )  # fmt: skip
    model[5].weight = model[2].weight
    dead = {"1": range(4), "3": range(3)}
    small = compacted(masked_with(model, "norm", dead))
    assert (small[2].in_channels, small[5].in_channels) == (3, 4)


@pytest.mark.parametrize(
    ("norm", "act", "left"),
    [
        (TimmNormAct, nn.ReLU(inplace=True), 3),
        (TimmNormAct, nn.SiLU(), 3),
        (TimmNormAct, nn.PReLU(), 6),
        (NormAct, nn.ReLU(), 6),
    ],
)
def test_norms_with_an_activation(norm, act, left):
    model = sequence(
        nn.Conv2d(3, 6, 1), norm(6, act), nn.Conv2d(6, 5, 3, padding=1), nn.Tanh(), *head(5)
    )
    model[1].bias.data[:4] = torch.tensor([1.0, -2, 3, 4])
    model[1].running_mean[:4] = 0
    small = compacted(masked_with(model, "neuron", {"0": range(4)}))
    # Two vary, and one of the constants that are left carries the others past the border.
    assert (small[0].out_channels, small[1].num_features, small[2].in_channels) == (left,) * 3


class Parts(nn.Module):
    """Channels in two halves that gate each other, read by their places, or by their ends."""

    def __init__(self, cut):
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.cut = cut

    def forward(self, x):
        x = self.conv(x)
        a, b = self.cut(x)
        return self.fc(self.mix(a + torch.tanh(b)).mean((2, 3)))


def changed_between(x):
    parts = x.chunk(2, 1)
    x.add_(1)
    return parts


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        (lambda x: x.chunk(2, 1), 4),
        (lambda x: torch.chunk(x, chunks=2, dim=-3), 4),
        (lambda x: (x.chunk(2, 1)[-1], x.chunk(2, 1)[0]), 4),
        (lambda x: (x.chunk(2, 2)[0][:, :4], x.chunk(2, 2)[1][:, 4:]), 8),
        (lambda x: (x[:, :4], x[:, 4:]), 8),
        (lambda x: (x[:, 1:5], x[:, -4:]), 8),
        (lambda x: x.split(4, 1), 8),
        (changed_between, 8),
        (lambda x: (torch.stack(x.chunk(2, 1)).sum(0), x[:, 4:]), 8),
    ],
)
def test_halves(cut, left):
    """Channels 0 and 1 of both halves are dead."""
    model = Parts(cut).double()
    masked = masked_with(model, "neuron", {"conv": [0, 1, 4, 5]}, fuse=False).requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert widths(compacted(masked, x))["conv"] == (3, left)


class InPlace(nn.Module):
    """Values that are changed where they are, and read again by their old name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        a = self.a(x)
        old = a
        a.add_(1)
        a.add_(self.b(x))
        nn.functional.hardtanh(a, -2, 2, inplace=True)
        return self.fc((self.c(old) + self.d(a)).mean((2, 3)))


def test_in_place():
    model = InPlace().double()
    model.b.weight.data[1:] = 0
    small = compacted(masked_with(model, "neuron", {"a": [0, 1, 2]}, fuse=False))
    # Of a value that was overwritten no channel is known to be constant.
    assert widths(small) == widths(model)


@pytest.mark.parametrize("site", ["neuron", "norm", "filter"])
def test_layer_without_neurons_keeps_one(site):
    model = sequence(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(),
        nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), *head(5),
    )  # fmt: skip
    dead = "3" if site == "filter" else "4"
    small = compacted(masked_with(model, site, {dead: range(6)}), varies=False)
    # With weights of 0, as with masks on filters, the layer in front has nothing to say either.
    assert widths(small) == {
        "0": (3, 1 if site == "filter" else 4),
        "3": (1 if site == "filter" else 4, 1),
        "6": (1, 5),
        "10": (5, 3),
    }


def test_modules_called_twice_keep_their_channels():
    model = MODELS["shared"]().double().eval()
    masked = masked_with(model, "filter", {"conv1": [0], "conv2": [1], "conv3": [1], "twice": [2]})
    assert widths(compacted(masked)) == widths(model)


def test_weights_that_the_model_reads_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.mix = nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(F.conv2d(self.mix(self.conv(x)), self.mix.weight).mean((2, 3)))

    model = Tied().double()
    model.conv.weight.data[0] = 0
    model.conv.bias.data[0] = 0
    assert widths(compacted(model)) == widths(model)
    assert "mix" not in mnp_fast.masks(mnp_fast.wrap(model))


def test_plain_models():
    """Neurons whose weights are 0 are silent as well; without any, nothing changes."""
    model = sequence(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), *head(4))
    assert widths(compacted(model)) == widths(model)
    model[0].weight.data[1] = 0
    assert widths(compacted(model))["0"] == (3, 3)
    assert widths(compacted(mnp_fast.unwrap(mnp_fast.wrap(model))))["0"] == (3, 3)


def test_compact_models_can_be_wrapped_trained_and_loaded():
    model = randomize(ResNet18(8)).eval()
    model.conv1.weight.requires_grad_(False)
    masked = mnp_fast.wrap(model)
    for mask in mnp_fast.masks(masked).values():
        mask.data[::3] = 0
    small = compacted(masked, X.float())
    again = mnp_fast.compact(mnp_fast.wrap(small), (X.float(),))
    assert widths(again) == widths(small)
    again.load_state_dict(small.state_dict())
    assert not small.conv1.weight.requires_grad
    assert small.layers[0][0].conv1.weight.requires_grad
    small.train()(X.float()).sum().backward()


def test_hooks():
    model = sequence(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), *head(5))
    hooked = masked_with(model, "neuron", {"0": [1], "2": [1]})
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    assert widths(compacted(hooked))["2"] == (4, 4)  # what a hook makes of a layer is not known
    hidden = masked_with(nn.Sequential(model), "neuron", {"0.0": [1]})
    hidden[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert widths(compacted(hidden))["0.2"] == (3, 5)


def test_outputs_of_any_structure():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)
            self.fc = nn.Conv2d(4, 2, 1)

        def forward(self, x, y=None):
            x = torch.relu(self.body(x))
            y = self.fc(x)
            return {"features": [x], "class": y.argmax(1), "logits": y}

    masked = masked_with(Several().double(), "neuron", {"body": [1]})
    small = mnp_fast.compact(masked, (X,))
    assert widths(small) == widths(masked)  # the features are an output
    assert torch.allclose(small(X)["logits"], masked(X)["logits"], rtol=0, atol=1e-12)


def test_bad_input():
    masked = mnp_fast.wrap(ResNet18(8))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not str"):
        mnp_fast.compact("model", (X,))
    with pytest.raises(TypeError, match="example_inputs must be a tuple, not Tensor"):
        mnp_fast.compact(masked, X)
    with pytest.raises(ValueError, match="at least one sample"):
        mnp_fast.compact(masked, (X[:0],))
    dynamic = mnp_fast.wrap(Dynamic().double(), example_inputs=(X,))
    with pytest.raises(ValueError, match="Dynamic cannot be traced symbolically"):
        mnp_fast.compact(dynamic, (X,))
