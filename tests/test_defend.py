import contextlib
import copy
import importlib
import io
import json
import pickle

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mnp_fast
from mnp_fast import DefenseConfig, defend
from mnp_fast.data import evaluate
from mnp_fast.exposure import OffsetExposure
from mnp_fast.io import CheckpointError, load_checkpoint
from mnp_fast.objectives import MaskFit

from .models import NoNorm
from .trained import attack_success, backdoored, small_net, stripes

module = importlib.import_module("mnp_fast.defend")
CLEAN = stripes(40, seed=2)
DATA = (CLEAN.images, CLEAN.labels)
EXPOSURES = ["offset", "weights"]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("mnp_fast.io.files._sync", lambda path: None)


def small(exposure="offset", **settings):
    """A configuration of a few epochs that stops suppressing before the last one allowed."""
    short = {
        "suppressions": 2, "suppress_lr": 0.1, "suppress_epochs": 15, "suppress_accuracy": 60.0,
        "suppress_batch_size": 16, "offset_steps": 6, "fit_epochs": 3, "fit_batch_size": 10,
        "fit_lr": 0.2, "max_pruned": 0.5, "few": 1, "max_exposed": 99.0, "max_drop": 100.0,
    }  # fmt: skip
    return DefenseConfig(exposure=exposure, **{**short, **settings})


def same_state(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(v, states[1][k]) for k, v in states[0].items()
    )


def outcome(result):
    """All but the times, for bitwise comparison."""
    history = [(r.phase, r.epoch, r.loss, r.accuracy) for r in result.history]
    masks = {name: mask.tolist() for name, mask in result.masks.items()}
    weights = {name: value.tolist() for name, value in result.model.state_dict().items()}
    return masks, result.curve, result.cut, result.pruned, result.target, history, weights


def test_removes_a_backdoor():
    model = backdoored().eval()
    assert attack_success(model) > 95
    result = defend(model, DATA, DefenseConfig(max_pruned=0.5, few=1, fit_batch_size=10))
    assert result.target == 0
    assert attack_success(result.model) < 10
    assert evaluate(result.model, stripes(200, seed=5))[0] > 95
    assert 0 < len(result.pruned) < 12
    assert result.curve[0].exposed > 95
    assert result.cut.exposed <= 8
    assert min(result.offset_sizes, key=result.offset_sizes.get) == 0
    assert sorted(result.offset_sizes) == [0, 1, 2, 3]


@pytest.mark.parametrize(("suspects", "target"), [(1, 2), (3, 0), (9, 0)])
def test_target_is_the_suspect_with_the_smallest_offset(suspects, target, monkeypatch):
    favours = dict.fromkeys([2, 3, 0, 1], 0.0)
    monkeypatch.setattr(module, "favoured_classes", lambda *_: favours)
    short = {"offset_steps": 40, "fit_epochs": 1, "suspects": suspects}
    assert defend(backdoored(), DATA, small(**short)).target == target
    assert defend(backdoored(), DATA, small("weights", **short)).target == 2


@pytest.fixture
def no_cut_will_do(monkeypatch):
    """And the trained network's four classes are enough to tell a suspect among them."""
    monkeypatch.setattr("mnp_fast.suspects.RIVALS", 3)
    monkeypatch.setattr(module, "choose", lambda curve, *_: curve[0])


REPAIRED = {"offset_steps": 40, "few": 1, "max_pruned": 0.01, "fit_lr": 1e-3}


@pytest.mark.usefixtures("no_cut_will_do")
def test_what_a_cut_leaves_is_repaired_if_the_suspect_is_conspicuous():
    model = backdoored().eval()
    config = small(**REPAIRED, repair_epochs=25)
    result = defend(model, DATA, config)
    assert result.conspicuous
    assert result.target == 0
    assert len(result.pruned) == result.cut.pruned == result.repaired.pruned == 2
    assert attack_success(result.model) < 20 < 90 < attack_success(model)
    assert result.repaired.accuracy == evaluate(result.model, CLEAN)[0]
    changed = {
        name
        for name, value in result.model.state_dict().items()
        if not torch.equal(value, model.state_dict()[name])
    }
    assert changed == {"1.weight", "1.bias", "4.weight", "4.bias", "8.bias"}
    assert [r.epoch for r in result.history if r.phase == "repair"] == list(range(1, 26))
    assert "repair" in result.seconds
    assert "and the rest repaired (suspect: class 0)" in result.outcome()
    assert result.summary()["repaired"]["accuracy"] == result.repaired.accuracy


def suppressed_runs(result):
    return sum(r.phase == "suppress" and r.accuracy <= 60 for r in result.history)


# Nothing is conspicuous.
NEVER = {"conspicuous": 0.0, "untargeted": 0.0, "suppressions_again": 0, "drift_favour": 1.0}
AGAIN = {**NEVER, "suppressions_again": 3, "conspicuous_again": 1.0}  # but at the second look


@pytest.mark.usefixtures("no_cut_will_do")
@pytest.mark.parametrize(
    ("settings", "runs", "conspicuous"),
    [
        ({**AGAIN, "conspicuous": 1.0}, 2, True),
        (AGAIN, 5, True),
        ({**AGAIN, "conspicuous_again": -0.5}, 5, False),
        ({**AGAIN, "conspicuous_again": -1.0}, 2, False),  # not even doubtful
        (NEVER, 2, False),
    ],
)
def test_a_doubtful_suspect_is_looked_at_again(settings, runs, conspicuous, monkeypatch):
    monkeypatch.setattr("mnp_fast.suspects.DOUBT", 0.7)
    result = defend(backdoored(), DATA, small(**REPAIRED, **settings, repair_epochs=1))
    assert result.conspicuous == conspicuous
    assert suppressed_runs(result) == runs


@pytest.mark.usefixtures("no_cut_will_do")
def test_a_second_look_goes_on_after_an_interruption(monkeypatch, tmp_path):
    config = small(**REPAIRED, **AGAIN, repair_epochs=1)
    expected = defend(backdoored(), DATA, config)
    with monkeypatch.context() as patch:
        interrupted(patch, module, "favour", 4, False)
        with pytest.raises(KeyboardInterrupt):
            defend(backdoored(), DATA, config, checkpoint=tmp_path / "c.pt")
    found = defend(backdoored(), DATA, config, checkpoint=tmp_path / "c.pt")
    assert suppressed_runs(expected) == 5
    assert outcome(found) == outcome(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"repair_epochs": 0},
        NEVER,
        {"repair_lr": 10.0, "max_drop": 1.0},  # it ruins the network
    ],
)
@pytest.mark.usefixtures("no_cut_will_do")
def test_nothing_is_repaired(settings):
    model = backdoored().eval()
    result = defend(model, DATA, small(**{**REPAIRED, "repair_epochs": 2, **settings}))
    assert result.repaired is None
    assert result.pruned == []
    assert result.cut is result.curve[0]
    assert same_state(result.model, model)
    assert result.conspicuous == ("conspicuous" not in settings)
    assert ("there is a suspect" in result.outcome()) == result.conspicuous


@pytest.mark.parametrize("afforded", [1, 3, 9])
def test_a_cut_is_no_longer_than_is_needed_and_afforded_before_a_repair(afforded, monkeypatch):
    monkeypatch.setattr("mnp_fast.suspects.RIVALS", 3)
    monkeypatch.setattr(module, "choose", lambda curve, *_: curve[3])
    monkeypatch.setattr(module, "affordable", lambda curve, *_: curve[afforded])
    settings = {"offset_steps": 40, "max_pruned": 0.25, "repair_epochs": 2}
    result = defend(backdoored().eval(), DATA, small(**settings))
    assert result.conspicuous
    assert len(result.pruned) == result.cut.pruned == result.repaired.pruned == min(3, afforded)
    assert result.repaired.accuracy == evaluate(result.model, CLEAN)[0]


@pytest.mark.parametrize(("rivals", "limit"), [(4, "max_drop"), (3, "unsure_drop")])
def test_a_cut_is_to_cost_less_where_a_suspect_could_be_conspicuous(rivals, limit, monkeypatch):
    given = []
    monkeypatch.setattr("mnp_fast.suspects.RIVALS", rivals)
    monkeypatch.setattr(module, "choose", lambda curve, *rest: given.append(rest[-1]) or curve[0])
    config = small(**NEVER, offset_steps=40, max_drop=7.0, unsure_drop=2.0)
    defend(backdoored().eval(), DATA, config)
    assert given == [getattr(config, limit)]


def test_a_repair_that_costs_too_much_leaves_the_cut(monkeypatch):
    monkeypatch.setattr("mnp_fast.suspects.RIVALS", 3)
    monkeypatch.setattr(module, "choose", lambda curve, *_: curve[3])
    monkeypatch.setattr(module, "affordable", lambda curve, *_: curve[1])
    monkeypatch.setattr(module, "admissible", lambda *_: False)
    model = backdoored().eval()
    settings = {"offset_steps": 40, "max_pruned": 0.25, "repair_epochs": 2}
    result = defend(model, DATA, small(**settings))
    assert result.repaired is None
    assert len(result.pruned) == result.cut.pruned == 3
    assert torch.equal(result.model[8].bias, model[8].bias)


@pytest.mark.usefixtures("no_cut_will_do")
def test_an_offset_away_from_all_classes_is_the_last_suspect():
    settings = {**REPAIRED, **NEVER, "untargeted": 1.0, "drift_agreement": 1.0, "repair_epochs": 2}
    result = defend(backdoored().eval(), DATA, small(**settings))
    sizes = sorted(result.offset_sizes.values())
    assert 0 < result.untargeted_size <= (sizes[1] + sizes[2]) / 2
    assert result.target is None
    assert result.conspicuous
    assert "(suspect: all classes)" in result.outcome()
    assert json.loads(json.dumps(result.summary()))["target"] is None
    settings["untargeted"] = 0.0
    result = defend(backdoored().eval(), DATA, small(**settings))
    assert result.untargeted_size is None
    assert result.target == 0


@pytest.mark.usefixtures("no_cut_will_do")
def test_a_class_that_norms_remember_is_suspect():
    settings = {**REPAIRED, **NEVER, "repair_epochs": 2}
    result = defend(backdoored().eval(), DATA, small(**settings))
    assert not result.conspicuous
    favours = result.drift_favours
    assert max(favours, key=favours.__getitem__) == 0
    result = defend(backdoored().eval(), DATA, small(**{**settings, "drift_favour": favours[0]}))
    assert result.conspicuous
    assert result.target == 0
    assert result.repaired is not None
    assert result.drift_favours == favours
    assert json.loads(json.dumps(result.summary()))["drift_favours"]["0"] == favours[0]


@pytest.mark.usefixtures("no_cut_will_do")
@pytest.mark.parametrize("drift_weight", [1.0, 0.0])
def test_a_class_is_suspect_by_offset_and_drift_together(drift_weight, monkeypatch):
    monkeypatch.setattr(module, "is_conspicuous", lambda *_: False)
    settings = {**REPAIRED, **NEVER, "conspicuous": 1.0, "drift_weight": drift_weight}
    result = defend(backdoored(), DATA, small(**settings, repair_epochs=1))
    assert result.target == 0
    assert result.conspicuous == (drift_weight > 0)


def test_what_norms_remember_is_among_few_suspects(monkeypatch):
    favours = dict.fromkeys([2, 3, 0, 1], 0.0)
    monkeypatch.setattr(module, "favoured_classes", lambda *_: favours)
    result = defend(backdoored(), DATA, small(suspects=2, drift_favour=0.03))
    assert list(result.offset_sizes) == [0, 2]
    result = defend(backdoored(), DATA, small(suspects=2, drift_favour=1.0))
    assert list(result.offset_sizes) == [2, 3]


@pytest.mark.usefixtures("no_cut_will_do")
@pytest.mark.parametrize(
    ("agreement", "favour", "target"), [(-1.0, 1.0, None), (1.0, 1.0, 0), (-1.0, 0.0, None)]
)
def test_an_offset_away_from_all_classes_is_suspect_by_its_agreement(
    agreement, favour, target, monkeypatch
):
    """And before a class that norms remember."""
    monkeypatch.setattr("mnp_fast.suspects.SPREAD_OUT", 0.0)
    settings = {**REPAIRED, **NEVER, "untargeted": 1e-9, "drift_agreement": agreement}
    settings["drift_favour"] = favour
    result = defend(backdoored().eval(), DATA, small(**settings, repair_epochs=1))
    assert result.target == target
    assert result.conspicuous == (target is None)
    assert -1 < result.drift_agreement < 1
    assert 0 <= result.drift_spread <= 1


@pytest.mark.usefixtures("no_cut_will_do")
def test_an_offset_away_from_all_classes_that_leads_to_one_is_not_suspect():
    settings = {**REPAIRED, **NEVER, "untargeted": 1e-9, "drift_agreement": -1.0}
    result = defend(backdoored().eval(), DATA, small(**settings, repair_epochs=1))
    assert result.drift_spread < 0.7
    assert not result.conspicuous


@pytest.mark.usefixtures("no_cut_will_do")
def test_without_its_weight_drift_is_not_looked_at(monkeypatch):
    settings = {**REPAIRED, "repair_epochs": 1}
    followed = defend(backdoored(), DATA, small(**settings))
    monkeypatch.setattr(module, "Drift", lambda *_: pytest.fail("it was measured"))
    result = defend(backdoored(), DATA, small(**settings, drift_weight=0))
    assert result.conspicuous
    assert result.drift_favours == {}
    assert result.drift_agreement is None
    assert outcome(result)[0] != outcome(followed)[0]


@pytest.mark.usefixtures("no_cut_will_do")
def test_networks_without_batch_norms_have_no_drift():
    data = torch.rand(12, 3, 16, 16), torch.arange(12) % 4
    result = defend(NoNorm(), data, small())
    assert result.drift_favours == {}
    assert result.drift_agreement is None


@pytest.mark.usefixtures("no_cut_will_do")
@pytest.mark.parametrize("settings", [{}, {**NEVER, "untargeted": 1e-9, "drift_agreement": -1.0}])
def test_a_run_that_follows_a_drift_goes_on_after_interruptions(settings, monkeypatch, tmp_path):
    monkeypatch.setattr("mnp_fast.suspects.SPREAD_OUT", 0.0)
    config = small(**REPAIRED, **settings, repair_epochs=1)
    expected = defend(backdoored(), DATA, config)
    assert expected.conspicuous
    for count in (1, 5, 6, 7, 8):  # searches: of a class, those that follow, in the fit, the repair
        path = tmp_path / f"{count}.pt"
        with monkeypatch.context() as patch:
            interrupted(patch, OffsetExposure, "_search", count, True)
            with pytest.raises(KeyboardInterrupt):
                defend(backdoored(), DATA, config, checkpoint=path)
        assert outcome(defend(backdoored(), DATA, config, checkpoint=path)) == outcome(expected)


def test_nothing_is_cut_where_no_cut_stops_the_exposure():
    model = backdoored().eval()
    result = defend(model, DATA, small(max_exposed=0, max_drop=0, max_pruned=0.01, few=1))
    assert result.pruned == []
    assert result.cut is result.curve[0]
    assert same_state(result.model, model)


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_result_is_consistent(exposure):
    config = small(exposure)
    result = defend(backdoored(), DATA, config)
    assert [(r.phase, r.epoch) for r in result.history] == [
        *(("suppress", 1 + k) for k in range(len(result.history) - 3)),
        *(("fit", 1 + k) for k in range(3)),
    ]
    suppressed = [r for r in result.history if r.phase == "suppress"]
    runs = config.suppressions if exposure == "offset" else 1
    assert runs < len(suppressed) < runs * config.suppress_epochs
    assert sum(record.accuracy <= 60 for record in suppressed) == runs
    assert suppressed[-1].accuracy <= 60 < suppressed[-2].accuracy
    assert all(r.loss < 0 for r in suppressed)
    assert list(result.masks) == ["1", "4"]
    for layer, neurons in zip(result.neurons.values(), (8, 16), strict=True):
        for values in (layer.mask, layer.magnitude, layer.saliency):
            assert values.shape == (neurons,)
            assert values.dtype == torch.float32
            assert values.min() >= 0
        assert layer.mask.max() <= 1
    magnitude = backdoored()[3].weight.abs().sum((1, 2, 3))
    torch.testing.assert_close(result.neurons["4"].magnitude, magnitude.detach())
    assert any((mask < 1).any() for mask in result.masks.values())
    order = sorted(mask for layer in result.masks.values() for mask in layer.tolist())
    assert [neuron.mask for neuron in result.pruned] == order[: len(result.pruned)]
    assert result.cut in result.curve
    assert len(result.pruned) == result.cut.pruned
    assert [point.pruned for point in result.curve] == list(range(13))
    expected = {"suppress", "fit", "select"} | ({"expose"} if exposure == "offset" else set())
    assert set(result.seconds) == expected
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert result.config is config


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_model_is_plain_and_equal_to_one_pruned_by_hand(exposure, monkeypatch):
    monkeypatch.setattr(module, "choose", lambda curve, *_: curve[5])
    model = backdoored().eval()
    result = defend(model, DATA, small(exposure))
    assert type(result.model) is nn.Sequential
    assert not any("mnp_fast" in type(m).__module__ for m in result.model.modules())
    by_hand = copy.deepcopy(model)
    assert len({(neuron.layer, neuron.index) for neuron in result.pruned}) == 5
    for neuron in result.pruned:
        nn.init.zeros_(by_hand.get_submodule(neuron.layer).weight[neuron.index])
    assert not same_state(result.model, model)
    assert same_state(result.model, by_hand)
    assert torch.equal(result.model(CLEAN.images), by_hand(CLEAN.images))
    accuracy, loss = evaluate(by_hand, CLEAN)
    assert result.cut.accuracy == accuracy
    assert result.cut.loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_given_model_is_not_changed(exposure):
    model = backdoored().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[8].weight.grad = torch.ones_like(model[8].weight)
    model[4].register_forward_hook(lambda *_: None)
    modes = [m.training for m in model.modules()]
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    before, kept = copy.deepcopy(model), dict(model.named_parameters())
    result = defend(model, DATA, small(exposure))
    assert same_state(model, before)
    for found in (model, result.model):
        assert [m.training for m in found.modules()] == modes
        assert {name: p.requires_grad for name, p in found.named_parameters()} == needs
    assert all(p is kept[name] for name, p in model.named_parameters())
    assert torch.equal(model[8].weight.grad, torch.ones_like(model[8].weight))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["8.weight"]
    assert [len(m._forward_hooks) for m in model.modules()] == [0] * 5 + [1] + [0] * 4
    assert not any(m._forward_pre_hooks for m in model.modules())
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in result.model.parameters())


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_repeatable_by_seed(exposure):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = outcome(defend(backdoored(), DATA, small(exposure)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    loader = DataLoader(TensorDataset(*DATA), batch_size=7)
    assert outcome(defend(backdoored(), loader, small(exposure))) == first
    assert outcome(defend(backdoored(), DATA, small(exposure, seed=1)))[0] != first[0]


def saves_of(exposure, monkeypatch, folder):
    """How often an undisturbed run writes its checkpoint."""
    written = []
    with monkeypatch.context() as patch:
        real = module.save_checkpoint
        patch.setattr(module, "save_checkpoint", lambda *args: (written.append(1), real(*args)))
        result = defend(backdoored(), DATA, small(exposure), checkpoint=folder / "whole.pt")
    return len(written), outcome(result)


def interrupted(patch, owner, name, count, after):
    """Make the `count`-th call raise KeyboardInterrupt, before or after it does its work."""
    real, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and not after:
            raise KeyboardInterrupt
        result = real(*args, **kwargs)
        if len(calls) == count:
            raise KeyboardInterrupt
        return result

    patch.setattr(owner, name, stopping)


def stopped_and_resumed(monkeypatch, path, exposure, *where):
    with monkeypatch.context() as patch:
        interrupted(patch, *where)
        with pytest.raises(KeyboardInterrupt):
            defend(backdoored(), DATA, small(exposure), checkpoint=path)
    return outcome(defend(backdoored(), DATA, small(exposure), checkpoint=path))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("exposure", EXPOSURES)
def test_goes_on_from_every_checkpoint(exposure, after, monkeypatch, tmp_path):
    count, expected = saves_of(exposure, monkeypatch, tmp_path)
    assert expected == outcome(defend(backdoored(), DATA, small(exposure)))
    assert count >= 6
    for k in range(1, count + 1):
        path = tmp_path / f"{k}.pt"
        found = stopped_and_resumed(
            monkeypatch, path, exposure, module, "save_checkpoint", k, after
        )
        assert found == expected, f"interrupted at checkpoint {k}"


MOMENTS = {
    "epoch": (MaskFit, "epoch", 2, True),
    "batch": (MaskFit, "penalty", 7, False),  # in the middle of the second epoch
    "search": (OffsetExposure, "_search", 2, True),
    "saliency": (module, "saliency", 1, True),
    "cut": (module, "prune", 2, True),
    "write": (torch, "save", 3, True),
}


@pytest.mark.parametrize(
    ("exposure", "moment"),
    [(e, m) for e in EXPOSURES for m in MOMENTS if (e, m) != ("weights", "search")],
)
def test_goes_on_from_anywhere(exposure, moment, monkeypatch, tmp_path):
    expected = outcome(defend(backdoored(), DATA, small(exposure)))
    found = stopped_and_resumed(monkeypatch, tmp_path / "c.pt", exposure, *MOMENTS[moment])
    assert found == expected
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_goes_on_after_many_interruptions(exposure, monkeypatch, tmp_path):
    path, runs = tmp_path / "c.pt", 0
    expected = outcome(defend(backdoored(), DATA, small(exposure)))
    for _ in range(60):
        runs += 1
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            interrupted(patch, module, "save_checkpoint", 1, True)
            found = defend(backdoored(), DATA, small(exposure), checkpoint=path)
            break
    assert outcome(found) == expected
    assert runs > 6


def test_a_finished_run_is_not_repeated(monkeypatch, tmp_path):
    path = tmp_path / "c.pt"
    expected = defend(backdoored(), DATA, small(), checkpoint=path)
    monkeypatch.setattr(MaskFit, "epoch", lambda *_: pytest.fail("it was fitted again"))
    found = defend(backdoored(), DATA, small(), checkpoint=str(path))
    assert outcome(found) == outcome(expected)
    assert found.seconds["fit"] == expected.seconds["fit"]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Of a run that was interrupted."""
    path = tmp_path / "c.pt"
    with monkeypatch.context() as patch:
        interrupted(patch, module, "save_checkpoint", 3, True)
        with pytest.raises(KeyboardInterrupt):
            defend(backdoored(), DATA, small(), checkpoint=path)
    return path


def other_weights():
    model = backdoored()
    with torch.no_grad():
        model[1].running_mean[3] += 1e-6
    return model


def other_activation():
    model = backdoored()
    model[2] = nn.GELU()
    return model


@pytest.mark.parametrize(
    ("model", "data", "config"),
    [
        (other_activation, DATA, small()),
        (backdoored, DATA, small(alpha=0.81)),
        (backdoored, DATA, small(seed=1)),
        (backdoored, DATA, small("weights")),
        (other_weights, DATA, small()),
        (lambda: small_net(4), DATA, small()),
        (backdoored, (CLEAN.images[:-1], CLEAN.labels[:-1]), small()),
        (backdoored, (CLEAN.images.flip(3), CLEAN.labels), small()),
        (backdoored, (CLEAN.images, CLEAN.labels.flip(0)), small()),
    ],
)
def test_checkpoint_of_another_run_is_refused(checkpoint, model, data, config, monkeypatch):
    content = checkpoint.read_bytes()
    monkeypatch.setattr(module, "suppress", lambda *_: pytest.fail("it was suppressed"))
    with pytest.raises(ValueError, match=r"checkpoint '.*c\.pt' belongs to another run .* delete"):
        defend(model(), data, config, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content


def test_checkpoint_of_another_version_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("mnp_fast.fingerprint.metadata.version", lambda name: "0.0.1")
    with pytest.raises(ValueError, match="other model, data, config or version"):
        defend(backdoored(), DATA, small(), checkpoint=checkpoint)


def test_checkpoint_that_is_something_else_is_refused(checkpoint):
    torch.save(torch.ones(3), checkpoint)
    with pytest.raises(ValueError, match="belongs to another run"):
        defend(backdoored(), DATA, small(), checkpoint=checkpoint)


@pytest.mark.parametrize(
    "share",
    [
        0,
        0.2,
        0.99,
    ],
)
def test_truncated_checkpoint_is_refused(checkpoint, share):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="truncated"):
        defend(backdoored(), DATA, small(), checkpoint=checkpoint)


class Dangerous:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, save_pickle])
def test_code_in_a_checkpoint_is_not_run(checkpoint, save, tmp_path):
    content = load_checkpoint(checkpoint)
    save({**content, "more": Dangerous(tmp_path / "executed")}, checkpoint)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        defend(backdoored(), DATA, small(), checkpoint=checkpoint)
    assert not (tmp_path / "executed").exists()


def test_checkpoint_folder_that_cannot_be_written_is_found_first(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "suppress", lambda *_: pytest.fail("it was suppressed"))
    with pytest.raises(OSError, match=r"file' cannot be written"):
        defend(backdoored(), DATA, small(), checkpoint=tmp_path / "file" / "c.pt")


def test_checkpoint_folder_is_created(tmp_path):
    path = tmp_path / "new" / "folder" / "c.pt"
    defend(backdoored(), DATA, small(), checkpoint=path)
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]


def with_value(value):
    images = CLEAN.images.clone()
    images[7, 1, 2, 3] = value
    return images, CLEAN.labels


def broken(value):
    model = backdoored()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = value
    return model


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)

    def forward(self, x):
        return self.conv(x), x


NOTHING = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("model", "data", "kind", "message"),
    [
        (NOTHING, DATA, ValueError, "Sequential has nothing to mask at site 'auto'"),
        (nn.Identity(), DATA, ValueError, r"must return logits \(N, classes\)"),
        (TwoOutputs(), DATA, ValueError, r"must return logits \(N, classes\) .* not tuple"),
        ("model", DATA, TypeError, "model must be a torch.nn.Module, not str"),
        (mnp_fast.wrap(small_net()), DATA, ValueError, "wrapped already"),
        (broken(NAN), DATA, ValueError, "model: 3.weight holds NaN or infinity"),
        (broken(INF), DATA, ValueError, "model: 3.weight holds NaN or infinity"),
        (small_net(), [], ValueError, "data is empty"),
        (small_net(), (DATA[0][:0], DATA[1][:0]), ValueError, "at least 2 samples .* got 0"),
        (small_net(), (DATA[0][:1], DATA[1][:1]), ValueError, "at least 2 samples .* got 1"),
        (small_net(), (DATA[0], DATA[1] + 1), ValueError, "label 4 is beyond .* 4 classes"),
        (small_net(), (DATA[0], DATA[1] - 1), ValueError, "must not be negative, found -1"),
        (small_net(), with_value(NAN), ValueError, "1 images hold NaN or infinity, .* image 7"),
        (small_net(), with_value(INF), ValueError, "1 images hold NaN or infinity, .* image 7"),
        (small_net(), (DATA[0][:, :1], DATA[1]), ValueError, r"shape \(1, 8, 8\): .*channels"),
        (small_net(), (DATA[0].double(), DATA[1]), ValueError, "cannot process images"),
        (small_net().to("meta"), DATA, ValueError, "different devices: 0.weight on meta, .* cpu"),
        (small_net(), (DATA[0].to("meta"), DATA[1]), ValueError, "images are on meta, labels on"),
        (small_net(), None, TypeError, "data must be a pair .* not NoneType"),
        (small_net(), CLEAN.images, TypeError, "every batch must be a pair"),
    ],
)
def test_bad_input_is_named_before_any_work(model, data, kind, message, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "suppress", lambda *_: pytest.fail("it was suppressed"))
    with pytest.raises(kind, match=message):
        defend(model, data, small(), checkpoint=tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()


def test_config_of_another_type_is_named():
    for config in ({"alpha": 1}, DefenseConfig, 0):
        kind = type(config).__name__
        with pytest.raises(TypeError, match=f"^config must be a DefenseConfig, not {kind}$"):
            defend(backdoored(), DATA, config)


def test_site_that_the_model_lacks():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(ValueError, match="nothing to mask at site 'norm'"):
        defend(model, DATA, small(site="norm"))


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_model_without_batch_norm(exposure, monkeypatch):
    monkeypatch.setattr(module, "choose", lambda curve, *_: curve[4])
    model = NoNorm().eval()
    data = torch.rand(20, 3, 16, 16), torch.arange(20) % 4
    result = defend(model, data, small(exposure))
    assert list(result.masks) == ["conv", "grouped", "circular", "hidden"]
    by_hand = copy.deepcopy(model)
    for neuron in result.pruned:
        layer = by_hand.get_submodule(neuron.layer)
        nn.init.zeros_(layer.weight[neuron.index])
        nn.init.zeros_(layer.bias[neuron.index : neuron.index + 1])
    assert len(result.pruned) == 4
    assert same_state(result.model, by_hand)


@pytest.mark.parametrize("site", ["neuron", "norm", "filter"])
def test_sites(site):
    result = defend(backdoored(), DATA, small(site=site, max_exposed=100))
    assert list(result.masks) == (["0", "3"] if site == "filter" else ["1", "4"])
    assert any((mask < 1).any() for mask in result.masks.values())


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_labels_of_one_class(exposure):
    of_one = CLEAN.labels == 2
    result = defend(backdoored(), (CLEAN.images[of_one], CLEAN.labels[of_one]), small(exposure))
    assert result.target != 2
    assert len(result.curve) == 13


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_two_images_are_enough(exposure):
    result = defend(backdoored(), (CLEAN.images[:2], CLEAN.labels[:2]), small(exposure))
    assert len(result.curve) == 13


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_float64(exposure):
    result = defend(backdoored().double(), (CLEAN.images.double(), CLEAN.labels), small(exposure))
    single = defend(backdoored(), DATA, small(exposure))
    assert {p.dtype for p in result.model.parameters()} == {torch.float64}
    assert result.target == single.target
    for name, mask in result.masks.items():
        torch.testing.assert_close(mask, single.masks[name], rtol=0, atol=1e-3)


def test_progress_is_shown_on_a_console():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    defend(backdoored(), DATA, small(), console=console)
    for phase in ("Suppressing", "Exposing", "Fitting", "Cutting"):
        assert phase in text.getvalue()
    assert "100%" in text.getvalue()


def test_nothing_is_printed_without_a_console(capsys):
    defend(backdoored(), DATA, small())
    assert capsys.readouterr() == ("", "")
