import pytest
import torch

from mnp_fast import reference
from mnp_fast.ops import neuron_magnitude

from .cases import relative_error

SHAPES = [(4, 3, 3, 3), (1, 7), (64, 513), (5, 2, 3, 3, 3), (6,), (0, 3)]


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference_in_float64(norm, dtype):
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    actual = neuron_magnitude(weights, norm)
    rows = [w.double().reshape(w.shape[0], -1) if w.numel() else w.double() for w in weights]
    expected = reference.neuron_magnitude([r for r in rows if r.numel()], norm)
    assert actual.pop().shape == (0,)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(a, e) <= tolerance


def test_any_stride():
    w = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    t = torch.randn(5, 7).T
    actual = neuron_magnitude([w, t])
    assert torch.allclose(actual[0], w.abs().sum((1, 2, 3)))
    assert torch.allclose(actual[1], t.abs().sum(1))


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_nan_is_not_hidden(norm):
    w = torch.ones(2, 40)
    w[1, 17] = float("nan")
    (result,) = neuron_magnitude([w], norm)
    assert result.isnan().tolist() == [False, True]


def test_opcheck_and_default():
    from mnp_fast.ops import magnitude as module

    weights = [torch.randn(4, 3, 3, 3), torch.randn(5, 7)]
    torch.library.opcheck(torch.ops.mnp_fast.neuron_magnitude.default, (weights, "l1"))
    for a, b in zip(module._default(weights, "l2"), neuron_magnitude(weights, "l2"), strict=True):
        assert relative_error(a, b) <= 1e-6


def test_bad_input_is_named():
    with pytest.raises(RuntimeError, match="norm must be 'l1', 'l2' or 'linf', not 'l3'"):
        neuron_magnitude([torch.ones(2, 2)], "l3")
    with pytest.raises(RuntimeError, match="shape"):
        neuron_magnitude([torch.ones(())])
    with pytest.raises(RuntimeError, match="dtype"):
        neuron_magnitude([torch.ones(2, 2, dtype=torch.int32)])
