"""`compact` on attention: torch's own, with columns of 0 in its projection, is the reference."""

import copy
import itertools
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mnp_fast
from mnp_fast.attention import PrunedAttention

from .ops.cases import relative_error
from .test_compact import compacted, masked_with, size
from .test_coverage import non_contiguous, randomize, transformer

KEPT = torch.tensor([True, False, False, True])  # of four heads of width 3
ROWS = KEPT.repeat_interleave(3)
TOLERANCE = 1e-12
LAYOUTS = ["positions first", "batch first", "unbatched"]
WIDTHS = {"own": {"kdim": 5, "vdim": 7}, "same": {}}
MASKS = ["none", "bool", "bool of heads", "float of heads", "causal"]
PADDINGS = ["none", "bool", "float"]


def silence(attention):
    """Columns of 0 for the heads that `KEPT` does not have."""
    attention.out_proj.weight.data[:, ~ROWS] = 0
    return attention


def attention(**settings):
    return silence(randomize(nn.MultiheadAttention(12, 4, **settings)).eval())


def pruned(full):
    return PrunedAttention.adopt(copy.deepcopy(full), KEPT)


def mask_of(kind, samples):
    shape = (samples * 4, 5, 6) if kind.endswith("heads") else (5, 6)
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(shape, dtype=torch.bool).triu(1)
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False  # all see something
    return mask if kind.startswith("bool") else torch.randn(shape).double()


def padding_of(kind, layout):
    if kind == "none":
        return None
    padding = torch.zeros((6,) if layout == "unbatched" else (2, 6), dtype=torch.bool)
    padding[..., -1] = True
    return padding if kind == "bool" else -3 * padding.double()


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_torch_s_attention_with_columns_of_0(layout, widths, bias):
    full = attention(batch_first=layout == "batch first", bias=bias, **WIDTHS[widths])
    small = pruned(full)

    def sequence(length, width):
        shapes = [(length, 2, width), (2, length, width), (length, width)]
        return non_contiguous(*shapes[LAYOUTS.index(layout)]).requires_grad_()

    inputs = [sequence(5, 12), sequence(6, full.kdim), sequence(6, full.vdim)]
    for mask, padding, need in itertools.product(MASKS, PADDINGS, [True, False]):
        options = {
            "attn_mask": mask_of(mask, 1 if layout == "unbatched" else 2),
            "key_padding_mask": padding_of(padding, layout),
            "need_weights": need,
            "is_causal": mask == "causal",
        }
        expected, found = full(*inputs, **options)[0], small(*inputs, **options)
        assert found[1] is None
        assert found[0].shape == expected.shape
        assert relative_error(found[0], expected) <= TOLERANCE
        dy = torch.randn_like(expected)
        theirs = gradients(full, expected, inputs, dy)
        for name, gradient in gradients(small, found[0], inputs, dy).items():
            assert relative_error(gradient, of_kept(theirs[name], name)) <= TOLERANCE, name


def gradients(module, y, inputs, dy):
    tensors = {**dict(module.named_parameters()), **{str(i): x for i, x in enumerate(inputs)}}
    return dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))


def of_kept(gradient, name):
    """What is left of a gradient of torch's."""
    if name == "out_proj.weight":
        return gradient[:, ROWS]
    if name.startswith("in_proj"):
        return gradient[ROWS.repeat(3)]
    return gradient[ROWS] if name.endswith("proj_weight") else gradient


def test_self_attention_and_its_parameters():
    full = attention(batch_first=True)
    small, x = pruned(full), non_contiguous(2, 7, 12)
    assert relative_error(small(x, x, x)[0], full(x, x, x)[0]) <= TOLERANCE
    assert {name: tuple(p.shape) for name, p in small.named_parameters()} == {
        "in_proj_weight": (18, 12), "in_proj_bias": (18,),
        "out_proj.weight": (12, 6), "out_proj.bias": (12,),
    }  # fmt: skip
    assert (small.num_heads, small.kept_heads, small.out_proj.in_features) == (4, (0, 3), 6)


def test_dropout_in_train_mode_alone():
    small, x = pruned(attention(dropout=0.5)), non_contiguous(7, 2, 12)
    assert torch.equal(small(x, x, x)[0], small(x, x, x)[0])
    small.train()
    assert not torch.allclose(small(x, x, x)[0], small(x, x, x)[0])


def test_copies_pickles_and_states():
    small, x = pruned(attention()), non_contiguous(7, 2, 12)
    expected = small(x, x, x)[0]
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x, x, x)[0], expected)
        nn.init.zeros_(other.in_proj_weight)
        other.load_state_dict(small.state_dict())
        assert torch.equal(other(x, x, x)[0], expected)


def test_bad_input():
    small, x = pruned(attention()), non_contiguous(7, 2, 12)
    with pytest.raises(ValueError, match="needs an attn_mask"):
        small(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="sizes"):
        small(x, x, x, attn_mask=torch.zeros(4, 7, 7))  # of the kept heads only
    with pytest.raises(ValueError, match=r"key has shape \(7, 1, 12\)"):
        small(x, x[:, :1], x)
    with pytest.raises(ValueError, match=r"value has shape \(7, 12\)"):
        small(x, x, x[:, 0])


@pytest.mark.parametrize("site", ["auto", "neuron"])
@pytest.mark.parametrize("seed", range(4))
def test_random_heads(seed, site):
    torch.manual_seed(seed)
    model = transformer(nn.MultiheadAttention(12, 4, batch_first=True))
    masked = mnp_fast.wrap(model, site)
    gone = 0
    for name, mask in mnp_fast.masks(masked).items():
        if name.endswith("out_proj"):
            mask.data.copy_(torch.rand(4) * (torch.rand(4) < 0.5))
            gone += min(3, int((mask == 0).sum()))
    assert gone > 0
    x = non_contiguous(2, 7, 5)
    small = compacted(masked, x)
    assert size(model) - size(small) == gone * (3 * (3 * 12 + 3) + 3 * 12)
    again = compacted(mnp_fast.unwrap(masked), x)
    assert size(again) == size(small)
    rounded = compacted(masked.float(), x.float())
    assert size(rounded) == size(small)


def test_channels_around_attention_go_as_well():
    model = transformer(nn.MultiheadAttention(12, 4, batch_first=True))
    dead = {"0.1.fc1": range(0, 20, 2), "0.2.attention.out_proj": range(4)}
    small = compacted(masked_with(model, "neuron", dead), non_contiguous(2, 7, 5))
    assert small[0][1].fc1.out_features == 10
    assert type(small[0][1].attention) is nn.MultiheadAttention
    assert small[0][2].attention.kept_heads == (0,)  # one stays


class Reader(nn.Module):
    """A model that calls its attention as it is told."""

    def __init__(self, inner, read, **settings):
        super().__init__()
        self.inner, self.read = inner, read
        self.alias = self.inner
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(self.read(self, x))


def called(model, x):
    y, _ = model.inner(x, x, x)
    return y


def called_twice(model, x):
    y = x + model.inner(x, x, x)[0]
    return y + model.alias(y, x, x, need_weights=False)[0]


def untraceable(model, x):
    return called(model, x if x.sum() < 1e9 else -x)


def weights_read(model, x):
    y, weights = model.inner(x, x, x)
    return y + weights.mean()


def parameters_read(model, x):
    return called(model, x) + model.alias.in_proj_weight[:12, 0]


def projected_again(model, x):
    return called(model, model.inner.out_proj(x))


def not_called(model, x):
    return x


@pytest.mark.parametrize("read", [called, called_twice, untraceable])
def test_heads_go(read):
    model = randomize(Reader(attention(), read))
    small = compacted(model, non_contiguous(2, 7, 12))
    assert small.inner is small.alias
    assert small.inner.kept_heads == (0, 3)
    assert type(model.inner) is nn.MultiheadAttention


@pytest.mark.parametrize("read", [weights_read, parameters_read, projected_again, not_called])
def test_heads_stay_where_something_else_reads_what_would_go(read):
    model = randomize(Reader(attention(), read))
    small = compacted(model, non_contiguous(2, 7, 12))
    assert type(small.inner) is nn.MultiheadAttention


class Returning(nn.Module):
    """All that attention returns is the model's output."""

    def __init__(self, inner, need_weights):
        super().__init__()
        self.inner, self.need_weights = inner, need_weights

    def forward(self, x):
        return self.inner(x, x, x, need_weights=self.need_weights)


def test_weights_that_are_an_output_stay():
    x = non_contiguous(2, 7, 12)
    for need, kind in ((True, nn.MultiheadAttention), (False, PrunedAttention)):
        model = Returning(attention(), need)
        small = mnp_fast.compact(model, (x,))
        assert type(small.inner) is kind
        assert (small(x)[1] is None) == (model(x)[1] is None)


class Subclass(nn.MultiheadAttention):
    pass


def hooked():
    full = attention()
    full.register_forward_hook(lambda module, args, output: (output[0] + 1, None))
    return full


def with_its_own_forward():
    full, inner = attention(), attention()
    full.forward = lambda *inputs: inner(*inputs)
    return full


def projection_normed():
    full = nn.MultiheadAttention(12, 4)
    parametrizations.weight_norm(full.out_proj, dim=1)
    full.out_proj.parametrizations.weight.original0.data[:, ~ROWS] = 0
    return full


OTHERS = {
    "bias of keys": lambda: attention(add_bias_kv=True),
    "zeros": lambda: attention(add_zero_attn=True),
    "subclass": lambda: silence(Subclass(12, 4).double()),
    "parametrised": lambda: parametrizations.weight_norm(attention(), "in_proj_weight"),
    "parametrised projection": projection_normed,
    "hook": hooked,
    "forward": with_its_own_forward,
    "all heads": lambda: randomize(nn.MultiheadAttention(12, 4)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_attentions_stay_as_they_are(kind):
    model = Reader(OTHERS[kind](), called).double()
    small = compacted(model, non_contiguous(2, 7, 12))
    assert not isinstance(small.inner, PrunedAttention)
    assert size(small) == size(model)


class Padded(nn.Module):
    """Torch's encoder or decoder on sequences of several lengths."""

    def __init__(self, stack):
        super().__init__()
        self.stack, self.fc = stack, nn.Linear(12, 3)

    def forward(self, x, padding=None):
        if isinstance(self.stack, nn.TransformerEncoder):
            return self.fc(self.stack(x, src_key_padding_mask=padding))
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.fc(self.stack(x, 2 * x, tgt_mask=causal, memory_key_padding_mask=padding))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_stacks_of_torch(kind, grad):
    """Without gradients the encoder runs on nested tensors, past `forward` of its layers' parts."""
    settings = {"d_model": 12, "nhead": 4, "dim_feedforward": 20, "batch_first": True}
    if kind == "encoder":
        stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(**settings), 3)
    else:
        stack = nn.TransformerDecoder(nn.TransformerDecoderLayer(**settings), 3)
    model = randomize(Padded(stack)).eval()
    x, padding = non_contiguous(2, 7, 12), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    masked = mnp_fast.wrap(model, include="*out_proj", example_inputs=(x, padding))
    heads = mnp_fast.masks(masked)
    assert len(heads) == 3 * (1 if kind == "encoder" else 2)
    for name, mask in heads.items():
        mask.data[{"0": [1], "1": [0, 2], "2": []}[name.split(".")[2]]] = 0
    small = mnp_fast.compact(masked, (x, padding))
    assert size(model) - size(small) == len(heads) * (3 * (3 * 12 + 3) + 3 * 12)
    with torch.set_grad_enabled(grad):
        for given in ((x,), (x, padding)):
            assert relative_error(small(*given), masked(*given)) <= 1e-9


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_masked_layers_on_nested_tensors():
    settings = {"d_model": 12, "nhead": 4, "dim_feedforward": 20, "batch_first": True}
    model = randomize(Padded(nn.TransformerEncoder(nn.TransformerEncoderLayer(**settings), 2)))
    x, padding = non_contiguous(2, 7, 12), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    masked = mnp_fast.wrap(model.eval(), example_inputs=(x, padding))
    names = list(mnp_fast.masks(masked))
    assert "stack.layers.1.linear1" in names
    for mask in mnp_fast.masks(masked).values():
        mask.data.copy_(torch.linspace(0, 1, len(mask)))
    expected = mnp_fast.unwrap(masked)(x, padding)  # with gradients, torch nests nothing
    with torch.no_grad():
        assert relative_error(masked(x, padding)[~padding], expected[~padding]) <= 1e-9
        layer = masked.get_submodule("stack.layers.1.linear1")
        layer.mask = nn.Parameter(torch.ones(2, 20).to(x))
        nested = torch.nested.as_nested_tensor([x[0], x[1, :4]])
        with pytest.raises(RuntimeError, match="per sample are not possible for nested"):
            layer(nested)


def test_untraceable_models_without_silent_heads_are_refused():
    model = Reader(randomize(nn.MultiheadAttention(12, 4)), untraceable).double()
    with pytest.raises(ValueError, match="Reader cannot be traced symbolically"):
        mnp_fast.compact(model, (non_contiguous(2, 7, 12),))


def compact_transformer(dtype=torch.float64):
    model = transformer(nn.MultiheadAttention(12, 4, batch_first=True)).to(dtype)
    x = non_contiguous(2, 7, 5).to(dtype)
    masked = masked_with(model, "neuron", {f"0.{i}.attention.out_proj": [i] for i in (1, 2)})
    return compacted(masked, x), x


def test_compiles_and_exports():
    small, x = compact_transformer()
    expected = small(x)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), expected) <= TOLERANCE
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    for strict in (True, False):
        program = torch.export.export(small, (x,), dynamic_shapes=shapes, strict=strict)
        assert relative_error(program.module()(x[:1]), expected[:1]) <= TOLERANCE


def test_onnx(tmp_path):
    small, x = compact_transformer(torch.float32)
    path = str(tmp_path / "small.onnx")
    torch.onnx.export(small, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(found, small(x).detach().numpy(), rtol=0, atol=1e-5)


def test_can_be_wrapped_and_trained():
    """Heads of what is compact have no masks; the rest does."""
    small, x = compact_transformer()
    masked = mnp_fast.wrap(small)
    assert "0.1.fc1" in mnp_fast.masks(masked)
    assert not any("attention" in name for name in mnp_fast.masks(masked))
    assert relative_error(masked(x), small(x)) <= 1e-10
    small.train()(x).sum().backward()
    assert small[0][1].attention.in_proj_weight.grad is not None
