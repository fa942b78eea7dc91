"""The page and the picture of `benchmarks.effectiveness`, from stored cells alone."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mnp_fast.io import atomic_path
from mnp_fast.plots import INK, MUTED, PRUNED

from .attacks import ATTACKS
from .population import CLEAN, COLUMNS, COST, TOOK, failures

CellFigures = dict[str, Any]
HEAD = f"""# What defenses leave of attacks

Printed by `python -m benchmarks.effectiveness --page` from the figures that the command without
`--page` stores. All in percent of held-back images: accuracy (ACC), attack success rate (ASR:
images of other classes that the trigger sends to the attacker's class), robust accuracy (triggered
images given their own class). Seconds are of processor time. Means over models, and the standard
deviation where there are several.

- An attack *took* if its ASR is at least {TOOK:g} % and its accuracy within {COST:g} points of the
  clean model's. Each section's first table is over models on which it took, as many as it says;
  the others are in the tables below it. Averages compare where these numbers are equal.
- Defenses get the model, the clean images and a seed, in a process of their own that is given
  nothing else.
- `+rule`: the peer's order of neurons, cut by the rule of `mnp_fast.defend`, without its repair.
  Without `+rule`, the peer's published cut.
  But for badnets and wanet of width 16, figures of `+rule` are of a rule before the last change:
  one suppression in place of four, and cuts that may cost `max_drop` where nothing is conspicuous.
- **Seeds 0 and 1 are not held back**: `few`, `conspicuous`, `untargeted` and the repair of `mnp`
  were set after a look at what it did to models of these seeds; `unsure_drop` after the clean model
  of seed 2. Where there are other seeds than 0 and 1, a table of its own is of them alone.
"""
LOOKED_AT = (0, 1)  # seeds of models on which settings were chosen


def write_page(cells: Path, page: Path) -> str:
    """Write the page, and one picture a section beside it in `images`; returns the text."""
    sections: dict[tuple[Any, ...], list[CellFigures]] = defaultdict(list)
    for file in sorted(cells.glob("*/*.json")):
        figures = json.loads(file.read_text())
        setting = figures["cell"]["setting"]
        fixed = [setting[key] for key in ("data", "size", "arch", "width", "epochs")]
        key = (*fixed, figures["cell"]["clean"])
        sections[key].append(figures)
    text = HEAD
    for index, ((data, size, arch, width, epochs, clean), found) in enumerate(sections.items()):
        title = f"{data} {size}×{size}, {arch} of width {width}, {epochs} epochs, {clean} clean"
        picture = page.parent / "images" / f"effectiveness-{index}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(picture) as path:
            _picture(found).savefig(path, format="png")
        title = (
            f"{data} {size}×{size}, {arch} of width {width}, {epochs} epochs, {clean} clean images"
        )
        text += f"\n## {title}\n\n![Attack success left](images/{picture.name})\n\n"
        text += _summary(found) + "\n"
        unseen = [one for one in found if one["cell"]["setting"]["seed"] not in LOOKED_AT]
        if unseen:
            text += f"Without seeds {' and '.join(map(str, LOOKED_AT))}:\n\n{_summary(unseen)}\n"
        text += _models(found) + "\n" + _details(found)
    with atomic_path(page) as path:
        path.write_text(text)
    return text


def _took(figures: CellFigures) -> bool:
    return _attack(figures) != CLEAN and not failures(figures["before"])


def _attack(figures: CellFigures) -> str:
    return figures["cell"]["setting"]["attack"]


def _by_defense(found: Iterable[CellFigures]) -> dict[str, list[CellFigures]]:
    """Cells that ran, by defense."""
    grouped: dict[str, list[CellFigures]] = defaultdict(list)
    for figures in found:
        if "after" in figures:
            grouped[figures["cell"]["defense"]].append(figures)
    return grouped


def _summary(found: list[CellFigures]) -> str:
    """A row a defense, over the attacks that took."""
    rows = []
    for name, cells in _by_defense(found).items():
        took = [cell for cell in cells if _took(cell)]
        clean = [_loss(cell) for cell in cells if _attack(cell) == CLEAN]
        asr = [cell["after"]["asr"] for cell in took]
        rows.append(
            [
                name,
                str(len(took)),
                _mean(map(_loss, took)),
                _mean(asr),
                f"{max(asr):.1f}" if asr else "–",
                _mean(cell["after"]["robust"] for cell in took),
                _mean(clean),
                _mean(100 * cell["pruned"] / cell["neurons"] for cell in took),
                _mean(cell["s"] for cell in cells),
            ]
        )
    head = ["defense", "models", "ACC lost", "ASR", "highest ASR", "robust ACC"]
    return table([*head, "ACC lost of clean models", "neurons pruned (%)", "seconds"], rows)


def _models(found: list[CellFigures]) -> str:
    """A row an attack and seed: whether it took."""
    rows = {}
    for figures in found:
        setting, before = figures["cell"]["setting"], figures["before"]
        verdict = "" if _attack(figures) == CLEAN else ", ".join(failures(before)) or "took"
        values = [f"{before[key]:.1f}" if key in before else "–" for key in COLUMNS]
        rows[_order(figures), setting["seed"]] = [
            _attack(figures),
            str(setting["seed"]),
            *values,
            verdict,
        ]
    ordered = [rows[key] for key in sorted(rows)]
    return table(["attack", "seed", *COLUMNS.values(), "check"], ordered)


def _details(found: list[CellFigures]) -> str:
    """A row an attack and defense, over the seeds; cells that failed have a row of their own."""
    groups: dict[tuple[int, str, str], list[CellFigures]] = defaultdict(list)
    rows = []
    for figures in found:
        if "after" in figures:
            groups[_order(figures), _attack(figures), figures["cell"]["defense"]].append(figures)
    for (_, attack, name), cells in sorted(groups.items(), key=lambda item: item[0][0]):
        columns = [
            _mean(cell["after"][key] for cell in cells if key in cell["after"])
            for key in ("accuracy", "asr", "robust")
        ]
        cut = _mean(cell["pruned"] for cell in cells)
        rows.append([attack, name, *columns, cut, _mean(cell["s"] for cell in cells)])
    text = table(["attack", "defense", "ACC", "ASR", "robust ACC", "pruned", "seconds"], rows)
    for figures in found:
        if "error" in figures:
            seed = figures["cell"]["setting"]["seed"]
            text += f"\n{_attack(figures)}, seed {seed}: {figures['error']}\n"
    return text


def _picture(found: list[CellFigures]) -> Figure:
    """ASR after each defense (rows) of each attack (columns), mean over seeds."""
    grouped = _by_defense(found)
    attacks = [name for name in ATTACKS if any(_attack(cell) == name for cell in found)]
    values = np.full((len(grouped), max(len(attacks), 1)), np.nan)
    for row, cells in enumerate(grouped.values()):
        for column, name in enumerate(attacks):
            asr = [cell["after"]["asr"] for cell in cells if _attack(cell) == name]
            if asr:
                values[row, column] = statistics.mean(asr)
    names = 0.09 * max(map(len, grouped), default=0)
    size = (1.5 + names + 0.75 * values.shape[1], 1.6 + 0.3 * len(grouped))
    figure = Figure(figsize=size, dpi=150)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("asr", ["#ffffff", PRUNED])
    axes.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=INK)
    axes.set_xticks(range(len(attacks)), attacks, rotation=40, ha="right", fontsize=8, color=MUTED)
    axes.set_yticks(range(len(grouped)), list(grouped), fontsize=8, color=MUTED)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Attack success left, percent", loc="left", fontsize=10, color=INK)
    return figure


def _order(figures: CellFigures) -> int:
    return [*ATTACKS, CLEAN].index(_attack(figures))


def _loss(figures: CellFigures) -> float:
    return figures["before"]["accuracy"] - figures["after"]["accuracy"]


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(head: Sequence[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
