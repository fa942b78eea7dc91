"""Wrapped models under torch's tools, and plain ones made of them outside of torch.

Copies, pickles, state dicts, memory formats and hooks on modules: `test_wrap.py`, `test_fusion.py`.
"""

import copy
import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import mnp_fast
from mnp_fast import ops
from mnp_fast.fusion import fused_blocks

from .models import randomize
from .ops.cases import relative_error

BATCH = ({0: torch.export.Dim.DYNAMIC},)
PLAIN = {
    "unwrap": mnp_fast.unwrap,
    "compact": lambda masked: mnp_fast.compact(masked, (images(dtype=masked.fc.weight.dtype),)),
}
fused_or_apart = pytest.mark.parametrize("fuse", [True, False])


class Net(nn.Module):
    """A residual block and a hidden linear layer; masked at all of them but the last layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn(self.conv(x)))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))


def wrapped(fuse=True, dtype=torch.float64):
    masked = mnp_fast.wrap(randomize(Net()).to(dtype).eval(), fuse=fuse)
    for mask in mnp_fast.masks(masked).values():
        nn.init.uniform_(mask, 0.2, 1)
        mask.data[1] = 0
    return masked


def images(count=2, dtype=torch.float64):
    return torch.randn(count, 3, 7, 5, dtype=dtype)


def masks_of(masked):
    return {f"{name}.mask": mask.detach() for name, mask in mnp_fast.masks(masked).items()}


def plain_loss(plain, masks, x):
    """The loss of `Net` whose weights are products with the masks; plain torch."""
    weights = dict(plain.named_parameters())
    folded = {
        f"{name}.{kind}": weights[f"{name}.{kind}"] * mask.reshape(-1, *(1,) * (dim - 1))
        for name, kinds in {
            "stem": {"weight": 4, "bias": 1},
            "bn": {"weight": 1},
            "hidden": {"weight": 2, "bias": 1},
        }.items()
        for kind, dim in kinds.items()
        for mask in [masks[f"{name}.mask"]]
    }
    return torch.func.functional_call(plain, folded, (x,)).square().sum()


def plain_net(masked):
    """The network of a wrapped one, without its masks."""
    plain = Net().to(masked.fc.weight.dtype).train(masked.training)
    plain.load_state_dict({k: v for k, v in masked.state_dict().items() if "mask" not in k})
    return plain


def assert_close(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        assert relative_error(actual[name], value) <= tolerance, name


def mask_gradients(masked, loss):
    parameters = mnp_fast.masks(masked)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(masks_of(masked), grads, strict=True))


def plain_gradients(masked, x):
    masks = {name: mask.clone().requires_grad_() for name, mask in masks_of(masked).items()}
    loss = plain_loss(plain_net(masked), masks, x)
    return dict(zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True))


@pytest.mark.parametrize(
    ("fuse", "training", "backend"),
    [(True, False, "inductor"), (False, False, "aot_eager"), (False, True, "aot_eager")],
)
def test_compiled_gradients(fuse, training, backend):
    masked, x = wrapped(fuse).train(training), images()
    expected = plain_gradients(masked, x)
    compiled = torch.compile(masked, fullgraph=True, backend=backend)
    assert_close(mask_gradients(masked, compiled(x).square().sum()), expected)


def test_compiled_transform():
    masked, x = wrapped(), images()

    def loss(masks):
        return torch.func.functional_call(masked, masks, (x,)).square().sum()

    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    assert_close(compiled(masks_of(masked)), plain_gradients(masked, x))


@pytest.mark.parametrize("strict", [True, False])
@fused_or_apart
def test_export_of_a_wrapped_model(fuse, strict):
    masked = wrapped(fuse)
    program = torch.export.export(masked, (images(),), dynamic_shapes=BATCH, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded, x = torch.export.load(file).module(), images(5)
    assert relative_error(loaded(x), masked(x)) <= 1e-10


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("plain_of", PLAIN)
def test_export_of_a_plain_model_has_torch_s_operators_alone(plain_of, strict):
    masked, x = wrapped(), images(5)
    plain = PLAIN[plain_of](masked)
    program = torch.export.export(plain, (images(),), dynamic_shapes=BATCH, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {target.split(".")[0] for target in targets} == {"aten"}
    assert relative_error(program.module()(x), masked(x)) <= 1e-10


@pytest.mark.parametrize("plain_of", PLAIN)
def test_onnx_of_a_plain_model(plain_of, tmp_path):
    masked, x = wrapped(dtype=torch.float32), images(5, torch.float32)
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        PLAIN[plain_of](masked), (images(dtype=torch.float32),), path,
        dynamo=True, dynamic_shapes=BATCH, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, masked(x).detach().numpy(), rtol=1e-4, atol=1e-6)


def dtypes_under_autocast(model, x):
    """Of what every module is given and gives."""
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, given, y, name=name: seen.append((name, given[0].dtype, y.dtype))
        )
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    return seen


def test_autocast_gives_each_layer_torch_s_dtype():
    masked, x = wrapped(dtype=torch.float32), images(dtype=torch.float32)
    expected = dtypes_under_autocast(mnp_fast.unwrap(masked), x)
    assert dtypes_under_autocast(masked, x) == expected
    assert ("bn", torch.bfloat16, torch.bfloat16) in expected


@fused_or_apart
def test_autocast_computes_what_it_says(fuse):
    masked, x = wrapped(fuse, torch.float32), images(dtype=torch.float32)
    expected = plain_gradients(masked, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked(x)
    assert y.dtype == torch.bfloat16
    assert 0 < relative_error(y, masked(x)) <= 0.02
    grads = mask_gradients(masked, y.float().square().sum())
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert_close(grads, expected, 0.05)


def test_autocast_of_the_operators():
    x, w, mask = images(), torch.randn(4, 3, 3, 3).double(), torch.rand(4)
    rows, matrix = torch.randn(2, 3), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.masked_conv2d(x, w, mask.double()).dtype == torch.float64
        y = ops.masked_conv2d(x.float(), w.float(), mask, residual=torch.ones(2, 4, 5, 3))
        z = ops.masked_linear(rows, matrix.bfloat16(), mask)
        assert ops.masked_affine(y, mask).dtype == torch.bfloat16
        assert ops.masked_affine(x.float(), mask[:3]).dtype == torch.float32
    args = [t.bfloat16() for t in (x, w)]
    expected = ops.masked_conv2d(*args, mask, residual=torch.ones(2, 4, 5, 3).bfloat16())
    assert torch.equal(y, expected)
    assert torch.equal(z, ops.masked_linear(rows.bfloat16(), matrix.bfloat16(), mask))


@fused_or_apart
def test_grad_and_jvp(fuse):
    masked, x = wrapped(fuse), images()
    masks = masks_of(masked)

    def loss(masks):
        return torch.func.functional_call(masked, masks, (x,)).square().sum()

    expected = plain_gradients(masked, x)
    assert_close(torch.func.grad(loss)(masks), expected)
    directions = {name: torch.randn_like(mask) for name, mask in masks.items()}
    _, slope = torch.func.jvp(loss, (masks,), (directions,))
    along = sum((expected[name] * direction).sum() for name, direction in directions.items())
    assert relative_error(slope, along) <= 1e-10


@fused_or_apart
def test_second_derivatives_by_transforms(fuse):
    masked, x = wrapped(fuse), images()
    plain, masks = plain_net(masked), masks_of(masked)

    def loss(masks):
        return torch.func.functional_call(masked, masks, (x,)).square().sum()

    actual = torch.func.hessian(loss)(masks)
    expected = torch.func.hessian(lambda masks: plain_loss(plain, masks, x))(masks)
    for name, row in expected.items():
        assert_close(actual[name], row)


@pytest.mark.parametrize("loss", [torch.Tensor.sum, lambda y: y.square().sum()])
@fused_or_apart
def test_second_derivatives_by_autograd_are_refused(fuse, loss):
    masked, x = wrapped(fuse).requires_grad_(False), images()
    mask = masked.stem.mask.requires_grad_(True)
    (once,) = torch.autograd.grad(loss(masked(x)), [mask])
    (first,) = torch.autograd.grad(loss(masked(x)), [mask], create_graph=True)
    assert torch.equal(first, once)
    with pytest.raises(NotImplementedError, match=r"a second time.*Inside.* torch\.func\.grad"):
        torch.autograd.grad(first.sum(), [mask])


@fused_or_apart
def test_vmap_over_models(fuse):
    models, x = [wrapped(fuse), wrapped(fuse)], images()
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def outputs(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    expected = torch.stack([model(x) for model in models])
    assert relative_error(torch.vmap(outputs)(parameters, buffers), expected) <= 1e-10


@fused_or_apart
def test_vmap_of_grad_gives_gradients_of_each_sample(fuse):
    masked, x = wrapped(fuse), images(3)

    def loss(masks, image):
        return torch.func.functional_call(masked, masks, (image[None],)).square().sum()

    actual = torch.vmap(torch.func.grad(loss), (None, 0))(masks_of(masked), x)
    rows = [plain_gradients(masked, image[None]) for image in x]
    assert_close(actual, {name: torch.stack([row[name] for row in rows]) for name in rows[0]})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_keep_their_dtype_in_transforms(dtype):
    x, mask, scale = images(dtype=dtype), torch.rand(2, 4), torch.rand(4)
    w, residual = torch.randn(4, 3, 3, 3).to(dtype), torch.randn(2, 4, 3, 3).to(dtype)
    if dtype == torch.float64:
        mask, scale = mask.double(), scale.double()
    options = {"residual": residual, "stride": 2, "padding": (0, 1), "activation": "relu"}

    def conv(x):
        return ops.masked_conv2d(x, w, mask, scale, **options)

    def affine(x):
        return ops.masked_affine(x, mask[:, :3], scale[:3], activation="relu")

    def linear(x):
        return ops.masked_linear(x, w[:, :, 0, 0], mask, scale)

    for function, given in ((conv, x), (affine, x), (linear, x.movedim(1, -1))):
        expected, ran = function(given), torch.vmap(function)(given[None])[0]
        assert ran.dtype == dtype
        assert relative_error(ran, expected) <= (1e-10 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("reentrant", [True, False])
@fused_or_apart
def test_gradient_checkpointing(fuse, reentrant):
    masked, x = wrapped(fuse), images()
    checkpoint(
        masked, x.clone().requires_grad_(), use_reentrant=reentrant
    ).square().sum().backward()
    grads = {f"{name}.mask": mask.grad for name, mask in mnp_fast.masks(masked).items()}
    assert_close(grads, plain_gradients(masked, x))


class Fit(nn.Module):
    """Masks fitted in the form that PyTorch Lightning asks for."""

    def __init__(self, masked):
        super().__init__()
        self.masked = masked

    def training_step(self, batch, _):
        x, labels = batch
        return F.cross_entropy(self.masked(x), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(mnp_fast.masks(self.masked).values(), lr=0.05)


def test_training_loop_in_the_form_of_lightning():
    masked = wrapped().requires_grad_(False)
    for mask in mnp_fast.masks(masked).values():
        mask.requires_grad_(True)
    weights = {k: v.clone() for k, v in masked.state_dict().items() if "mask" not in k}
    batches = [(images(6), torch.arange(6) % 3) for _ in range(2)]
    module = Fit(masked)
    optimizer = module.configure_optimizers()
    epochs = []
    for _ in range(8):
        module.train()
        masked.eval()  # statistics of the batch norms stay
        total = 0.0
        for index, batch in enumerate(batches):
            loss = module.training_step(batch, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        epochs.append(total)
    assert epochs == sorted(epochs, reverse=True)
    assert all(torch.equal(masked.state_dict()[name], value) for name, value in weights.items())
    restored = Fit(wrapped())
    restored.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert sum(restored.training_step(batch, 0).item() for batch in batches) < epochs[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@fused_or_apart
def test_to_another_dtype(fuse, dtype):
    masked, x = wrapped(fuse), images()
    expected = masked(x)
    assert masked.to(dtype) is masked
    assert {p.dtype for p in masked.parameters()} == {dtype}
    y = masked(x.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) <= (1e-5 if dtype == torch.float32 else 0.05)


@fused_or_apart
def test_to_another_device_and_memory_format(fuse):
    masked = wrapped(fuse).to(device="meta", memory_format=torch.channels_last)
    assert all(parameter.is_meta for parameter in masked.parameters())
    assert masked.conv.weight.is_contiguous(memory_format=torch.channels_last)
    y = masked(images().to("meta", memory_format=torch.channels_last))
    assert y.is_meta
    assert y.shape == (2, 3)


def test_hooks_of_all_modules_run():
    masked, seen = wrapped(), []
    assert fused_blocks(masked)
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        masked(images())
    finally:
        handle.remove()
    assert seen == [masked.stem, masked.conv, masked.bn, masked.hidden, masked.fc, masked]


@fused_or_apart
def test_backward_hooks_of_a_module_run(fuse):
    masked, x, seen = wrapped(fuse), images(), []
    masked.bn.register_full_backward_hook(lambda module, given, taken: seen.append((module, taken)))
    grads = mask_gradients(masked, masked(x).square().sum())
    ((module, (taken,)),) = seen
    assert module is masked.bn
    assert taken.shape == (2, 4, 7, 5)
    assert_close(grads, plain_gradients(masked, x))
