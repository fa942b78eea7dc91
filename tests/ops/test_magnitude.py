import pytest
import torch

from mnp_fast import backends, reference
from mnp_fast.ops import neuron_magnitude

from .cases import assert_same_bits, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = ["l1", "l2", "linf"]
MATRICES = [
    *[(4, 3, 3, 3), (5, 17, 3, 3), (3, 9, 3, 3), (2, 40, 7, 7), (2, 130, 11, 13), (3, 2, 8, 9)],
    *[
        (6, 5, 1, 1),
        (4, 21),
        (7,),
        (0, 3),
        (2, 6, 2, 3, 4),
        (3, 1, 5, 5),
        (2, 9, 19),
        (1, 64, 1, 4),
    ],
]
SHAPES = [(4, 3, 3, 3), (1, 7), (64, 513), (5, 2, 3, 3, 3), (6,), (0, 3)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
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


def strided(dtype):
    def random(*shape):
        return torch.randn(shape).to(dtype)

    return {
        "channels-last": random(6, 4, 3, 5).to(memory_format=torch.channels_last),
        "transposed": random(5, 7).T,
        "part of each row": random(6, 40)[:, 3:32],
        "every other row": random(12, 33)[::2],
        "every other column": random(6, 66)[:, ::2],
        "one row, repeated": random(1, 19).expand(4, 19),
        "one element, repeated": random(4, 1).expand(4, 9),
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_stride(norm, dtype):
    weights = strided(dtype)
    actual = neuron_magnitude(list(weights.values()), norm)
    expected = reference.neuron_magnitude([w.double() for w in weights.values()], norm)
    for name, a, e in zip(weights, actual, expected, strict=True):
        assert relative_error(a, e) <= (1e-14 if dtype == torch.float64 else 1e-6), name


@pytest.fixture(params=[None, "linalg"])
def spectral_backend(request):
    """The default one, and the one that CUDA tensors have."""
    if request.param is None:
        yield
        return
    with backends.use(neuron_magnitude=request.param):
        yield


@pytest.mark.usefixtures("spectral_backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral(dtype):
    weights = [torch.randn(shape).to(dtype) for shape in MATRICES]
    weights += [w.to(memory_format=torch.channels_last) for w in weights if w.dim() == 4]
    weights += [w[::2] for w in weights] + [w[:, ::2] for w in weights if w.dim() > 1]
    weights += [w.transpose(2, 3) for w in weights if w.dim() == 4]
    expected = reference.neuron_magnitude([w.double() for w in weights if w.numel()], "spectral")
    actual = [a for a in neuron_magnitude(weights, "spectral") if a.numel()]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(a, e) <= (1e-8 if dtype == torch.float64 else 2e-6), e.shape


@pytest.mark.usefixtures("spectral_backend")
def test_spectral_of_values_that_lie_close_together():
    """Equal ones, nearly equal ones, one alone, none."""
    u, v = (torch.linalg.qr(torch.randn(3, 20, 9))[0] for _ in range(2))
    values = torch.tensor([[3.0] * 9, [3.0] * 5 + [3 - 1e-4] * 4, [3.0] + [0.0] * 8])
    w = torch.cat([(u * values[:, None]) @ v[:, :9].mT, torch.zeros(1, 20, 9)])
    exact = torch.linalg.matrix_norm(w.double(), 2)
    (found,) = neuron_magnitude([w], "spectral")
    assert ((found - exact).abs() <= 2e-6 * exact).all()


@pytest.mark.usefixtures("spectral_backend")
@pytest.mark.parametrize("place", [0, 8, 79])
def test_spectral_does_not_hide_nan_and_infinity(place):
    w = torch.ones(3, 10, 2, 4)
    w[1].view(-1)[place], w[2].view(-1)[place] = float("nan"), float("inf")
    (result,) = neuron_magnitude([w], "spectral")
    assert result.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_half_type(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)[:, None]
    (actual,) = neuron_magnitude([values], "linf")
    assert torch.equal(actual.nan_to_num(-1), values[:, 0].float().abs().nan_to_num(-1))


def test_long_rows_round_little():
    w = torch.rand(2, 100_003) + 0.5
    for norm in ("l1", "l2"):
        (expected,) = reference.neuron_magnitude([w.double()], norm)
        assert relative_error(neuron_magnitude([w], norm)[0], expected) <= 1e-6


@pytest.mark.parametrize("norm", ["l2", "spectral"])
def test_same_for_any_number_of_threads(norm):
    weights = [torch.randn(shape) for shape in ((3, 50_001), (700, 301), (0, 4), (1, 9), (64, 576))]
    assert_same_bits(lambda: tuple(neuron_magnitude(weights, norm)), (1, 2, 3))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 17, 39])
def test_nan_and_infinity_are_not_hidden(norm, dtype, place):
    w = torch.ones(4, 40, dtype=dtype)
    w[1, place], w[2, place], w[3] = float("nan"), -float("inf"), float("inf")
    w[3, place] = float("nan")
    (result,) = neuron_magnitude([w], norm)
    assert result.isnan().tolist() == [False, True, False, True]
    assert result[2] == float("inf")


@pytest.mark.parametrize("norm", ["l2", "spectral"])
def test_opcheck_and_default(norm):
    from mnp_fast.ops import magnitude as module

    weights = [torch.randn(4, 3, 3, 3), torch.randn(5, 7)]
    torch.library.opcheck(torch.ops.mnp_fast.neuron_magnitude.default, (weights, norm))
    for a, b in zip(module._default(weights, norm), neuron_magnitude(weights, norm), strict=True):
        assert relative_error(a, b) <= 1e-6


def test_linalg_takes_spectral_norms_alone():
    for wrong, why in (
        ((torch.ones(2, 2), "l2"), "'linalg' cannot run: norm must be 'spectral', not 'l2'"),
        (
            (torch.ones(()), "spectral"),
            r"shape \(neurons, \*\) and a floating-point dtype, not \(\)",
        ),
        ((torch.ones(2, 2).int(), "spectral"), "not .* and torch.int32"),
    ):
        weight, norm = wrong
        with backends.use(neuron_magnitude="linalg"), pytest.raises(RuntimeError, match=why):
            neuron_magnitude([weight], norm)


def test_bad_input_is_named():
    with pytest.raises(
        RuntimeError, match="norm must be 'l1', 'l2', 'linf' or 'spectral', not 'l3'"
    ):
        neuron_magnitude([torch.ones(2, 2)], "l3")
    with pytest.raises(RuntimeError, match="shape"):
        neuron_magnitude([torch.ones(())])
    with pytest.raises(RuntimeError, match="dtype"):
        neuron_magnitude([torch.ones(2, 2, dtype=torch.int32)])


def test_spectral_names_its_types():
    with pytest.raises(RuntimeError, match="'spectral' takes float32 or float64"):
        torch.ops.mnp_fast.neuron_magnitude([torch.ones(2, 2).half()], "spectral")
