"""Competitors timed in turn, results checked before times: what every suite shares."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mnp_fast import build_info

Tensors = tuple[Tensor, ...]
Function = Callable[[], Tensors]
OURS = "mnp_fast"


@dataclass
class Case:
    """One piece of work and who can do it.

    Attributes
    ----------
    name
        What is computed, on which shapes.
    functions
        By competitor. Names of this project's own start with `OURS`.
    exact
        The results in float64.
    limit
        Largest allowed ||result - exact|| / ||exact||; a faster wrong result is no result.
    different
        Competitors that compute something else on purpose, whose result is not checked.
    """

    name: str
    functions: dict[str, Function]
    exact: Tensors
    limit: float = 1e-5
    different: frozenset[str] = field(default_factory=frozenset)


@dataclass
class Row:
    """What one competitor took for one case; times in milliseconds."""

    case: str
    by: str
    error: float | None
    times: list[float]
    wrong: bool = False
    ratio: float | None = None  # of the fastest peer's median to this one's, for our own

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def measure(case: Case, rounds: int, clock: Callable[[], float]) -> list[Row]:
    """Check every result, then call all in turn, so that they meet the same disturbances."""
    rows = {}
    for name, function in case.functions.items():
        error = None
        if name not in case.different:
            error = max(
                ((found.double() - exact).norm() / exact.norm()).item()
                for found, exact in zip(function(), case.exact, strict=True)
            )
        rows[name] = Row(case.name, name, error, [], error is not None and not error <= case.limit)
    for _ in range(rounds):
        for name, function in case.functions.items():
            start = clock()
            function()
            rows[name].times.append(1e3 * (clock() - start))
    peers = [r.median for r in rows.values() if not r.by.startswith(OURS) and not r.wrong]
    for row in rows.values():
        if row.by.startswith(OURS) and not row.wrong and peers:
            row.ratio = min(peers) / row.median
    return list(rows.values())


def run(cases: Iterable[Case], rounds: int, threads: int, title: str) -> list[Row]:
    """Measure all cases and print their table."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    table = Table(
        "case", "by", "error", "ms: median (quartiles)", "best peer's time / this", title=title
    )
    console = Console(width=120)
    rows = []
    for case in cases:
        found = measure(case, rounds, clock)
        rows += found
        for row in found:
            table.add_row(row.case if row is found[0] else "", row.by, *_cells(row))
        table.add_section()
    console.print(machine(threads))
    console.print(table)
    losses = [row for row in rows if row.ratio is not None and row.ratio < 1]
    wrong = [row for row in rows if row.wrong]
    console.print(f"{len(losses)} slower than the best peer, {len(wrong)} wrong.")
    return rows


def _cells(row: Row) -> tuple[str, str, str]:
    ordered = sorted(row.times)
    low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    verdict = "" if row.ratio is None else f"{row.ratio:.2f}" + (" loss" if row.ratio < 1 else "")
    error = "another result" if row.error is None else f"{row.error:.1e}"
    times = f"{row.median:.2f} ({low:.2f} to {high:.2f})"
    return error, times, "wrong" if row.wrong else verdict


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


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [
        {
            "case": row.case,
            "by": row.by,
            "error": row.error,
            "wrong": row.wrong,
            "ratio_to_best_peer": row.ratio,
            "milliseconds": row.times,
        }
        for row in rows
    ]
