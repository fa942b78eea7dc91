"""Compiles every kernel in every configuration for every target; needs no GPU.

python -m tests.triton.resources            prints registers, memory and accesses of each
python -m tests.triton.resources --update   also writes resources.json, which the test compares with

There is a table for each release of Triton, as each has its own ptxas.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver

from mnp_fast.triton import conv

BASELINE = Path(__file__).with_name("resources.json")
TARGETS = (80, 90, 100)
# 16-byte accesses need channels-last images with channels in multiples of 16 bytes.
CASES = {
    "float32": (torch.float32, False, True),
    "tf32": (torch.float32, True, True),
    "float16": (torch.float16, False, True),
    "bfloat16": (torch.bfloat16, False, True),
    "float32 unaligned": (torch.float32, False, False),
    "float16 unaligned": (torch.float16, False, False),
}
Resources = dict[str, list[int]]


@dataclass(frozen=True)
class Compiled:
    """One kernel as ptxas made it."""

    kernel: str
    target: int
    case: str
    tile: str
    warps: int
    registers: int  # per thread
    stack: int  # bytes per thread; spilled registers live there
    shared: int  # bytes per block
    instructions: list[str]  # PTX accesses to global memory and tensor core products

    @property
    def name(self) -> str:
        return f"{self.kernel} sm_{self.target} {self.case} {self.tile}"

    @property
    def blocks(self) -> int:
        """Blocks that fit on one multiprocessor: registers, shared memory and threads counted."""
        shared = (163 if self.target == 80 else 227) * 1024
        registers = 65536 // (-(-self.registers // 8) * 8 * self.warps * 32)
        return min(registers, shared // (self.shared + 1024), 64 // self.warps)


def compile_all() -> list[Compiled]:
    """Every kernel, case, target and configuration, in the order of the baseline."""
    tasks = [(case, target) for target in TARGETS for case in CASES]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = pool.map(compile_case, *zip(*tasks, strict=True))
        return [compiled for result in results for compiled in result]


def compile_case(case: str, target: int) -> list[Compiled]:
    """The kernels that the operators launch in a case, forward and backward."""
    driver.set_active(Driver(target))
    return [
        _compile(tuner, config, args, kwargs, case, target)
        for tuner, args, kwargs in _launches(*CASES[case])
        for config in (tuner.configs if isinstance(tuner, Autotuner) else [None])
    ]


class Driver:
    """Stands for a GPU of a compute capability."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target  # kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0


def _launches(
    dtype: torch.dtype, allow_tf32: bool, aligned: bool
) -> list[tuple[object, tuple, dict]]:
    """What the operators launch, with the very arguments, everything that is optional given."""
    launches: list[tuple[object, tuple, dict]] = []

    def recorder(kernel: object) -> dict[object, Callable[..., None]]:
        class Record:
            def __getitem__(self, grid: object) -> Callable[..., None]:
                return lambda *args, **kwargs: launches.append((kernel, args, kwargs))

        return Record()

    channels, neurons, stride = (64, 128, 1) if aligned else (3, 70, 2)
    x = torch.zeros(8, channels, 16, 16, dtype=dtype)
    if aligned:
        x = x.to(memory_format=torch.channels_last)
    weight = torch.zeros(neurons, channels, 3, 3, dtype=dtype)
    vectors = [torch.zeros(8, neurons), *(torch.zeros(neurons) for _ in range(3))]
    geometry = ([stride] * 2, [1, 1], [1, 1], 1)
    y = torch.nn.functional.conv2d(x, weight, None, *geometry[:2])
    with (
        patch.object(conv, "wrap_triton", recorder),
        patch.object(conv, "why_not_conv2d", lambda *args: None),
    ):
        ops = torch.ops.mnp_fast
        y, u = ops.triton_masked_conv2d(
            x, weight, *vectors, torch.zeros_like(y), *geometry, "relu", True, allow_tf32
        )
        ops.triton_masked_conv2d_backward(
            y, x, weight, y, u, *vectors[:3], *geometry, True, False, True, True, allow_tf32
        )
    return launches


def _compile(tuner, config, args, kwargs, case, target) -> Compiled:
    options = {} if config is None else config.all_kwargs()
    kernel = tuner if config is None else tuner.fn
    binary = kernel.warmup(*args, grid=(1,), **kwargs, **options)
    tile = {**kwargs, **options}
    usage = _usage(binary.asm["cubin"])
    return Compiled(
        kernel=kernel.__name__,
        target=target,
        case=case,
        tile="x".join(str(tile[name]) for name in ("ROWS", "COLUMNS", "TERMS") if name in tile),
        warps=binary.metadata.num_warps,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=binary.metadata.shared,
        instructions=sorted(set(_instructions(binary.asm["ptx"]))),
    )


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text.split("Function")[1])
    }


def _instructions(ptx: str) -> Iterator[str]:
    """Accesses with their width in bytes, and tensor core products."""
    for kind, vector, bits in re.findall(
        r"\b(ld\.global|st\.global)(?:\.L\w+::\w+|\.\w+::\w+)*(?:\.v(\d))?\.b(\d+)", ptx
    ):
        yield f"{kind} {int(vector or 1) * int(bits) // 8}"
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x(\w+)", ptx):
        yield f"cp.async {int(size, 16)}"
    yield from re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx)


def main() -> None:
    compiled = compile_all()
    for c in compiled:
        print(
            f"{c.name:58} {c.warps} warps, {c.registers:3} registers, {c.stack} stack, "
            f"{c.shared:6} shared, {c.blocks} blocks; {', '.join(c.instructions)}"
        )
    if sys.argv[1:] == ["--update"]:
        write({**stored(), triton.__version__: {c.name: [c.registers, c.shared] for c in compiled}})


def stored() -> dict[str, Resources]:
    """Of every known release of Triton, registers and shared memory by kernel."""
    return json.loads(BASELINE.read_text())


def write(tables: dict[str, Resources]) -> None:
    """Store the tables, a line for each kernel."""
    parts = [
        f"  {json.dumps(version)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
        + "\n  }"
        for version, kernels in sorted(tables.items())
    ]
    BASELINE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
