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
from .defenses import OURS
from .population import CLEAN, COLUMNS, COST, TOOK, failures

CellFigures = dict[str, Any]
HEAD = f"""# What defenses leave of attacks

Printed by `python -m benchmarks.effectiveness --page` from the figures that the command without
`--page` stores. All in percent of held-back images: accuracy (ACC), attack success rate (ASR:
images of other classes that the trigger sends to the attacker's class), robust accuracy (triggered
images given their own class). Seconds are of processor time; what a defense shares with the one
before it on the same model, scores or the rule's search, is counted once. Means over models, and
the standard deviation where there are several.

- An attack *took* if its ASR is at least {TOOK:g} % and its accuracy within {COST:g} points of the
  clean model's. Each section's first table is over models on which it took, as many as it says;
  the others are in the tables below it. Averages compare where these numbers are equal.
- Defenses get the model, the clean images and a seed, in a process of their own that is given
  nothing else.
- `+rule`: the peer's order of neurons, cut by the rule of `mnp_fast.defend`, without its repair.
  Without `+rule`, the peer's published cut. `mnp:` with settings of `DefenseConfig` behind it is
  `mnp` with these in place of the defaults. With `drift_weight=0` it does not look at what norms
  remember. Where no class is conspicuous it looks further; with `suppressions_again=0`,
  `drift_favour=1`, `drift_agreement=1` or `untargeted=0` it goes without more suppressions, without
  the class that norms remember, without a trigger of all classes that agrees with them, or without
  one by its size.
- **Seeds 0 to 2 are not held back**: `few`, `conspicuous`, `untargeted` and the repair of `mnp`
  were set after a look at what it did to models of these seeds; the second look at doubtful
  suspects after the WaNet model of seed 0 and width 16, which `conspicuous_again` just takes in;
  what norms remember after the all-to-all models of width 8 (seeds 0 to 2, and seed 0 of VGG-13,
  MobileNetV2 and the pre-activation network), the WaNet model of the last, and BadNets at width
  64; that all classes are looked at before the one that norms remember, after the all-to-all model
  of seed 1 of VGG-13. Where there are other seeds, a table of its own is of them alone.
- The last look, at offset and drift together, came in after these figures. It changes only what
  ends without a conspicuous class.
"""
USUAL = 100  # clean images
LOOKED_AT = (0, 1, 2)  # seeds of models on which settings were chosen


Section = tuple[str, int, str, int, int, int]  # data, size, arch, width, epochs, clean images


def write_page(cells: Path, page: Path) -> str:
    """Write the page, and one picture a section beside it in `images`; returns the text.

    Raises
    ------
    ValueError
        Cells of one setting are of different models.
    """
    sections: dict[Section, list[CellFigures]] = defaultdict(list)
    for folder in sorted(cells.glob("*")):
        for figures in stored(folder):
            setting = figures["cell"]["setting"]
            data, size, arch, width, epochs = (
                setting[key] for key in ("data", "size", "arch", "width", "epochs")
            )
            sections[data, size, arch, width, epochs, figures["cell"]["clean"]].append(figures)
    largest = sorted(sections.items(), key=lambda item: -len(item[1]))
    text = HEAD + _overview(largest)
    for index, (section, found) in enumerate(largest):
        picture = page.parent / "images" / f"effectiveness-{index}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        plain = [figures for figures in found if not _is_variant(figures)]
        with atomic_path(picture) as path:
            _picture(plain).savefig(path, format="png")
        text += f"\n## {_title(section)}\n\n![Attack success left](images/{picture.name})\n\n"
        text += _summaries(plain) + _behind(plain) + _variants(found) + _models(found)
        text += "\n" + _details(found)
    with atomic_path(page) as path:
        path.write_text(text)
    return text


def stored(folder: Path) -> list[CellFigures]:
    """The cells of one model.

    Raises
    ------
    ValueError
        They are of different models.
    """
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    for figures in found:
        if figures["before"] != found[0]["before"]:
            raise ValueError(f"cells in '{folder}' are of different models; delete the older ones")
    return found


def _title(section: Section) -> str:
    data, size, arch, width, epochs, clean = section
    return f"{data} {size}×{size}, {arch} of width {width}, {epochs} epochs, {clean} clean images"


def _overview(sections: list[tuple[Section, list[CellFigures]]]) -> str:
    """What is left after ours with its defaults, a row a section and one for the usual number."""
    rows, usual = [], []
    for section, found in sections:
        ours = [figures for figures in found if figures["cell"]["defense"] == OURS]
        rows += [[_title(section), *row[1:-2]] for row in _rows(ours)]
        usual += [figures for figures in ours if figures["cell"]["clean"] == USUAL]
    rows += [[f"all with {USUAL} clean images", *row[1:-2]] for row in _rows(usual)]
    return f"\n`{OURS}`, by data and network:\n\n" + table(["", *SUMMARY[1:-2]], rows)


def _summaries(found: list[CellFigures]) -> str:
    """All defenses on the models that peers ran on; ours on all, and on those not looked at."""
    ours = [figures for figures in found if figures["cell"]["defense"] == OURS]
    compared = {_model(figures) for figures in found if figures["cell"]["defense"] != OURS}
    text = ""
    if compared:
        text += table(SUMMARY, _rows(f for f in found if _model(f) in compared)) + "\n"
    seeds = sorted({figures["cell"]["setting"]["seed"] for figures in ours})
    if any(_model(figures) not in compared for figures in ours):
        text += (
            f"`{OURS}` on seeds {', '.join(map(str, seeds))}:\n\n{table(SUMMARY, _rows(ours))}\n"
        )
    unseen = [f for f in ours if f["cell"]["setting"]["seed"] not in LOOKED_AT]
    if unseen:
        first, *_, last = LOOKED_AT
        text += f"Without seeds {first} to {last}:\n\n{table(SUMMARY, _rows(unseen))}\n"
    return text


def _behind(found: list[CellFigures]) -> str:
    """A row an attack and peer that leaves less of it than ours, on the same models."""
    ours = _ours(found)
    rows = []
    for name, cells in _by_defense(found).items():
        for attack in ATTACKS:
            pairs = [
                (cell, ours[_model(cell)])
                for cell in cells
                if _attack(cell) == attack and _took(cell) and _model(cell) in ours
            ]
            asr = [
                [figures["after"]["asr"] for figures in column]
                for column in zip(*pairs, strict=True)
            ]
            if asr and statistics.mean(asr[0]) < statistics.mean(asr[1]):
                lost = [_mean(map(_loss, column)) for column in zip(*pairs, strict=True)]
                rows.append([attack, name, str(len(pairs)), *map(_mean, asr), *lost])
    if not rows:
        return ""
    head = ("attack", "defense", "models", "ASR", f"by `{OURS}`", "ACC lost", f"by `{OURS}`")
    return f"Where others leave less than `{OURS}`:\n\n{table(head, rows)}\n"


def _variants(found: list[CellFigures]) -> str:
    """A row a variant of ours, beside ours with its defaults on the same models."""
    ours = _ours(found)
    rows = []
    for name, cells in _by_defense(filter(_is_variant, found)).items():
        pairs = [(cell, ours[_model(cell)]) for cell in cells if _model(cell) in ours]
        took = [pair for pair in pairs if _took(pair[0])]
        columns = [
            *(_mean(_loss(pair[i]) for pair in took) for i in (0, 1)),
            *(_mean(pair[i]["after"]["asr"] for pair in took) for i in (0, 1)),
            *(_mean(_loss(pair[i]) for pair in pairs if _is_clean(pair[0])) for i in (0, 1)),
        ]
        rows.append([name, str(len(took)), *columns])
    if not rows:
        return ""
    head = [
        name
        for what in ("ACC lost", "ASR", "ACC lost of clean models")
        for name in (what, f"by `{OURS}`")
    ]
    return (
        f"Variants, and `{OURS}` with its defaults on the same models:\n\n"
        + table(["defense", "models", *head], rows)
        + "\n"
    )


def _ours(found: Iterable[CellFigures]) -> dict[str, CellFigures]:
    """Cells of ours with its defaults that ran, by model."""
    return {_model(f): f for f in found if f["cell"]["defense"] == OURS and "after" in f}


def _model(figures: CellFigures) -> str:
    return json.dumps(figures["cell"]["setting"])


def _is_variant(figures: CellFigures) -> bool:
    return bool(figures["cell"]["defense"].startswith(f"{OURS}:"))


def _is_clean(figures: CellFigures) -> bool:
    return _attack(figures) == CLEAN


def _took(figures: CellFigures) -> bool:
    return not _is_clean(figures) and not failures(figures["before"])


def _attack(figures: CellFigures) -> str:
    return figures["cell"]["setting"]["attack"]


def _by_defense(found: Iterable[CellFigures]) -> dict[str, list[CellFigures]]:
    """Cells that ran, by defense."""
    grouped: dict[str, list[CellFigures]] = defaultdict(list)
    for figures in found:
        if "after" in figures:
            grouped[figures["cell"]["defense"]].append(figures)
    return grouped


SUMMARY = (
    *("defense", "models", "ACC lost", "ASR", "highest ASR", "robust ACC"),
    *("ACC lost of clean models", "neurons pruned (%)", "seconds"),
)


def _rows(found: Iterable[CellFigures]) -> list[list[str]]:
    """A row of `SUMMARY` a defense, over the attacks that took."""
    rows = []
    for name, cells in _by_defense(found).items():
        took = [cell for cell in cells if _took(cell)]
        asr = [cell["after"]["asr"] for cell in took]
        rows.append(
            [
                name,
                str(len(took)),
                _mean(map(_loss, took)),
                _mean(asr),
                f"{max(asr):.1f}" if asr else "–",
                _mean(cell["after"]["robust"] for cell in took),
                _mean(_loss(cell) for cell in cells if _is_clean(cell)),
                _mean(100 * cell["pruned"] / cell["neurons"] for cell in took),
                _mean(cell["s"] for cell in cells),
            ]
        )
    return rows


def _models(found: list[CellFigures]) -> str:
    """A row an attack and seed: whether it took."""
    rows = {}
    for figures in found:
        setting, before = figures["cell"]["setting"], figures["before"]
        verdict = "" if _is_clean(figures) else ", ".join(failures(before)) or "took"
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
