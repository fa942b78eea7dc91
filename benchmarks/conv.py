"""3x3 convolutions: torch's own beside masked_conv2d's two algorithms, interleaved in one process.

python benchmarks/conv.py                       # one thread, CPU time
python benchmarks/conv.py --batches 32,128 --rounds 21
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mnp_fast import _C
from mnp_fast.ops import masked_conv2d

LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels in and out, height and width
ALGORITHMS = ("direct", "winograd4")
LIMIT = 1e-5  # of ||out - exact|| / ||exact||; a faster wrong result is no result
ONES = ([1, 1], [1, 1], [1, 1])  # stride, padding, dilation
Case = Callable[[], Tensor]
Times = list[float]


def cases(batch: int, channels: int, size: int) -> dict[str, tuple[Tensor, dict[str, Case]]]:
    """By direction: the exact result, and what computes it by name."""
    last = torch.channels_last
    x = torch.randn(batch, channels, size, size).to(memory_format=last)
    grad = torch.randn_like(x)
    weight = torch.randn(channels, channels, 3, 3)
    packed = weight.to(memory_format=last)

    def torch_grad(g: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            g, x.to(g.dtype), w, None, *ONES, False, [0, 0], 1, [True, False, False]
        )[0]

    def forward(algorithm: str) -> Case:
        return lambda: masked_conv2d(x, weight, padding=1, algorithm=algorithm)

    def backward(algorithm: str) -> Case:
        needs = (True, False, False, False)
        return lambda: torch.ops.mnp_fast.masked_conv2d_backward(
            grad, x, weight, *(None,) * 5, *ONES, 1, *needs, algorithm
        )[0]

    return {
        "forward": (
            F.conv2d(x.double(), weight.double(), padding=1),
            {
                "torch": lambda: F.conv2d(x, packed, padding=1),
                **{name: forward(name) for name in ALGORITHMS},
            },
        ),
        "input gradient": (
            torch_grad(grad.double(), weight.double()),
            {
                "torch": lambda: torch_grad(grad, packed),
                **{name: backward(name) for name in ALGORITHMS},
            },
        ),
    }


def timed(functions: dict[str, Case], rounds: int, clock: Callable[[], float]) -> dict[str, Times]:
    """Milliseconds of every function, called in turn so that they meet the same disturbances."""
    times: dict[str, Times] = {name: [] for name in functions}
    for lap in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if lap:  # the first call warms up
                times[name].append(1e3 * (clock() - start))
    return times


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes with commas between.")] = "32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU time with one, else wall time.")] = 1,
) -> None:
    """Time 3x3 convolutions; exit with 1 where a result is wrong."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = time.thread_time if threads == 1 else time.perf_counter
    kind = "CPU" if threads == 1 else "wall"
    table = Table(
        title=f"float32, torch {torch.__version__} channels-last, {_C.instruction_set}, "
        f"{threads} thread(s), {rounds} rounds; {kind} ms: median (25 % to 75 %)"
    )
    for column in (
        "batch, C = K, H = W",
        "direction",
        "by",
        "error",
        "time",
        "times torch's speed",
    ):
        table.add_column(column)
    wrong = losses = 0
    with torch.no_grad():
        for batch in map(int, batches.split(",")):
            for channels, size in LAYERS:
                for direction, (exact, functions) in cases(batch, channels, size).items():
                    norm = exact.norm().item()
                    errors = {
                        name: (function().double() - exact).norm().item() / norm
                        for name, function in functions.items()
                    }
                    times = timed(functions, rounds, clock)
                    medians = {name: statistics.median(values) for name, values in times.items()}
                    for name, values in times.items():
                        ratio = medians["torch"] / medians[name]
                        verdict = "" if name == "torch" else f"{ratio:.2f}"
                        if not errors[name] <= LIMIT:
                            wrong, verdict = wrong + 1, "wrong result"
                        elif ratio < 1:
                            losses, verdict = losses + 1, verdict + " (loss)"
                        low, high = spread(values)
                        table.add_row(
                            f"{batch}, {channels}, {size}",
                            direction,
                            name,
                            f"{errors[name]:.1e}",
                            f"{medians[name]:.1f} ({low:.1f} to {high:.1f})",
                            verdict,
                        )
                table.add_section()
    console = Console(width=110)
    console.print(table)
    console.print(f"{losses} slower than torch, {wrong} wrong (error above {LIMIT})")
    if wrong:
        raise typer.Exit(1)


def spread(values: Times) -> tuple[float, float]:
    """The quartiles."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


if __name__ == "__main__":
    typer.run(main)
