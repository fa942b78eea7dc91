"""Weights and checkpoints: what is read, what is refused, and that nothing is executed."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mnp_fast.io import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)


class Payload:
    """Creates the marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def state() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.arange(6.0).view(2, 3), "conv.steps": torch.tensor(3)}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=0)


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "net"])
def test_torch_checkpoint_plain_or_nested(tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state() if key is None else {"epoch": 3, key: OrderedDict(state())}, path)
    assert_same(load_weights(path), state())


def test_safetensors_is_known_by_content(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "weights.pth")
    loaded = load_weights(tmp_path / "weights.pth")
    assert_same({name: loaded[name] for name in state()}, state())


def test_legacy_torch_format(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(load_weights(tmp_path / "old.pth"), state())


def test_data_parallel_prefix_is_stripped_only_when_common(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({f"module.{name}": tensor for name, tensor in state().items()}, path)
    assert_same(load_weights(path), state())
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, path)
    assert_same(load_weights(path), mixed)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_weights(tmp_path)


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_file(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "weights"
    tensors = {"weight": torch.randn(400)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "torch")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="truncated"):
        load_weights(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    torch.save(
        {"weight": torch.ones(1), "extra": Payload(marker)},
        path,
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(CheckpointError, match=r"refused.*nothing in it was run.*execute code"):
        load_weights(path)
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_bare_malicious_pickle_is_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(CheckpointError):
        load_weights(path)
    assert not marker.exists()


def test_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"torch.nn.modules.linear.Linear.*state_dict"):
        load_weights(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "holds no tensors"),
        ({"weight": torch.ones(1), "epoch": 3}, "entry 'epoch' is a int"),
        ({3: torch.ones(1)}, "entry 3 is a Tensor"),
    ],
)
def test_content_that_is_no_mapping_of_tensors(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_non_finite_weights_are_named(tmp_path: Path, value: float, save: Any) -> None:
    save({"good": torch.ones(2), "bad": torch.tensor([1.0, value])}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="'bad' has NaN or infinite"):
        load_weights(tmp_path / "weights")


def test_sparse_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.eye(2).to_sparse()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="not a dense tensor"):
        load_weights(tmp_path / "weights.pth")


def test_save_weights_takes_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"base": base, "same": base, "turned": base.t(), "row": base[1]}
    save_weights(tensors, tmp_path / "weights.safetensors")
    loaded = load_weights(tmp_path / "weights.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_save_weights_names_what_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['epoch'\] is a int"):
        save_weights({"epoch": 3}, tmp_path / "weights.safetensors")  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    content = {
        "phase": "fit",
        "epoch": 3,
        "best": 0.5,
        "done": False,
        "none": None,
        "masks": {"layer": torch.rand(3)},
        "history": [{"loss": 1.0}, (1, "two")],
        "moments": {0: torch.ones(2)},
    }
    save_checkpoint(content, tmp_path / "state.pt")
    loaded = load_checkpoint(tmp_path / "state.pt")
    torch.testing.assert_close(loaded.pop("masks"), content.pop("masks"))
    torch.testing.assert_close(loaded.pop("moments"), content.pop("moments"))
    assert loaded == content


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"path": Path("x")}, r"state\['path'\] is a"),
        ({"a": [1, {2}]}, r"state\['a'\]\[1\] is a set"),
        ({(1, 2): 3}, "key of type tuple"),
    ],
)
def test_checkpoint_refuses_to_save_what_it_could_not_load(
    tmp_path: Path, content: dict[Any, Any], where: str
) -> None:
    with pytest.raises(TypeError, match=where):
        save_checkpoint(content, tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    save_checkpoint({"epoch": 1}, path)

    def interrupted(_: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"epoch": 2}, path)
    assert load_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"refused.*TorchScript"):
        load_weights(tmp_path / "model.pt")
