import math

import pytest
import torch
from torch import nn

from mnp_fast.demo.attacks import ATTACKS, TARGET, badnets, blend, poison, sig
from mnp_fast.demo.digits import load_digits
from mnp_fast.demo.train import accuracy, attack_success_rate, predict, train

from .trained import small_net, stripes

IMAGES = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def test_badnets_stamps_a_checkerboard_into_the_corner():
    stamped = badnets(IMAGES)
    patch = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(stamped[..., -3:, -3:], patch.expand(20, 3, 3, 3))
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[-3:, -3:] = False
    assert torch.equal(stamped[..., outside], IMAGES[..., outside])


def test_blend_mixes_in_one_fixed_pattern():
    torch.manual_seed(1)
    pattern = (blend(IMAGES) - 0.8 * IMAGES) / 0.2
    torch.testing.assert_close(pattern, pattern[:1].expand_as(pattern), rtol=0, atol=1e-5)
    assert pattern.std() == pytest.approx(math.sqrt(1 / 12), rel=0.1)  # uniform in [0, 1]
    assert torch.equal(blend(IMAGES, 0.0), IMAGES)
    torch.manual_seed(2)
    torch.testing.assert_close(blend(IMAGES, 1.0)[0], pattern[0], rtol=0, atol=1e-5)


def test_sig_adds_a_sine_along_the_rows():
    gray = torch.full((1, 3, 16, 16), 0.5)
    wave = sig(gray, amplitude=0.2, periods=2) - 0.5
    expected = 0.2 * torch.sin(2 * math.pi * 2 * torch.arange(16) / 16)
    torch.testing.assert_close(wave, expected.expand(1, 3, 16, 16), rtol=0, atol=1e-6)
    loud = sig(IMAGES, amplitude=2.0)
    assert loud.min() == 0
    assert loud.max() == 1


@pytest.mark.parametrize("name", ATTACKS)
def test_triggers_keep_range_shape_and_their_input(name):
    before = IMAGES.clone()
    state = torch.get_rng_state()
    stamped = ATTACKS[name](IMAGES)
    assert torch.equal(IMAGES, before)
    assert torch.equal(state, torch.get_rng_state())
    assert stamped.shape == IMAGES.shape
    assert stamped.dtype == IMAGES.dtype
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert (stamped != IMAGES).flatten(1).any(1).all()
    assert torch.equal(ATTACKS[name](IMAGES), stamped)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.1, 2), (0.13, 3), (1.0, 20)])
def test_poison_stamps_and_labels_a_share(rate, count):
    labels = 1 + torch.arange(20) % 9
    images, poisoned = poison(IMAGES, labels, badnets, rate, seed=3)
    changed = poisoned != labels
    assert changed.sum() == count
    assert (poisoned[changed] == TARGET).all()
    assert torch.equal(images[changed], badnets(IMAGES)[changed])
    assert torch.equal(images[~changed], IMAGES[~changed])
    assert torch.equal(labels, 1 + torch.arange(20) % 9)


def test_poison_chooses_by_the_seed():
    labels = torch.ones(20, dtype=torch.int64)
    chosen = [poison(IMAGES, labels, badnets, 0.3, seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def parts(seed):
    digits = load_digits(seed)
    return [digits.train, digits.clean, digits.test]


def test_digits_are_split_into_disjoint_sets():
    from sklearn.datasets import load_digits as raw_digits

    split = parts(0)
    assert [len(labels) for _, labels in split] == [1197, 100, 500]
    for images, labels in split:
        assert images.shape == (len(labels), 3, 16, 16)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert 0 <= images.min() < 0.1 < 0.9 < images.max() <= 1
        assert labels.unique().tolist() == list(range(10))
        assert torch.equal(images[:, 0], images[:, 2])
    # Each of the 1,797 originals, which differ, is there once with its label.
    raw = raw_digits()
    originals = nn.functional.interpolate(
        torch.tensor(raw.images).float()[:, None] / 16, size=(16, 16), mode="bilinear"
    )
    pairs = zip(originals, raw.target, strict=True)
    expected = {image.numpy().tobytes(): int(label) for image, label in pairs}
    found = [
        (image[:1].numpy().tobytes(), int(label))
        for images, labels in split
        for image, label in zip(images, labels, strict=True)
    ]
    assert len(expected) == len(found) == 1797
    assert dict(found) == expected


def test_digits_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = parts(5)
    torch.manual_seed(2)
    for (images, labels), (again, same), (_, other) in zip(first, parts(5), parts(6), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
        assert not torch.equal(labels, other)
    more = load_digits(0, size=9, clean=180)
    assert more.clean[0].shape == (180, 3, 9, 9)
    assert [len(more.train[1]), len(more.test[1])] == [1117, 500]


class FirstPixel(nn.Module):
    """Predicts the class that the first pixel names."""

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0, 0, 0].round().long(), 10).float()


def labelled(predicted):
    images = torch.zeros(len(predicted), 3, 4, 4)
    images[:, 0, 0, 0] = torch.tensor(predicted).float()
    return images


def test_accuracy_is_in_percent():
    model = FirstPixel().train()
    images = labelled([1, 2, 3, 0, 0, 0, 7, 8])
    assert accuracy(model, images, torch.tensor([1, 2, 3, 0, 1, 1, 7, 9])) == 62.5
    assert predict(model, images, batch_size=3).tolist() == [1, 2, 3, 0, 0, 0, 7, 8]
    assert not model.training


def test_attack_success_leaves_the_target_class_out():
    """Six images are of other classes; the trigger sends three of them to the target."""
    images = labelled([5, 5, 1, 1, 1, 5, 5, 5])
    labels = torch.tensor([TARGET, TARGET, 1, 2, 3, 4, 5, 6])
    stamped = []

    def trigger(x):
        stamped.append(len(x))
        return torch.where(x == 1, TARGET, x)

    assert attack_success_rate(FirstPixel(), images, labels, trigger) == 50
    assert stamped == [6]


def test_training_learns_and_is_repeatable():
    data = stripes(200, seed=1)

    def trained(seed):
        torch.manual_seed(0)
        model = small_net()
        losses = list(train(model, data.images, data.labels, epochs=8, seed=seed))
        return model, losses

    (model, losses), (same, again), (_, other) = trained(0), trained(0), trained(1)
    assert len(losses) == 8
    assert losses == again != other
    assert losses[-1] < 0.5 * losses[0]
    held_back = stripes(80, seed=2)
    assert accuracy(model, held_back.images, held_back.labels) > 60
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())
