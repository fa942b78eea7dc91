"""Models from a factory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mnp_fast.io import CheckpointError, build_model

FACTORIES = """
from dataclasses import dataclass
from torch import nn

class Models:
    @staticmethod
    def small():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

@dataclass
class Settings:
    width: int = 2

def build():
    return Models.small()

def fails():
    raise RuntimeError("no such width")

def returns_text():
    return "model"

constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "factories_for_tests.py"
    file.write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return file


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "spec", ["factories_for_tests:build", "factories_for_tests:Models.small", "{file}:build"]
)
def test_build_model(tmp_path: Path, factories: Path, spec: str) -> None:
    original = small()
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    model = build_model(spec.format(file=factories), tmp_path / "weights.pth")
    assert not model.training
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(images), original.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("factories_for_tests", "not of the form 'package.module:factory'"),
        (":build", "not of the form"),
        ("factories_for_tests:", "not of the form"),
        ("no_such_module_here:build", "'no_such_module_here' cannot be imported"),
        ("factories_for_tests:Models.large", "has no 'Models.large'"),
        ("factories_for_tests:constant", "'constant' cannot be called"),
        ("factories_for_tests:fails", "failed with RuntimeError: no such width"),
        ("factories_for_tests:returns_text", "returned a str, not an nn.Module"),
    ],
)
@pytest.mark.usefixtures("factories")
def test_unusable_spec(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(spec, tmp_path / "weights.pth")


def test_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_in_this_folder.py").write_text(FACTORIES)
    weights = tmp_path / "weights.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(), weights)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.path", [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    )
    before = list(sys.path)
    assert isinstance(build_model("factory_in_this_folder:build", weights), nn.Sequential)
    assert sys.path == before


def test_missing_and_broken_factory_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*none.py'"):
        build_model(f"{tmp_path}/none.py:build", tmp_path / "weights.pth")
    (tmp_path / "broken.py").write_text("def build(:")
    with pytest.raises(ValueError, match="cannot be imported \\(SyntaxError"):
        build_model(f"{tmp_path}/broken.py:build", tmp_path / "weights.pth")


def test_weights_that_do_not_fit_are_listed(tmp_path: Path, factories: Path) -> None:
    state = small().state_dict()
    state["0.weight"] = torch.ones(4, 3, 5, 5)
    state["head.weight"] = state.pop("1.bias")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as error:
        build_model(f"{factories}:build", tmp_path / "weights.pth")
    message = str(error.value)
    assert "weights.pth' does not fit Sequential" in message
    assert "1 missing: 1.bias" in message
    assert "1 unexpected: head.weight" in message
    assert "0.weight is (4, 3, 5, 5) in the file, (4, 3, 3, 3) in the model" in message


def test_checkpoint_without_batch_counters_is_accepted(tmp_path: Path, factories: Path) -> None:
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "weights.pth")
    model = build_model(f"{factories}:build", tmp_path / "weights.pth")
    assert model[1].num_batches_tracked == 0


def test_only_the_first_misfits_are_listed(tmp_path: Path, factories: Path) -> None:
    state = small().state_dict() | {f"extra.{i}": torch.ones(1) for i in range(9)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"9 unexpected: extra.0, .*extra.4 and 4 more$"):
        build_model(f"{factories}:build", tmp_path / "weights.pth")
