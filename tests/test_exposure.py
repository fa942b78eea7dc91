import copy
import math

import pytest
import torch
from torch import nn

from mnp_fast import DefenseConfig, masks, wrap
from mnp_fast.data import CleanSet
from mnp_fast.exposure import MARGIN, POOL, WIDENED, OffsetExposure, WeightExposure
from mnp_fast.io import load_checkpoint, save_checkpoint

from .trained import backdoored, stripes

STEPS = 12


def identity_net():
    """Three pixels, a class each: the logits are 10 times the pixels; 3 neurons between."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        for layer, scale in ((model[1], 1.0), (model[2], 10.0)):
            layer.weight.copy_(scale * torch.eye(3))
            layer.bias.zero_()
    return model


def pixels(count=12, low=0.0, high=1.0):
    """Images whose pixel of the label's number is `high`, the others `low`."""
    labels = torch.arange(count) % 3
    images = low + (high - low) * nn.functional.one_hot(labels, 3).float()
    return CleanSet(images[:, :, None, None], labels)


def pixels_and_labels():
    data = pixels()
    return data.images, data.labels


def exposed(model=None, data=None, target=1, **settings):
    masked = wrap(identity_net() if model is None else model).eval().requires_grad_(False)
    for mask in masks(masked).values():
        mask.requires_grad_(True)
    config = DefenseConfig(**settings)
    return OffsetExposure(masked, pixels() if data is None else data, target, config)


def inputs_of(exposure):
    """All that the network is given from now on."""
    seen = []
    exposure.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-2.0, 3.0)])
def test_search_reaches_the_target(low, high):
    exposure = exposed(data=pixels(low=low, high=high), offset_decay=0.01)
    assert exposure.success() == 0
    size = exposure.start()
    assert exposure.success() == 100
    expected = exposure.first.square().mean().sqrt().item() / (high - low)
    assert size == pytest.approx(expected, rel=1e-6)
    assert exposure.first[0, 1] > 0 > exposure.first[0, [0, 2]].max()


def test_search_ends_at_the_margin():
    exposure = exposed(offset_steps=300, offset_decay=1)
    exposure.start()
    logits = exposure.model((exposure.others + exposure.first).clamp(0, 1))
    margins = logits[:, 1] - logits[:, [0, 2]].amax(1)
    assert MARGIN <= margins.min() <= margins.max() <= 1.3 * MARGIN


def test_search_finds_the_trigger_of_a_backdoor():
    """The target takes a smaller offset than any other class."""
    data = stripes(40, seed=2)
    sizes = [exposed(backdoored().eval(), data, target).start() for target in range(4)]
    assert sizes.index(min(sizes)) == 0


def test_an_offset_away_from_all_classes():
    """Each class's pixel is lowered, by as much as brings another in front of it."""
    exposure = exposed(target=None, offset_steps=200, offset_decay=1)
    assert exposure.success() == 0
    assert len(exposure.others) == len(pixels())
    assert exposure.start() == math.inf  # it cannot: lowering all three changes no order
    data = CleanSet(*(part[pixels().labels != 2] for part in pixels_and_labels()))
    exposure = exposed(data=data, target=None, offset_steps=200, offset_decay=1)
    assert exposure.start() < math.inf
    assert exposure.success() == 100
    logits = exposure.model(exposure.images())
    own = logits.gather(1, data.labels[:, None])[:, 0]
    margins = logits[:, 2] - own
    assert MARGIN <= margins.min() <= margins.max() <= 1.3 * MARGIN


def test_a_search_after_a_change_joins_the_last_offsets():
    exposure = exposed(offset_steps=40, offset_decay=0.01)
    exposure.start()
    first = exposure.first
    for count in (2, 3, 3):
        exposure.again()
        assert len(exposure.offsets) == count
        assert torch.equal(exposure.offsets[-1], first)  # nothing has changed
    assert exposure.first is first


def test_search_that_fails_counts_as_infinite():
    exposure = exposed(offset_decay=1e6)
    assert exposure.start() == math.inf
    assert exposure.success() == 0
    assert exposure.first.abs().max() < 0.05


def test_decay_and_rate_are_in_units_of_the_range():
    """Ten times the range with a tenth of the weights gives ten times the offset."""
    small, model = exposed(offset_decay=1.0), identity_net()
    with torch.no_grad():
        model[1].weight /= 10
    large = exposed(model, pixels(high=10.0), offset_decay=1.0)
    size = small.start()
    assert math.isfinite(size)
    assert large.start() == pytest.approx(size, rel=1e-3)
    torch.testing.assert_close(large.first, 10 * small.first, rtol=1e-3, atol=1e-4)


def test_shifted_images_stay_in_the_range_of_the_data():
    data = pixels(low=-0.5, high=0.75)
    exposure = exposed(data=data, offset_steps=STEPS, offset_lr=0.2, offset_decay=0)
    seen = inputs_of(exposure)
    exposure.start()
    exposure.renew(1)
    exposure.renew(2)
    exposure.logits(data.images, 0)
    exposure.success()
    assert len(seen) == STEPS + 1 + STEPS // 2 + STEPS // 6 + 2
    images = torch.cat(seen)
    assert images.min() == -0.5
    assert images.max() == 0.75
    assert (exposure.first + data.images).abs().max() > 0.75  # without clamping they do not


def test_renewed_searches_have_their_steps_and_starts():
    exposure = exposed(offset_steps=STEPS)
    seen = inputs_of(exposure)
    exposure.start()
    assert len(seen) == STEPS + 1
    assert torch.equal(seen[0], exposure.others)
    seen.clear()
    exposure.renew(0)
    assert seen == []
    for epoch, steps in ((1, STEPS // 2), (2, STEPS // 6), (3, STEPS // 2), (4, STEPS // 6)):
        last = exposure.offsets[-1]
        exposure.renew(epoch)
        assert len(seen) == steps
        from_last = (exposure.others + last).clamp(0, 1)
        assert torch.equal(seen[0], exposure.others if epoch % 2 else from_last)
        assert not torch.equal(exposure.offsets[-1], last)
        assert len(exposure.offsets) == min(epoch + 1, POOL)
        seen.clear()


def test_batches_take_the_offsets_in_turn():
    exposure = exposed(offset_steps=STEPS)
    exposure.start()
    exposure.renew(1)
    images = pixels().images
    for step in range(4):
        shifted = (images + exposure.offsets[step % 2]).clamp(0, 1)
        assert torch.equal(exposure.logits(images, step), exposure.model(shifted))
    assert not torch.equal(exposure.logits(images, 0), exposure.logits(images, 1))


def test_success_widens_the_first_offset():
    exposure = exposed()
    exposure.offsets = [torch.full((1, 3, 1, 1), 9.0)]
    gap = torch.tensor([-0.5, 0.5, -0.5])[None, :, None, None]  # at which the classes are equal
    for factor, success in ((1.01, 100), (0.99, 0)):
        exposure.first = gap * factor / WIDENED
        assert exposure.success() == success
    assert pixels().images.shape[0] > exposure.others.shape[0] == 8


class Stopped(Exception):  # noqa: N818
    pass


def test_masks_take_gradients_again_even_after_an_error():
    exposure = exposed(offset_steps=STEPS)
    parameters = list(masks(exposure.model).values())
    while_searching = []

    def stop(*_):
        while_searching.append([mask.requires_grad for mask in parameters])
        if len(while_searching) == 3:
            raise Stopped

    handle = exposure.model.register_forward_hook(stop)
    with pytest.raises(Stopped):
        exposure.start()
    assert while_searching == [[False]] * 3
    assert all(mask.requires_grad for mask in parameters)
    handle.remove()
    exposure.start()
    assert all(mask.requires_grad for mask in parameters)
    assert all(p.grad is None for p in exposure.model.parameters())


def test_state_goes_through_a_checkpoint(tmp_path):
    exposure, other = exposed(offset_steps=STEPS), exposed(offset_steps=STEPS)
    exposure.start()
    exposure.renew(1)
    save_checkpoint(exposure.state(), tmp_path / "state.pt")
    other.load(load_checkpoint(tmp_path / "state.pt"))
    for step in range(2):
        images = pixels().images
        assert torch.equal(other.logits(images, step), exposure.logits(images, step))
    assert other.success() == exposure.success()
    other.renew(2)
    exposure.renew(2)
    assert torch.equal(other.offsets[-1], exposure.offsets[-1])


def test_images_without_contrast():
    data = CleanSet(torch.full((4, 3, 1, 1), 0.5), torch.arange(4) % 3)
    exposure = exposed(data=data)
    assert exposure.start() == math.inf
    assert torch.isfinite(exposure.first).all()


def test_suppressed_weights_share_the_masks():
    model, data = backdoored().eval(), stripes(40, seed=2)
    suppressed = copy.deepcopy(model)
    with torch.no_grad():
        suppressed[-1].bias[2] += 9  # class 2 for many
    before = copy.deepcopy(suppressed.state_dict())
    masked = wrap(model)
    exposure = WeightExposure(masked, suppressed, data, 2, DefenseConfig())
    exposure.renew(1)
    with torch.no_grad():
        expected = suppressed(data.images)
        torch.testing.assert_close(exposure.logits(data.images, 0), expected, rtol=1e-4, atol=1e-4)
        others = suppressed(data.images[data.labels != 2]).argmax(1)
    assert exposure.success() == pytest.approx(100 * (others == 2).double().mean().item())
    assert exposure.success() > 50

    for mine, shared in zip(masks(exposure.model).values(), masks(masked).values(), strict=True):
        assert mine is shared
        nn.init.uniform_(shared)
    with torch.no_grad():
        for index in (1, 4):
            suppressed[index].weight *= masks(masked)[str(index)]
        expected = suppressed(data.images)
    torch.testing.assert_close(
        exposure.logits(data.images, 0).detach(), expected, rtol=1e-4, atol=1e-4
    )
    needs = {k for k, p in exposure.model.named_parameters() if p.requires_grad}
    assert needs == {"1.mask", "4.mask"}
    for key in before.keys() - {"1.weight", "4.weight"}:
        assert torch.equal(suppressed.state_dict()[key], before[key])
    assert exposure.state() == {}
    exposure.load({})


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([0, 1, 2, 0, 1, 2], 0.0),  # no image leaves its class
        ([0, 0, 0, 0, 0, 0], 0.0),  # all that leave go to one
        ([1, 2, 0, 1, 2, 0], 1.0),
        ([1, 2, 0, 0, 1, 2], 1.0),
        ([1, 2, 2, 0, 1, 2], math.log(2) / math.log(3)),
    ],
)
def test_spread(chosen, expected, monkeypatch):
    """Of the images that leave their class, whose labels are 0, 1, 2, 0, 1, 2."""
    exposure = exposed(data=pixels(6), target=None)
    logits = nn.functional.one_hot(torch.tensor(chosen), 3).float()
    monkeypatch.setattr("mnp_fast.exposure.predict", lambda *_: logits)
    assert exposure.spread(exposure.first) == pytest.approx(expected, abs=1e-6)
