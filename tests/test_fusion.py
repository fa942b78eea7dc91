import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mnp_fast
from mnp_fast.fusion import fused_blocks, run_region

from .models import MODELS, Dynamic, PreActivation, bare_norms, randomize, resnet
from .ops.cases import relative_error


def build(model, dtype=torch.float64, **options):
    """The model wrapped with and without fusion, with equal random masks, some of them 0."""
    model = randomize(model).to(dtype).eval()
    fused = mnp_fast.wrap(model, **options)
    apart = mnp_fast.wrap(model, fuse=False, **options)
    for mine, other in zip(*map(parameters, (fused, apart)), strict=True):
        nn.init.uniform_(mine)
        mine.data[::3] = 0
        other.data.copy_(mine)
    return fused, apart


def parameters(masked):
    return list(mnp_fast.masks(masked).values())


def outputs_and_gradients(masked, x):
    x = x.clone().requires_grad_(True)
    wanted = [x, *(p for p in masked.parameters() if p.requires_grad)]
    y = masked(x)
    torch.manual_seed(3)
    seed = torch.randn(y.shape, dtype=y.dtype)  # whatever the memory format of y
    return [y, *torch.autograd.grad(y, wanted, seed, allow_unused=True, materialize_grads=True)]


def assert_equal(fused, apart, x, tolerance=1e-10):
    pairs = zip(*(outputs_and_gradients(m, x) for m in (fused, apart)), strict=True)
    for mine, other in pairs:
        assert mine.shape == other.shape
        assert (mine - other).norm() <= tolerance * (1 + other.norm())


def inputs(dtype=torch.float64):
    return torch.randn(4, 3, 16, 16, dtype=dtype)


@pytest.mark.parametrize("site", ["auto", "neuron", "norm", "filter"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "no norm"])
def test_equal_to_the_layers_apart(name, site):
    fused, apart = build(MODELS[name](), site=site)
    assert fused_blocks(fused)
    assert fused_blocks(apart) == []
    assert list(fused.state_dict()) == list(apart.state_dict())
    assert_equal(fused, apart, inputs())


@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd4"])
def test_float32_of_a_whole_network(algorithm):
    fused, apart = build(resnet(), torch.float32, algorithm=algorithm)
    x = inputs(torch.float32)
    exact = copy.deepcopy(apart).double()(x.double())
    assert relative_error(fused(x).double(), exact) <= 1e-5


def functions_left(masked):
    graph = vars(masked)["forward"]._current(list(masked.modules())).graph
    return [node.target for node in graph.nodes if node.op not in ("placeholder", "get_attr")]


def test_a_residual_block_is_two_operators():
    masked = mnp_fast.wrap(resnet().eval())
    assert len(fused_blocks(masked)) == 20
    assert fused_blocks(masked)[:2] == [("conv1", "bn1"), ("layers.0.0.conv1", "layers.0.0.bn1")]
    left = functions_left(masked)
    assert left.count(run_region) == 1
    assert set(left) & {"add", F.relu, torch.relu, "relu"} == set()


def test_pre_activation_blocks():
    masked = mnp_fast.wrap(PreActivation().eval())
    assert fused_blocks(masked) == [("stem",), ("bn1",), ("conv1", "bn2"), ("conv2",)]


class Dropped(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Odd(nn.Module):
    """What must not be fused, or only in part."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.kind == "read twice":
            y = F.relu(y) + y
        elif self.kind == "broadcast residual":
            y = F.relu(y + self.scale)
        elif self.kind == "residual of another size":
            y = F.relu(y + y.mean((2, 3), keepdim=True))
        elif self.kind == "number":
            y = F.relu(y + 1)
        elif self.kind == "size":
            y = F.relu(y + x.shape[0])
        elif self.kind == "scaled residual":
            y = F.relu(torch.add(y, self.conv(x), alpha=0.5))
        elif self.kind == "itself":
            y = F.relu(y + y)
        elif self.kind == "view":
            y = F.relu(y)
            y = y.view(y.size(0), 4, -1)[..., None]
        elif self.kind == "view of a pool":
            y = F.max_pool2d(F.relu(y), 2)
            y = y.view(y.shape[0], 4, -1, 1)
        elif self.kind == "indices":
            y, where = self.pool(y)
            y = y + where
        elif self.kind == "left residual":
            y = F.relu(self.scale * self.conv(x) + y)
        return self.fc(y.mean((2, 3)))


KINDS = [
    "read twice", "broadcast residual", "residual of another size", "number",
    "size", "scaled residual", "itself", "view", "view of a pool", "indices", "left residual",
]  # fmt: skip


@pytest.mark.parametrize("site", ["norm", "neuron", "filter"])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_structures(kind, site):
    fused, apart = build(Odd(kind), site=site)
    assert fused_blocks(fused)
    assert_equal(fused, apart, inputs())


def test_padding_by_name_and_mode():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 4, padding="same"),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect", groups=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16 * 16, 3),
    )
    fused, apart = build(model)
    assert fused_blocks(fused) == [("0", "1"), ("3",)]
    assert_equal(fused, apart, inputs())


def test_norms_without_statistics_stay_apart():
    fused, apart = build(bare_norms())
    assert fused_blocks(fused) == [("0", "1")]
    assert_equal(fused, apart, inputs())


def test_train_mode_is_the_model_s_own():
    fused, apart = build(resnet())
    x = inputs()
    for masked in (fused, apart):
        masked.train()
    assert_equal(fused, apart, x)
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name])
    for masked in (fused, apart):
        masked.eval()
        masked.bn1.train()  # one module is enough
    assert_equal(fused, apart, x)
    for masked in (fused, apart):
        torch.testing.assert_close(masked.bn1.running_mean, apart.bn1.running_mean)


def test_a_trace_is_made_in_eval_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Dropped(), nn.Conv2d(4, 2, 3))
    fused, apart = build(model)
    copied = copy.deepcopy(fused.train())
    assert fused_blocks(copied) == [("0", "1")]
    assert copied.training
    assert_equal(copied.eval(), apart, inputs())


def test_hooks_on_modules_run():
    fused, _ = build(resnet())
    expected, seen = fused(inputs()), []
    del expected
    for module in (fused.bn1, fused.layers[0]):
        handle = module.register_forward_hook(lambda module, *_: seen.append(module))
        fused(inputs())
        assert seen == [module]
        seen.clear()
        handle.remove()
        fused(inputs())
        assert seen == []
    fused.register_forward_hook(lambda *_: seen.append("root"))
    fused(inputs())
    assert seen == ["root"]


def through_torch_save(masked):
    file = io.BytesIO()
    torch.save(masked, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save]
)
def test_copies_are_fused_and_their_own(copied):
    fused, _ = build(resnet())
    x = inputs()
    before = fused(x)
    other = copied(fused)
    assert torch.equal(other(x), before)
    assert fused_blocks(other) == fused_blocks(fused)
    with torch.no_grad():
        for mask in parameters(other):
            mask.zero_()
    assert not torch.equal(other(x), before)
    assert torch.equal(fused(x), before)


def test_changes_after_wrapping_count():
    fused, apart = build(Odd("broadcast residual"))
    fused(inputs())
    for masked in (fused, apart):
        torch.manual_seed(5)
        masked.scale = nn.Parameter(torch.randn(4, 1, 1, dtype=torch.float64))
        masked.bn.running_mean = torch.randn(4, dtype=torch.float64)
        masked.fc = nn.Linear(4, 3).double()
        masked.conv.weight.data.mul_(2)
    assert_equal(fused, apart, inputs())
    for masked in (fused, apart):
        masked.float()
    assert_equal(fused, apart, inputs(torch.float32), 1e-5)


def test_contiguous_outputs():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )
    fused, apart = build(model)
    x = inputs().to(memory_format=torch.channels_last)
    assert fused(inputs()).is_contiguous()
    assert_equal(fused, apart, x)


def test_a_model_that_cannot_be_traced_runs_apart():
    model = randomize(Dynamic()).eval()
    masked = mnp_fast.wrap(model, example_inputs=(torch.randn(1, 3, 8, 8),))
    assert fused_blocks(masked) == []
    assert "forward" not in vars(masked)
    x = torch.randn(4, 3, 8, 8)
    assert relative_error(masked(x), model(x)) <= 1e-5


def test_a_forward_of_the_model_s_own_is_kept():
    model = resnet().eval()
    model.forward = lambda x: x
    masked = mnp_fast.wrap(model)
    assert masked(1) == 1


def test_unwrap_removes_it():
    fused, _ = build(resnet())
    plain = mnp_fast.unwrap(fused)
    assert "forward" not in vars(plain)
    x = inputs()
    assert relative_error(plain(x), fused(x)) <= 1e-10


def test_compiles_without_graph_breaks():
    fused, _ = build(Odd("read twice"), torch.float32)
    x = inputs(torch.float32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), fused(x)) <= 1e-5


def test_images_without_a_batch_axis():
    fused, apart = build(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    assert fused_blocks(fused) == [("0",)]
    assert_equal(fused, apart, inputs()[0])


@pytest.mark.parametrize("wanted", ["image", "masks", "weights"])
def test_gradients_of_one_kind_alone(wanted):
    pairs = []
    for masked in build(resnet()):
        for parameter in masked.parameters():
            parameter.requires_grad_(wanted == "weights" and parameter.dim() > 1)
        for mask in parameters(masked):
            mask.requires_grad_(wanted == "masks")
        torch.manual_seed(1)
        x = inputs().requires_grad_(wanted == "image")
        leaves = [p for p in (x, *masked.parameters()) if p.requires_grad]
        pairs.append(torch.autograd.grad(masked(x).square().sum(), leaves))
    for mine, other in zip(*pairs, strict=True):
        assert relative_error(mine, other) <= 1e-10


def test_outputs_are_the_same_with_and_without_gradients():
    fused, _ = build(resnet(), torch.float32)
    x = inputs(torch.float32)
    expected = fused(x)
    with torch.no_grad():
        assert torch.equal(fused(x), expected)
    with torch.inference_mode():
        assert torch.equal(fused(x), expected)


class InPlace(nn.Module):
    """A value that is changed in place, under a name that is read again."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.clip = nn.Hardtanh(-0.1, 0.1, inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        a = self.norm1(self.conv1(x))
        b = self.change(self, a)
        return self.head((self.norm2(self.conv2(b)) + a).mean((2, 3)))


CHANGES = {
    "method": lambda model, a: a.mul_(0.3),
    "function": lambda model, a: torch.relu_(a),
    "argument": lambda model, a: F.hardtanh(a, -0.1, 0.1, True),
    "keyword": lambda model, a: F.hardtanh(a, -0.1, 0.1, inplace=True),
    "module": lambda model, a: model.clip(a),
    "out": lambda model, a: torch.add(a, 1, out=a),
    "view": lambda model, a: a.view(a.shape).mul_(0.3),
    "into another": lambda model, a: a.add_(model.norm2(model.conv2(a))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place_that_others_see_are_not_fused(name):
    model, x = InPlace(CHANGES[name]).eval(), torch.randn(2, 3, 6, 6)
    masked = mnp_fast.wrap(model)
    assert not fused_blocks(masked)
    with torch.no_grad():
        assert relative_error(masked(x), model(x)) <= 1e-6


def test_changes_in_place_that_nobody_else_sees_are_fused():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    model = nn.Sequential(
        *layers, nn.Conv2d(8, 8, 3), nn.Hardswish(inplace=True), nn.Flatten(), nn.Linear(32, 2)
    )
    model, x = model.eval(), torch.randn(2, 3, 6, 6)
    masked = mnp_fast.wrap(model)
    assert fused_blocks(masked) == [("0", "1"), ("3",)]
    assert relative_error(masked(x), model(x)) <= 1e-6
