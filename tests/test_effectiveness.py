import json

import pytest
import torch

from benchmarks import effectiveness, effectiveness_page
from benchmarks.architectures import build
from benchmarks.peers.norms import cut, norms
from benchmarks.population import Setting, subject

from .commands import call

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pruned_neurons_are_counted():
    model = build("resnet18", 4, 0)
    gone = torch.tensor([True, True, False, False])
    after = cut(model, {"bn1": gone}, bias=False)
    assert effectiveness.pruned(model, after) == (
        2,
        sum(len(n.weight) for n in norms(model).values()),
    )
    assert effectiveness.pruned(after, after)[0] == 0
    with torch.no_grad():
        after.conv1.weight[3] = 0
    assert effectiveness.pruned(model, after)[0] == 3


def test_effectiveness_command(tmp_path):
    store, cells, page = tmp_path / "store", tmp_path / "cells", tmp_path / "page.md"
    short = "mnp:suppress_epochs=1,suspects=1,offset_steps=6,fit_epochs=1"
    options = (
        *("--attacks", "badnets", "--defenses", f"clp;{short}", "--width", 2, "--epochs", 1),
        *("--clean", 18, "--store", store, "--cells", cells, "--out", page),
    )
    result = call(effectiveness.main, *options)
    assert result.exit_code == 0, result.output
    files = sorted(cells.glob("*/*.json"))
    assert len(files) == 4  # with and without attack, two defenses
    figures = [json.loads(file.read_text()) for file in files]
    assert all("after" in cell for cell in figures)
    assert page.read_text() == result.output[result.output.index("# What defenses") :][:-1]
    assert page.read_text().count("\n## ") == 1
    assert "ASR below 90 %" in page.read_text()
    assert (tmp_path / "images" / "effectiveness-0.png").read_bytes().startswith(b"\x89PNG")
    before = [file.stat().st_mtime_ns for file in files]
    assert call(effectiveness.main, *options).exit_code == 0
    assert [file.stat().st_mtime_ns for file in files] == before  # nothing is run twice


def test_effectiveness_stops_in_time_and_checks_first(tmp_path):
    options = "--cells", tmp_path / "cells", "--out", tmp_path / "page.md"
    result = call(effectiveness.main, "--attacks", "sig", "--minutes", 0, *options)
    assert result.exit_code == 0
    assert "24 cells are left" in result.output
    result = call(effectiveness.main, "--defenses", "anpp", *options)
    assert isinstance(result.exception, ValueError)


def cell(attack, defense, seed, asr, accuracy=97.0):
    setting = {
        **{"attack": attack, "seed": seed, "arch": "resnet18", "width": 8, "size": 16},
        **{"data": "digits", "epochs": 20},
    }
    before = {"accuracy": 98.0}
    after = {"accuracy": accuracy}
    if attack != "none":
        before |= {"asr": 99.0, "robust": 1.0, "clean_accuracy": 98.5, "clean_asr": 2.0}
        after |= {"asr": asr, "robust": 90.0}
    return {
        "cell": {"setting": setting, "defense": defense, "clean": 100},
        **{"before": before, "after": after, "pruned": 6, "neurons": 600, "s": 2.0},
    }


def store(cells, found):
    """Each cell in its model's folder."""
    for index, figures in enumerate(found):
        setting = figures["cell"]["setting"]
        folder = cells / f"{setting['attack']}-{setting['seed']}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.json").write_text(json.dumps(figures))


def test_page(tmp_path):
    found = [
        cell("badnets", "mnp", 0, 1.0),
        cell("badnets", "mnp", 1, 3.0),
        cell("wanet", "mnp", 0, 50.0),
        cell("none", "mnp", 0, None, accuracy=97.5),
        cell("badnets", "mnp:alpha=1", 0, 60.0),
        cell("badnets", "clp", 0, 20.0),
        cell("badnets", "rnp", 0, 0.5, accuracy=80.0),
        {**cell("sig", "clp", 0, 0.0), "error": "defense clp failed: so"},
    ]
    found[2]["before"]["asr"] = 80.0  # did not take
    del found[-1]["after"]
    store(tmp_path / "cells", found)
    text = effectiveness_page.write_page(tmp_path / "cells", tmp_path / "page.md")
    assert "| mnp | 2 | 1.0 ± 0.0 | 2.0 ± 1.4 | 3.0 | 90.0 ± 0.0 | 0.5 | 1.0 ± 0.0 |" in text
    assert "| wanet | 0 | 98.0 | 80.0 | 1.0 | 98.5 | 2.0 | ASR below 90 % |" in text
    assert "| badnets | mnp | 97.0 ± 0.0 | 2.0 ± 1.4 |" in text
    assert "sig, seed 0: defense clp failed: so" in text
    assert "| mnp | 1 | 1.0 | 1.0 |" in text  # beside its peers, on their models
    assert "| clp | 1 | 1.0 | 20.0 |" in text
    assert "| badnets | rnp | 1 | 0.5 | 1.0 | 18.0 | 1.0 |" in text  # leaves less than ours
    assert "| badnets | clp | 1 |" not in text
    assert "| all with 100 clean images | 2 |" in text
    assert "| mnp:alpha=1 | 1 | 1.0 | 1.0 | 60.0 | 1.0 | – | – |" in text


def test_cells_of_different_models_are_refused(tmp_path):
    found = [cell("badnets", name, 0, 1.0) for name in ("mnp", "clp")]
    found[1]["before"]["asr"] = 98.0
    store(tmp_path / "cells", found)
    with pytest.raises(ValueError, match="are of different models"):
        effectiveness_page.write_page(tmp_path / "cells", tmp_path / "page.md")


def test_stored_cells_of_another_model_stop_the_command(tmp_path):
    cells = tmp_path / "cells"
    options = {"arch": "resnet18", "width": 2, "epochs": 1}
    setting = Setting("none", 0, **options)
    old = cell("none", "clp", 0, None)
    folder = cells / setting.key
    folder.mkdir(parents=True)
    (folder / "clp-18.json").write_text(json.dumps(old))
    trained = subject(setting, store=tmp_path / "models")
    with pytest.raises(ValueError, match="another model of this setting"):
        effectiveness.check_model(trained, folder)
    (folder / "clp-18.json").write_text(json.dumps({**old, "before": trained.figures}))
    effectiveness.check_model(trained, folder)
