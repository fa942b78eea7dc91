from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.attacks import ATTACKS, input_aware, poison, success, surrogate
from benchmarks.attacks.attack import CLASSES
from benchmarks.attacks.dct import waves
from benchmarks.attacks.label_consistent import RADIUS, corners
from benchmarks.attacks.quantisation import LEVELS, quantise
from mnp_fast.demo.attacks import TARGET, badnets

COUNT = 200
LABELS = torch.arange(COUNT) % CLASSES


def digits_like(seed=3, height=16, width=16):
    """Dim noise with a bright bar, whose place is the class."""
    images = 0.2 * torch.rand(
        COUNT, 3, height, width, generator=torch.Generator().manual_seed(seed)
    )
    for index, label in enumerate(LABELS.tolist()):
        images[index, :, label : label + 3] += 0.6
    return images


IMAGES = digits_like()
ADDED = ["low-frequency", "frequency", "reflection"]


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Triggers need not work here, so what is trained for them hardly is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surrogate, "EPOCHS", 2)
        patch.setattr(input_aware, "STEPS", 3)
        yield


@pytest.fixture(scope="module", params=ATTACKS)
def attacked(request):
    attack = ATTACKS[request.param]
    return attack, poison(attack, IMAGES, LABELS, seed=5)


def test_a_share_is_poisoned_and_the_rest_untouched(attacked):
    attack, data = attacked
    assert len(data.chosen) == round(attack.rate * COUNT)
    assert len(data.covered) == round(attack.cover_rate * COUNT)
    assert not torch.isin(data.chosen, data.covered).any()
    changed = (data.images != IMAGES).flatten(1).any(1)
    touched = torch.zeros(COUNT, dtype=torch.bool)
    touched[data.chosen] = touched[data.covered] = True
    assert torch.equal(changed, touched)


def test_labels_follow_the_mapping(attacked):
    attack, data = attacked
    expected = LABELS.clone()
    expected[data.chosen] = attack.target(LABELS[data.chosen])
    assert torch.equal(data.labels, expected)
    if attack.clean_label:
        assert torch.equal(data.labels, LABELS)
    else:
        assert (data.labels[data.chosen] != LABELS[data.chosen]).all()


def test_images_keep_shape_type_and_range(attacked):
    _, data = attacked
    assert data.images.shape == IMAGES.shape
    assert data.images.dtype == IMAGES.dtype
    assert not data.images.requires_grad
    assert data.images.min() >= 0
    assert data.images.max() <= 1


def test_trigger_changes_every_image_alike_and_not_its_input(attacked):
    _, data = attacked
    before = IMAGES.clone()
    triggered = data.trigger(IMAGES)
    assert torch.equal(before, IMAGES)
    assert (triggered != IMAGES).flatten(1).any(1).all()
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    torch.testing.assert_close(data.trigger(IMAGES[7:30]), triggered[7:30], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ATTACKS)
def test_seed_decides_alone(name):
    torch.manual_seed(1)
    first = poison(ATTACKS[name], IMAGES, LABELS, seed=2)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = poison(ATTACKS[name], IMAGES, LABELS, seed=2)
    other = poison(ATTACKS[name], IMAGES, LABELS, seed=3)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.chosen, again.chosen)
    assert not torch.equal(first.chosen, other.chosen)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ADDED)
def test_these_add_one_pattern(name):
    gray = torch.full((2, 3, 16, 16), 0.5)
    trigger = poison(ATTACKS[name], IMAGES, LABELS, seed=0).trigger
    change = trigger(gray) - gray
    assert torch.equal(change[0], change[1])
    spectrum = (waves(16).T @ change[0] @ waves(16)).abs()
    if name == "low-frequency":
        assert spectrum[:, 4:].max() < 1e-5
        assert spectrum[:, :, 4:].max() < 1e-5
        assert change.abs().max() == pytest.approx(0.15, abs=1e-6)
    elif name == "frequency":
        loud = (spectrum.amax(0) > 1e-5).nonzero().tolist()
        assert loud == [[7, 7], [15, 15]]


def test_waves_are_orthonormal():
    torch.testing.assert_close(waves(9).T @ waves(9), torch.eye(9))
    torch.testing.assert_close(waves(9)[:, 0], torch.full((9,), 1 / 3))


def test_quantised_images_have_few_levels_and_the_same_mean():
    quantised = quantise(IMAGES)
    assert set((quantised * (LEVELS - 1)).round(decimals=4).unique().tolist()) <= set(range(LEVELS))
    assert (quantised.mean((2, 3)) - IMAGES.mean((2, 3))).abs().max() < 0.02
    assert (IMAGES - quantised).abs().max() > 0.5 / (LEVELS - 1)  # more than rounding


def test_corners_stamp_all_four_corners():
    gray = torch.full((1, 3, 9, 8), 0.5)
    stamped = corners(gray)
    for axes in ((), (-1,), (-2,), (-1, -2)):
        assert torch.equal(stamped.flip(axes)[..., -3:, -3:], badnets(gray)[..., -3:, -3:])
    assert (stamped == gray).sum() == 3 * (9 * 8 - 4 * 9)


def test_clean_label_hides_what_it_poisons():
    attack = ATTACKS["clean-label"]
    data = poison(attack, IMAGES, LABELS, seed=0)
    difference = data.images[data.chosen] - corners(IMAGES[data.chosen])
    assert difference.abs().max().item() == pytest.approx(RADIUS)
    assert (LABELS[data.chosen] == TARGET).all()


def test_not_enough_images():
    with pytest.raises(ValueError, match=r"16 images to poison .* only 0 of 200"):
        poison(ATTACKS["clean-label"], IMAGES, LABELS.clamp(min=1), seed=0)


def test_attacks_lead_to_the_class_that_is_asked_for():
    for name, attack in ATTACKS.items():
        data = poison(replace(attack, target_class=7), IMAGES, LABELS, seed=0)
        expected = (LABELS[data.chosen] + 1) % CLASSES if attack.all_to_all else 7
        assert (data.labels[data.chosen] == expected).all(), name
        other = poison(attack, IMAGES, LABELS, seed=0)
        made_for_it = name in ("low-frequency", "input-aware")
        assert made_for_it != torch.equal(data.trigger(IMAGES[:9]), other.trigger(IMAGES[:9])), name


class FirstPixel(nn.Module):
    """Predicts the class that the first pixel names, in tenths."""

    def forward(self, x):
        return nn.functional.one_hot((10 * x[:, 0, 0, 0]).round().long(), CLASSES).float()


@pytest.mark.parametrize(("name", "expected"), [("badnets", (40, 60)), ("all-to-all", (50, 0))])
def test_success(name, expected):
    labels = torch.tensor([TARGET, 1, 2, 3, 4, 9])
    named = {"badnets": [5, 0, 0, 3, 4, 9], "all-to-all": [1, 2, 3, 5, 6, 5]}[name]
    images = (torch.tensor(named) / 10).reshape(-1, 1, 1, 1)
    found = success(FirstPixel(), ATTACKS[name], lambda images: images, images, labels)
    assert found == expected
