import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mnp_fast
from mnp_fast import _extension, backends, ops
from mnp_fast.demo.resnet import ResNet18

OPERATORS = {"masked_conv2d", "masked_affine", "masked_linear", "neuron_magnitude", "mask_update_"}


def results():
    """Of every operator, on the same inputs each time."""
    torch.manual_seed(1)
    x, weight, mask = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.rand(4)
    masks = [torch.rand(4), torch.rand(3)]
    ops.mask_update_(masks, [m + 1 for m in masks], [m - 1 for m in masks], masks, lr=0.1)
    return [
        ops.masked_conv2d(x, weight, mask, activation="relu"),
        ops.masked_affine(x, torch.rand(3), residual=x),
        ops.masked_linear(x, torch.randn(6, 5), torch.rand(6), residual=torch.ones(2, 3, 5, 6)),
        ops.masked_linear(x[0, 0, 0], torch.randn(6, 5), torch.rand(6)),
        *ops.neuron_magnitude([weight, weight[0]], "l2"),
        *masks,
    ]


def test_table_says_what_is_available():
    table = backends.table()
    assert set(table) == OPERATORS
    for candidates in table.values():
        assert {"cpu", "cuda", "torch"} <= set(candidates)
        assert candidates["cpu"] == candidates["torch"] == "available"
        assert candidates["cuda"] == (_extension.cuda_missing or "available")


def test_triton_says_what_it_cannot_do():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 2, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1])
    vectors = (None,) * 5
    for groups, algorithm, why in (
        (2, "auto", "groups must be 1, not 2"),
        (1, "winograd4", "algorithm must be 'auto' or 'direct', not 'winograd4'"),
        (1, "direct", "x must be on a CUDA device, not on cpu"),
    ):
        arguments = (x, weight, *vectors, *geometry, groups, "none", algorithm)
        assert backends.reasons("masked_conv2d", *arguments)["triton"] == why
    message = "masked_linear: the backend 'triton' cannot run: x must be on a CUDA device"
    with backends.use(masked_linear="triton"), pytest.raises(RuntimeError, match=message):
        ops.masked_linear(x, torch.randn(3, 5))


def test_triton_takes_over_where_cuda_kernels_are_missing(monkeypatch):
    candidates = [
        backends.Candidate(c.name, "gone" if c.name == "cuda" else None, c.can_run, c.run)
        for c in backends._candidates["masked_linear"]
    ]
    monkeypatch.setitem(backends._candidates, "masked_linear", candidates)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        assert (
            backends.choose("masked_linear", x, torch.empty(4, 3, device="cuda")).name == "triton"
        )


def test_spectral_norms_of_cuda_tensors_are_by_linalg():
    with FakeTensorMode():
        weights = [torch.empty(4, 3, 3, 3, device="cuda")]
        assert backends.choose("neuron_magnitude", weights, "spectral").name == "linalg"
        why = backends.reasons("neuron_magnitude", weights, "spectral")["cuda"]
        assert why == (_extension.cuda_missing or "norm 'spectral' has no CUDA kernel")
    assert backends.choose("neuron_magnitude", [torch.empty(2, 2)], "spectral").name == "cpu"


def test_the_compiled_kernels_are_the_default():
    x = torch.randn(2, 3)
    assert backends.choose("masked_affine", x).name == "cpu"
    assert backends.reasons("masked_affine", x)["cpu"] is None
    assert backends.choose("neuron_magnitude", [x]).name == "cpu"
    assert backends.choose("neuron_magnitude", []).name == "cpu"
    assert backends.choose("masked_affine", x.to("meta")).name == "torch"


def test_plain_torch_computes_the_same():
    expected = results()
    with backends.use(**dict.fromkeys(OPERATORS, "torch")):
        assert backends.choose("masked_affine", torch.randn(2, 3)).name == "torch"
        actual = results()
    torch.testing.assert_close(actual, expected)


def test_choices_nest_and_end():
    x = torch.randn(2, 3)
    with backends.use(masked_affine="torch"):
        with backends.use(masked_affine="cpu", masked_conv2d="torch"):
            assert backends.choose("masked_affine", x).name == "cpu"
        assert backends.choose("masked_affine", x).name == "torch"
        assert backends.choose("masked_conv2d", x).name == "cpu"
    assert backends.choose("masked_affine", x).name == "cpu"


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="operator must be one of masked_affine.*, not 'relu'"):
        backends.use(relu="torch").__enter__()
    message = "masked_affine must be one of cpu, cuda, .*torch, not 'tpu'"
    with pytest.raises(ValueError, match=message):
        backends.use(masked_affine="tpu").__enter__()


def test_a_choice_that_cannot_run_fails():
    why = re.escape(_extension.cuda_missing or "the tensors are on cpu")
    message = f"masked_affine: the backend 'cuda' cannot run: {why}"
    with backends.use(masked_affine="cuda"), pytest.raises(RuntimeError, match=message):
        ops.masked_affine(torch.randn(2, 3))


def test_cuda_tensors_without_cuda_kernels_fail_at_once(monkeypatch):
    why = "mnp_fast was built with MNP_FAST_CUDA=OFF"
    candidates = [
        backends.Candidate(c.name, why if c.name == "cuda" else c.missing, c.can_run, c.run)
        for c in backends._candidates["masked_affine"]
    ]
    monkeypatch.setitem(backends._candidates, "masked_affine", candidates)
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        with pytest.raises(RuntimeError) as error:
            ops.masked_affine(x)
        lines = str(error.value).splitlines()
        assert lines[0] == "masked_affine: no backend for tensors on cuda:"
        assert f"  cuda: {why}" in lines
        assert lines[-1].endswith("mnp_fast.backends.use(masked_affine='torch')")
        with backends.use(masked_affine="torch"):
            assert ops.masked_affine(x).device.type == "cuda"


def without_cuda_kernels(monkeypatch, why):
    """As where neither they nor Triton are installed."""
    for operator, known in backends._candidates.items():
        candidates = [
            backends.Candidate(
                c.name, why if c.name in ("cuda", "triton") else c.missing, c.can_run, c.run
            )
            for c in known
        ]
        monkeypatch.setitem(backends._candidates, operator, candidates)


def test_a_device_without_kernels_is_refused_before_any_work(monkeypatch):
    why = "mnp_fast was built with MNP_FAST_CUDA=OFF"
    without_cuda_kernels(monkeypatch, why)
    device = torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match=f"^no kernels for tensors on cuda:1: {why}. Move"):
        backends.check_device(device)
    with backends.use(**dict.fromkeys(OPERATORS - {"mask_update_"}, "torch")):
        with pytest.raises(RuntimeError, match=r"use\(mask_update_='torch'\)$"):
            backends.check_device(device)
        with backends.use(mask_update_="torch"):
            backends.check_device(device)
    backends.check_device(torch.device("cpu"))


@pytest.mark.parametrize("function", [mnp_fast.defend, mnp_fast.detect, mnp_fast.neuron_stats])
def test_functions_look_at_the_device_first(monkeypatch, function):
    def refuse(device):
        raise RuntimeError(f"no kernels for {device}")

    monkeypatch.setattr(backends, "check_device", refuse)
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    with pytest.raises(RuntimeError, match="no kernels for cpu"):
        function(ResNet18(4), (images, labels))


def test_why_cuda_kernels_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _extension._load_cuda() == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    built = SimpleNamespace(cuda_left_out="nvcc was not found", __file__=str(tmp_path / "_C.so"))
    monkeypatch.setattr(_extension, "_C", built)
    advice = "install it again with -Ccmake.define.MNP_FAST_CUDA=ON"
    assert _extension._load_cuda() == f"nvcc was not found; {advice}"
    built.cuda_left_out = ""
    (tmp_path / "_cuda.so").write_bytes(bytes(99))
    assert f"{tmp_path / '_cuda.so'} cannot be loaded: " in _extension._load_cuda()


def test_compiles_with_a_choice():
    x, mask = torch.randn(2, 3), torch.rand(3)

    def function(x, mask):
        return ops.masked_affine(x, mask, activation="relu")

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    expected = function(x, mask)
    torch.testing.assert_close(compiled(x, mask), expected)
    with backends.use(masked_affine="torch"):
        torch.testing.assert_close(compiled(x, mask), expected)
