"""Benchmarks beside peers: python -m benchmarks.run --suite layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from . import layers, step
from .timing import Case, as_json, machine, run


class Suite(str, Enum):
    """What can be timed."""

    layers = "layers"
    step = "step"


SUITES: dict[Suite, Callable[[bool], Iterator[Case]]] = {
    Suite.layers: layers.cases,
    Suite.step: step.cases,
}


def main(
    suite: Annotated[Suite, typer.Option(help="What to time.")],
    quick: Annotated[bool, typer.Option(help="Small shapes, to see that it runs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 11,
    threads: Annotated[
        Optional[int],  # noqa: UP045 (Typer evaluates it on Python 3.10)
        typer.Option(min=1, help="Threads; CPU time with one, else wall time."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="File for all times."),
    ] = None,
) -> None:
    """Time this project beside its peers, in one process; exit with 1 where a result is wrong."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    used = torch.get_num_threads()
    rows = run(SUITES[suite](quick), rounds, used, f"{suite.value}, {rounds} rounds")
    if output is not None:
        content = {"machine": machine(used), "rows": as_json(rows)}
        output.write_text(json.dumps(content, indent=1) + "\n")
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
