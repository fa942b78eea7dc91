"""A defense's result as files: `report.json` for programs, `report.html` for people."""

from __future__ import annotations

import io
import json
import math
import os
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context

from . import plots, stats_plots
from .io.files import atomic_path, ensure_writable
from .plain import finite

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from .result import DefenseResult

SECTIONS: tuple[tuple[str, str, Callable[[DefenseResult], Figure]], ...] = (
    (
        "Clean accuracy and exposure against neurons pruned",
        "Neurons go in the order of their fitted masks, lowest first. The exposure succeeds on an "
        "image that it sends to the suspect class. The dashed line is the cut that was chosen.",
        plots.accuracy_curve,
    ),
    (
        "Fitted masks",
        "A mask near 0 marks a neuron that clean data does not need and the penalty drove out.",
        plots.mask_histogram,
    ),
    (
        "Magnitude against saliency",
        "A neuron of large weights and little clean saliency is suspect. Pruned neurons are "
        "ringed.",
        plots.magnitude_saliency,
    ),
    (
        "Magnitude against saliency, layer by layer",
        "The same with a panel a layer. Neurons of saliency 0 lie on the lower border.",
        stats_plots.result_by_layer,
    ),
    (
        "Correlation by depth",
        "Spearman's correlation of magnitude and saliency in each layer: positive where larger "
        "neurons matter more to clean images.",
        stats_plots.result_by_depth,
    ),
    (
        "Objective by epoch",
        "Suppression raises the clean loss until the model forgets clean data; the masks are then "
        "fitted.",
        plots.objective_history,
    ),
)
PHASE_NAMES = {
    "train": "Training",
    "suppress": "Suppression",
    "expose": "Exposure",
    "fit": "Mask fitting",
    "select": "Choice of the cut",
    "repair": "Repair",
}
_ID = re.compile(r'(\bid="|href="#|url\(#)')


def write_report(
    result: DefenseResult,
    folder: str | os.PathLike[str],
    *,
    title: str,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write `report.json` and `report.html` into `folder`, each atomically.

    The page is one file: style and plots are inside, nothing is fetched and no script runs.

    Parameters
    ----------
    result
        What `defend` returned.
    folder
        Where to write; created if needed.
    title
        Heading of the page.
    extra
        Plain data added to the top level of the JSON. `"before"` and `"after"`, dicts with
        `"accuracy"` and `"asr"` (attack success rate) in percent, also head the page.

    Returns
    -------
    Path
        The page, `folder/report.html`.

    Raises
    ------
    ValueError
        A key of `extra` is one that the report writes itself.
    TypeError
        `extra` holds what JSON cannot.
    OSError
        The folder cannot be written.
    """
    content = report_content(result, title=title, extra=extra)
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    page = render_page(result, content)
    folder = ensure_writable(folder)
    with atomic_path(folder / "report.json") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def report_content(
    result: DefenseResult, *, title: str, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `report.json`; NaN and infinite numbers become null.

    Raises
    ------
    ValueError
        A key of `extra` is one that the report writes itself.
    """
    own = {
        "title": title,
        "mnp_fast": _version(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **result.summary(),
    }
    clash = sorted(set(own) & set(extra or {}))
    if clash:
        raise ValueError(f"extra has keys that the report writes itself: {', '.join(clash)}")
    content: dict[str, Any] = finite({**own, **(extra or {})})
    return content


def render_page(result: DefenseResult, content: dict[str, Any]) -> str:
    """The HTML page for a result and its `report_content`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        # Layer names come from an untrusted model.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment.get_template("report.html.j2").render(
        content=content,
        attack=_attack_rows(content),
        summary=_summary_rows(result),
        nothing_cut=result.cut.pruned == 0 and result.repaired is None,
        layers=_layer_rows(result),
        sections=[
            {"title": heading, "note": note, "svg": _svg(draw(result), index)}
            for index, (heading, note, draw) in enumerate(SECTIONS)
        ],
    )


def _version() -> str:
    try:
        return metadata.version("mnp_fast")
    except metadata.PackageNotFoundError:
        return "unknown"


def _attack_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    before, after = content.get("before"), content.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    names = (("accuracy", "Clean accuracy"), ("asr", "Attack success rate"))
    return [
        {"name": name, "before": before[key], "after": after[key]}
        for key, name in names
        if before.get(key) is not None and after.get(key) is not None
    ]


def _summary_rows(result: DefenseResult) -> list[tuple[str, str]]:
    total = sum(len(layer.mask) for layer in result.neurons.values())
    share = 100 * len(result.pruned) / max(total, 1)
    rows = [("Suspect", result.suspect), *_offset_rows(result)]
    points = [("at the cut", result.cut)]
    if result.repaired is not None:
        points.append(("after the repair", result.repaired))
    if result.curve and result.curve[0].pruned == 0:
        points.insert(0, ("before the cut", result.curve[0]))
    rows += [(f"Exposure's success {when}", f"{_number(at.exposed)} %") for when, at in points]
    rows += [(f"Clean accuracy {when}", f"{_number(at.accuracy)} %") for when, at in points]
    rows += [
        ("Clean loss at the cut", f"{result.cut.loss:.4g} nats"),
        ("Neurons pruned", f"{len(result.pruned):,} of {total:,} ({share:.1f} %)"),
    ]
    rows += [
        (PHASE_NAMES.get(phase, phase), f"{seconds:,.1f} s")
        for phase, seconds in result.seconds.items()
    ]
    rows.append(("Total time", f"{sum(result.seconds.values()):,.1f} s"))
    return rows


def _offset_rows(result: DefenseResult) -> list[tuple[str, str]]:
    """How far the suspect class is from the images, beside the other suspects."""
    size = result.untargeted_size
    if result.target is not None:
        size = result.offset_sizes.get(result.target)
    if size is None:
        return []
    others = [other for label, other in result.offset_sizes.items() if label != result.target]
    rows = [("Size of its offset", _share_of_range(size))]
    if others:
        rows.append(("Median size of the other offsets", _share_of_range(median(others))))
    if result.target is None:
        if result.drift_agreement is not None:
            rows.append(("Agreement with batch norms' drift", f"{result.drift_agreement:.2f}"))
    elif not math.isnan(given := result.drift_favours.get(result.target, math.nan)):
        rows.append(("Given to it along batch norms' drift", f"{100 * given:.0f} %"))
    return [*rows, ("Conspicuous", "yes" if result.conspicuous else "no")]


def _share_of_range(size: float) -> str:
    return f"{100 * size:.1f} % of the range of values" if math.isfinite(size) else "none found"


def _layer_rows(result: DefenseResult) -> list[dict[str, Any]]:
    counts = dict.fromkeys(result.neurons, 0)
    for neuron in result.pruned:
        counts[neuron.layer] += 1
    return [
        {
            "name": name,
            "pruned": count,
            "neurons": len(result.neurons[name].mask),
            "share": 100 * count / max(len(result.neurons[name].mask), 1),
        }
        for name, count in counts.items()
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _svg(figure: Figure, index: int) -> Markup:
    buffer = io.StringIO()
    # Glyphs as paths need no font to be there; the salt makes equal results give equal pages.
    with rc_context({"svg.hashsalt": "mnp_fast", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Only the element: the prolog and its DTD address are of no use inside a page.
    element = text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)
    # The figures share a page, and ids are the page's.
    return Markup(_ID.sub(rf"\1figure{index}-", element))
