import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mnp_fast import DefenseConfig
from mnp_fast.data import CleanSet, evaluate
from mnp_fast.fusion import fused_blocks
from mnp_fast.seeds import SUPPRESS
from mnp_fast.suppression import (
    MAX_GRADIENT_NORM,
    favour,
    favoured_classes,
    on_kernels,
    parts,
    suppress,
)
from mnp_fast.wrap import masks

from .trained import backdoored, stripes

CLEAN = stripes(40, seed=2)


def equal(model, other):
    theirs = other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items())


def test_ascent_lowers_the_accuracy_and_stops_at_the_threshold():
    model = backdoored().eval()
    assert evaluate(model, CLEAN)[0] > 95
    config = DefenseConfig(suppress_lr=0.1, suppress_batch_size=16, suppress_accuracy=40)
    accuracies = []
    for accuracy, loss in suppress(model, CLEAN, config):
        assert not any(module.training for module in model.modules())
        assert (accuracy, loss) == evaluate(model, CLEAN)
        accuracies.append(accuracy)
    assert accuracies[-1] <= 40
    assert min(accuracies[:-1]) > 40


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_steps_are_clipped_ascent_with_decay(decay, scale):
    """In train mode: theta + lr * clip(dL/dtheta) - lr * 2 * mu * theta, batch by batch."""
    model = backdoored().double().eval()
    with torch.no_grad():
        model[-1].weight *= scale
    data = CleanSet(CLEAN.images.double(), CLEAN.labels)
    config = DefenseConfig(
        suppress_lr=0.05, suppress_decay=decay, suppress_batch_size=16, suppress_epochs=1,
        suppress_accuracy=0, seed=5,
    )  # fmt: skip
    theirs = copy.deepcopy(model).train()
    assert len(list(suppress(model, data, config))) == 1
    lengths = []
    for images, labels in data.batches(16, 5, SUPPRESS, 0):
        parameters = list(theirs.parameters())
        grads = torch.autograd.grad(F.cross_entropy(theirs(images), labels), parameters)
        length = torch.cat([g.flatten() for g in grads]).norm()
        lengths.append(length)
        clip = min(1.0, MAX_GRADIENT_NORM / (length.item() + 1e-6))
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter += 0.05 * clip * grad - 0.05 * 2 * decay * parameter
    assert (max(lengths) > MAX_GRADIENT_NORM) == (scale > 1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-9, atol=1e-9)


def convolutions():
    """Strides, groups, a bias, another padding mode; twice the same layer."""
    torch.manual_seed(3)
    twice = nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect")
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        twice, nn.BatchNorm2d(12), nn.ReLU(), twice,
        nn.Conv2d(12, 12, 3, stride=2, groups=12), nn.BatchNorm2d(12), nn.Hardswish(),
        nn.Conv2d(12, 20, 1, stride=2, bias=False), nn.BatchNorm2d(20),
        nn.Flatten(), nn.Dropout(0.1), nn.LazyLinear(4),
    )  # fmt: skip


def test_steps_on_kernels_are_those_of_torch():
    data = CleanSet(CLEAN.images.double(), CLEAN.labels)
    theirs = convolutions().double()
    theirs(data.images[:2])
    theirs = theirs.eval().requires_grad_(True)
    mine, images = on_kernels(copy.deepcopy(theirs), data)
    assert fused_blocks(mine)
    config = DefenseConfig(suppress_batch_size=16, suppress_epochs=2, suppress_accuracy=0)
    expected = list(suppress(theirs, data, config))
    for (accuracy, loss), (right, near) in zip(
        suppress(mine, images, config), expected, strict=True
    ):
        assert accuracy == right
        assert loss == pytest.approx(near, rel=1e-9)
    found = mine.state_dict()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(found.pop(name), value, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(mask, torch.ones_like(mask)) for mask in found.values())
    assert not any(mask.requires_grad for mask in masks(mine).values())
    assert favour(mine, images) == pytest.approx(favour(theirs, data), rel=1e-8)


def test_kernels_read_images_of_one_channel_as_channels_last():
    data = CleanSet(torch.rand(4, 1, 5, 6), torch.arange(4))
    _, images = on_kernels(nn.Sequential(nn.Conv2d(1, 4, 3)), data)
    assert torch.equal(images.images, data.images)
    assert images.images[:2].stride()[1:] == (1, 6, 1)


def test_without_convolutions_nothing_changes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    assert on_kernels(model, CLEAN) == (model, CLEAN)
    assert "forward" not in vars(model)


def test_stops_after_the_step_at_which_the_threshold_is_reached():
    model = backdoored()
    counter = model[1].num_batches_tracked
    before = counter.item()
    config = DefenseConfig(suppress_batch_size=4, suppress_lr=0.1, suppress_accuracy=100)
    assert len(list(suppress(model, CLEAN, config))) == 1
    assert counter.item() == before + 1


def test_at_most_so_many_epochs():
    config = DefenseConfig(suppress_epochs=3, suppress_accuracy=0, suppress_lr=1e-4)
    assert len(list(suppress(backdoored(), CLEAN, config))) == 3
    assert len(list(suppress(backdoored(), CLEAN, config, start=2))) == 1
    assert list(suppress(backdoored(), CLEAN, config, start=3)) == []


def with_dropout():
    model = backdoored()
    model.insert(2, nn.Dropout(0.3))
    return model


def test_repeatable_by_seed_alone():
    config = DefenseConfig(suppress_batch_size=16, suppress_epochs=2, suppress_accuracy=0)

    def suppressed(seed, other):
        torch.manual_seed(other)
        state = torch.get_rng_state()
        model = with_dropout()
        outcome = list(suppress(model, CLEAN, DefenseConfig(**{**vars(config), "seed": seed})))
        assert torch.equal(state, torch.get_rng_state())
        return model, outcome

    (first, one), (second, two), (third, three) = (
        suppressed(0, 1), suppressed(0, 2), suppressed(1, 1),
    )  # fmt: skip
    assert one == two
    assert equal(first, second)
    assert one != three
    assert not equal(first, third)


@pytest.mark.parametrize("start", [1, 2])
def test_goes_on_from_any_epoch(start):
    config = DefenseConfig(suppress_batch_size=16, suppress_epochs=3, suppress_accuracy=0)
    whole = with_dropout()
    expected = list(suppress(whole, CLEAN, config))
    model = with_dropout()
    stopped = suppress(model, CLEAN, config)
    found = [next(stopped) for _ in range(start)]
    stopped.close()
    resumed = with_dropout()
    resumed.load_state_dict(model.state_dict())
    found += suppress(resumed.eval(), CLEAN, config, start)
    assert found == expected
    assert equal(resumed, whole)


def test_does_not_go_on_from_the_threshold():
    config = DefenseConfig(suppress_lr=0.1, suppress_accuracy=40)
    model = backdoored().eval()
    epochs = len(list(suppress(model, CLEAN, config)))
    assert epochs < config.suppress_epochs
    stopped = copy.deepcopy(model)
    assert list(suppress(model, CLEAN, config, start=epochs)) == []
    assert equal(model, stopped)


def test_last_batch_of_one_image_is_skipped():
    """Batch norm on one pixel cannot be trained with it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
    nn.init.constant_(model[-1].bias[:1], 10)  # some stay right
    data = stripes(9, seed=0)
    config = DefenseConfig(suppress_batch_size=4, suppress_epochs=2, suppress_accuracy=0)
    assert len(list(suppress(model, data, config))) == 2
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize("threshold", [0, 100])
def test_overflow_is_an_error(threshold):
    config = DefenseConfig(suppress_lr=1e17, suppress_accuracy=threshold)
    with pytest.raises(ValueError, match=r"suppress_lr 1e\+17 is too large: loss (nan|inf)"):
        list(suppress(backdoored(), CLEAN, config))


def test_favour_leaves_out_own_images():
    """The images are the logits. Class 0 has most of all, but 2 has most of other classes'."""
    own = 50.0
    images = torch.tensor(
        [[own, 0, 0, 0], [own, 0, 0, 0], [own, 0, 0, 0], [0, 0, 4, 3], [0, 0, own, 0], [0, 0, 2, 3]]
    )
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    found = favour(nn.Identity(), CleanSet(images, labels))
    expected = [images[labels != label].softmax(1)[:, label].mean() for label in range(4)]
    torch.testing.assert_close(torch.tensor(found), torch.stack(expected))
    assert list(favoured_classes([found])) == [2, 3, 0, 1]
    same = CleanSet(images[:3], labels[:3])  # no images of other classes than 0
    assert list(favoured_classes([favour(nn.Identity(), same)])) == [1, 2, 3]


def test_favoured_classes_are_those_of_the_mean():
    found = favoured_classes([[0.5, 0.2, 0.3, math.nan], [0.0, 0.6, 0.3, math.nan]])
    assert list(found) == [1, 2, 0]
    assert list(found.values()) == pytest.approx([0.4, 0.3, 0.25])


def test_parts_differ_and_repeat():
    images = torch.arange(10.0)[:, None]
    data = CleanSet(images, torch.arange(10))
    assert parts(data, 1, 0) == [data]
    drawn = [part.labels.tolist() for part in parts(data, 3, 5)]
    assert all(len(set(labels)) == 7 for labels in drawn)
    assert len({frozenset(labels) for labels in drawn}) == 3
    assert drawn == [part.labels.tolist() for part in parts(data, 3, 5)]
    assert drawn != [part.labels.tolist() for part in parts(data, 3, 6)]
    assert all(torch.equal(part.images[:, 0], part.labels.float()) for part in parts(data, 3, 5))
    assert [len(part) for part in parts(CleanSet(images[:2], data.labels[:2]), 2, 0)] == [2, 2]


def test_favoured_classes_find_the_target():
    model = backdoored().eval()
    list(suppress(model, CLEAN, DefenseConfig(suppress_lr=0.1)))
    assert next(iter(favoured_classes([favour(model, CLEAN)]))) == 0
