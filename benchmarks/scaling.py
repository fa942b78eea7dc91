"""The model of cost in docs/distributed.md: python -m benchmarks.scaling.

It computes; it measures nothing. The unit of time is the forward of one image on one device.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mnp_fast import DefenseConfig

PROCESSES = (1, 2, 4, 8, 16, 64)


def step_time(phase: str, samples: int, processes: int, exchange: float, fill: int = 1) -> float:
    """Time of a step of a phase, by the process with most images.

    Parameters
    ----------
    phase
        `"suppress"`, `"expose"`, `"fit"` or `"select"`.
    samples
        Images in the clean set.
    processes
        Devices that share the work.
    exchange
        Time of one exchange between more than one process.
    fill
        Images that fill a device: the forward of fewer takes as long.
    """
    config = DefenseConfig()

    def forward(images: int, devices: int = 1) -> int:
        return max(fill, -(-images // devices))  # rounded up

    share = forward(samples, processes)
    compute, exchanges = {
        "suppress": (3 * forward(min(config.suppress_batch_size, samples)) + share, 1),
        "expose": (2 * share, 1),
        "fit": (4 * forward(min(config.fit_batch_size, samples), processes), 1),
        "select": (2 * share, 2),
    }[phase]
    return compute + (exchange * exchanges if processes > 1 else 0)


def main(
    samples: Annotated[int, typer.Option(min=2, help="Images in the clean set.")] = 500,
    exchange: Annotated[
        float, typer.Option(min=0, help="Time of an exchange, in forwards of one image.")
    ] = 1.0,
    fill: Annotated[
        int, typer.Option(min=1, help="Images that fill a device; fewer take as long.")
    ] = 1,
) -> None:
    """Print how many times faster a step of each phase is than on one device."""
    typer.echo("| processes | suppress | expose | fit | select |\n|---|---|---|---|---|")
    for processes in PROCESSES:
        ratios = (
            step_time(phase, samples, 1, exchange, fill)
            / step_time(phase, samples, processes, exchange, fill)
            for phase in ("suppress", "expose", "fit", "select")
        )
        typer.echo(f"| {processes} | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    typer.run(main)
