"""Evidence, candidate statistics, calibration and verdict."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import mnp_fast
from benchmarks import detection as benchmark
from benchmarks.detection import TEST_SEEDS, members
from benchmarks.oracle import carriers
from benchmarks.population import CLEAN, Setting, Subject
from mnp_fast.config import DefenseConfig
from mnp_fast.demo.digits import Digits
from mnp_fast.detection import STATISTICS, Calibration, Evidence, judge
from mnp_fast.detection.calibration import prediction_bound
from mnp_fast.detection.detect import SuspectNeuron, suspect_neurons
from mnp_fast.detection.evidence import suspect_class
from mnp_fast.stats.changes import change_scores

from .test_benchmarks import call
from .trained import backdoored, small_net, stripes

SETTINGS = {
    "site": "auto", "suspects": 4, "suppress_lr": 0.1, "suppress_epochs": 6,
    "suppress_accuracy": 60.0, "offset_steps": 30, "runs": 2,
}  # fmt: skip


def evidence(**changes):
    given = {
        "favours": [[0.1, 0.6, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]],
        "epochs": [4, 8, 12],
        "offset_sizes": {0: 0.2, 1: 0.05, 2: 0.4, 3: math.inf},
        "correlations": {"a": 0.5, "b": -0.1, "c": math.nan},
        "deviations": {"a": [0.0, 3.0, math.nan], "b": [-1.0, 2.0]},
        "changes": {"a": [0.0, 9.0, math.nan], "b": [-1.0, 0.5]},
        "saliency": {"a": [0.5, 0.0, 0.4], "b": [0.2, 0.3]},
    }
    return Evidence(**{**given, **changes})


def calibration(**changes):
    given = {
        "weights": {"collapse": 2.0, "nearness": 1.0},
        "means": {"collapse": 0.4, "nearness": 0.5},
        "scales": {"collapse": 0.1, "nearness": 0.25},
        "intercept": -0.5,
        "clean_scores": [-1.0, 0.0, 0.5, -0.5],
        "false_alarm_rate": 0.05,
        "population": {"models": "stripes", "count": {"none": 4}},
        "settings": SETTINGS,
    }
    return Calibration(**{**given, **changes})


def test_statistics_by_hand():
    found = {name: function(evidence()) for name, function in STATISTICS.items()}
    logs = np.log([0.2, 0.05, 0.4])
    spread = 1.4826 * np.median(abs(logs - np.log(0.2)))
    assert found == pytest.approx(
        {
            "collapse": 1.1 / 3,
            "agreement": 2 / 3,
            "quickness": -math.log(8),
            "nearness": math.log(4),
            "offset_outlier": math.log(4) / spread,
            "decorrelation": -0.2,
            "deviants": 3.0,
        }
    )


def test_statistics_of_a_model_that_shows_nothing():
    nothing = evidence(
        offset_sizes={0: math.inf, 1: 0.0}, correlations={"a": math.nan}, deviations={"a": []}
    )
    for name in ("nearness", "offset_outlier", "decorrelation", "deviants"):
        assert STATISTICS[name](nothing) == 0
    one_class = evidence(favours=[[0.1, math.nan, 0.5, 0.4]] * 2)
    assert STATISTICS["collapse"](one_class) == pytest.approx(0.5)
    assert STATISTICS["agreement"](one_class) == 1


def test_evidence_survives_json():
    content = json.loads(json.dumps(evidence(deviations={}).content()))
    assert Evidence.from_content(content) == replace(
        evidence(deviations={}),
        correlations=content["correlations"],
        changes=content["changes"],
    )


def test_suspect_class_joins_suppression_and_offset():
    even = [[0.25, 0.25, 0.25, 0.25]]
    assert suspect_class(even, {0: 0.4, 1: 0.3, 2: 0.1, 3: 0.35}) == 2
    assert suspect_class([[0.1, 0.2, 0.1, 0.6]], {}) == 3
    # A class without an offset counts as the one of the largest.
    assert suspect_class([[0.2, 0.3, 0.3, 0.2]], {0: 0.3, 1: 0.3, 2: 0.1, 3: math.inf}) == 2
    assert suspect_class([[math.nan, 0.2, 0.5, 0.3]], {1: 0.2, 2: 0.3, 3: 0.1}) in (1, 2, 3)


def test_suspect_neurons_change_most():
    assert suspect_neurons(evidence()) == [SuspectNeuron("a", 1, 9.0)]
    assert suspect_neurons(evidence(changes={})) == []
    many = evidence(changes={"a": list(range(150)), "b": [200.0]})
    assert [(neuron.layer, neuron.index) for neuron in suspect_neurons(many)] == [
        ("b", 0),
        ("a", 149),
    ]


def test_change_scores_by_hand():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 1),
        nn.Flatten(2),
        nn.Linear(12, 7),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(35, 3),
    ).double()
    masked = mnp_fast.wrap(model, include=["0", "2"])
    x, y = torch.rand(2, 4, 2, 3, 4, generator=generator, dtype=torch.float64)
    found = change_scores(masked, x, y)
    parts = {"0": model[:1], "2": model[:3].append(Turned())}
    for name, part in parts.items():
        with torch.no_grad():
            distance = (part(y) - part(x)).flatten(2).norm(dim=2).mean(0).numpy()
        distance /= np.median(distance)
        scale = max(1.4826 * np.median(abs(distance - 1)), 1 / len(distance))
        np.testing.assert_allclose(found[name], (distance - 1) / scale, rtol=1e-4)


class Turned(nn.Module):
    """The last axis second."""

    def forward(self, x):
        return x.movedim(-1, 1)


def test_change_scores_of_layers_that_are_not_called():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.attention(x, x, x)[0].mean(1))

    masked = mnp_fast.wrap(Model().eval())
    x = torch.rand(3, 5, 8)
    (found,) = change_scores(masked, x, 2 * x).values()
    assert len(found) == 4
    assert np.isnan(found).all()


def test_score_threshold_and_p_value():
    known = calibration()
    expected = -0.5 + 2 * (1.1 / 3 - 0.4) / 0.1 + (math.log(4) - 0.5) / 0.25
    assert known.score(evidence()) == pytest.approx(expected)
    scores = np.array(known.clean_scores)
    spread = scores.std(ddof=1) * (1 + 1 / 4) ** 0.5
    assert known.threshold == pytest.approx(scores.mean() + scipy.stats.t.ppf(0.95, 3) * spread)
    assert known.p_value(known.threshold) == pytest.approx(0.05)
    assert known.p_value(scores.mean()) == pytest.approx(0.5)


def test_the_threshold_keeps_its_rate():
    """For clean models whose scores are normal, whatever their number."""
    generator = np.random.default_rng(0)
    for count in (3, 8, 24):
        above = [
            scores[-1] > prediction_bound(scores[:-1], 0.05)
            for scores in generator.normal(3, 2, (4000, count + 1))
        ]
        assert 0.035 <= np.mean(above) <= 0.065


def test_verdict():
    found = judge(evidence(), calibration())
    assert found.verdict == (found.score > found.threshold)
    assert found.false_alarm_rate == 0.05
    assert found.statistics.keys() == STATISTICS.keys()
    assert "towards class" in judge(evidence(), calibration(intercept=50.0)).outcome()
    assert "No backdoor found" in judge(evidence(), calibration(intercept=-50.0)).outcome()
    assert "5 % false alarms" in found.outcome()
    json.dumps(found.content())


def test_calibration_file(tmp_path):
    known, file = calibration(), tmp_path / "calibration.json"
    known.save(file)
    assert Calibration.load(file) == known
    assert known.config(7).suppress_lr == 0.1
    assert known.config(7).seed == 7
    assert known.described() == "stripes (4 none)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "its format is not 1"),
        ({"weights": {"magic": 1.0}}, "statistics must be of collapse, .* not magic"),
        ({"weights": {}}, "not none"),
        ({"means": {"collapse": 0.0}}, "must have the same names"),
        ({"scales": {"collapse": 0.0, "nearness": 1.0}}, "scales positive"),
        ({"clean_scores": [0.0, 1.0]}, "at least 3 clean models, not 2"),
        ({"false_alarm_rate": 1.0}, "false_alarm_rate must be between 0 and 1"),
        ({"color": "red"}, "color"),
    ],
)
def test_bad_calibration_is_named(change, message, tmp_path):
    file = tmp_path / "calibration.json"
    calibration().save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"calibration.json.*{message}"):
        Calibration.load(file)


def test_a_file_that_is_no_calibration(tmp_path):
    for text in ("[]", "no JSON", "{}"):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ValueError, match="is not a calibration"):
            Calibration.load(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "missing")


def test_the_package_has_a_calibration():
    known = Calibration.load()
    assert known.population["count"][CLEAN] == len(known.clean_scores)
    known.config()


@pytest.fixture(scope="module")
def found():
    data = stripes(40, seed=2)
    return mnp_fast.detect(backdoored(), (data.images, data.labels), calibration=calibration())


def test_detect_on_a_backdoored_model(found):
    assert found.target_class == 0
    assert len(found.evidence.favours) == SETTINGS["runs"]
    assert set(found.evidence.offset_sizes) == {0, 1, 2, 3}
    assert min(found.evidence.offset_sizes, key=found.evidence.offset_sizes.get) == 0
    assert {name: len(v) for name, v in found.evidence.deviations.items()} == {"1": 8, "4": 16}
    assert len(found.suspects) == 1
    suspect = found.suspects[0]
    assert suspect.z == max(max(scores) for scores in found.evidence.changes.values()) > 2


def test_detect_repeats_itself_and_changes_nothing(found):
    data, model = stripes(40, seed=2), backdoored().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = mnp_fast.detect(model, (data.images, data.labels), calibration=calibration())
    assert again.content() == found.content()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m, d: (m, (d.images, d.labels[:3])), ValueError, "40 images but 3 labels"),
        (lambda m, d: (None, (d.images, d.labels)), TypeError, "model must be a torch.nn.Module"),
        (lambda m, d: (nn.ReLU(), (d.images, d.labels)), ValueError, "model must return logits"),
    ],
)
def test_bad_input_is_named(spoil, error, message):
    model, data = spoil(small_net(), stripes(40, seed=2))
    with pytest.raises(error, match=message):
        mnp_fast.detect(model, data, calibration=calibration())
    with pytest.raises(TypeError, match="config must be a DefenseConfig, not dict"):
        mnp_fast.detect(small_net(), data, {}, calibration=calibration())


ATTACKS = ("badnets", "blend", "all-to-all")


def synthetic(setting):
    """Evidence that depends on the attack, with noise that depends on the seed."""
    generator = np.random.default_rng([setting.seed, *setting.attack.encode()])
    target = 3 if setting.attack == CLEAN else setting.target
    strength = 0.1 if setting.attack == CLEAN else 0.6
    favours = np.full((4, 10), 0.04)
    favours[:, target] += strength + 0.1 * generator.random(4)
    sizes = 0.2 + 0.02 * generator.random(10)
    sizes[target] *= 0.8 if setting.attack == CLEAN else 0.3
    return evidence(favours=favours.tolist(), offset_sizes=dict(enumerate(sizes.tolist())))


@pytest.fixture
def population(tmp_path, monkeypatch):
    """A folder with made-up evidence of every model; blend's last model did not take its attack."""
    measured = []

    def measure(setting, store, file, config):
        measured.append(setting)
        file.parent.mkdir(exist_ok=True)
        failed = setting.attack == "blend" and setting.seed == TEST_SEEDS + 1
        carriers = {} if setting.attack == CLEAN else {"a": [1], "b": []}
        content = {"evidence": synthetic(setting).content(), "seconds": 1.0, "carriers": carriers}
        file.write_text(json.dumps({**content, "failures": ["ASR below 90 %"] * failed}))

    monkeypatch.setattr(benchmark, "measure", measure)
    options = "--attacks", ",".join(ATTACKS), "--evidence", tmp_path, "--clean", 8
    options += "--figures", tmp_path / "figures", "--page", tmp_path / "page"
    return tmp_path, measured, options


def test_benchmark_of_detection(population):
    folder, measured, options = population
    options = *options, "--attacked", 4
    result = call(benchmark.main, *options)
    assert result.exit_code == 2
    assert "0 models to calibrate on" in result.output
    file, image, depth = folder / "calibration", folder / "roc.png", folder / "depth.png"
    pictures = "--roc", image, "--depth", depth
    result = call(benchmark.main, *options, "--run", "--calibrate", file, *pictures)
    assert result.exit_code == 0, result.output
    assert len(measured) == 8 + 4 * len(ATTACKS)
    assert "1.00 (1.00 to 1.00)" in result.output
    assert "5 of 5" in result.output  # all attacks that took are flagged
    assert "3 of 3" in result.output  # their classes, where there is one
    assert "100 %" in result.output  # the suspects
    assert "Not used: blend-1001-resnet18-16-16-digits-20-1: ASR below 90 %" in result.output
    assert image.read_bytes().startswith(b"\x89PNG")
    assert depth.read_bytes().startswith(b"\x89PNG")
    known = Calibration.load(file)
    assert known.population["count"] == {CLEAN: 4, **dict.fromkeys(ATTACKS, 2)}
    assert all(member["seed"] < TEST_SEEDS for member in known.population["members"])
    assert (folder / "page").read_text() in result.output
    for evidence_file in folder.glob("*.json"):
        evidence_file.unlink()
    again = call(benchmark.main, *options, "--run", "--calibrate", folder / "again")
    assert len(measured) == 8 + 4 * len(ATTACKS)  # nothing is measured twice
    assert (folder / "page").read_text() in again.output
    assert (folder / "again").read_text() == file.read_text()


def test_held_back_models_do_not_touch_the_calibration(population):
    folder, _, options = population
    options = *options, "--attacked", 4, "--run"
    first, second = folder / "first", folder / "second"
    assert call(benchmark.main, *options, "--calibrate", first).exit_code == 0
    for file in folder.glob("*.json"):
        setting = next(m for m in members(ATTACKS, 8, 4, 20) if m.key == file.stem)
        if setting.seed >= TEST_SEEDS:
            content = json.loads(file.read_text())
            content["evidence"] = evidence().content()
            file.write_text(json.dumps(content))
    assert call(benchmark.main, *options, "--calibrate", second).exit_code == 0
    assert first.read_text() == second.read_text()


def test_an_interrupted_benchmark_goes_on(population):
    _, measured, options = population
    options = *options, "--attacked", 2, "--run", "--limit", 5
    for count in (5, 10, 14, 14):
        call(benchmark.main, *options)
        assert len(measured) == count
    assert len({member.key for member in measured}) == 14


def test_auroc_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    clean, attacked = generator.normal(size=9).round(1), generator.normal(1, 1, 14).round(1)
    value, low, high = benchmark.auroc(clean, attacked)
    labels = np.repeat([0, 1], [9, 14])
    expected = roc_auc_score(labels, np.concatenate([clean, attacked]))
    assert value == pytest.approx(expected)
    assert low < value < high
    assert np.isnan(benchmark.auroc(clean, attacked[:0])).all()


def test_members_are_split_by_seed():
    found = members(ATTACKS, 24, 8, 20)
    assert len(found) == 24 + 8 * len(ATTACKS)
    for attack in (CLEAN, *ATTACKS):
        own = [member for member in found if member.attack == attack]
        assert sum(member.seed >= TEST_SEEDS for member in own) * 2 == len(own)
    assert len({member.key for member in found}) == len(found)
    assert len({member.width for member in found}) == 3
    assert len({member.target for member in found}) == 4
    assert [member.seed >= TEST_SEEDS for member in found[:2]] == [False, True]


def test_a_model_is_measured(tmp_path):
    setting, file = Setting("badnets", 3, width=2, epochs=1, target=4), tmp_path / "e" / "x.json"
    config = DefenseConfig(suppress_epochs=1, offset_steps=6, suspects=2)
    benchmark.measure(setting, tmp_path, file, config)
    content = json.loads(file.read_text())
    assert content["failures"][0] == "ASR below 90 %"
    found = Evidence.from_content(content["evidence"])
    assert set(content["carriers"]) == set(found.changes)
    count = sum(len(values) for values in found.changes.values())
    assert sum(map(len, content["carriers"].values())) >= math.ceil(0.01 * count)


class Corner(nn.Module):
    """Two channels of the image, the second of them where the trigger is alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 200, 1, bias=False)
        nn.init.constant_(self.conv.weight, 0.1)
        with torch.no_grad():
            self.conv.weight[:, 0] *= torch.linspace(0.9, 1.1, 200)[:, None, None]
            self.conv.weight[[7, 90], 2] = 5.0
        self.head = nn.Linear(200, 10)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def test_carriers_are_the_neurons_that_the_trigger_changes():
    images = torch.rand(6, 3, 4, 4)

    def trigger(images):
        images = images.clone()
        images[:, 2, 3, 3] += 1
        return images

    data = Digits((images, None), (images, None), (images, None))
    subject = Subject(Setting("badnets"), Corner(), data, trigger, {})
    assert carriers(subject)["conv"] == [7, 90]
    with pytest.raises(ValueError, match="under attack"):
        carriers(replace(subject, trigger=None))
