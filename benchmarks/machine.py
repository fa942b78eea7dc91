"""What figures depend on: the machine, and how fast it can be. python -m benchmarks.machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Annotated, Optional

import torch
import typer

from mnp_fast import build_info
from mnp_fast.ops import masked_linear

PRODUCT, CHANNELS = 1536, 256
COPY = 256 * 2**20  # bytes, well beyond any cache
REPEATS = 7


def main(
    threads: Annotated[
        Optional[int],  # noqa: UP045 (Typer evaluates it on Python 3.10)
        typer.Option(min=1, help="Threads."),
    ] = None,
) -> None:
    """Print the machine, its arithmetic peak and its bandwidth."""
    if threads is not None:
        torch.set_num_threads(threads)
    typer.echo(machine(torch.get_num_threads()))
    typer.echo(roofline(measured_peaks()))


def machine(threads: int) -> str:
    """What the figures depend on, in a line."""
    info = build_info()
    kind = "CPU time" if threads == 1 else "wall time"
    return (
        f"{processor()}, {info['cpu']['used']}, {threads} thread(s), {kind}; "
        f"torch {torch.__version__}, mnp_fast {info['version']}, {info['compiler']}"
    )


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def measured_peaks() -> dict[str, float]:
    """FLOP and bytes a second that this machine reaches, by unit.

    FLOP is the most of torch.mm, this project's own product and torch's 3x3 convolution, float32;
    bytes are read plus written by a copy, as in STREAM.
    """
    a, b = torch.rand(PRODUCT, PRODUCT), torch.rand(PRODUCT, PRODUCT)
    images = torch.rand(32, CHANNELS, 8, 8).to(memory_format=torch.channels_last)
    filters = torch.rand(CHANNELS, CHANNELS, 3, 3).to(memory_format=torch.channels_last)
    source = torch.ones(COPY // 4)
    target = torch.empty_like(source)
    product = min(_fastest(lambda: torch.mm(a, b)), _fastest(lambda: masked_linear(a, b)))
    convolution = _fastest(lambda: torch.conv2d(images, filters, padding=1))
    return {
        "FLOP": max(2 * PRODUCT**3 / product, 2 * images.numel() * CHANNELS * 9 / convolution),
        "B": 2 * COPY / _fastest(lambda: target.copy_(source)),
    }


def roofline(peaks: dict[str, float]) -> str:
    """The peaks in a line."""
    return (
        f"peaks: {peaks['FLOP'] / 1e9:.0f} GFLOP/s (best of products of {PRODUCT} squared and "
        f"torch's 3x3 convolution of {CHANNELS} channels), {peaks['B'] / 1e9:.1f} GB/s (copy of "
        f"{COPY >> 20} MiB, read and written)"
    )


@torch.no_grad()
def _fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    typer.run(main)
