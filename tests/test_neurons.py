"""All statistics together: `neuron_stats`, its correlations and its files."""

import csv
import json
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F

import mnp_fast
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.stats import MAGNITUDES, SALIENCIES, NeuronStats, magnitudes
from mnp_fast.stats.correlation import (
    deviations,
    draws,
    interval,
    kendall,
    log_pearson,
    pearson,
    ranks,
    resampled_means,
    robust_z,
    spearman,
)

from .models import bare_norms, randomize
from .test_ablation import attention
from .test_stats import Tokens, images
from .trained import backdoored, stripes


def pairs(ties):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=17), generator.normal(size=(5, 17))
    if ties:
        x, y = x.round(), y.round()
    return x, y + 0.7 * x


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties):
    x, y = pairs(ties)
    for mine, other in (
        (spearman, scipy.stats.spearmanr),
        (kendall, scipy.stats.kendalltau),
        (pearson, scipy.stats.pearsonr),
    ):
        expected = [other(x, row).statistic for row in y]
        np.testing.assert_allclose(mine(x, y), expected, rtol=1e-12)


def test_logarithms_leave_out_zeros():
    x, y = pairs(False)
    x[3] = y[1, 5] = y[1, 6] = 0
    expected = [
        scipy.stats.pearsonr(np.log(abs(x[used])), np.log(abs(row[used]))).statistic
        for row in y
        for used in [(x != 0) & (row != 0)]
    ]
    np.testing.assert_allclose(log_pearson(x, y), expected, rtol=1e-12)


@pytest.mark.parametrize("measure", [spearman, kendall, log_pearson, pearson])
def test_what_is_constant_or_unknown_has_no_correlation(measure):
    x, y = pairs(False)
    y[0], y[1, 2] = 3.0, np.nan
    assert np.isnan(measure(x, y)).tolist() == [True, True, False, False, False]
    assert np.isnan(measure(x[:1], y[2:, :1])).all()


def test_deviations():
    magnitude, saliency = np.array([4.0, 1.0, 3.0, 2.0]), np.array([0.1, 0.2, 0.2, 0.9])
    np.testing.assert_allclose(ranks(saliency), [1, 2.5, 2.5, 4])
    np.testing.assert_allclose(deviations(magnitude, saliency), [0.75, -0.375, 0.125, -0.5])
    z = robust_z(np.array([0.0, 1.0, -1.0, 2.0, 50.0]))
    assert z[4] == pytest.approx(49 / (1.4826 * 1))
    assert z[1] == 0
    # A rank is the least that counts, where most are equal.
    np.testing.assert_allclose(robust_z(np.array([0.0, 0.0, 0.0, 0.5])), [0, 0, 0, 2])
    assert len(robust_z(np.zeros(0))) == 0


def test_bootstrap():
    generator = np.random.default_rng(1)
    samples = generator.normal(size=(40, 3)) * [1, 2, 3] + 5
    counts = draws(40, 2000, 0)
    assert (counts.sum(1) == 40).all()
    means = resampled_means(samples, counts)
    np.testing.assert_allclose(means[7], np.repeat(samples, counts[7].astype(int), 0).mean(0))
    low, high = interval(means[:, 1])
    assert high - low == pytest.approx(2 * 1.96 * samples[:, 1].std() / 40**0.5, rel=0.1)
    samples[:30, 0] = np.nan
    drawn = np.repeat(samples[:, 0], counts[7].astype(int))
    assert resampled_means(samples, counts)[7, 0] == pytest.approx(np.nanmean(drawn))
    samples[:, 1] = np.nan
    assert np.isnan(resampled_means(samples, counts)[:, 1]).all()
    assert np.isnan(interval(np.full(3, np.nan))).all()


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Correlation of magnitudes with saliencies that are means over noisy samples."""
    generator = np.random.default_rng(2)
    magnitude = generator.random(30)
    covered = 0
    for repeat in range(200):
        saliency = magnitude + generator.normal(size=30)
        samples = saliency + 0.3 * generator.normal(size=(50, 30))
        values = spearman(magnitude, resampled_means(samples, draws(50, 200, repeat)))
        low, high = interval(values)
        covered += low <= spearman(magnitude, saliency) <= high
    assert covered >= 180


def model():
    return randomize(ResNet18(4)).double().eval()


@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("magnitude", ["l1", "spectral"])
def test_by_definition(saliency, magnitude):
    network, data = model(), images()
    stats = mnp_fast.neuron_stats(
        network, (data.images, data.labels), saliency, magnitude=magnitude
    )
    masked = mnp_fast.wrap(network)
    assert list(stats.layers) == list(mnp_fast.masks(masked))
    assert (stats.magnitude, stats.saliency, stats.samples) == (magnitude, saliency, 7)
    means = []
    for name, layer in stats.layers.items():
        for kind in MAGNITUDES:
            expected = magnitudes(masked, kind)[name].numpy()
            np.testing.assert_allclose(getattr(layer, kind), expected, rtol=1e-12)
        mask = mnp_fast.masks(masked)[name]
        if saliency == "ablation":
            mask.data[1] = 0
            with torch.no_grad():
                loss = F.cross_entropy(masked(data.images), data.labels)
            mask.data[1] = 1
            before = F.cross_entropy(masked(data.images), data.labels)
            expected = (loss - before).item()
        else:
            grads = [
                torch.autograd.grad(F.cross_entropy(masked(x[None]), y[None]), mask)[0][1]
                for x, y in zip(data.images, data.labels, strict=True)
            ]
            grads = torch.stack(grads)
            expected = (grads**2 if saliency == "fisher" else grads).mean().abs().item()
        assert layer.saliency[1] == pytest.approx(expected, rel=1e-6, abs=1e-12)
        sizes = getattr(layer, magnitude)
        np.testing.assert_allclose(layer.magnitude_rank, ranks(sizes))
        np.testing.assert_allclose(layer.saliency_rank, ranks(layer.saliency))
        np.testing.assert_allclose(layer.deviation, deviations(sizes, layer.saliency))
        np.testing.assert_allclose(layer.z, robust_z(layer.deviation))
        for measure in ("spearman", "kendall"):
            estimate = getattr(layer.correlation, measure)
            other = {"spearman": scipy.stats.spearmanr, "kendall": scipy.stats.kendalltau}[measure]
            assert estimate.value == pytest.approx(other(sizes, layer.saliency).statistic)
            assert estimate.low <= estimate.high
        means.append(layer.correlation.spearman.value)
    assert stats.correlation.spearman.value == pytest.approx(np.mean(means))
    whole = stats.correlation.spearman
    assert whole.low < whole.high


def test_wrapped_and_plain_models_give_the_same():
    network, data = model(), images()
    masked = mnp_fast.wrap(network).train()
    plain, wrapped = (
        mnp_fast.neuron_stats(m, (data.images, data.labels), bootstrap=3) for m in (network, masked)
    )
    assert plain.content() == wrapped.content()
    assert all(module.training for module in masked.modules())


def test_permuted_neurons_permute_the_results():
    network, data = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 14), nn.Flatten()).double(),
        images(),
    )
    before = mnp_fast.neuron_stats(network, (data.images, data.labels), "ablation", bootstrap=20)
    order = torch.randperm(8)
    with torch.no_grad():
        for tensor in network[0].parameters():
            tensor.copy_(tensor[order].clone())
        network[2].weight.copy_(network[2].weight[:, order].clone())
    after = mnp_fast.neuron_stats(network, (data.images, data.labels), "ablation", bootstrap=20)
    for column in NeuronStats.COLUMNS[3:]:
        first, second = getattr(before.layers["0"], column), getattr(after.layers["0"], column)
        np.testing.assert_allclose(second, first[order], rtol=1e-9, atol=1e-12)
    assert after.correlation.spearman.value == pytest.approx(before.correlation.spearman.value)
    assert after.correlation.spearman.low == pytest.approx(before.correlation.spearman.low)


def test_layers_without_a_gradient_of_each_sample():
    network, data = Tokens(samples=1).double().eval(), images()
    given = (data.images, data.labels)
    taylor = mnp_fast.neuron_stats(network, given, bootstrap=5)
    fisher = mnp_fast.neuron_stats(network, given, "fisher", bootstrap=5)
    exact = mnp_fast.neuron_stats(network, given, "ablation", bootstrap=5)
    assert np.isfinite(taylor.layers["embed"].saliency).all()
    assert np.isnan(taylor.layers["embed"].correlation.spearman.low)
    assert np.isnan(fisher.layers["embed"].z).all()
    assert np.isnan(fisher.layers["embed"].correlation.spearman.value)
    assert np.isfinite(exact.layers["embed"].saliency).all()


def test_heads_have_a_gradient_of_each_sample():
    network, data = attention().double().eval(), images()
    stats = mnp_fast.neuron_stats(network, (data.images, data.labels), "fisher", bootstrap=5)
    assert np.isfinite(stats.layers["2.self_attn.out_proj"].saliency).all()


def test_no_bootstrap():
    data = images()
    stats = mnp_fast.neuron_stats(model(), (data.images, data.labels), bootstrap=0)
    assert np.isfinite(stats.correlation.kendall.value)
    assert np.isnan([stats.correlation.kendall.low, stats.correlation.kendall.high]).all()


def test_norms_over_the_batch():
    data = images()
    network = bare_norms().double().eval()
    stats = mnp_fast.neuron_stats(network, (data.images, data.labels), "ablation", bootstrap=3)
    assert all(np.isfinite(layer.saliency).all() for layer in stats.layers.values())


@pytest.fixture(scope="module")
def trained():
    data = stripes(40, seed=2)
    return mnp_fast.neuron_stats(backdoored(), (data.images, data.labels), bootstrap=5)


def test_csv(trained, tmp_path):
    trained.to_csv(tmp_path / "neurons.csv")
    with open(tmp_path / "neurons.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == NeuronStats.COLUMNS
    assert len(rows) == 8 + 16
    expected = [[str(value) for value in row] for row in trained.rows()]
    assert rows == expected
    assert rows[8][:3] == ["4", "1", "0"]


def test_json(trained, tmp_path):
    trained.to_json(tmp_path / "neurons.json")
    content = json.loads((tmp_path / "neurons.json").read_text())
    assert content == trained.content()
    assert [layer["layer"] for layer in content["layers"]] == ["1", "4"]
    assert content["layers"][1]["saliency"] == trained.layers["4"].saliency.tolist()
    assert content["correlation"]["spearman"]["value"] == trained.correlation.spearman.value


def test_json_has_no_nan(tmp_path):
    network, data = attention().double().eval(), images()
    stats = mnp_fast.neuron_stats(network, (data.images, data.labels), "fisher", bootstrap=0)
    stats.to_json(tmp_path / "neurons.json")
    assert "NaN" not in (tmp_path / "neurons.json").read_text()


def test_frame(trained):
    frame = trained.to_frame()
    assert tuple(frame.columns) == NeuronStats.COLUMNS
    assert len(frame) == 24
    layer = frame[frame["layer"] == "4"]
    np.testing.assert_array_equal(layer["z"], trained.layers["4"].z)
    assert layer["neuron"].tolist() == list(range(16))


def test_frame_without_pandas(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'mnp_fast\[pandas\]'"):
        trained.to_frame()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saliency": "oracle"}, "saliency must be one of taylor, fisher, ablation, not 'oracle'"),
        ({"magnitude": "l7"}, "magnitude must be one of l1, l2, linf, effective, spectral"),
        ({"bootstrap": -1}, "bootstrap must be at least 0, not -1"),
        ({"precision": 0.1}, "precision and checkpoint are for saliency='ablation'"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_input_is_named(options, message):
    data = images()
    with pytest.raises(ValueError, match=message):
        mnp_fast.neuron_stats(model(), (data.images, data.labels), **options)
