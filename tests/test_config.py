import dataclasses
import math
import re

import pytest

from mnp_fast import DefenseConfig
from mnp_fast.config import EXPOSURES
from mnp_fast.wrap import SITES

BETWEEN_PERCENT = "between 0 and 100 percent"
# name: smallest and largest values that are allowed, values that are not, and the rule in words.
RANGES = {
    "alpha": ([0.0, 1.0], [-0.1, 1.1], "between 0 and 1"),
    "weight_penalty": ([0.0, 1e6], [-1e-9, math.inf], "at least 0 and finite"),
    "suppress_lr": ([1e-300, 1e6], [0.0, -1.0, math.inf], "positive and finite"),
    "suppress_decay": ([0.0, 1e6], [-1e-9, math.inf], "at least 0 and finite"),
    "suppress_batch_size": ([2, 10**9], [1, 0, -3], "at least 2"),
    "suppress_epochs": ([1, 10**9], [0, -1], "at least 1"),
    "suppress_accuracy": ([0.0, 100.0], [-0.1, 100.1], BETWEEN_PERCENT),
    "suspects": ([1, 10**9], [0, -1], "at least 1"),
    "offset_steps": ([6, 10**9], [5, 0, -6], "at least 6"),
    "offset_lr": ([1e-300, 1e6], [0.0, -1.0, math.inf], "positive and finite"),
    "offset_decay": ([0.0, 1e6], [-1e-9, math.inf], "at least 0 and finite"),
    "fit_epochs": ([1, 10**9], [0, -1], "at least 1"),
    "fit_batch_size": ([1, 10**9], [0, -1], "at least 1"),
    "fit_lr": ([1e-300, 1e6], [0.0, -1.0, math.inf], "positive and finite"),
    "fit_momentum": ([0.0, 0.999], [-0.1, 1.0, 1.5], "at least 0 and below 1"),
    "max_exposed": ([0.0, 100.0], [-0.1, 100.1], BETWEEN_PERCENT),
    "max_pruned": ([1e-300, 1.0], [0.0, -0.1, 1.1], "above 0 and at most 1"),
    "few": ([1, 10**9], [0, -1], "at least 1"),
    "conspicuous": ([0.0, 1.0], [-0.1, 1.1], "between 0 and 1"),
    "suppressions": ([1, 10], [0], "at least 1"),
    "drift_weight": ([0.0, 9.0], [-1.0, math.inf], "at least 0 and finite"),
    "drift_favour": ([0.0, 1.0], [-0.1, 1.1], "between 0 and 1"),
    "drift_agreement": ([-1.0, 1.0], [-1.1, 1.1], "between -1 and 1"),
    "suppressions_again": ([0, 8], [-1], "at least 0"),
    "conspicuous_again": ([-1.0, 1.0], [-1.1, 1.1], "between -1 and 1"),
    "untargeted": ([0.0, 1.0], [-0.1, 1.1], "between 0 and 1"),
    "repair_alpha": ([0.0, 1.0], [-0.1, 1.1], "between 0 and 1"),
    "repair_epochs": ([0, 10**9], [-1], "at least 0"),
    "repair_lr": ([1e-300, 1e6], [0.0, -1.0, math.inf], "positive and finite"),
    "unsure_drop": ([0.0, 100.0], [-0.1, 100.1], "between 0 and 100 points"),
    "max_drop": ([0.0, 100.0], [-0.1, 100.1], "between 0 and 100 points"),
    "shards": ([1, 64], [0, -1], "at least 1"),
    "seed": ([0, 2**31 - 1], [-1, 2**31], "between 0 and 2147483647"),
}
KINDS = {field.name: type(field.default) for field in dataclasses.fields(DefenseConfig)}
FLOATS = [name for name, kind in KINDS.items() if kind is float]


def test_every_setting_is_covered_here():
    assert {*RANGES, "site", "exposure"} == set(KINDS)


@pytest.mark.parametrize("name", RANGES)
def test_limits_are_allowed(name):
    for value in RANGES[name][0]:
        assert getattr(DefenseConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range_are_named(name):
    _, refused, rule = RANGES[name]
    for value in refused + ([math.nan] if name in FLOATS else []):
        message = f"{name} must be {rule}, not {value}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            DefenseConfig(**{name: value})


@pytest.mark.parametrize("name", KINDS)
def test_values_of_another_type_are_named(name):
    kind = KINDS[name]
    wrong = [None, [1], True, b"auto"]
    wrong += [7] if kind is str else ["0.5"]
    wrong += [20.0] if kind is int else []
    for value in wrong:
        message = f"{name} must be of type {kind.__name__}, not {value!r}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            DefenseConfig(**{name: value})


@pytest.mark.parametrize("name", FLOATS)
def test_integers_become_floats(name):
    value = 0 if name == "fit_momentum" else 1
    found = getattr(DefenseConfig(**{name: value}), name)
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize(("name", "allowed"), [("site", SITES), ("exposure", EXPOSURES)])
def test_choices(name, allowed):
    for value in allowed:
        assert getattr(DefenseConfig(**{name: value}), name) == value
    message = f"{name} must be one of {', '.join(allowed)}, not 'Weights'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        DefenseConfig(**{name: "Weights"})


def test_unknown_settings_and_changes_are_refused():
    with pytest.raises(TypeError, match="lambda_"):
        DefenseConfig(lambda_=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DefenseConfig().alpha = 0.5
    with pytest.raises(ValueError, match="alpha must be"):
        dataclasses.replace(DefenseConfig(), alpha=2)
