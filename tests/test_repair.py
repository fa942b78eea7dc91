import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mnp_fast import DefenseConfig, masks, unwrap, wrap
from mnp_fast.data import CleanSet
from mnp_fast.distributed import Processes
from mnp_fast.exposure import OffsetExposure
from mnp_fast.repair import Repair
from mnp_fast.seeds import REPAIR

from .trained import backdoored, stripes

CLEAN = stripes(40, seed=2)
CONFIG = DefenseConfig(repair_epochs=3, fit_batch_size=16, repair_alpha=0.7, offset_steps=40)


def prepared(model, config=CONFIG, data=CLEAN):
    """A wrapped network of which three neurons are cut, its exposure and its repair."""
    masked = wrap(model).eval().requires_grad_(False)
    for mask in masks(masked).values():
        mask.requires_grad_(True)
    exposure = OffsetExposure(masked, data, 0, config)
    exposure.start()
    with torch.no_grad():
        masks(masked)["4"][:3] = 0
    return masked, exposure, Repair(masked, exposure, data, config)


def test_is_adam_on_norms_and_biases_of_the_plain_network():
    """Three epochs beside the same in plain torch, in float64."""
    data = CleanSet(CLEAN.images.double(), CLEAN.labels)
    masked, exposure, repair = prepared(backdoored().double().eval(), data=data)
    plain = unwrap(masked).eval().requires_grad_(False)
    cut = plain[4].weight == 0
    assert int(cut.sum()) == 3
    vectors = [plain[1].weight, plain[1].bias, plain[4].weight, plain[4].bias, plain[8].bias]
    optimizer = torch.optim.Adam([v.requires_grad_(True) for v in vectors], lr=CONFIG.repair_lr)
    expected = []
    for epoch in range(CONFIG.repair_epochs):
        total = 0.0
        for images, labels in data.batches(CONFIG.fit_batch_size, CONFIG.seed, REPAIR, epoch):
            exposed = (images + exposure.first).clamp(exposure.low, exposure.high)
            clean = F.cross_entropy(plain(images), labels)
            loss = 0.7 * clean + 0.3 * F.cross_entropy(plain(exposed), labels)
            optimizer.zero_grad()
            loss.backward()
            plain[4].weight.grad[cut] = 0  # a mask of 0 lets nothing through
            optimizer.step()
            total += loss.item() * len(labels)
        expected.append(total / len(data))
    assert list(repair.epochs()) == pytest.approx(expected, rel=1e-9)
    for name, value in unwrap(masked).state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-8, atol=1e-10)


def test_batches_in_parts_take_the_same_steps():
    results = []
    for shards in (1, 3):
        data = CleanSet(CLEAN.images.double(), CLEAN.labels, Processes(shards=shards))
        masked, _, repair = prepared(backdoored().double().eval(), data=data)
        objectives = list(repair.epochs())
        results.append((objectives, masked.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-7, atol=1e-9)


def test_weights_and_masks_stay_and_vectors_come_back():
    masked, _, repair = prepared(backdoored().eval())
    before = copy.deepcopy(masked.state_dict())
    needs = {name: p.requires_grad for name, p in masked.named_parameters()}
    list(repair.epochs())
    changed = {k for k, v in masked.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"1.weight", "1.bias", "4.weight", "4.bias", "8.bias"}
    assert {name: p.requires_grad for name, p in masked.named_parameters()} == needs
    assert all(p.grad is None for p in masked.parameters())
    repair.undo()
    assert all(torch.equal(v, before[k]) for k, v in masked.state_dict().items())


@pytest.mark.parametrize(
    ("successes", "share"),
    [
        ([10.0, 12.0], 0.5),
        ([10.0, 12.1, 12.1, 11.0], 0.7),
        ([10.0, 12.1, 12.1, 12.1, 12.1, 12.1, 10.0], 1.0),
    ],
)
def test_a_way_is_as_short_as_stops_the_exposure_as_well(successes, share):
    _, exposure, repair = prepared(backdoored().eval())
    list(repair.epochs())
    after, left = [vector.clone() for vector in repair.vectors], iter(successes)
    exposure.success = lambda: next(left)
    repair.shorten()
    assert list(left) == []
    for vector, start, end in zip(repair.vectors, repair.before, after, strict=True):
        torch.testing.assert_close(vector, start + share * (end - start))
        assert share < 1 or torch.equal(vector, end)


def test_the_offset_is_stopped():
    config = DefenseConfig(repair_epochs=20, repair_alpha=0.8)
    masked, exposure, repair = prepared(backdoored().eval(), config)
    with torch.no_grad():
        masks(masked)["4"].fill_(1)

    def hits():
        return (masked(exposure.images()).argmax(1) == 0).double().mean().item()

    assert hits() == 1
    objectives = list(repair.epochs())
    assert objectives[-1] < 0.3 * objectives[0]
    assert hits() < 0.1


def test_networks_without_vectors_have_nothing_to_repair():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, 4, bias=False))
    masked, _, repair = prepared_without_cut(model.eval())
    before = copy.deepcopy(masked.state_dict())
    assert list(repair.epochs()) == []
    assert all(torch.equal(v, before[k]) for k, v in masked.state_dict().items())


def prepared_without_cut(model):
    masked = wrap(model).requires_grad_(False)
    exposure = OffsetExposure(masked, CLEAN, 0, CONFIG)
    return masked, exposure, Repair(masked, exposure, CLEAN, CONFIG)
