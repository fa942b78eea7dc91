"""Every kind of layer at every site, structures that sharing makes, and what is refused."""

import copy
import pickle
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import mnp_fast
from mnp_fast.fusion import fused_blocks
from mnp_fast.layers import (
    MaskedBatchNorm1d,
    MaskedBatchNorm3d,
    MaskedConv1d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedHeads,
    MaskedLinear,
    MaskedSyncBatchNorm,
    weight_rows,
)
from mnp_fast.stats import magnitudes
from mnp_fast.wrap import masked_layers

from .models import TimmNormAct
from .ops.cases import relative_error

TOLERANCE = 1e-10
WEIGHTED = {
    "conv1d": (MaskedConv1d, (6, 9, 3), {"stride": 2, "padding": 1, "groups": 3}, (2, 6, 11)),
    "conv1d circular": (
        MaskedConv1d, (3, 5, 3), {"padding": 1, "padding_mode": "circular", "bias": False},
        (2, 3, 7),
    ),
    "conv3d": (MaskedConv3d, (4, 6, (1, 3, 2)), {"padding": "same", "groups": 2}, (2, 4, 3, 5, 4)),
    "depthwise 3d": (MaskedConv3d, (4, 8, 2), {"groups": 4}, (2, 4, 3, 5, 4)),
    "transpose1d": (MaskedConvTranspose1d, (5, 3, 4), {"stride": 3}, (2, 5, 6)),
    "transpose2d": (
        MaskedConvTranspose2d, (6, 9, 3), {"groups": 3, "output_padding": 1, "stride": 2},
        (2, 6, 5, 4),
    ),
    "transpose2d bare": (
        MaskedConvTranspose2d, (4, 4, 3), {"groups": 4, "bias": False}, (2, 4, 5, 4),
    ),
    "transpose3d": (MaskedConvTranspose3d, (4, 6, 2), {"groups": 2}, (1, 4, 3, 2, 3)),
    "linear": (MaskedLinear, (5, 7), {}, (3, 4, 5)),
}  # fmt: skip
NORMS = {
    "batchnorm1d": (MaskedBatchNorm1d, (5,), {}, (4, 5)),
    "batchnorm1d, positions": (MaskedBatchNorm1d, (5,), {}, (4, 5, 3)),
    "batchnorm1d, bare": (MaskedBatchNorm1d, (5,), {"affine": False}, (4, 5, 3)),
    "batchnorm3d": (MaskedBatchNorm3d, (3,), {}, (2, 3, 4, 2, 5)),
    "batchnorm3d, no statistics": (
        MaskedBatchNorm3d, (3,), {"track_running_stats": False}, (2, 3, 4, 2, 5),
    ),
    "syncbatchnorm": (MaskedSyncBatchNorm, (3,), {}, (2, 3, 4, 5)),
}  # fmt: skip
KINDS = WEIGHTED | NORMS


def randomize(model):
    """Nothing 0 or 1 that a mask could hide behind."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return model.double()


def randomize_masks(masked):
    for mask in mnp_fast.masks(masked).values():
        nn.init.uniform_(mask)
        mask.data[::3] = 0


def non_contiguous(*shape):
    return torch.randn(*shape, 2, dtype=torch.float64)[..., 0]


def by_definition(layer, theirs, mask, x):
    """The table of `mnp_fast.layers` in plain torch."""
    y = theirs(x)
    axis = -1 if isinstance(theirs, nn.Linear) else 1
    kept = torch.zeros_like(mask)
    if layer.site != "neuron" and theirs.bias is not None:
        kept = theirs.bias.detach()
    return ((y.movedim(axis, -1) - kept) * mask + kept).movedim(-1, axis)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_torch_s_with_a_mask(kind, number, training):
    cls, arguments, options, shape = KINDS[kind]
    theirs = randomize(cls.plain(*arguments, **options)).train(training)
    layer = cls.adopt(copy.deepcopy(theirs), cls.sites[number])
    x = non_contiguous(*shape).requires_grad_()
    assert relative_error(layer(x), copy.deepcopy(theirs)(x)) <= TOLERANCE
    assert layer.neurons == len(layer.mask) == weight_rows_or_channels(layer)
    randomize_masks(layer)
    mask = layer.mask.detach().clone().requires_grad_()
    y, expected = layer(x), by_definition(layer, copy.deepcopy(theirs), mask, x)
    assert relative_error(y, expected) <= TOLERANCE
    direction = torch.randn_like(y)
    for mine, other in zip(
        torch.autograd.grad((y * direction).sum(), (layer.mask, x)),
        torch.autograd.grad((expected * direction).sum(), (mask, x)),
        strict=True,
    ):
        assert relative_error(mine, other) <= TOLERANCE
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
        plain = copied.release()
        assert type(plain) is cls.plain
        assert plain.__dict__.keys() == theirs.__dict__.keys()
        assert relative_error(plain(x), expected) <= TOLERANCE


def weight_rows_or_channels(layer):
    return len(layer.mask) if getattr(layer, "weight", None) is None else len(weight_rows(layer))


@pytest.mark.parametrize("kind", WEIGHTED)
def test_layers_take_inputs_without_a_batch_axis(kind):
    cls, arguments, options, shape = KINDS[kind]
    theirs = cls.plain(*arguments, **options).double()
    layer = cls.adopt(copy.deepcopy(theirs), "filter")
    x = non_contiguous(*shape)[0]
    assert relative_error(layer(x), theirs(x)) <= TOLERANCE


def test_output_size_of_transposed_convolutions():
    theirs = nn.ConvTranspose2d(3, 4, 3, stride=2).double()
    layer = MaskedConvTranspose2d.adopt(copy.deepcopy(theirs), "neuron")
    x = non_contiguous(2, 3, 4, 5)
    for inputs in (x, x[0]):
        y = layer(inputs, output_size=[10, 12])
        assert relative_error(y, theirs(inputs, output_size=[10, 12])) <= TOLERANCE


def test_a_row_of_weights_is_what_its_neuron_reads():
    """The norm of a neuron's row is 0 where, and only where, its output is the bias."""
    for kind, (cls, arguments, options, _) in WEIGHTED.items():
        layer = cls(*arguments, **options).double()
        folded = copy.deepcopy(layer)
        folded.mask.data[1] = 0
        rows = weight_rows(folded.release())
        assert rows[1].norm() == 0, kind
        kept = torch.arange(layer.neurons) != 1
        assert torch.equal(rows[kept], weight_rows(layer)[kept]), kind


ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign,
    nn.LogSigmoid, nn.Tanhshrink, nn.Identity,
]  # fmt: skip
FRONTS = {
    "batch norm": lambda: nn.BatchNorm2d(6),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "layer norm": lambda: nn.LayerNorm([6, 7, 5]),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "instance norm with statistics": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "local response norm": lambda: nn.LocalResponseNorm(3),
    "no norm": nn.Identity,
}


def network(norm, activation):
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), norm(), activation(),
            nn.Conv2d(6, 6, 3, groups=6), norm_after_depthwise(norm), activation(),
            nn.Flatten(), nn.Linear(6 * 5 * 3, 7), nn.BatchNorm1d(7), activation(), nn.Linear(7, 3),
        )
    ).eval()  # fmt: skip


def norm_after_depthwise(norm):
    made = norm()
    return nn.LayerNorm([6, 5, 3]) if isinstance(made, nn.LayerNorm) else made


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("site", ["auto", "neuron", "filter"])
@pytest.mark.parametrize("norm", FRONTS)
def test_every_norm(norm, site, fuse):
    check_model(network(FRONTS[norm], nn.SiLU), non_contiguous(4, 3, 7, 5), site, fuse)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, fuse):
    masked = check_model(
        network(FRONTS["batch norm"], activation), non_contiguous(4, 3, 7, 5), "auto", fuse
    )
    assert list(mnp_fast.masks(masked)) == ["1", "4", "8"]


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid])
def test_activations_take_images_as_they_are(activation):
    """A block's images are channels-last, and are copied only for what may ask for other ones."""
    seen = []

    def spy(self, x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return activation.forward(self, x)

    layer = activation()
    layer.forward = partial(spy, layer)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), layer, nn.AvgPool2d(2), nn.Conv2d(6, 4, 3))
    masked = mnp_fast.wrap(model.eval())
    masked(torch.randn(2, 3, 9, 9))
    assert seen == [True]


def check_model(model, x, site="auto", fuse=True, **options):
    """Equal while masks are 1; gradients those of folded weights; unwrapped exactly."""
    masked = mnp_fast.wrap(model, site, fuse=fuse, **options)
    assert relative_error(masked(x), model(x)) <= TOLERANCE
    randomize_masks(masked)
    y = masked(x)
    assert relative_error(y, model(x)) > 1e-6
    direction = torch.randn_like(y)
    plain = mnp_fast.unwrap(masked)
    assert not masked_layers(plain)
    assert {type(m) for m in plain.modules()} == {type(m) for m in model.modules()}
    assert relative_error(plain(x), y) <= TOLERANCE
    with torch.no_grad():
        assert relative_error(plain(x), masked(x)) <= TOLERANCE
    masks = list(mnp_fast.masks(masked).values())
    for mask in masks:
        mask.data.clamp_(min=0.1)  # at 0 are the kinks of activations
    gradients = torch.cat(torch.autograd.grad((masked(x) * direction).sum(), masks))
    step = torch.randn_like(gradients)
    values = copy.deepcopy([m.data for m in masks])

    def unwrapped_at(t):
        """The folded model a little off, for a derivative by differences."""
        parts = step.split([len(m) for m in masks])
        for mask, value, part in zip(masks, values, parts, strict=True):
            mask.data = value + t * part
        with torch.no_grad():
            return (mnp_fast.unwrap(masked)(x) * direction).sum()

    h = 1e-5
    slope = (unwrapped_at(h) - unwrapped_at(-h)) / (2 * h)
    assert abs(slope - gradients @ step) <= 1e-6 * (gradients.norm() * step.norm())
    unwrapped_at(0)
    return masked


class Volume(nn.Module):
    """Down and up again, in three dimensions."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(2, 4, 3, stride=2)
        self.norm = nn.BatchNorm3d(4)
        self.up = nn.ConvTranspose3d(4, 6, 3, stride=2, groups=2)
        self.sync = nn.SyncBatchNorm(6)
        self.tokens = nn.Conv1d(6, 5, 2)
        self.bn = nn.BatchNorm1d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.elu(self.sync(self.up(F.gelu(self.norm(self.down(x))))))
        return self.fc(torch.tanh(self.bn(self.tokens(x.flatten(2)))).mean(2))


@pytest.mark.parametrize("site", ["auto", "neuron", "norm", "filter"])
def test_other_dimensions(site):
    model, x = randomize(Volume()).eval(), non_contiguous(2, 2, 5, 5, 5)
    masked = check_model(model, x, site)
    layers = masked_layers(masked)
    if site == "filter":
        assert list(layers) == ["down", "up", "tokens"]
    else:
        owners = {name: layer.weight_owner for name, layer in layers.items()}
        assert owners == {"norm": "down", "sync": "up", "bn": "tokens"}
        rows = weight_rows(model.up).flatten(1).abs().sum(1)
        torch.testing.assert_close(magnitudes(masked)["sync"], rows)


def test_synchronised_norms_are_fused():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    masked = check_model(randomize(model).eval(), non_contiguous(2, 3, 7, 6))
    assert fused_blocks(masked) == [("0", "1")]


class Block(nn.Module):
    """A transformer's block as most of them write it."""

    def __init__(self, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = attention
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        y = self.norm1(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            y = self.attention(y, y, y, need_weights=False)[0]
        else:
            y = self.attention(y)
        x = x + y
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class WrittenOut(nn.Module):
    """Attention with linear layers, called or not."""

    def __init__(self, called):
        super().__init__()
        self.called = called
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        if self.called:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            y = F.linear(x, self.qkv.weight, self.qkv.bias)
            q, k, v = y.unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


def transformer(attention):
    body = nn.Sequential(nn.Linear(5, 12), Block(attention), Block(copy.deepcopy(attention)))
    return randomize(nn.Sequential(body, nn.Linear(12, 3))).eval()


@pytest.mark.parametrize("dimensions", ["batch", "none"])
def test_heads_of_attention(dimensions):
    model = transformer(nn.MultiheadAttention(12, 4, batch_first=True))
    x = non_contiguous(*((2, 7, 5) if dimensions == "batch" else (7, 5)))
    masked = check_model(model, x)
    layers = masked_layers(masked)
    heads = layers["0.1.attention.out_proj"]
    assert isinstance(heads, MaskedHeads)
    assert heads.mask.shape == (4,)
    assert list(layers)[:3] == ["0.0", "0.1.attention.out_proj", "0.1.fc1"]
    assert "1" not in layers
    sizes = magnitudes(masked)
    by_hand = model[0][1].attention.out_proj.weight.abs().sum(0).reshape(4, 3).sum(1)
    torch.testing.assert_close(sizes["0.1.attention.out_proj"], by_hand)


@pytest.mark.parametrize("training", [False, True])
def test_a_head_s_mask_multiplies_its_output(training):
    attention = randomize(nn.MultiheadAttention(6, 3, kdim=4, vdim=5, add_zero_attn=True))
    attention.train(training)
    q, k, v = non_contiguous(4, 2, 6), non_contiguous(7, 2, 4), non_contiguous(7, 2, 5)
    masked = copy.deepcopy(attention)
    heads = MaskedHeads.adopt(masked, "neuron")
    nn.init.constant_(heads.mask, 0)
    heads.mask.data[1] = 0.5
    reader = copy.deepcopy(attention)  # its output is what the heads make
    reader.out_proj.weight.data = torch.eye(6, dtype=torch.float64)
    reader.out_proj.bias.data.zero_()
    made = reader(q, k, v)[0].unflatten(-1, (3, 2)) * torch.tensor([[0.0], [0.5], [0.0]])
    expected = F.linear(made.flatten(-2), attention.out_proj.weight, attention.out_proj.bias)
    with torch.no_grad():
        assert relative_error(masked(q, k, v)[0], expected) <= TOLERANCE
    assert relative_error(masked(q, k, v)[0], expected) <= TOLERANCE
    with pytest.raises(RuntimeError, match=r"mask of heads must have shape \(3,\), not \(2, 3\)"):
        torch.func.functional_call(masked, {"out_proj.mask": torch.ones(2, 3).double()}, (q, k, v))
    with pytest.raises(TypeError, match="masks MultiheadAttention, not Linear"):
        MaskedHeads.adopt(nn.Linear(2, 2), "neuron")


def test_attention_written_out():
    masked = check_model(transformer(WrittenOut(True)), non_contiguous(2, 7, 5))
    assert {"0.1.attention.qkv", "0.1.attention.proj"} <= mnp_fast.masks(masked).keys()


@pytest.mark.parametrize("traced", [True, False])
def test_weights_that_are_read_without_a_call_get_no_mask(traced):
    model, x = transformer(WrittenOut(False)), non_contiguous(2, 7, 5)
    model = model if traced else randomize(Untraceable(model)).eval()
    masked = check_model(model, x, example_inputs=(x,))
    names = [name.removeprefix("inner.") for name in mnp_fast.masks(masked)]
    assert names[:4] == ["0.0", "0.1.attention.proj", "0.1.fc1", "0.1.fc2"]


class Untraceable(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x if x.sum() < 1e9 else -x)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torch_s_encoder_layers_do_not_go_past_the_masks(activation):
    """In eval mode without gradients they read the weights of their layers themselves."""
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(12, 4, 20, activation=activation, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    model = randomize(nn.Sequential(encoder, nn.Linear(12, 3))).eval()
    x = non_contiguous(2, 7, 12)
    with pytest.raises(ValueError, match="example_inputs"):
        mnp_fast.wrap(model)
    masked = check_model(model, x, example_inputs=(x,))
    names = ["self_attn.out_proj", "linear1", "linear2"]
    assert list(mnp_fast.masks(masked)) == [f"0.layers.{i}.{n}" for i in range(2) for n in names]
    plain = mnp_fast.unwrap(masked)
    assert [m.activation_relu_or_gelu for m in plain[0].layers] == [
        m.activation_relu_or_gelu for m in model[0].layers
    ]


@pytest.mark.parametrize("kind", ["volume", "heads"])
def test_compiles_without_graph_breaks(kind):
    if kind == "volume":
        model, x = randomize(Volume()).eval(), non_contiguous(2, 2, 5, 5, 5)
    else:
        attention = nn.MultiheadAttention(12, 4, batch_first=True)
        model, x = transformer(attention), non_contiguous(2, 7, 5)
    masked = mnp_fast.wrap(model)
    randomize_masks(masked)
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    masks = list(mnp_fast.masks(masked).values())
    for y in zip(
        torch.autograd.grad(compiled(x).square().sum(), masks),
        torch.autograd.grad(masked(x).square().sum(), masks),
        strict=True,
    ):
        assert relative_error(*y) <= TOLERANCE


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Twice(nn.Module):
    """A block called twice, weights of one layer in another, one used by hand as well."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.alias = self.block
        self.tied, self.by_hand, self.unused = (nn.Linear(6, 6) for _ in range(3))
        self.tied.weight = self.stem.weight
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x.to(self.stem.weight.dtype)))  # what a dtype says is harmless
        x = self.alias(self.block(x))
        x = torch.tanh(self.tied(x)) + self.by_hand(x)
        return self.fc(F.linear(x, self.by_hand.weight.t()))


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("site", ["auto", "neuron", "filter"])
def test_shared_layers_and_weights(site, traced):
    model, x = Twice(), non_contiguous(4, 6)
    model = randomize(model if traced else Untraceable(model)).eval()
    masked = check_model(model, x, site, example_inputs=(x,))
    names = [name.removeprefix("inner.") for name in mnp_fast.masks(masked)]
    norms = {"filter": ["block.0"], "auto": ["block.1"], "neuron": ["block.1"]}[site]
    assert names == ["stem", *norms, "tied"]


def test_a_norm_behind_what_changed_in_place_is_not_paired():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.bn(self.a(x).relu_()))

    x = non_contiguous(3, 4)
    for model in (InPlace(), Untraceable(InPlace())):
        masked = mnp_fast.wrap(randomize(model).eval(), example_inputs=(x,))
        assert [name[-2:].strip(".") for name in mnp_fast.masks(masked)] == ["a", "bn"]
        assert not any(layer.weight_owner for layer in masked_layers(masked).values())


def test_a_norm_on_another_axis_than_the_neurons_is_not_paired():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(4, 2))
    x = non_contiguous(3, 7, 5)
    for network in (randomize(model).eval(), Untraceable(model).eval()):
        masked = check_model(network, x, example_inputs=(x,))
        assert len(mnp_fast.masks(masked)) == 2
        assert {len(size) for size in magnitudes(masked).values()} == {4, 7}


def test_two_outputs_of_an_untraceable_model():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.first, self.norm = nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(2)
            self.second = nn.Linear(4, 2)

        def forward(self, x):
            y = torch.empty(2, *x.shape[:-1], 2, dtype=x.dtype)
            x = self.body(x).tanh()
            y[0] = self.norm(self.first(x))
            y[1] = self.second(x)
            return {"both": y}

    model = randomize(Untraceable(Heads())).eval()
    masked = mnp_fast.wrap(model, example_inputs=(non_contiguous(3, 4),))
    assert list(mnp_fast.masks(masked)) == ["inner.body"]


def test_include_and_exclude():
    def chosen(**options):
        return list(mnp_fast.masks(mnp_fast.wrap(model, **options)))

    model = network(FRONTS["batch norm"], nn.ReLU)
    assert chosen(include="[14]") == ["1", "4"]
    assert chosen(include=["8", "1"]) == ["1", "8"]
    assert chosen(exclude="8", include="*") == ["1", "4"]
    assert chosen(include=lambda name, layer: type(layer) is nn.BatchNorm1d) == ["8"]
    assert chosen(exclude=lambda name, layer: name == "4") == ["1", "8"]
    assert chosen(exclude=("1", "4"), site="neuron") == ["8"]
    check_model(model, non_contiguous(4, 3, 7, 5), include="4")
    for option in ("include", "exclude"):
        with pytest.raises(
            ValueError, match=f"{option}: no layer .* matches 'conv'; they are 1, 4"
        ):
            chosen(**{option: ["1", "conv"]})
        with pytest.raises(TypeError, match=f"{option} must be a pattern, .* not 3"):
            chosen(**{option: 3})
    with pytest.raises(ValueError, match="has nothing to mask"):
        chosen(exclude="*")
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    with pytest.raises(ValueError, match=r"they are 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$"):
        mnp_fast.wrap(many, include="x")


def test_what_cannot_be_masked_is_named():
    def model(layer):
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2))

    def refuses(layer, reason):
        with pytest.raises(ValueError, match=reason) as caught:
            mnp_fast.wrap(model(layer))
        return str(caught.value)

    refuses(nn.LazyLinear(4), r"2 \(LazyLinear\) has no weights yet: run the model")
    ran = model(nn.LazyLinear(4))
    ran(torch.randn(1, 4))
    assert list(mnp_fast.masks(mnp_fast.wrap(ran))) == ["0", "2"]
    computed = r"2 \(Linear\) computes its 'weight' before each call"
    refuses(nn.utils.weight_norm(nn.Linear(4, 4)), computed)
    pruned = nn.Linear(4, 4)
    prune.random_unstructured(pruned, "weight", 2)
    refuses(pruned, computed)
    refuses(nn.utils.spectral_norm(nn.Linear(4, 4)), r"2 \(Linear\) has a weight that is no param")
    for function in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ):
        layer = function(nn.Linear(4, 4))
        assert "exclude='2'" in refuses(layer, r"2 \(ParametrizedLinear\) is parametrised")
    apart = mnp_fast.wrap(model(layer), exclude="2")
    assert list(mnp_fast.masks(apart)) == ["0"]
    x = torch.randn(3, 4)
    assert relative_error(mnp_fast.unwrap(apart.eval())(x), apart(x)) <= 1e-6
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    refuses(patched, r"2 \(Linear\) has a forward of its own")
    integers = nn.Linear(4, 4)
    integers.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    refuses(integers, r"2 \(Linear\) has weights of kind Tensor of torch.int8")
    quantized = torch.ao.nn.quantized.Linear(4, 4)
    assert "exclude='2'" in refuses(quantized, r"2 \(Linear\) is quantised")
    assert list(mnp_fast.masks(mnp_fast.wrap(model(quantized), exclude="2"))) == ["0"]
    prepared = model(nn.Sequential(torch.ao.quantization.QuantStub(), nn.Linear(4, 4)))
    assert list(mnp_fast.masks(mnp_fast.wrap(prepared))) == ["0", "2.1"]


def test_a_recurrent_layer_follows_others():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.LSTM(36, 8))
    assert list(mnp_fast.masks(mnp_fast.wrap(model))) == ["0"]


def test_subclasses_stay_as_they_are():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Shifted(nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(
        nn.Linear(4, 5), Shifted(5), nn.Tanh(), Doubled(5, 5), nn.Tanh(), nn.Linear(5, 2)
    )
    masked = check_model(randomize(model).eval(), non_contiguous(3, 4))
    assert list(mnp_fast.masks(masked)) == ["0"]  # in front of the norm, which has none
    with pytest.raises(ValueError, match="its layers are: 1 Shifted, 1 Doubled, 1 Linear"):
        mnp_fast.wrap(model[1:])


def test_timm_s_norms_with_an_activation_have_masks_at_site_norm(monkeypatch):
    package = types.ModuleType("timm.layers.norm_act")
    package.BatchNormAct2d = TimmNormAct
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.layers", types.ModuleType("timm.layers"))
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", package)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), TimmNormAct(6, nn.SiLU()), nn.Conv2d(6, 4, 3),
        TimmNormAct(4, nn.ReLU(inplace=True)), nn.Flatten(), nn.Linear(4 * 3 * 2, 3),
    )  # fmt: skip
    x = non_contiguous(2, 3, 7, 6)
    masked = check_model(randomize(model).eval(), x, site="norm")
    assert list(mnp_fast.masks(masked)) == ["1", "3"]
    assert list(mnp_fast.masks(mnp_fast.wrap(model))) == ["0", "2"]
    copied = pickle.loads(pickle.dumps(masked))
    assert type(copied[1]) is type(masked[1])
    assert torch.equal(copied(x), masked(x))
    masked.train()
    plain = mnp_fast.unwrap(masked)
    assert type(plain[1]) is TimmNormAct
    assert relative_error(plain(x), masked(x)) <= 1e-6


def test_layers_that_run_in_train_mode_alone_get_no_mask():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.hidden = nn.Linear(4, 5), nn.Linear(5, 5)
            self.extra, self.fc = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            x = self.body(x).tanh()
            if self.training:
                return self.fc(x) + self.extra(self.hidden(x).tanh())
            return self.fc(x)

    masked = mnp_fast.wrap(Auxiliary())
    assert masked.training
    assert list(mnp_fast.masks(masked)) == ["body"]
