import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import mnp_fast
from mnp_fast import _C, _extension, backends, build_info

CPU = build_info()["cpu"]
PACKAGE = Path(mnp_fast.__file__).parent


def test_keys_and_values():
    info = build_info()
    assert set(info) == {
        "version", "compiler", "torch_built", "torch_running", "python", "cpu", "cuda",
        "backends",
    }  # fmt: skip
    assert info["version"] == metadata.version("mnp_fast")
    assert re.fullmatch(r"(GNU|Clang|AppleClang) \d+(\.\d+)+", info["compiler"])
    assert re.match(r"\d+\.\d+", info["torch_built"])
    assert info["torch_running"] == torch.__version__
    assert info["python"] == platform.python_version()
    reason = _extension.cuda_missing
    built = not _C.cuda_left_out
    assert info["cuda"] == {
        "built": built,
        "loaded": not reason,
        "reason": reason or "",
        "devices": torch.cuda.device_count(),
    }
    assert info["backends"] == backends.table()
    assert json.loads(json.dumps(info)) == info


def test_instruction_sets():
    assert set(CPU) == {"built", "usable", "used", "threads"}
    assert CPU["built"][0] == CPU["usable"][0] == "baseline"
    assert CPU["usable"] == [name for name in CPU["built"] if name in CPU["usable"]]
    assert CPU["used"] == (os.environ.get("MNP_FAST_CPU") or CPU["usable"][-1])
    assert CPU["threads"] == torch.get_num_threads()
    flags = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and flags.exists():
        assert ("avx2" in CPU["usable"]) == ({"avx2", "fma"} <= set(flags.read_text().split()))


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_import_is_light():
    """Plots, reports, the command line and the demo import what they need themselves."""
    code = (
        "import sys, torch; before = set(sys.modules); import mnp_fast; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split())
    assert "mnp_fast" in imported
    assert not imported & {"matplotlib", "sklearn", "scipy", "jinja2", "typer", "rich"}


COMPARISON = """
import torch
import mnp_fast
from mnp_fast import ops, reference

torch.manual_seed(0)
assert mnp_fast.build_info()["cpu"]["used"] == {name!r}
for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    def near(actual, expected):
        error = ((actual - expected).norm() / expected.norm()).item()
        assert 0 <= error <= limit, (dtype, error)

    def rand(*shape):
        return torch.randn(*shape, dtype=dtype)

    x, weight = rand(3, 7, 9, 11).requires_grad_(), rand(37, 7, 3, 3).requires_grad_()
    mask = torch.rand(37, dtype=dtype).requires_grad_()
    vectors = dict(scale=rand(37), shift=rand(37), bias=rand(37), activation="relu")
    conv, affine = (x, weight, mask), (rand(3, 37, 5, 7).requires_grad_(), mask)
    pairs = [(ops.masked_affine(*affine, **vectors), reference.masked_affine, affine, {{}})]
    for algorithm in ("direct", "winograd4"):
        y = ops.masked_conv2d(*conv, **vectors, padding=1, algorithm=algorithm)
        pairs.append((y, reference.masked_conv2d, conv, dict(padding=(1, 1))))
    for y, by_hand, inputs, geometry in pairs:
        expected = by_hand(*inputs, **vectors, **geometry)
        near(y, expected)
        ours = torch.autograd.grad(y.square().sum(), inputs)
        for mine, grad in zip(ours, torch.autograd.grad(expected.square().sum(), inputs)):
            near(mine, grad)

    weights = [rand(37, 7, 3, 3), rand(5, 1001)]
    for norm in ("l1", "l2", "linf"):
        pairs = zip(ops.neuron_magnitude(weights, norm), reference.neuron_magnitude(weights, norm))
        for mine, expected in pairs:
            near(mine, expected)

    lists = [[torch.rand(n, dtype=dtype) for n in (3, 70, 1001)] for _ in range(4)]
    theirs = [[t.clone() for t in tensors] for tensors in lists]
    ops.mask_update_(*lists, lr=0.1, momentum=0.9, penalty=0.3)
    reference.mask_update_(*theirs, lr=0.1, momentum=0.9, penalty=0.3)
    for mine, expected in zip(lists[0] + lists[2], theirs[0] + theirs[2]):
        near(mine, expected)
print("compared", {name!r})
"""


@pytest.mark.parametrize("name", CPU["usable"])
def test_every_usable_instruction_set_agrees_with_the_reference(name):
    done = run(COMPARISON.format(name=name), MNP_FAST_CPU=name)
    assert done.stdout == f"compared {name}\n", done.stderr


@pytest.mark.parametrize(
    "name", ["sse9", *(name for name in CPU["built"] if name not in CPU["usable"])]
)
def test_instruction_set_that_cannot_be_used(name):
    done = run("import mnp_fast", MNP_FAST_CPU=name)
    assert done.returncode == 1
    allowed = " ".join(CPU["usable"])
    message = f"MNP_FAST_CPU is '{name}', but this CPU and build allow only: {allowed}\n"
    assert message in done.stderr


def import_copy(folder, **extension):
    """Import a copy of the package with this extension file, in a new process."""
    copied = folder / "mnp_fast"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, content in extension.items():
        (copied / name).write_bytes(content)
    # Without site, no editable install puts itself in front of the copy.
    return subprocess.run(
        [sys.executable, "-S", "-c", "import mnp_fast"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])},
    )


def test_damaged_extension_is_explained(tmp_path):
    name = Path(_C.__file__).name
    done = import_copy(tmp_path, **{name: bytes(4096)})
    assert done.returncode == 1
    first, second, third = done.stderr.splitlines()[-3:]
    assert re.search(f"ImportError: mnp_fast's compiled .* cannot be loaded: .*{name}", first)
    assert f"torch {torch.__version__} ({Path(torch.__file__).parent})" in second
    assert f"python {platform.python_version()} ({os.path.normpath(sys.executable)})" in second
    assert third == f"  extension modules: {tmp_path / 'mnp_fast' / name}"


def test_missing_extension_is_explained(tmp_path):
    done = import_copy(tmp_path)
    assert done.returncode == 1
    *_, listed, advice = done.stderr.splitlines()
    assert listed == "  extension modules: none"
    assert advice == "  The package was not built here: install it with pip."


def test_missing_symbol_is_explained(tmp_path, monkeypatch):
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    error = ImportError("/lib/_C.so: undefined symbol: aoti_torch_new_thing")
    text = _extension._explain(error)
    assert "cannot be loaded: /lib/_C.so: undefined symbol: aoti_torch_new_thing\n" in text
    assert f"torch {torch.__version__}" in text
    listed = [line for line in text.splitlines() if "extension modules" in line]
    assert f"{tmp_path / '_C.cpython-399-x86_64-linux-gnu.so'}" in listed[0]
    assert _C.__file__ in listed[0]
    assert text.endswith("mnp_fast needs torch >= 2.10; this torch lacks the symbol named above.")
