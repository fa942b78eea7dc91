"""Competitors called in turn, results checked before times: what every suite shares."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Tensors = tuple[Tensor, ...]
Function = Callable[[], Tensors]
OURS = "mnp_fast"
KEPT = f"{OURS}, frozen weights"
HEAVY_ROUNDS = 3
WARM_UP = 0.01  # seconds of calls of a kind in front of each one that is timed


def relative_error(found: Tensors, exact: Tensors) -> float:
    """The largest ||found - exact|| / ||exact||; NaN where one is NaN."""
    errors = [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)
    ]
    return next((error for error in errors if error != error), max(errors))


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
        Largest allowed error; a faster wrong result is no result.
    error
        Of a result, given the exact one.
    describe
        A result in words, shown in place of its error.
    different
        Competitors that compute something else on purpose, whose result is not checked.
    bounds
        Of these, the ones that are no peers: they do less, and say what the machine allows.
    excluded
        Competitors that cannot run here, and why.
    work, unit
        Operations ("FLOP") or bytes ("B") a call, by competitor; of convolutions those of the
        direct algorithm, whichever is used.
    reading, metric
        What is measured in place of milliseconds, read after a call, and its unit.
    heavy
        So long that the first call counts, and few are made.
    """

    name: str
    functions: dict[str, Function]
    exact: Tensors
    limit: float = 1e-5
    error: Callable[[Tensors, Tensors], float] = relative_error
    describe: Callable[[Tensors], str] | None = None
    different: frozenset[str] = frozenset()
    bounds: frozenset[str] = frozenset()
    excluded: dict[str, str] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    unit: str = "FLOP"
    reading: Callable[[], float] | None = None
    metric: str = "ms"
    heavy: bool = False


@dataclass
class Row:
    """What one competitor took for one case.

    Attributes
    ----------
    case, by
        Names of the case and the competitor.
    error
        Of its result; None where it is not checked.
    note
        Its result in words, or why it is excluded.
    metric, values
        One value a call.
    wrong
        Whether the error is above the limit.
    ratio
        Of our own: the best peer's median to this one's. None where either is wrong.
    to_ours
        Of a peer: its median to that of our first competitor.
    rate, unit
        Operations or bytes a second.
    share
        Of `rate` in what the machine allows, if that was measured.
    """

    case: str
    by: str
    error: float | None = None
    note: str = ""
    metric: str = "ms"
    values: list[float] = field(default_factory=list)
    wrong: bool = False
    ratio: float | None = None
    to_ours: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None

    @property
    def is_ours(self) -> bool:
        return self.by.startswith(OURS)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def measure(
    case: Case, rounds: int, clock: Callable[[], float], peaks: dict[str, float]
) -> list[Row]:
    """Check every result, then call all in turn, so that they meet the same disturbances.

    A call that is timed follows others of its own kind, as in a loop: caches and kept memory hold
    what these left there, not what the competitor before them did.
    """

    def call(function: Function) -> tuple[Tensors, float]:
        start = clock()
        results = function()
        elapsed = 1e3 * (clock() - start)
        return results, elapsed if case.reading is None else case.reading()

    rows = {}
    for name, function in case.functions.items():
        row = rows[name] = Row(case.name, name, metric=case.metric, unit=case.unit)
        results, value = call(function)
        if name not in case.different | case.bounds:
            row.error = case.error(results, case.exact)
            row.wrong = not row.error <= case.limit
        if case.describe is not None:
            row.note = case.describe(results)
        if case.heavy:
            row.values.append(value)
    for _ in range(min(rounds, HEAVY_ROUNDS) - 1 if case.heavy else rounds):
        for name, function in case.functions.items():
            if not case.heavy and case.reading is None:
                warm_up(function)
            rows[name].values.append(call(function)[1])
    _compare(case, list(rows.values()), peaks)
    excluded = [Row(case.name, name, note=why) for name, why in case.excluded.items()]
    return [*rows.values(), *excluded]


def warm_up(function: Function) -> None:
    """Call it for `WARM_UP` seconds, once at least."""
    start = time.perf_counter()
    while True:
        function()
        if time.perf_counter() - start >= WARM_UP:
            return


def _compare(case: Case, rows: list[Row], peaks: dict[str, float]) -> None:
    """Fill in ratios and rates."""
    right = [row for row in rows if not row.wrong and row.by not in case.bounds]
    peers = [row for row in right if not row.is_ours]
    ours = [row for row in right if row.is_ours]
    for row in ours:
        row.ratio = min(peer.median for peer in peers) / row.median if peers else None
    for row in peers:
        row.to_ours = row.median / ours[0].median if ours else None
    for row in rows:
        if row.by in case.work:
            row.rate = 1e3 * case.work[row.by] / row.median
    bounds = [row.rate for row in rows if row.by in case.bounds and row.rate]
    peak = max(bounds, default=peaks.get(case.unit))
    for row in rows:
        if peak and row.rate:
            row.share = row.rate / peak
