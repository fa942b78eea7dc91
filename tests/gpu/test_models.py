"""Whole models on a CUDA device, beside the same on the CPU."""

import time

import pytest
import torch
from torch.nn import functional as F

import mnp_fast
from benchmarks import cuda
from benchmarks.timing import measure
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.stats import MAGNITUDES, magnitudes

from ..models import randomize
from ..ops.cases import random_mask, relative_error
from ..trained import small_net, stripes

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def wrapped(site, fuse):
    masked = mnp_fast.wrap(randomize(ResNet18(8)).eval(), site, fuse=fuse).double()
    for mask in mnp_fast.masks(masked).values():
        mask.data.copy_(random_mask(len(mask)))
    return masked


def outputs_and_gradients(masked, images, labels):
    outputs = masked(images)
    loss = F.cross_entropy(outputs, labels)
    return outputs, *torch.autograd.grad(loss, list(mnp_fast.masks(masked).values()))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("site", ["auto", "neuron", "norm", "filter"])
def test_outputs_and_gradients(site, fuse):
    masked = wrapped(site, fuse)
    images, labels = torch.rand(5, 3, 16, 16).double(), torch.arange(5)
    expected = outputs_and_gradients(masked, images, labels)
    found = outputs_and_gradients(masked.to(DEVICE), images.to(DEVICE), labels.to(DEVICE))
    for mine, exact in zip(found, expected, strict=True):
        assert relative_error(mine.cpu(), exact) <= 1e-9


def test_magnitudes_of_every_kind():
    masked = wrapped("auto", True)
    expected = {kind: magnitudes(masked, kind) for kind in MAGNITUDES}
    masked.to(DEVICE)
    for kind in MAGNITUDES:
        for name, mine in magnitudes(masked, kind).items():
            assert mine.device.type == DEVICE
            assert relative_error(mine.cpu(), expected[kind][name]) <= 1e-9, (kind, name)


def test_a_defense_runs_where_its_model_is():
    clean = stripes(40, seed=2)
    config = mnp_fast.DefenseConfig(suppressions=1, suppress_epochs=2, offset_steps=6, fit_epochs=2)
    data = clean.images.to(DEVICE), clean.labels.to(DEVICE)
    result = mnp_fast.defend(small_net().to(DEVICE), data, config)
    assert all(t.device.type == DEVICE for t in result.model.state_dict().values())
    assert result.model(data[0]).isfinite().all()


def test_benchmarks_are_right():
    """Captured in graphs, as they are timed."""
    rows = [row for case in cuda.cases(True, DEVICE) for row in measure(case, 1, time.time, {})]
    assert not [row.case for row in rows if row.wrong]
