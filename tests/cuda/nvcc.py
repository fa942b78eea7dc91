"""The kernels compiled for real devices: python -m tests.cuda.nvcc stores what they need of one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .shim import CSRC, KERNELS, run

TARGETS = ("sm_80", "sm_90", "sm_100")
BASELINE = Path(__file__).parent / "resources.json"
FLAGS = (
    *("-std=c++20", "-O3", "-cubin", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"),
    *("-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error"),
)

Resources = dict[str, list[int]]  # registers and bytes of shared memory, by kernel


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def compile_kernels(name: str, target: str, cache: Path) -> tuple[str, str]:
    """What ptxas says of a file's kernels, and their PTX; errors and warnings fail."""
    nvcc = find_nvcc()
    assert nvcc is not None
    source = CSRC / "cuda" / f"{name}.cu"
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.*h")]
    version = run([nvcc, "--version"]).stdout
    text = [version.encode(), repr((FLAGS, target)).encode()]
    text += [path.read_bytes() for path in (source, *sorted(headers))]
    key = hashlib.sha256(b"\0".join(text)).hexdigest()[:20]
    stored = cache / f"{name}-{target}-{key}.json"
    if not stored.exists():
        with tempfile.TemporaryDirectory() as folder:
            keep = ["-keep", "-keep-dir", folder, "-o", f"{folder}/kernels.cubin"]
            done = run([nvcc, *FLAGS, f"-arch={target}", *keep, source])
            ptx = (Path(folder) / f"{name}.ptx").read_text()
        stored.write_text(json.dumps([demangled(done.stdout + done.stderr), demangled(ptx)]))
    log, ptx = json.loads(stored.read_text())
    return log, ptx


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout


def short(name: str) -> str:
    """`epilogue_planes<float, 4>` of a kernel's full name."""
    for part in ("void ", "mnp::cuda::", "(anonymous namespace)::", "(mnp::Norm)"):
        name = name.replace(part, "")
    return name.split("(")[0]


def resources(log: str) -> Resources:
    """Registers and shared memory of every kernel; fails for one that spills."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = short(part.split("' for '")[0])
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert spilled is not None
        assert spilled.groups() == ("0", "0"), f"{name} spills"
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        found[name] = [int(registers[1]), int(shared[1]) if shared else 0]
    return found


def release() -> str:
    match = re.search(r"release ([\d.]+)", run([find_nvcc() or "nvcc", "--version"]).stdout)
    assert match is not None
    return match[1]


def entries(ptx: str) -> dict[str, str]:
    """The body of every kernel in a PTX file."""
    parts = re.split(r"\.entry ", ptx)[1:]
    return {short(part.split("\n")[0].rstrip("(")): part for part in parts}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {
            target: {
                kernel: used
                for name in KERNELS
                for kernel, used in resources(
                    compile_kernels(name, target, Path(folder))[0]
                ).items()
            }
            for target in TARGETS
        }
    lines = [
        f'  "{target}": {{\n'
        + ",\n".join(f'    "{k}": {json.dumps(v)}' for k, v in sorted(kernels.items()))
        + "\n  }"
        for target, kernels in found.items()
    ]
    BASELINE.write_text(f'{{\n  "nvcc": "{release()}",\n' + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
