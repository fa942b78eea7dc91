import pytest
import torch
from torch import nn

from benchmarks import data, population
from benchmarks.architectures import ARCHITECTURES, build
from benchmarks.attacks import ATTACKS
from mnp_fast.wrap import wrap

from .commands import call
from .models import randomize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [16, 32])
def test_architectures_can_be_masked(name, size):
    model = randomize(build(name, 4, 0)).double().eval()
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    assert model(images).shape == (2, 10)
    torch.testing.assert_close(wrap(model).eval()(images), model(images))
    again, other = build(name, 4, 0), build(name, 4, 1)
    first = next(model.parameters()).float()
    assert torch.equal(first, next(again.parameters()))
    assert not torch.equal(first, next(other.parameters()))


def write_cifar(folder, records=3):
    generator = torch.Generator().manual_seed(0)
    for name in (*data.CIFAR_TRAIN, *data.CIFAR_TEST):
        batch = torch.randint(256, (records, data.RECORD), generator=generator, dtype=torch.uint8)
        batch[:, 0] = torch.arange(records) % 10
        (folder / name).write_bytes(batch.numpy().tobytes())
    return batch


def test_cifar(tmp_path, monkeypatch):
    last = write_cifar(tmp_path)
    monkeypatch.setattr(data, "CIFAR_CLEAN", 4)
    found = data.load("cifar10", 32, 1, tmp_path)
    assert [len(part[1]) for part in (found.train, found.clean, found.test)] == [11, 4, 3]
    images, labels = found.test
    assert torch.equal(images[2, 1, 4, 5] * 255, last[2, 1 + 1024 + 4 * 32 + 5].float())
    assert labels.tolist() == [0, 1, 2]
    everything = torch.cat([found.train[0], found.clean[0]])
    assert len(everything.unique(dim=0)) == 15
    again, other = (data.load("cifar10", 32, seed, tmp_path).clean[0] for seed in (1, 2))
    assert torch.equal(found.clean[0], again)
    assert not torch.equal(again, other)


def test_cifar_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match="data must be digits or cifar10, not 'mnist'"):
        data.load("mnist", 16, 0, None)
    with pytest.raises(ValueError, match="size 32"):
        data.load("cifar10", 16, 0, tmp_path)
    with pytest.raises(FileNotFoundError):
        data.load("cifar10", 32, 0, tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"data_batch_3\.bin' is not a binary batch"):
        data.load("cifar10", 32, 0, tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\xff" * data.RECORD)
    with pytest.raises(ValueError, match="label 255"):
        data.load("cifar10", 32, 0, tmp_path)


def test_shifted_images_are_parts_of_the_padded_one_or_mirrored():
    images = torch.rand(40, 3, 6, 6)
    found = population.shifted(images, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, [4] * 4)
    mirrored = 0
    for image, source in zip(found, padded, strict=True):
        windows = source.unfold(1, 6, 1).unfold(2, 6, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        plain = (windows == image).flatten(1).all(1).any()
        flipped = (windows == image.flip(-1)).flatten(1).all(1).any()
        assert plain or flipped
        mirrored += int(flipped and not plain)
    assert 5 < mirrored < 35


def test_models_are_trained_once(tmp_path, monkeypatch):
    setting = population.Setting("badnets", width=2, epochs=1)
    first = population.subject(setting, store=tmp_path)
    keys = {"accuracy", "asr", "robust", "clean_accuracy", "clean_asr"}
    assert set(first.figures) == keys
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # the clean model too
    monkeypatch.setattr(population, "train", None)
    again = population.subject(setting, store=tmp_path)
    assert again.figures == first.figures
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    measured = population.measure(again.model, setting, again.trigger, again.data)
    assert measured == {key: first.figures[key] for key in ("accuracy", "asr", "robust")}
    # An attack that is another one now is no longer that of the stored model.
    monkeypatch.setitem(population.ATTACKS, "badnets", population.ATTACKS["all-to-all"])
    with pytest.raises(RuntimeError, match="other figures now than when trained; delete it"):
        population.subject(setting, store=tmp_path)


def test_a_setting_is_checked():
    with pytest.raises(ValueError, match="attack must be one of none, badnets"):
        population.Setting("wannet")
    with pytest.raises(ValueError, match="arch must be one of resnet18"):
        population.Setting("none", arch="alexnet")
    with pytest.raises(ValueError, match="target must be from 0 to 9, not 10"):
        population.Setting("badnets", target=10)


def test_the_attack_leads_to_the_settings_class(tmp_path):
    setting = population.Setting("badnets", width=4, epochs=6, target=3)
    found = population.subject(setting, store=tmp_path)
    assert found.figures["asr"] > 50
    assert setting.clean == population.Setting("none", width=4, epochs=6)


def test_attacks_that_did_not_take_are_reported(tmp_path):
    taken = {"asr": 95.0, "accuracy": 97.0, "clean_accuracy": 98.5}
    assert population.failures(taken) == []
    assert population.failures({**taken, "asr": 80.0}) == ["ASR below 90 %"]
    assert len(population.failures({**taken, "accuracy": 96.0, "asr": 1.0})) == 2
    options = "--attacks", "badnets", "--width", 2, "--epochs", 1, "--store", tmp_path
    result = call(population.main, *options)
    assert result.exit_code == 1
    assert "ASR below 90 %" in result.output


def test_all_attacks_are_known_to_the_population():
    assert ("none", *ATTACKS) == population.KINDS
