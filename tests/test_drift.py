import copy
import math

import pytest
import torch
from torch import nn

from mnp_fast import wrap
from mnp_fast.data import CleanSet
from mnp_fast.demo.attacks import TARGET, badnets
from mnp_fast.demo.train import train
from mnp_fast.drift import Drift

from .trained import CLASSES, backdoored, small_net, stripes

CLEAN = stripes(40, seed=2)


def drift_of(model, data=CLEAN):
    return Drift(model, model, data)


def agreement(drift, images):
    """Of the change from the clean images to these."""
    return drift.agreement(drift.clean, drift.means(images)[1])


def clean_network():
    data = stripes(400, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_net()
    for _ in train(model, data.images, data.labels, epochs=12):
        pass
    return model


def one_norm(dtype=torch.float64):
    """A norm of five features and a linear layer, with statistics and weights of their own."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype).eval()
    norm = model[0]
    norm.running_mean.copy_(torch.randn(5))
    norm.running_var.copy_(torch.rand(5) + 0.5)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return model


def features(count=60, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = 2 * torch.randn(classes, 5, generator=generator, dtype=dtype)
    noise = torch.randn(count, 5, generator=generator, dtype=dtype)
    return CleanSet(centres[labels] + noise, labels)


def class_means(data, classes=3):
    return torch.stack([data.images[data.labels == k].mean(0) for k in range(classes)])


def test_the_attackers_class_is_what_norms_remember():
    found = drift_of(backdoored()).favours()
    of_clean = drift_of(clean_network()).favours()
    assert len(found) == CLASSES
    assert max(range(CLASSES), key=found.__getitem__) == TARGET
    assert found[TARGET] > 10 * max(of_clean + found[TARGET + 1 :])


def test_a_trigger_that_norms_saw_agrees_with_the_drift():
    clean, triggered = CLEAN.images, badnets(CLEAN.images)
    model = clean_network()
    before = agreement(drift_of(model), triggered)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.cat([clean, triggered]))
    drift = drift_of(model)
    assert before < 0.5
    assert agreement(drift, triggered) > 0.8
    assert abs(agreement(drift, clean)) < 0.1
    assert agreement(drift, 1 - clean) < 0.5


def test_favours_are_those_of_inputs_moved_by_hand(monkeypatch):
    model, data = one_norm(), features()
    clean, running = data.images.mean(0), model[0].running_mean
    factor = 0.5 * math.sqrt(len(data))
    moved = data.images - clean + clean + factor * (running - clean)
    given = model(moved).softmax(1)
    expected = [given[data.labels != k, k].mean().item() for k in range(3)]
    assert drift_of(model, data).favours() == pytest.approx(expected)
    monkeypatch.setattr("mnp_fast.drift.FACTOR", 1.0)
    given = model(data.images + running - clean).softmax(1)
    expected = [given[data.labels != k, k].mean().item() for k in range(3)]
    assert drift_of(model, data).favours() == pytest.approx(expected)


def test_favours_of_batches_are_moved_by_their_own_means(monkeypatch):
    drift = drift_of(backdoored(), stripes(200, seed=2))
    whole = drift.favours()
    monkeypatch.setattr("mnp_fast.drift.BATCH", 64)
    assert drift.favours() == pytest.approx(whole, abs=0.1)


def test_a_class_without_other_images_has_no_favour():
    data = CleanSet(CLEAN.images[:4], torch.full((4,), 2))
    found = drift_of(backdoored(), data).favours()
    assert [math.isnan(one) for one in found] == [False, False, True, False]


def test_agreement_is_the_cosine_of_the_change_and_the_drift():
    model, data = one_norm(), features()
    norm, step = model[0], torch.linspace(-1, 2, 5, dtype=torch.float64)
    deviation = (norm.running_var + norm.eps).sqrt()
    # So far from what any frequencies of the classes explain that these hardly matter.
    means = class_means(data)
    normal = torch.linalg.svd((means - means.mean(0)) / deviation).Vh[-1]
    norm.running_mean.copy_(data.images.mean(0) + 3 * normal * deviation)
    found = agreement(drift_of(model, data), data.images + step)
    expected = torch.cosine_similarity(step / deviation, normal, dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_other_frequencies_of_the_classes_are_no_drift(monkeypatch):
    monkeypatch.setattr("mnp_fast.drift.NO_DRIFT", 1e6)
    model, data = one_norm(), features()
    frequencies = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    model[0].running_mean.copy_(frequencies @ class_means(data))
    drift = drift_of(model, data)
    deviation = (model[0].running_var + model[0].eps).sqrt()
    from_clean = (model[0].running_mean - data.images.mean(0)) / deviation
    assert 1e6 * drift.direction.norm() < 0.02 * from_clean.norm()


def test_means_do_not_depend_on_the_batches(monkeypatch):
    whole = drift_of(backdoored())
    monkeypatch.setattr("mnp_fast.drift.BATCH", 7)
    parts = drift_of(backdoored())
    torch.testing.assert_close(whole.clean, parts.clean)
    torch.testing.assert_close(whole.direction, parts.direction)


def test_gradient_of_agreement():
    model = copy.deepcopy(backdoored()).double()
    images = CLEAN.images.double()
    drift = Drift(model, wrap(model), CleanSet(images, CLEAN.labels))
    some = images[:3].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: agreement(drift, x), (some,), fast_mode=True)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3), (6, 4, 2, 3, 3)])
def test_norms_of_any_dimension(shape):
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    torch.manual_seed(0)
    model = nn.Sequential(kind(4), nn.Flatten(), nn.Linear(math.prod(shape[1:]), 3))
    model[0].running_mean.normal_()
    images, labels = torch.randn(shape), torch.arange(6) % 3
    drift = drift_of(model, CleanSet(images, labels))
    assert all(0 <= one <= 1 for one in drift.favours())
    moved = images + torch.ones(4).reshape(-1, *[1] * (len(shape) - 2))
    assert -1 <= agreement(drift, moved) <= 1


class Twice(nn.Module):
    """Runs one norm twice, one once, and one never."""

    def __init__(self):
        super().__init__()
        self.twice, self.once, self.never = (nn.BatchNorm1d(5) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        return self.head(self.once(self.twice(self.twice(images)).relu()))


def test_only_norms_that_run_once_and_have_statistics_count():
    data = features(dtype=torch.float32)
    model = Twice()
    drift = drift_of(model, data)
    assert drift.norms == {"once": drift.model.once}
    assert not any(module._forward_pre_hooks for module in drift.model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for norm in (nn.BatchNorm1d(5, track_running_stats=False), nn.LayerNorm(5)):
        assert drift_of(nn.Sequential(norm, nn.Linear(5, 3)), data).norms == {}


def test_few_clean_images_are_trusted_less():
    model = backdoored()
    assert [drift_of(model, stripes(n, seed=2)).trust for n in (20, 100, 400)] == [0.2, 1.0, 1.0]
