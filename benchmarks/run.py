"""Benchmarks beside peers: python -m benchmarks.run --suite layers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from . import compaction, cuda, defense, inference, layers, memory, stats, step
from .machine import machine, measured_peaks, roofline
from .output import as_data, show
from .timing import Case, Row, measure

RESULTS = Path(__file__).parent / "results"


class Device(str, Enum):
    """Where it is timed."""

    cpu = "cpu"
    cuda = "cuda"


class Suite(str, Enum):
    """What can be timed."""

    layers = "layers"
    step = "step"
    memory = "memory"
    inference = "inference"
    compaction = "compaction"
    stats = "stats"
    defense = "defense"


SUITES: dict[Suite, Callable[[bool], Iterator[Case]]] = {
    Suite.layers: layers.cases,
    Suite.step: step.cases,
    Suite.memory: memory.cases,
    Suite.inference: inference.cases,
    Suite.compaction: compaction.cases,
    Suite.stats: stats.cases,
    Suite.defense: defense.cases,
}


def main(
    suite: Annotated[
        Optional[Suite],  # noqa: UP045 (Typer evaluates it on Python 3.10)
        typer.Option(help="What to time on the CPU."),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="cuda has cases of its own, instead of a suite.")
    ] = Device.cpu,
    quick: Annotated[bool, typer.Option(help="Small shapes, to see that it runs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 11,
    threads: Annotated[
        Optional[int],  # noqa: UP045 (Typer evaluates it on Python 3.10)
        typer.Option(min=1, help="Threads; CPU time with one, else wall time."),
    ] = None,
    seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Begin no further case after so long."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="File for all figures."),
    ] = None,
    stored: Annotated[
        bool, typer.Option(help="Print the suite's figures that the documentation has.")
    ] = False,
    results: Annotated[
        Path, typer.Option(help="Where --stored finds them; folders in it have other machines'.")
    ] = RESULTS,
) -> None:
    """Time this project beside its peers, in one process; exit with 1 where a result is wrong."""
    if stored:
        if suite is None:
            raise typer.BadParameter("--stored needs --suite NAME")
        file = results / f"{suite.value}.json"
        if not file.exists():
            raise typer.BadParameter(f"--results has no figures of {suite.value}: {file}")
        found = json.loads(file.read_text())
        return show(
            [Row(**row) for row in found["rows"]], f"{suite.value}, stored", found["machine"]
        )
    if threads is not None:
        torch.set_num_threads(threads)
    if (suite is None) == (device is Device.cpu):
        raise typer.BadParameter("give either --suite NAME or --device cuda")
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter(
            f"--device cuda needs a CUDA device, and torch {torch.__version__} finds none"
        )
    torch.manual_seed(0)
    used = torch.get_num_threads()
    if suite is None:
        name, cases, clock, peaks = "cuda", cuda.cases(quick, "cuda"), after_the_device, {}
        head = f"{cuda.device_line()}\n{machine(used)}"
    else:
        name, cases = suite.value, SUITES[suite](quick)
        clock = time.thread_time if used == 1 else time.perf_counter
        peaks = {} if quick else measured_peaks()
        head = "\n".join([machine(used), *([roofline(peaks)] if peaks else [])])
    timed = begun_within(seconds, cases)
    rows = [row for case in timed for row in measure(case, rounds, clock, peaks)]
    show(rows, f"{name}, {rounds} rounds", head)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": head, "quick": quick, "rows": as_data(rows)}
        output.write_text(json.dumps(content, indent=1) + "\n")
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


def begun_within(seconds: float | None, cases: Iterator[Case]) -> Iterator[Case]:
    """The cases until the time is up; so a report has what was timed."""
    start = time.monotonic()
    for case in cases:
        yield case
        if seconds is not None and time.monotonic() - start > seconds:
            typer.echo(f"{seconds:g} s are over: no further cases")
            return


def after_the_device() -> float:
    """The time when all work on the device is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
