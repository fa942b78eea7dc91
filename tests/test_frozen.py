import copy
import threading

import pytest
import torch
from torch import nn

import mnp_fast
from mnp_fast import frozen_weights

from .models import randomize, resnet

COUNTS = (1, 3)  # of samples: fewer pixels than neurons, and more


@pytest.fixture
def model():
    return randomize(resnet()).eval()


@pytest.fixture
def x():
    return torch.randn(1, 3, 16, 16)


@pytest.fixture
def budget():
    """A budget of its own for the test that asks for it."""
    before = mnp_fast.memory_budget()
    yield mnp_fast.set_memory_budget
    mnp_fast.set_memory_budget(before)


def step(masked, x):
    """The output, and the gradients of all masks."""
    y = masked(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), list(mnp_fast.masks(masked).values()))


def assert_same(a, b):
    assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [0, 100_000, 1 << 28])
@pytest.mark.parametrize("fuse", [True, False])
def test_computes_the_same_bits(fuse, size, model, x, budget):
    """Nothing, a part, and all of the weights fit into the budget."""
    masked = mnp_fast.wrap(model, fuse=fuse)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batches = [x.repeat(count, 1, 1, 1) for count in COUNTS]
    expected = [step(masked, batch) for batch in batches]
    budget(size)
    with frozen_weights(masked):
        for _ in range(2):
            for batch, wanted in zip(batches, expected, strict=True):
                assert_same(step(masked, batch), wanted)
    assert_same(step(masked, batches[0]), expected[0])


@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"])
def test_every_algorithm(algorithm, model, x):
    masked = mnp_fast.wrap(model, algorithm=algorithm)
    expected = step(masked, x)
    with frozen_weights(masked):
        for _ in range(2):
            assert_same(step(masked, x), expected)


@pytest.mark.parametrize("algorithm", ["auto", "winograd2"])
def test_images_of_several_sizes(algorithm):
    """Images of 2x2 take other sums of the weights than larger ones."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    masked = mnp_fast.wrap(model, algorithm=algorithm)
    images = [torch.randn(2, 16, size, size) for size in (2, 3, 8)]
    expected = [step(masked, x) for x in images]
    with frozen_weights(masked):
        for _ in range(2):
            for x, wanted in zip(images, expected, strict=True):
                assert_same(step(masked, x), wanted)


def test_masks_may_change(model, x):
    masked = mnp_fast.wrap(model)
    with frozen_weights(masked):
        masked(x)
        with torch.no_grad():
            for mask in mnp_fast.masks(masked).values():
                mask.mul_(torch.rand_like(mask) > 0.5)
        inside = step(masked, x)
    assert_same(step(masked, x), inside)


def test_new_weights_count_after_the_block(model, x):
    masked = mnp_fast.wrap(model)
    with frozen_weights(masked):
        before = masked(x)
    with torch.no_grad():
        masked.conv1.weight.mul_(2)
    with frozen_weights(masked):
        after = masked(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, masked(x))


def test_blocks_may_nest(model, x):
    masked = mnp_fast.wrap(model)
    expected = step(masked, x)
    with frozen_weights(masked), frozen_weights(masked):
        assert_same(step(masked, x), expected)
        with frozen_weights(masked):
            assert_same(step(masked, x), expected)
        assert_same(step(masked, x), expected)


CHANGES = {
    "in place": lambda conv: conv.weight.mul_(2),
    "other memory": lambda conv: setattr(conv.weight, "data", conv.weight.detach() * 2),
    "loaded": lambda conv: conv.load_state_dict({"weight": conv.weight * 2}),
    "assigned": lambda conv: conv.load_state_dict({"weight": conv.weight * 2}, assign=True),
    "replaced": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight * 2)),
    "other layout": lambda conv: conv.to(memory_format=torch.channels_last).weight.mul_(2),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_packed_anew(name, fuse, model, x):
    """In the innermost of nested blocks too, forward and backward."""
    masked = mnp_fast.wrap(model, fuse=fuse)
    with frozen_weights(masked), frozen_weights(masked):
        before = step(masked, x)
        with torch.no_grad():
            CHANGES[name](masked.conv1)
        after = step(masked, x)
    assert not torch.equal(before[0], after[0])
    assert_same(after, step(masked, x))


def test_a_change_of_dtype(model, x):
    masked = mnp_fast.wrap(model)
    with frozen_weights(masked):
        masked(x)
        masked.double()
        after = step(masked, x.double())
    assert_same(after, step(masked, x.double()))


def test_a_copy_has_weights_of_its_own(model, x):
    masked = mnp_fast.wrap(model)
    with frozen_weights(masked):
        masked(x)
        copied = copy.deepcopy(masked)
        with torch.no_grad():
            copied.conv1.weight.mul_(2)
        other, own = step(copied, x), step(masked, x)
    assert_same(other, step(copied, x))
    assert_same(own, step(masked, x))
    assert not torch.equal(own[0], other[0])


def test_nothing_is_left_behind(model):
    masked = mnp_fast.wrap(model)
    with pytest.raises(ZeroDivisionError), frozen_weights(masked):
        raise ZeroDivisionError
    assert not masked._forward_pre_hooks


def test_threads_share_what_is_kept(model, x):
    masked = mnp_fast.wrap(model)
    expected, results = step(masked, x), []

    def work():
        for _ in range(5):
            with frozen_weights(masked):
                results.append(step(masked, x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        assert_same(result, expected)


def test_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3))
        masked, x = mnp_fast.wrap(model), torch.randn(2, 3, 9, 9)
        expected = masked(x)
        with frozen_weights(masked):
            assert torch.equal(masked(x), expected)
