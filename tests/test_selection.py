import copy

import pytest
import torch
from torch import nn

from mnp_fast import DefenseConfig, masks, wrap
from mnp_fast.data import evaluate
from mnp_fast.result import CutPoint, LayerNeurons, PrunedNeuron
from mnp_fast.selection import admissible, affordable, choose, cut_points, prune, pruning_order

from .trained import backdoored, stripes


def layer(mask, magnitude):
    mask = torch.tensor(mask)
    return LayerNeurons(mask, torch.tensor(magnitude), torch.zeros_like(mask))


def test_order_is_by_mask_then_by_magnitude_within_the_layer():
    neurons = {
        "b": layer([0.5, 0.0, 1.0], [1.0, 3.0, 2.0]),  # relative: .5, 1.5, 1
        "a": layer([0.0, 0.5, 0.25, 0.0], [60.0, 10.0, 20.0, 10.0]),  # relative: 2.4, .4, .8, .4
    }
    order = pruning_order(neurons)
    assert order == [
        PrunedNeuron("a", 0, 0.0),
        PrunedNeuron("b", 1, 0.0),
        PrunedNeuron("a", 3, 0.0),
        PrunedNeuron("a", 2, 0.25),
        PrunedNeuron("b", 0, 0.5),
        PrunedNeuron("a", 1, 0.5),
        PrunedNeuron("b", 2, 1.0),
    ]


def test_full_ties_keep_the_order_of_layers_and_indices():
    neurons = {"z": layer([0.0, 0.0], [2.0, 2.0]), "a": layer([0.0, 0.0], [0.5, 0.5])}
    found = [(neuron.layer, neuron.index) for neuron in pruning_order(neurons)]
    assert found == [("z", 0), ("z", 1), ("a", 0), ("a", 1)]


def test_layers_of_zero_weights_come_last_among_equals():
    neurons = {"zero": layer([0.0, 0.0], [0.0, 0.0]), "a": layer([0.0, 0.0], [0.5, 0.1])}
    found = [(neuron.layer, neuron.index) for neuron in pruning_order(neurons)]
    assert found == [("a", 0), ("a", 1), ("zero", 0), ("zero", 1)]


def test_prune_sets_exactly_these_masks():
    masked = wrap(backdoored())
    parameters = masks(masked)
    for mask in parameters.values():
        nn.init.uniform_(mask)
    for chosen in ([("1", 2), ("4", 0), ("4", 15)], [("4", 3)], []):
        prune(masked, [PrunedNeuron(name, index, 0.7) for name, index in chosen])
        for name, mask in masks(masked).items():
            assert mask is parameters[name]
            expected = torch.ones_like(mask)
            expected[[index for where, index in chosen if where == name]] = 0
            assert torch.equal(mask, expected)


class Recorder:
    """An exposure whose success is the number of masks that are 0."""

    def __init__(self, masked):
        self.masked = masked

    def success(self):
        return float(sum((mask == 0).sum() for mask in masks(self.masked).values()))


def wide(neurons):
    return wrap(nn.Sequential(nn.Flatten(), nn.Linear(192, neurons), nn.Linear(neurons, 4)))


def points_of(masked, conspicuous=False, **settings):
    neurons = {
        name: layer(torch.rand(len(mask)).tolist(), [1.0] * len(mask))
        for name, mask in masks(masked).items()
    }
    order = pruning_order(neurons)
    config = DefenseConfig(**{"few": 1, **settings})
    data = stripes(8, seed=0)
    return order, list(cut_points(masked, order, Recorder(masked), data, config, conspicuous))


@pytest.mark.parametrize(
    ("neurons", "share", "last", "step"),
    [
        (10, 0.5, 5, 1),
        (10, 0.59, 5, 1),
        (10, 0.01, 1, 1),
        (10, 1.0, 10, 1),
        (99, 1.0, 99, 1),
        (100, 1.0, 100, 2),
        (250, 1.0, 249, 3),
        (250, 0.4, 100, 2),
    ],
)
def test_cut_points_step_up_to_the_share(neurons, share, last, step):
    masked = wide(neurons)
    _, found = points_of(masked, max_pruned=share)
    assert [point.pruned for point in found] == list(range(0, last + 1, step))
    assert len(found) <= 100
    assert [point.exposed for point in found] == [point.pruned for point in found]


def test_few_neurons_may_be_cut_whatever_their_share():
    for neurons, last in ((1000, 30), (100, 7), (5, 5)):
        _, found = points_of(wide(neurons), max_pruned=0.03, few=7)
        assert found[-1].pruned == last


def test_where_the_suspect_is_conspicuous_twice_as_many_may_be_cut():
    for settings, last in (({"max_pruned": 0.15}, 3), ({"max_pruned": 0.6}, 10), ({"few": 4}, 8)):
        _, found = points_of(wide(10), conspicuous=True, **{"max_pruned": 0.01, **settings})
        assert found[-1].pruned == last


def test_cut_points_are_measured_on_the_pruned_network():
    model, data = backdoored().eval(), stripes(8, seed=0)
    masked = wrap(model).eval()
    order, found = points_of(masked, max_pruned=0.5)
    assert len(found) == 13
    for point in found:
        by_hand = copy.deepcopy(model)
        for neuron in order[: point.pruned]:
            nn.init.zeros_(by_hand.get_submodule(neuron.layer).weight[neuron.index])
        accuracy, loss = evaluate(by_hand, data)
        assert point.accuracy == accuracy
        assert point.loss == pytest.approx(loss, rel=1e-4)
    assert len({point.loss for point in found}) > 6


MANY = 10**12  # images: no standard error to speak of


def curve(*pairs):
    return [CutPoint(2 * k, accuracy, 0.1, e) for k, (accuracy, e) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("pairs", "chosen"),
    [
        (((90, 100), (89, 50), (88, 20), (87, 0)), 2),  # the smallest that stops enough
        (((90, 100), (84.9, 20), (86, 20)), 2),  # 84.9 costs too much
        (((90, 100), (85, 20.1), (85, 20)), 2),  # both limits are included
        (((90, 100), (84.9, 20), (90, 20.1)), 0),  # nothing within them
        (((90, 20), (95, 0)), 0),  # nothing to stop
        (((90, 100),), 0),
    ],
)
def test_choice(pairs, chosen):
    points = curve(*pairs)
    assert choose(points, MANY, DefenseConfig(max_exposed=20), 5) is points[chosen]


def test_choice_follows_the_settings():
    points = curve((90, 100), (85, 40), (69, 10))
    assert choose(points, MANY, DefenseConfig(max_exposed=40), 5).pruned == 2
    assert choose(points, MANY, DefenseConfig(max_exposed=40), 4).pruned == 0
    assert choose(points, MANY, DefenseConfig(max_exposed=39), 30).pruned == 4


@pytest.mark.parametrize(
    ("images", "drop", "admissible"),
    [(100, 4, True), (100, 5, True), (100, 6, False), (10_000, 4, False), (10_000, 3.1, True)],
)
def test_a_loss_counts_beyond_its_standard_error(images, drop, admissible):
    points = curve((90, 100), (90 - drop, 0))
    cut = choose(points, images, DefenseConfig(), 3)
    assert (cut is points[1]) == admissible


@pytest.mark.parametrize(
    ("accuracies", "last"),
    [
        ((90, 89, 88, 85, 84), 3),  # the limit is included
        ((90, 84, 90, 90), 0),  # not beyond the first that costs too much
        ((90, 95, 86), 2),
        ((90,), 0),
    ],
)
def test_affordable_cuts_end_before_the_first_costly_one(accuracies, last):
    points = curve(*((accuracy, 100) for accuracy in accuracies))
    assert affordable(points, DefenseConfig(max_drop=5)) is points[last]


def test_admissible_is_what_choice_admits():
    before, *points = curve((90, 100), (87, 0), (86, 0), (85, 0), (84, 0))
    admitted = [admissible(before, point, 100, 3) for point in points]
    assert admitted == [True, True, True, False]
