import functools
import importlib
import inspect
import json
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mnp_fast import DefenseConfig, build_info
from mnp_fast.cli import app
from mnp_fast.demo import run as demo_run
from mnp_fast.io import load_weights, save_weights

from .test_detection import calibration
from .trained import backdoored, small_net, stripes

defend_module = importlib.import_module("mnp_fast.defend")
CLEAN = stripes(40, seed=2)
QUICK = {
    "suppress_lr": 0.1, "suppress_accuracy": 60.0, "suppress_epochs": 3, "suspects": 1,
    "offset_steps": 6, "fit_epochs": 2, "fit_batch_size": 10, "fit_lr": 0.2, "max_pruned": 0.25,
    "few": 1, "max_exposed": 99.0, "max_drop": 100.0,
}  # fmt: skip
FACTORY = f"from torch import nn\nCLASSES = 4\n{inspect.getsource(small_net)}"
RESULTS = ["masks.safetensors", "purified.safetensors", "report.html", "report.json"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text_of(result):
    """Standard output and error without line breaks and colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def settings(**more):
    return [part for item in {**QUICK, **more}.items() for part in ("--set", "{}={}".format(*item))]


@pytest.fixture
def files(tmp_path):
    """Options that name a model, its weights and its data."""
    (tmp_path / "factory.py").write_text(FACTORY)
    save_weights(backdoored().state_dict(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "data.npz", images=CLEAN.images.numpy(), labels=CLEAN.labels.numpy())
    return {
        "--model": f"{tmp_path / 'factory.py'}:small_net",
        "--checkpoint": tmp_path / "weights.safetensors",
        "--data": tmp_path / "data.npz",
        "--out": tmp_path / "out",
    }


def options(files, **changes):
    changed = {**files, **{f"--{name}": value for name, value in changes.items()}}
    return [part for item in changed.items() if item[1] is not None for part in item]


def expected(data=CLEAN, **more):
    model, config = backdoored().eval(), DefenseConfig(**QUICK, **more)
    return defend_module.defend(model, (data.images, data.labels), config)


def assert_written(out, result):
    assert sorted(path.name for path in out.iterdir()) == RESULTS
    masks = load_weights(out / "masks.safetensors")
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        name: mask.tolist() for name, mask in result.masks.items()
    }
    purified = load_weights(out / "purified.safetensors")
    assert purified.keys() == small_net().state_dict().keys()
    assert all(torch.equal(purified[k], v) for k, v in result.model.state_dict().items())


def test_info():
    result = call("info")
    assert result.exit_code == 0
    facts, text = build_info(), text_of(result)
    for line in (f"version {facts['version']}", f"cpu used {facts['cpu']['used']}", "cuda built"):
        assert line in text
    assert f"cpu usable {', '.join(facts['cpu']['usable'])}" in text
    assert "backends masked conv2d cpu: available, cuda: " in text


def test_info_json():
    result = call("info", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == build_info()


def test_without_a_command_there_is_help():
    assert all(name in call().output for name in ("demo", "defend", "info"))


def test_defend(files, tmp_path):
    result = call("defend", *options(files), *settings())
    assert result.exit_code == 0, result.output
    outcome = expected()
    assert len(outcome.pruned) > 0
    assert_written(tmp_path / "out", outcome)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["title"] == f"Defense of {files['--model']}"
    assert report["config"] == {**vars(DefenseConfig()), **QUICK}
    assert len(report["pruned"]) == report["cut"]["pruned"] == len(outcome.pruned)
    text = text_of(result)
    assert " ".join(outcome.outcome().split()) in " ".join(text.split())
    assert f"Weights, masks and report: {tmp_path / 'out'}" in text
    for phase in ("Suppressing", "Exposing", "Fitting", "Cutting"):
        assert phase in text


def test_defend_an_exported_archive(files, tmp_path):
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(backdoored().eval(), (CLEAN.images[:2],), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "model.pt2")
    changes = {"model": None, "checkpoint": None, "exported": tmp_path / "model.pt2"}
    result = call("defend", *options(files, **changes), *settings())
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == RESULTS
    outcome = expected()
    for name, mask in load_weights(out / "masks.safetensors").items():
        torch.testing.assert_close(mask, outcome.masks[name], rtol=0, atol=1e-3)
    purified = load_weights(out / "purified.safetensors")
    for neuron in json.loads((out / "report.json").read_text())["pruned"]:
        assert purified[f"{neuron['layer']}.weight"][neuron["index"]] == 0


def test_samples_are_drawn_by_the_seed(files, tmp_path):
    result = call("defend", *options(files, samples=20), *settings(seed=3))
    assert result.exit_code == 0, result.output
    images, labels = CLEAN.batches(20, 3)[0]
    assert_written(tmp_path / "out", expected(type(CLEAN)(images, labels), seed=3))


def test_folder_of_images_is_resized_and_normalised(files, tmp_path):
    for index, (image, label) in enumerate(zip(CLEAN.images[:8], CLEAN.labels, strict=False)):
        path = tmp_path / "images" / f"class{label}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (255 * image).round().byte().repeat_interleave(2, 1).repeat_interleave(2, 2)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    changes = {"data": tmp_path / "images", "image-size": 8}
    changes |= {"mean": "0.5,0.5,0.5", "std": "0.25,0.25,0.25"}
    result = call("defend", *options(files, **changes), *settings())
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == RESULTS


NAMES = ", ".join(vars(DefenseConfig()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("alpha", f"--set takes name=value with a name of {NAMES}; got 'alpha'"),
        ("lambda=1", f"--set takes name=value with a name of {NAMES}; got 'lambda=1'"),
        ("=1", "got '=1'"),
        ("alpha=much", "--set alpha needs a value of type float, not 'much'"),
        ("fit_epochs=2.5", "--set fit_epochs needs a value of type int, not '2.5'"),
        ("alpha=2", "alpha must be between 0 and 1, not 2.0"),
        ("site=layer", "site must be one of auto, neuron, norm, filter, not 'layer'"),
    ],
)
def test_bad_settings(files, tmp_path, setting, message):
    result = call("defend", *options(files), "--set", setting)
    assert result.exit_code == 1
    assert message in text_of(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"checkpoint": None},
        {"model": None, "checkpoint": None},
        {"exported": "model.pt2"},
        {"exported": "model.pt2", "model": None},
        {"exported": "model.pt2", "checkpoint": None},
    ],
)
def test_models_that_are_given_by_halves_or_twice(files, tmp_path, changes):
    result = call("defend", *options(files, **changes))
    assert result.exit_code == 1
    assert text_of(result) == "Error: give either --model with --checkpoint, or --exported"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["data", "out"])
def test_options_that_are_needed(files, missing):
    result = call("defend", *options(files, **{missing: None}))
    assert result.exit_code == 2
    assert f"Missing option '--{missing}'" in text_of(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "no_such.npz"}, "no_such.npz"),
        ({"checkpoint": "no_such.pt"}, "there is no file 'no_such.pt'"),
        ({"model": "no_such.py:build"}, "there is no file 'no_such.py'"),
        ({"model": "small_net"}, "is not of the form"),
        (
            {"mean": "0.5,half,0.5"},
            "--mean must be numbers with commas between, not '0.5,half,0.5'",
        ),
        ({"mean": "0.5,0.5,0.5", "std": ""}, "--std must be numbers with commas between, not ''"),
        ({"mean": "0.5,0.5,0.5"}, "std"),
    ],
)
def test_errors_are_one_line(files, changes, message):
    result = call("defend", *options(files, **changes))
    assert result.exit_code == 1
    assert text_of(result).startswith("Error: ")
    assert message in text_of(result)
    assert len(result.output.splitlines()) == 1


def test_damaged_weights_are_named(files):
    content = files["--checkpoint"].read_bytes()
    files["--checkpoint"].write_bytes(content[:-100])
    result = call("defend", *options(files))
    assert result.exit_code == 1
    assert "weights.safetensors' is a truncated or damaged safetensors file" in text_of(result)


def test_folder_that_cannot_be_written_is_found_first(files, tmp_path, monkeypatch):
    (tmp_path / "out").touch()
    monkeypatch.setattr("mnp_fast.io.load_clean_data", lambda *_, **__: pytest.fail("it read data"))
    result = call("defend", *options(files))
    assert result.exit_code == 1
    assert f"output folder '{tmp_path / 'out'}' cannot be written" in text_of(result)


def interrupt_at(monkeypatch, owner, name, count):
    """Ctrl-C after the `count`-th call."""
    real, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(real(*args, **kwargs))
        if len(calls) == count:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(owner, name, stopping)


def test_interrupted_defense_goes_on(files, tmp_path, monkeypatch):
    arguments = ("defend", *options(files), *settings())
    with monkeypatch.context() as patch:
        interrupt_at(patch, defend_module, "save_checkpoint", 2)
        result = call(*arguments)
    out = tmp_path / "out"
    assert result.exit_code == 130
    hint = f"Interrupted: run the same command again to go on from {out / 'checkpoint.pt'}."
    assert hint in text_of(result)
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]

    other = call(*arguments, "--set", "seed=1")
    assert other.exit_code == 1
    assert "belongs to another run" in text_of(other)
    with monkeypatch.context() as patch:
        suppressed = []
        real = defend_module.suppress
        patch.setattr(
            defend_module, "suppress", lambda *args: (suppressed.append(args[3]), real(*args))[1]
        )
        result = call(*arguments)
    assert suppressed == [2, 0, 0, 0]  # the epoch it went on from, and further suppressions
    assert result.exit_code == 0, result.output
    assert_written(out, expected())


def test_restart_ignores_the_checkpoint(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, defend_module, "save_checkpoint", 2)
        call("defend", *options(files), *settings())
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    result = call("defend", *options(files), *settings(seed=1), "--restart")
    assert result.exit_code == 0, result.output
    assert_written(tmp_path / "out", expected(seed=1))


def test_interruption_before_the_first_checkpoint(files, monkeypatch):
    interrupt_at(monkeypatch, defend_module, "check_model", 1)
    result = call("defend", *options(files))
    assert result.exit_code == 130
    assert text_of(result) == "Interrupted."


@pytest.fixture
def quick_demo(monkeypatch):
    """The demo with a defense of seconds."""
    quick = functools.partial(DefenseConfig, **{**QUICK, "max_pruned": 0.02, "few": 1})
    monkeypatch.setattr(demo_run, "DefenseConfig", quick)


@pytest.mark.parametrize("attack", ["badnets", "none"])
def test_demo(tmp_path, quick_demo, attack):
    out = tmp_path / "demo"
    arguments = ("--out", out, "--attack", attack, "--seed", 1, "--width", 4, "--epochs", 1)
    result = call("demo", *arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == [
        "demo.png", "model.safetensors", "purified.safetensors", "report.html", "report.json",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["attack"] == attack
    assert report["seed"] == report["config"]["seed"] == 1
    text = text_of(result)
    for state in ("before", "after"):
        assert set(report[state]) == {"accuracy", "asr"}
        assert 0 <= report[state]["accuracy"] <= 100
        assert f"{report[state]['accuracy']:.1f} %" in text
        if attack == "none":
            assert report[state]["asr"] is None
        else:
            assert 0 <= report[state]["asr"] <= 100
    assert report["before"]["accuracy"] > 25  # an epoch teaches something
    assert ("attack success rate" in text) == (attack != "none")
    assert set(report["seconds"]) == {"train", "suppress", "expose", "fit", "select"}
    assert all(seconds > 0 for seconds in report["seconds"].values())
    before, after = (load_weights(out / f"{n}.safetensors") for n in ("model", "purified"))
    norms = [key for key in before if key.replace("running_mean", "weight") in before]
    assert report["neurons"] == sum(len(before[k]) for k in norms if k.endswith("running_mean"))
    cut = {(neuron["layer"], neuron["index"]) for neuron in report["pruned"]}
    changed = {
        (key.removesuffix(".weight"), int(index))
        for key in before
        for index in (before[key] != after[key]).flatten().nonzero()
    }
    assert report["neurons_pruned"] == len(report["pruned"]) == len(cut)
    assert changed == cut
    assert f"{len(cut) or 'None'} of {report['neurons']} neurons pruned" in text
    with Image.open(out / "demo.png") as image:
        assert image.size == (1650, 510)


def test_demo_with_an_unknown_attack(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_run, "train", lambda *_, **__: pytest.fail("it trained"))
    result = call("demo", "--out", tmp_path / "demo", "--attack", "wanet")
    assert result.exit_code == 1
    expected = "Error: attack must be one of badnets, blend, sig or none, not 'wanet'"
    assert text_of(result) == expected
    assert not (tmp_path / "demo").exists()


def test_demo_finds_a_folder_that_cannot_be_written_first(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo_run, "train", lambda *_, **__: pytest.fail("it trained"))
    result = call("demo", "--out", tmp_path / "file" / "demo")
    assert result.exit_code == 1
    assert f"output folder '{tmp_path / 'file' / 'demo'}' cannot be written" in text_of(result)


@pytest.mark.parametrize("option", ["--width", "--epochs"])
def test_demo_limits(tmp_path, option):
    result = call("demo", "--out", tmp_path / "demo", option, 0)
    assert result.exit_code == 2
    assert option in text_of(result)
    assert not (tmp_path / "demo").exists()


def test_interrupted_demo(tmp_path, quick_demo, monkeypatch):
    arguments = ("demo", "--out", tmp_path, "--width", 4, "--epochs", 1)
    with monkeypatch.context() as patch:
        patch.setattr(demo_run, "trained_model", Mock(side_effect=KeyboardInterrupt))
        result = call(*arguments)
    assert result.exit_code == 130
    assert text_of(result) == "Interrupted."
    monkeypatch.setattr(demo_run, "trained_model", lambda *_: demo_run.ResNet18(4))
    interrupt_at(monkeypatch, defend_module, "save_checkpoint", 1)
    result = call(*arguments)
    assert result.exit_code == 130
    assert "run the same command again" in text_of(result)
    assert (tmp_path / "checkpoint-badnets-0-4-1.pt").exists()
    result = call(*arguments, "--seed", 1)  # another demo is not stopped by it
    assert result.exit_code == 0, result.output


def without(files, *names):
    return [part for name, value in files.items() if name not in names for part in (name, value)]


@pytest.mark.parametrize("saliency", ["taylor", "ablation"])
def test_stats(files, saliency):
    result = call("stats", *without(files), "--saliency", saliency, "--magnitude", "effective")
    assert result.exit_code == 0, result.output
    out = files["--out"]
    assert sorted(path.name for path in out.iterdir()) == [
        "correlation.png", "neurons.csv", "neurons.json", "neurons.png",
    ]  # fmt: skip
    content = json.loads((out / "neurons.json").read_text())
    assert (content["saliency"], content["magnitude"]) == (saliency, "effective")
    value = content["correlation"]["spearman"]["value"]
    assert f"{value:.2f}" in text_of(result)
    with Image.open(out / "neurons.png") as image:
        assert min(image.size) > 300


def test_interrupted_stats_go_on(files, monkeypatch):
    ablation = importlib.import_module("mnp_fast.stats.ablation")
    monkeypatch.setattr(ablation, "SAVE_SECONDS", 0.0)
    interrupt_at(monkeypatch, ablation, "save_checkpoint", 2)
    arguments = ("stats", *without(files), "--saliency", "ablation")
    result = call(*arguments)
    assert result.exit_code == 130
    assert "run the same command again" in text_of(result)
    assert (files["--out"] / "ablation.pt").exists()
    assert call(*arguments).exit_code == 0
    assert not (files["--out"] / "ablation.pt").exists()


def test_bad_options_of_stats(files):
    result = call("stats", *without(files), "--saliency", "oracle")
    assert result.exit_code == 1
    assert "Error: saliency must be one of" in text_of(result)


@pytest.mark.parametrize(
    ("intercept", "code", "says"), [(90, 3, "likely"), (-90, 0, "No backdoor")]
)
def test_detect(files, tmp_path, intercept, code, says):
    known = calibration(intercept=float(intercept))
    known.save(tmp_path / "calibration.json")
    result = call("detect", *without(files), "--calibration", tmp_path / "calibration.json")
    assert result.exit_code == code, result.output
    assert says in text_of(result)
    assert "Calibrated on: stripes (4 none)" in text_of(result)
    content = json.loads((files["--out"] / "detection.json").read_text())
    assert content["verdict"] == (code == 3)
    assert content["target_class"] == 0
    assert (files["--out"] / "detection.png").exists()


def test_detect_needs_a_calibration(files, tmp_path):
    result = call("detect", *without(files, "--out"), "--calibration", tmp_path / "missing.json")
    assert result.exit_code == 1
    assert "missing.json" in text_of(result)
    (tmp_path / "missing.json").write_text("{}")
    result = call("detect", *without(files, "--out"), "--calibration", tmp_path / "missing.json")
    assert "is not a calibration of this version" in text_of(result)


def test_detect_and_stats_need_one_source(files):
    for command in ("detect", "stats"):
        result = call(command, *without(files, "--checkpoint"))
        assert result.exit_code == 1
        assert "give either --model with --checkpoint, or --exported" in text_of(result)
