"""Figures of statistics and detection."""

import sys

import numpy as np
import pytest

from mnp_fast.stats import Estimate
from mnp_fast.stats_plots import (
    by_depth,
    by_layer,
    correlation_by_depth,
    roc_curves,
    stats_by_layer,
)
from mnp_fast.stats_report import most_deviating, write_stats

from .test_neurons import trained

assert trained  # a fixture


def layers(count, neurons=6):
    generator = np.random.default_rng(0)
    return {f"layer{i}": generator.random(neurons) + 0.1 for i in range(count)}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.axison]


def test_a_panel_a_layer_with_its_suspects_ringed():
    x, y = layers(7), layers(7)
    y["layer2"][:2] = 0, -1
    figure = by_layer(x, y, [("layer2", 1), ("layer2", 4), ("layer5", 0)])
    figure.canvas.draw()
    assert titles(figure) == list(x)
    plain, filled, rings = figure.axes[2].collections
    assert len(plain.get_offsets()) == 4
    lowest = y["layer2"][y["layer2"] > 0].min()
    expected = [[x["layer2"][1], lowest], [x["layer2"][4], y["layer2"][4]]]
    np.testing.assert_allclose(rings.get_offsets(), expected)
    np.testing.assert_allclose(filled.get_offsets(), expected)
    assert figure.get_suptitle() == "Suspect: 3 neurons, ringed"


def test_deep_networks_show_the_layers_with_suspects():
    x = layers(60)
    suspects = [("layer7", 0), ("layer7", 1), ("layer31", 2)]
    figure = by_layer(x, x, suspects)
    shown = titles(figure)
    assert len(shown) == 25
    assert {"layer0", "layer7", "layer31", "layer59"} <= set(shown)
    assert shown == sorted(shown, key=list(x).index)
    assert figure.get_suptitle().endswith("25 of 60 layers")


@pytest.mark.parametrize("values", [np.zeros(3), np.full(3, np.nan), np.ones(1)])
def test_layers_at_their_limits(values):
    by_layer({"a": values}, {"a": values}, [("a", 0)]).canvas.draw()


def test_correlation_by_depth():
    one, other = (np.random.default_rng(i).random((3, 5)) for i in (0, 1))
    one[0, 2] = other[0, 2] = np.nan
    other[0, 1] = np.nan
    figure = correlation_by_depth({"clean": [one, other], "backdoored": [one]})
    figure.canvas.draw()
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    mean = lines["clean (mean of 2)"]
    np.testing.assert_allclose(mean[[0, 1]], [(one[0, 0] + other[0, 0]) / 2, one[0, 1]])
    assert np.isnan(mean[2])
    np.testing.assert_allclose(lines["backdoored"], one[0])
    assert len(figure.axes[0].collections) == 1  # the band of the one model


def test_roc_by_hand():
    clean, attacked = np.array([0.0, 1.0]), {"a": np.array([0.5, 2.0]), "b": np.array([3.0])}
    figure = roc_curves(clean, attacked)
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["0.75  a (2)", "1.00  b (1)", "0.83  all attacks (3)"]


def test_files_of_statistics(trained, tmp_path):
    write_stats(trained, tmp_path / "new")
    assert (tmp_path / "new" / "correlation.png").stat().st_size > 5000
    figure = stats_by_layer(trained, most_deviating(trained))
    assert titles(figure) == ["1", "4"]
    ((layer, index),) = most_deviating(trained)
    assert trained.layers[layer].z[index] == max(s.z.max() for s in trained.layers.values())
    depth = by_depth(trained)
    estimate = trained.layers["4"].correlation.spearman
    assert Estimate(*depth[:, 1].tolist()) == estimate
    assert "matplotlib.pyplot" not in sys.modules
