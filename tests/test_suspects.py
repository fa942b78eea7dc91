import math

import pytest

from mnp_fast import DefenseConfig
from mnp_fast.suspects import (
    conspicuous_again,
    conspicuous_by_both,
    distances,
    is_conspicuous,
    is_doubtful,
    is_drift,
    is_untargeted,
    remembered,
)

NONE = dict.fromkeys(range(6), 0.0)


def sizes_of(*sizes):
    return dict(enumerate(sizes))


def test_distance_is_relative_to_the_other_sizes():
    found = distances(sizes_of(0.1, 0.2, 0.4, math.inf), {**NONE, 1: 0.8})
    assert found[0] == pytest.approx(0.1 / 0.4)  # the median of 0.2, 0.4 and infinity
    assert found[1] == pytest.approx(0.2 / 0.4 - 0.25 * 0.8)
    assert found[2] == pytest.approx(0.4 / 0.2)
    assert found[3] == math.inf
    assert distances({7: 0.3}, {7: 1.0}) == {7: pytest.approx(0.05)}
    assert distances(sizes_of(math.inf, math.inf), NONE) == {0: math.inf, 1: math.inf}


def test_suppression_decides_between_offsets_of_like_size():
    found = distances(sizes_of(0.15, 0.14, 0.18, 0.19, 0.2), {**NONE, 0: 0.5})
    assert min(found, key=found.get) == 0
    found = distances(sizes_of(0.15, 0.08, 0.18, 0.19, 0.2), {**NONE, 0: 0.5})
    assert min(found, key=found.get) == 1


@pytest.mark.parametrize(
    ("sizes", "favour", "expected"),
    [
        ([0.6, 1, 1, 1, 1], 0.0, True),
        ([0.7, 1, 1, 1, 1], 0.0, False),
        ([0.7, 1, 1, 1, 1], 0.4, True),
        ([0.7, 1, 1, 1, 1], 0.39, False),
        ([0.6, 2, 1, 0.9, 0.9], 0.0, False),  # the median of the others is 0.95
        ([0.1, 1, 1, 1], 1.0, False),  # too few others
        ([0.1, math.inf, math.inf, math.inf, math.inf], 0.0, True),
        ([math.inf] * 5, 1.0, False),
        ([], 0.0, False),
    ],
)
def test_conspicuous(sizes, favour, expected):
    config = DefenseConfig(conspicuous=0.6)
    assert is_conspicuous(sizes_of(*sizes), {**NONE, 0: favour}, config) == expected


@pytest.mark.parametrize(
    ("sizes", "favour", "doubtful", "found"),
    [
        ([1, 1, 1, 1, 0.9], 0.5, True, 0),
        ([1, 1, 1, 1, 0.9], 0.49, True, None),
        ([1, 1, 1, 1, 0.9], 0.37, False, None),
        ([1, 1, 1, 1, 0.5], 0.0, True, 4),
        ([1, 1, 1, 0.5], 0.0, False, 3),  # too few others
    ],
)
def test_favours_count_whole_at_a_second_look(sizes, favour, doubtful, found):
    config = DefenseConfig(conspicuous_again=0.5)
    favours = {**NONE, 0: favour}
    assert is_doubtful(sizes_of(*sizes), favours, config) == doubtful
    assert conspicuous_again(sizes_of(*sizes), favours, config) == found


@pytest.mark.parametrize(
    ("first", "drift", "found"),
    [
        (0.7, 0.2, 0),
        (0.7, 0.19, None),
        (0.7, math.nan, None),
        (math.inf, 1.0, None),
        (1.0, 1.0, None),
    ],
)
def test_drift_counts_as_suppression_does(first, drift, found):
    config, favours = DefenseConfig(conspicuous=0.6), {**NONE, 0: 0.2}
    sizes = sizes_of(first, 1, 1, 1, 1)
    assert conspicuous_by_both(sizes, favours, {**NONE, 0: drift}, config) == found


@pytest.mark.parametrize(
    ("size", "spread", "sizes", "expected"),
    [
        (0.9, 0.0, [1, 1, 1, 1, 1], True),
        (0.91, 0.0, [1, 1, 1, 1, 1], False),
        (1.15, 0.5, [1, 1, 1, 1, 1], True),
        (1.16, 0.5, [1, 1, 1, 1, 1], False),
        (math.inf, 1.0, [math.inf] * 5, False),
        (0.9, 0.0, [1, 0.5, 0.5, 0.5, 1], False),
        (None, None, [1, 1, 1, 1, 1], False),
    ],
)
def test_untargeted(size, spread, sizes, expected):
    config = DefenseConfig(untargeted=0.9)
    assert is_untargeted(size, spread, sizes_of(*sizes), config) == expected


@pytest.mark.parametrize(
    ("favours", "found"),
    [
        ([0.1, 0.6, 0.2], 1),
        ([0.1, 0.3, 0.2], 1),
        ([0.1, 0.29, 0.2], None),
        ([math.nan, 0.3, 0.5], 2),
        ([math.nan], None),
        ([], None),
    ],
)
def test_remembered(favours, found):
    assert remembered(sizes_of(*favours), DefenseConfig(drift_favour=0.3)) == found


@pytest.mark.parametrize(
    ("agreement", "spread", "expected"),
    [
        (0.8, 0.7, True),
        (0.79, 1.0, False),
        (1.0, 0.69, False),  # it leads to few classes
        (None, None, False),
    ],
)
def test_a_trigger_that_norms_remember_for_all_classes(agreement, spread, expected):
    assert is_drift(agreement, spread, DefenseConfig(drift_agreement=0.8)) == expected
