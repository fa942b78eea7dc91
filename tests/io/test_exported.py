"""Models from a torch.export archive."""

from __future__ import annotations

import contextlib
import json
import operator
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnp_fast.io import CheckpointError, load_exported
from mnp_fast.io.operators import resolve


class Net(nn.Module):
    """All kinds of layers, shared, in place and nested, and tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)
        )
        self.twice = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.hidden = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)
        self.register_buffer("shift", torch.rand(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x - self.shift)
        y = self.plain(self.twice(self.twice(x)))
        y += x
        first, second = torch.chunk(F.relu(y) * self.scale, 2, dim=1)
        y = torch.cat([second, first], 1)
        y = F.adaptive_avg_pool2d(y, 1)
        y = y.view(y.size(0), -1)
        return self.head(self.dropout(F.relu(self.norm(self.hidden(y)))))


def trained_net() -> Net:
    net = Net()
    for _ in range(2):
        net(torch.randn(8, 3, 8, 8))
    return net.eval()


def export(model: nn.Module, path: Path, *, dynamic: bool = False, **options: Any) -> Path:
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    images = (torch.randn(2, 3, 8, 8),)
    program = torch.export.export(model, images, dynamic_shapes=shapes, **options)
    torch.export.save(program, path)
    return path


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of the archive with each entry changed."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for entry in source.infolist():
            name = entry.filename.partition("/")[2]
            copy.writestr(entry.filename, change(name, source.read(entry)))
    return target


def rewrite_json(path: Path, name: str, change: Callable[[Any], Any]) -> Path:
    def apply(entry: str, content: bytes) -> bytes:
        if entry != name:
            return content
        data = json.loads(content)
        change(data)
        return json.dumps(data).encode()

    return rewrite(path, apply)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(trained_net(), tmp_path_factory.mktemp("export") / "net.pt2")


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_model_equals_the_original(tmp_path: Path, dynamic: bool) -> None:
    original = trained_net()
    path = export(original, tmp_path / "net.pt2", dynamic=dynamic)
    model = load_exported(path)
    program = torch.export.load(path).module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(model(images), original(images), rtol=0, atol=0)
        if batch == 2 or (dynamic and batch > 1):
            torch.testing.assert_close(model(images), program(images), rtol=0, atol=0)
    assert not model.training


def test_layers_are_modules_under_their_own_names(tmp_path: Path) -> None:
    original = trained_net()
    model = load_exported(export(original, tmp_path / "net.pt2"))
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
    expected = {n: type(m) for n, m in original.named_modules() if isinstance(m, kinds)}
    assert {n: type(m) for n, m in model.named_modules() if isinstance(m, kinds)} == expected
    tensors = dict(original.named_parameters()) | dict(original.named_buffers())
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert isinstance(found[name], nn.Parameter) == isinstance(tensor, nn.Parameter)
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_gradients_reach_the_modules(archive: Path) -> None:
    model = load_exported(archive)
    model(torch.randn(3, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_module_can_be_traced_and_its_activations_are_known(archive: Path) -> None:
    model = load_exported(archive)
    targets = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes]
    assert F.relu in targets
    assert operator.add in targets
    assert operator.iadd in [node.target for node in model.graph.nodes]


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.offset = nn.Parameter(torch.rand(2, 2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.offset


def test_batch_size_that_cannot_be_freed_is_explained(tmp_path: Path) -> None:
    path = export(FixedBatch(), tmp_path / "net.pt2")
    with pytest.raises(CheckpointError, match=r"exported for batches of 2 .*dynamic_shapes"):
        load_exported(path)


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.token = nn.Parameter(torch.rand(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), patches], 1).mean(1)


def test_expanded_batch_size_is_freed(tmp_path: Path) -> None:
    original = Token()
    model = load_exported(export(original, tmp_path / "net.pt2"))
    images = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(model(images), original(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: (self.conv(x).mean((2, 3)), x), "returns other things than one tensor"),
        (lambda self, x: self.conv(x).sum(0), "one row an image"),
        (lambda self, x: F.dropout(self.conv(x), 0.5, True), "training mode"),
        (lambda self, x: x.mean((2, 3)), "no convolution, linear layer or batch norm"),
        (lambda self, x: self.conv(x).cholesky_inverse(), "list of operators"),
    ],
)
def test_unsupported_programs_are_explained(
    tmp_path: Path, forward: Callable[[Any, Tensor], Any], message: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    path = export(Model(), tmp_path / "net.pt2")
    with pytest.raises(CheckpointError, match=message):
        load_exported(path)


def test_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    path = export(model, tmp_path / "net.pt2")
    with pytest.raises(CheckpointError, match=r"training mode; call model.eval\(\)"):
        load_exported(path)


class Payload:
    """Creates the marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def load_unsafely(path: Path) -> None:
    """Show that a payload works: run it with torch's own loader, which may fail afterwards."""
    with contextlib.suppress(Exception):
        torch.export.load(path)


def test_malicious_sample_inputs_are_not_read(tmp_path: Path, archive: Path) -> None:
    marker = tmp_path / "marker"
    torch.save(Payload(marker), tmp_path / "payload.pt")
    payload = (tmp_path / "payload.pt").read_bytes()
    changed = rewrite(
        archive, lambda name, content: payload if "sample_inputs" in name else content
    )
    load_exported(changed)
    assert not marker.exists()
    load_unsafely(changed)
    assert marker.exists()


@pytest.mark.parametrize(("folder", "record"), [("weights", "weight_0"), ("constants", "tensor_0")])
def test_pickled_tensors_are_refused(
    tmp_path: Path, archive: Path, folder: str, record: str
) -> None:
    marker = tmp_path / "marker"
    torch.save(Payload(marker), tmp_path / "payload.pt")
    payload = (tmp_path / "payload.pt").read_bytes()

    def change(name: str, content: bytes) -> bytes:
        if name == f"data/{folder}/{record}":
            return payload
        if name != f"data/{folder}/model_{folder}_config.json":
            return content
        config = json.loads(content)
        for meta in config["config"].values():
            meta["use_pickle"] = meta["path_name"] == record
        return json.dumps(config).encode()

    changed = rewrite(archive, change)
    with pytest.raises(CheckpointError, match=r"refused and nothing in it was run.*pickled object"):
        load_exported(changed)
    assert not marker.exists()
    load_unsafely(changed)
    assert marker.exists()


def program_change(change: Callable[[Any], None]) -> Callable[[Path], Path]:
    return lambda path: rewrite_json(path, "models/model.json", change)


def test_code_in_symbolic_sizes_is_not_evaluated(tmp_path: Path, archive: Path) -> None:
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path('{marker}').touch()"

    def change(program: Any) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]
        for meta in values.values():
            meta["sizes"][:1] = [{"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}]
        program["guards_code"] = [code]

    changed = program_change(change)(archive)
    with pytest.raises(CheckpointError, match="does not run with 3"):
        load_exported(changed)
    assert not marker.exists()
    load_unsafely(changed)
    assert marker.exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.hub.load",
        "torch.load",
        "_operator.attrgetter",
        "math.exp",
        "#extension:op",
        "torch.ops.aten.save.default",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.set_.source_Tensor",
        "torch.ops.aten.add.out",
        "torch.ops.aten.add.__class__",
        "torch.ops.aten.__dict__.default",
        "torch.ops.higher_order.cond",
        "torch.ops.mine.op.default",
    ],
)
def test_operators_off_the_list_are_refused(archive: Path, target: str) -> None:
    def change(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = target

    assert resolve(target) is None
    with pytest.raises(CheckpointError, match=r"known to be harmless"):
        load_exported(program_change(change)(archive))


@pytest.mark.parametrize("path", ["x'); import os #", 'a"b.weight', "a b", "forward", "", "a..b"])
def test_tensor_names_that_are_no_names_are_refused(archive: Path, path: str) -> None:
    def change(program: Any) -> None:
        specs = program["graph_module"]["signature"]["input_specs"]
        specs[0]["parameter"]["parameter_name"] = path

    with pytest.raises(CheckpointError, match="is not allowed"):
        load_exported(program_change(change)(archive))


def test_code_in_argument_names_and_values_does_not_run(tmp_path: Path, archive: Path) -> None:
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path('{marker}').touch()"

    def rename(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["name"] = f"x={code}"

    with pytest.raises(CheckpointError, match="has no argument"):
        load_exported(program_change(rename)(archive))

    def revalue(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["inputs"].append(
            {"name": "alpha", "arg": {"as_string": f"'+{code}+'"}, "kind": 2}
        )

    with pytest.raises(CheckpointError, match="does not run"):
        load_exported(program_change(revalue)(archive))
    assert not marker.exists()


def set_version(program: Any) -> None:
    program["schema_version"]["major"] = 9


def drop_nodes(program: Any) -> None:
    del program["graph_module"]["graph"]["nodes"]


def wrong_argument(program: Any) -> None:
    program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_tensor": {"name": "?"}}


def unknown_argument(program: Any) -> None:
    program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_graph": {}}


def mistyped_argument(program: Any) -> None:
    program["graph_module"]["graph"]["nodes"][0]["inputs"][1]["arg"] = {"as_int": "1"}


def open_size_without_value(program: Any) -> None:
    values = program["graph_module"]["graph"]["tensor_values"]
    values["x"]["sizes"][0] = {"as_expr": {"expr_str": "s0", "hint": None}}


def second_input(program: Any) -> None:
    module = program["graph_module"]
    module["signature"]["input_specs"].append(module["signature"]["input_specs"][-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_version, "version 9 of the export schema"),
        (drop_nodes, "damaged"),
        (wrong_argument, "damaged"),
        (mistyped_argument, "damaged"),
        (open_size_without_value, "damaged"),
        (unknown_argument, "argument of kind 'as_graph'"),
        (second_input, "other inputs than one tensor"),
    ],
)
def test_malformed_programs(archive: Path, change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_exported(program_change(change)(archive))


def test_tensor_outside_its_record_is_refused(archive: Path) -> None:
    def change(data: Any) -> None:
        data["config"]["head.weight"]["tensor_meta"]["storage_offset"]["as_int"] = 10**6

    with pytest.raises(CheckpointError, match="damaged"):
        load_exported(rewrite_json(archive, "data/weights/model_weights_config.json", change))


def test_non_finite_weights_are_named(archive: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return b"\xff" * len(content) if name == "data/weights/weight_0" else content

    with pytest.raises(CheckpointError, match="has NaN or infinite values"):
        load_exported(rewrite(archive, change))


def test_compressed_entries_are_refused(tmp_path: Path, archive: Path) -> None:
    with (
        zipfile.ZipFile(archive) as source,
        zipfile.ZipFile(tmp_path / "small.pt2", "w", zipfile.ZIP_DEFLATED) as copy,
    ):
        for entry in source.infolist():
            copy.writestr(entry.filename, source.read(entry))
    with pytest.raises(CheckpointError, match="compressed"):
        load_exported(tmp_path / "small.pt2")


def test_files_that_are_no_archive(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_exported(tmp_path / "none.pt2")
    (tmp_path / "half.pt2").write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_exported(tmp_path / "half.pt2")
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt2")
    with pytest.raises(CheckpointError, match="holds 0 exported programs"):
        load_exported(tmp_path / "weights.pt2")
