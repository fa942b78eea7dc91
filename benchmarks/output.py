"""What a suite found: as a table, and as plain data."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .timing import Row

WIDTH = 150


def show(rows: list[Row], title: str, head: str) -> None:
    """Print the machine, the table of a suite, and how many rows are losses or wrong."""
    console = Console(width=WIDTH)
    table = Table(
        "case", "by", "error", "median (quartiles)", "rate", "best peer / this", title=title
    )
    table.add_column("this / ours")
    for index, row in enumerate(rows):
        is_new = index == 0 or rows[index - 1].case != row.case
        if is_new:
            table.add_section()
        table.add_row(row.case if is_new else "", row.by, *_cells(row))
    console.print(head)
    console.print(table)
    losses = sum(row.ratio is not None and row.ratio < 1 for row in rows)
    console.print(
        f"{losses} behind the best peer, {sum(row.wrong for row in rows)} wrong, "
        f"{sum(not row.values for row in rows)} excluded."
    )


def _cells(row: Row) -> tuple[str, ...]:
    if not row.values:
        return "", f"excluded: {row.note}"
    error = "not checked" if row.error is None else f"{row.error:.1e}"
    ordered = sorted(row.values)
    low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    unit, scale = ("s", 1e3) if row.metric == "ms" and low >= 1e3 else (row.metric, 1.0)
    rate = "" if row.rate is None else f"{row.rate / 1e9:.1f} G{row.unit}/s"
    share = "" if row.share is None else f" ({100 * row.share:.0f} %)"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}" + (" loss" if row.ratio < 1 else "")
    return (
        row.note or error,
        f"{row.median / scale:.2f} {unit} ({low / scale:.2f} to {high / scale:.2f})",
        rate + share,
        "wrong" if row.wrong else ratio,
        "" if row.to_ours is None else f"{row.to_ours:.2f}",
    )


def as_data(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain data, without what is not known of them."""
    return [
        {key: value for key, value in vars(row).items() if value not in (None, "", [])}
        for row in rows
    ]
