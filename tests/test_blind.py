"""Defenses see a model and clean images, nothing else."""

import copy
import inspect
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import blind
from benchmarks.architectures import build
from benchmarks.defenses import GROUPS, OURS, defense
from benchmarks.peers import rule

ROOT = Path(__file__).parent.parent
ALL = sorted({OURS, *(name for group in GROUPS.values() for name in group)})


@pytest.mark.parametrize("name", ALL)
def test_a_defense_receives_a_model_and_clean_images_only(name):
    assert list(inspect.signature(defense(name)).parameters) == [
        "model",
        "images",
        "labels",
        "seed",
    ]


def in_process(code, *arguments):
    """Run code in a process of its own; returns what it prints, or the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "look",
    [
        "import benchmarks.attacks",
        "from benchmarks.attacks import ATTACKS",
        "import importlib; importlib.import_module('benchmarks.attacks.wanet')",
        "import benchmarks.population",
        "from mnp_fast.demo.attacks import TARGET",
        "import mnp_fast.demo.train",
        "open(sys.argv[1])",
        "import os; os.open(sys.argv[1], os.O_RDONLY)",
        "import pathlib; pathlib.Path(sys.argv[1]).read_bytes()",
        "import mnp_fast.io; mnp_fast.io.load_weights(sys.argv[1])",
        "import numpy; numpy.fromfile(sys.argv[1])",
    ],
)
def test_attacks_and_poisoned_data_cannot_be_opened(look, tmp_path):
    secret = tmp_path / "store" / "poisoned.safetensors"
    secret.parent.mkdir()
    secret.write_bytes(b"trigger")
    head = "import sys\nfrom benchmarks.blind import SECRETS, hide\n"
    hidden = head + "hide([*SECRETS, sys.argv[1].rsplit('/', 1)[0]])\n"
    assert "a defense must not open" in in_process(hidden + look, secret)


def test_a_defense_starts_without_the_attacks_and_may_open_other_files(tmp_path):
    (tmp_path / "a").write_text("clean")
    code = (
        "import sys\nfrom benchmarks.blind import SECRETS, hide\nhide(SECRETS)\n"
        "print(open(sys.argv[1]).read(), [m for m in sys.modules if 'attack' in m])"
    )
    assert in_process(code, tmp_path / "a") == "clean []"


class Recorded:
    """What a defense's process was given."""

    def __init__(self, monkeypatch):
        self.files, self.request = {}, {}

        def run(command, **_):
            folder = Path(command[-1])
            self.request = json.loads((folder / "request.json").read_text())
            self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
            (folder / "purified-0.safetensors").write_bytes(self.files["model.safetensors"])
            (folder / "outcomes.json").write_text('[{"seconds": 1.5, "error": ""}]')
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(blind.subprocess, "run", run)


def test_the_process_of_a_defense_is_given_nothing_else(monkeypatch, tmp_path):
    recorded = Recorded(monkeypatch)
    model = build("resnet18", 4, 3)
    clean = torch.rand(6, 3, 16, 16), torch.arange(6)
    (outcome,) = blind.run_blind(["clp"], model, ("resnet18", 4), clean, 7, [tmp_path])
    assert set(recorded.files) == {"model.safetensors", "clean.safetensors", "request.json"}
    assert set(recorded.request) == {"defenses", "arch", "seed", "threads", "hidden"}
    assert recorded.request["hidden"] == [str(tmp_path)]
    assert outcome.seconds == 1.5
    assert torch.equal(outcome.model.fc.weight, model.fc.weight)
    assert not outcome.model.training


def test_a_defense_that_fails_is_reported(tmp_path):
    model = build("resnet18", 4, 0)
    clean = torch.zeros(2, 3, 16, 16), torch.tensor([-1, 3])
    outcome, other = blind.run_blind(["mnp", "clp"], model, ("resnet18", 4), clean, 0, [tmp_path])
    assert outcome.model is None
    assert outcome.error == "ValueError: data: labels must not be negative, found -1"
    assert isinstance(other.model, torch.nn.Module)  # which looks at no label
    assert not other.error


def test_a_process_that_fails_is_reported(monkeypatch, tmp_path):
    gone = subprocess.CompletedProcess([], 1, stderr="Traceback\nMemoryError: no")
    monkeypatch.setattr(blind.subprocess, "run", lambda *_, **__: gone)
    clean = torch.zeros(2, 3, 16, 16), torch.tensor([0, 3])
    with pytest.raises(RuntimeError, match="defenses failed: MemoryError: no"):
        blind.run_blind(["clp"], build("resnet18", 4, 0), ("resnet18", 4), clean, 0, [tmp_path])


def test_the_search_that_rules_share_changes_no_result(monkeypatch):
    short = partial(rule.DefenseConfig, suppressions=1, suppress_epochs=2, suspects=5)
    monkeypatch.setattr(rule, "DefenseConfig", partial(short, offset_steps=12))
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 10
    model = build("resnet18", 4, 0).eval()
    defend = defense("rnp+rule")
    first = defend(model, images, labels, 0)
    hits = rule._searched.cache_info().hits
    again = defend(model, images, labels, 0)
    assert rule._searched.cache_info().hits == hits + 1
    apart = defend(copy.deepcopy(model), images.clone(), labels, 0)
    assert rule._searched.cache_info().hits == hits + 1
    for other in (again, apart):
        assert all(map(torch.equal, first.state_dict().values(), other.state_dict().values()))
