import pytest
import torch

from mnp_fast.ops import mask_update_


def lists(dtype, sizes=(3, 70, 1000)):
    masks = [torch.rand(s, dtype=dtype) for s in sizes]
    grads = [torch.randn(s, dtype=dtype) for s in sizes]
    velocities = [torch.zeros(s, dtype=dtype) for s in sizes]
    magnitudes = [torch.rand(s, dtype=dtype) for s in sizes]
    return masks, grads, velocities, magnitudes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_torch_sgd_followed_by_a_clamp(dtype):
    masks, _, velocities, magnitudes = lists(dtype)
    parameters = [m.clone().requires_grad_() for m in masks]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in range(5):
        grads = [torch.randn_like(m) for m in masks]
        mask_update_(masks, grads, velocities, magnitudes, lr=0.1, momentum=0.9, penalty=0.3)
        for p, g, m in zip(parameters, grads, magnitudes, strict=True):
            p.grad = g + 0.3 * m
        optimizer.step()
        with torch.no_grad():
            for p in parameters:
                p.clamp_(0, 1)
    for mask, parameter in zip(masks, parameters, strict=True):
        assert torch.allclose(mask, parameter, rtol=0, atol=1e-6)
    assert masks[-1].min() == 0
    assert masks[-1].max() == 1


def test_leaves_that_require_grad_are_changed_and_marked():
    mask = torch.nn.Parameter(torch.full((4,), 0.5))
    version = mask._version
    zero = torch.zeros(4)
    mask_update_([mask], [torch.ones(4)], [zero.clone()], [zero], lr=0.25)
    assert torch.equal(mask.detach(), torch.full((4,), 0.25))
    assert mask._version > version


def test_grads_of_any_stride():
    mask, zero = torch.full((3,), 0.5), torch.zeros(3)
    mask_update_([mask], [torch.ones(1).expand(3)], [zero.clone()], [zero], lr=0.5)
    assert mask.tolist() == [0, 0, 0]


def test_opcheck():
    torch.library.opcheck(
        torch.ops.mnp_fast.mask_update_.default, (*lists(torch.float32), 0.1, 0.9, 0.3)
    )


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (1, [torch.ones(4)], r"grads must have shape \(3,\)"),
        (2, [torch.ones(3).double()], "velocities must have shape"),
        (3, [torch.ones(2)], "magnitudes must have shape"),
        (3, [], "same length, not 1, 1, 1 and 0"),
        (0, [torch.ones(3).half()], "masks must be float32 or float64"),
        (0, [torch.ones(6)[::2]], "contiguous"),
    ],
)
def test_bad_input_changes_nothing(position, bad, message):
    arguments = [[torch.full((3,), 0.5)], [torch.ones(3)], [torch.zeros(3)], [torch.ones(3)]]
    arguments[position] = bad
    with pytest.raises(RuntimeError, match=message):
        mask_update_(*arguments, lr=0.1)
    if position:
        assert arguments[0][0].tolist() == [0.5] * 3
