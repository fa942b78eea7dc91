"""A picture of the stored figures: python -m benchmarks.chart."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from mnp_fast.plots import INK, KEPT, MUTED, PRUNED, style_axes

from .timing import OURS

ROOT = Path(__file__).parent.parent
TICKS = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 16)
INCHES = 0.19  # of height a bar
COLOURS = 32


class Bar(NamedTuple):
    """A case and how much longer its best peer takes."""

    case: str
    ratio: float


def main(
    results: Annotated[Path, typer.Option(help="Folder with the suites' JSON files.")] = (
        ROOT / "benchmarks" / "results"
    ),
    image: Annotated[Path, typer.Option(help="PNG to write.")] = (
        ROOT / "docs" / "images" / "benchmarks.png"
    ),
) -> None:
    """Draw every case's ratio of the best peer to this project, losses in another colour."""
    suites = {file.stem: bars(file) for file in sorted(results.glob("*.json"))}
    suites = {name: found for name, found in suites.items() if found}
    if not suites:
        raise typer.BadParameter(f"{results} has no ratios: `make bench` stores them there")
    image.parent.mkdir(parents=True, exist_ok=True)
    save(draw(suites), image)
    typer.echo(str(image))


def save(figure: Figure, image: Path) -> None:
    """Write a PNG with few colours, rare ones such as a loss among them, a third as large."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(
            image, optimize=True
        )


def bars(file: Path) -> list[Bar]:
    """The first of our own competitors of every case, where its result is right."""
    content = json.loads(file.read_text())
    if content["quick"]:
        raise typer.BadParameter(f"{file} has figures of --quick, which say nothing")
    found: dict[str, Bar] = {}
    for row in content["rows"]:
        if row["by"].startswith(OURS) and "ratio" in row:
            found.setdefault(row["case"], Bar(row["case"], row["ratio"]))
    return list(found.values())


def draw(suites: dict[str, list[Bar]]) -> Figure:
    """One bar a case, logarithmic, from 1 to the right where ours is faster."""
    count = sum(map(len, suites.values())) + len(suites)
    figure = Figure(figsize=(9, INCHES * count + 0.9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    style_axes(axes)
    axes.grid(visible=False)
    places, labels = [], []
    place = 0
    for suite, found in suites.items():
        axes.text(1, place, f" {suite}", weight="bold", fontsize=9, color=INK, va="center")
        for bar in found:
            place += 1
            colour = PRUNED if bar.ratio < 1 else KEPT
            axes.barh(place, bar.ratio - 1, 0.72, left=1, color=colour)
            end = max(bar.ratio, 1)
            axes.text(end, place, f" {bar.ratio:.2f}", fontsize=8, va="center", color=INK)
            places.append(place)
            labels.append(bar.case)
        place += 1
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    ratios = [bar.ratio for found in suites.values() for bar in found]
    axes.set_xlim(0.9 * min(*ratios, 0.8), 1.5 * max(*ratios, 2))
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(places, labels, fontsize=8, color=MUTED)
    axes.set_ylim(place - 0.3, -0.8)
    axes.set_xlabel("best peer / mnp_fast; losses in red")
    return figure


if __name__ == "__main__":
    typer.run(main)
