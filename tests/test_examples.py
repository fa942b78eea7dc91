"""The examples, on less data and with fewer epochs than when they are run."""

import zipfile

import numpy as np
import pytest
import torch

import mnp_fast
from examples import backdoorbench, own_loop
from mnp_fast.io import CheckpointError, DataError

QUICK = mnp_fast.DefenseConfig(suppress_epochs=1, suspects=1, offset_steps=6, fit_epochs=1)
FACTORY = "mnp_fast.demo.resnet:ResNet18"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder of a network that is hardly trained."""
    return backdoorbench.make_folder(tmp_path_factory.mktemp("bench"), epochs=1)


def test_backdoorbench_from_end_to_end(results, capsys):
    data = results.parents[1] / "data" / "digits"
    result = backdoorbench.purify(results, FACTORY, data, QUICK, mean=(0, 0, 0), std=(1, 1, 1))
    shown = capsys.readouterr().out
    assert "clean accuracy" in shown
    assert "attack success" in shown
    written = torch.load(results / "defense" / "mnp" / "defense_result.pt", weights_only=True)
    attack = torch.load(results / "attack_result.pt", weights_only=False)
    assert written.keys() == {"model_name", "num_classes", "model"}
    assert (written["model_name"], written["num_classes"]) == ("resnet18", 10)
    assert list(written["model"]) == list(attack["model"])
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, written["model"][name])


def test_triggered_images_have_the_attackers_labels(results):
    attack = backdoorbench.read_attack(results)
    samples = attack["bd_test"]["bd_data_container"]["data_dict"]
    for index, sample in samples.items():  # of every class its own, to see the order
        sample["other_info"][0] = 1000 * sample["other_info"][1] + int(index)
    images, labels = backdoorbench.triggered(results, attack)
    index = next(iter(samples))
    path, label = samples[index]["path"], samples[index]["other_info"][0]
    pixels = np.asarray(backdoorbench.Image.open(path)).transpose(2, 0, 1)
    assert torch.equal(images[labels == label][0], torch.tensor(pixels / np.float32(255)))
    del samples[index]
    with pytest.raises(DataError, match="bd_test_dataset"):
        backdoorbench.triggered(results, attack)


def test_files_of_numpy_1_are_read(results, tmp_path):
    new, old = (folder / "attack_result.pt" for folder in (results, tmp_path))
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert old.read_bytes().count(b"numpy.core.multiarray") >= 2
    expected, found = (backdoorbench.read_attack(path.parent)["bd_test"] for path in (new, old))
    for name in ("original_index_array", "poison_indicator"):
        assert np.array_equal(expected[name], found[name])


class Stranger:
    """Would run something if it were unpickled."""

    def __reduce__(self):
        return print, ("run",)


KNOWN = {"model_name": "", "num_classes": 2, "model": {}, "img_size": [16, 16, 3]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (KNOWN | {"bd_test": Stranger()}, r"\bprint, which can execute"),
        (KNOWN | {"bd_test": np.array([Stranger()], dtype=object)}, "not a readable"),
        (KNOWN | {"bd_test": {"x": torch.zeros(1), "y": torch.zeros(1)}}, "bd_test of its kind"),
        (KNOWN, "lacks bd_test"),
        (torch.zeros(1), "lacks bd_test, img_size"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "attack_result.pt")
    with pytest.raises(CheckpointError, match=message):
        backdoorbench.read_attack(tmp_path)
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError):
        backdoorbench.read_attack(tmp_path / "other")


def test_own_loop(capsys):
    small = own_loop.main(train_epochs=1, mask_epochs=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["trained", "pruned", "compact"]
    pruned, compact = (line.split(": ")[1].split(" %")[0] for line in lines[1:])
    assert pruned == compact
    assert small.conv1.out_channels <= 8
    assert sum(p.numel() for p in small.parameters()) < 176402
