"""The report: its numbers, its safety, and that it needs nothing from outside."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mnp_fast import plots, stats_plots
from mnp_fast.report import write_report
from mnp_fast.result import (
    CutPoint,
    DefenseResult,
    EpochRecord,
    LayerNeurons,
    PrunedNeuron,
)

EVIL = "<script>alert('x')</script>&\"layer"


@dataclass(frozen=True)
class Config:
    site: str = "norm"
    alpha: float = 0.5


def make_result(layers: list[str], pruned: int = 3, width: int = 12) -> DefenseResult:
    neurons = {}
    for name in layers:
        mask = torch.linspace(0, 1, width)
        neurons[name] = LayerNeurons(mask, torch.rand(width) + 0.1, torch.rand(width))
    order = sorted(
        (float(layer.mask[index]), name, index)
        for name, layer in neurons.items()
        for index in range(width)
    )
    curve = [CutPoint(k, 99.0 - k, 0.1, 100.0 - k) for k in range(len(order))]
    return DefenseResult(
        model=torch.nn.Identity(),
        neurons=neurons,
        pruned=[PrunedNeuron(name, index, mask) for mask, name, index in order[:pruned]],
        curve=curve,
        cut=curve[pruned],
        repaired=CutPoint(pruned, 95.5, 0.2, 1.5),
        target=2,
        conspicuous=True,
        offset_sizes={4: 0.25, 2: 0.125, 1: 0.5, 0: math.inf},
        untargeted_size=None,
        untargeted_spread=None,
        drift_favours={1: math.nan, 2: 0.625},
        drift_agreement=None,
        drift_spread=None,
        history=[
            EpochRecord("suppress", 1, -2.0, 20.0, 0.5),
            EpochRecord("fit", 1, 0.5, 90.0, 0.6),
        ],
        seconds={"suppress": 0.5, "fit": 0.6, "select": 0.125},
        config=Config(),  # type: ignore[arg-type]
    )


class Page(HTMLParser):
    """Collects what a page's tags ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.cells.append(data.strip())


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    extra = {"before": {"accuracy": 99.2, "asr": 100.0}, "after": {"accuracy": 98.2, "asr": 0.9}}
    result = make_result(["first", EVIL])
    folder = tmp_path_factory.mktemp("report")
    return write_report(result, folder, title=f"On {EVIL}", extra=extra).read_text()


def test_json_holds_summary_extra_version_and_time(tmp_path: Path) -> None:
    result = make_result(["a", "b"])
    page = write_report(result, tmp_path / "out", title="T", extra={"command": ["demo"], "asr": 1})
    assert page == tmp_path / "out" / "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    for key, value in result.summary().items():
        assert content[key] == value
    assert content["target"] == 2
    assert content["cut"] == {"pruned": 3, "accuracy": 96.0, "loss": 0.1, "exposed": 97.0}
    assert content["repaired"] == {"pruned": 3, "accuracy": 95.5, "loss": 0.2, "exposed": 1.5}
    assert content["command"] == ["demo"]
    assert content["asr"] == 1
    assert isinstance(content["mnp_fast"], str)
    assert datetime.fromisoformat(content["created"]).tzinfo is not None


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    result = make_result(["a"])
    result.history.append(EpochRecord("fit", 2, float("nan"), 90.0, 0.5))
    write_report(result, tmp_path, title="T", extra={"score": float("inf")})
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert content["history"][-1]["loss"] is None
    assert content["score"] is None


@pytest.mark.parametrize("layers", [1, 20])
def test_page_is_self_contained(tmp_path: Path, layers: int) -> None:
    text = write_report(
        make_result([f"layers.{i}" for i in range(layers)]), tmp_path, title="T"
    ).read_text()
    page = Page(text)
    assert page.tags.count("svg") == 6
    assert not {"script", "link", "iframe", "img", "object", "foreignobject"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "Effect on the attack" not in page.cells


def test_ids_of_the_figures_do_not_collide(page_text: str) -> None:
    page = Page(page_text)
    targets = {address[1:] for address in page.addresses}
    targets |= {target[1:] for target in re.findall(r"url\(([^)]*)\)", page_text)}
    assert targets
    assert targets <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_names_from_the_model_are_escaped(page_text: str) -> None:
    page = Page(page_text)
    assert "script" not in page.tags
    assert page.cells.count(f"On {EVIL}") == 2
    assert EVIL in page.cells


def test_tables(page_text: str) -> None:
    cells = Page(page_text).cells
    assert cells[cells.index("Clean accuracy before the cut") + 1] == "99.0 %"
    assert cells[cells.index("Clean accuracy at the cut") + 1] == "96.0 %"
    assert cells[cells.index("Neurons pruned") + 1] == "3 of 24 (12.5 %)"
    assert cells[cells.index("Total time") + 1] == "1.2 s"
    first = cells.index("first")
    assert cells[first + 1 : first + 4] == ["1", "12", "8.3 %"]


@pytest.mark.parametrize(
    ("target", "row"),
    [
        (2, ["Given to it along batch norms' drift", "62 %"]),
        (None, ["Agreement with batch norms' drift", "0.91"]),
        (1, []),
    ],
)
def test_what_batch_norms_remember(target: int | None, row: list[str], tmp_path: Path) -> None:
    result = replace(make_result(["a"]), target=target, untargeted_size=0.1, drift_agreement=0.912)
    write_report(result, tmp_path, title="T")
    cells = Page((tmp_path / "report.html").read_text()).cells
    found = [i for i, cell in enumerate(cells) if "drift" in cell]
    assert [cells[i : i + 2] for i in found] == ([row] if row else [])


def test_attack_table_is_there_when_measured(page_text: str) -> None:
    cells = Page(page_text).cells
    row = cells.index("Attack success rate")
    assert cells[row + 1 : row + 3] == ["100.0", "0.9"]


def test_extra_must_not_hide_the_report(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="extra has keys that the report writes itself: cut, title"
    ):
        write_report(make_result(["a"]), tmp_path, title="T", extra={"title": 1, "cut": 2})
    with pytest.raises(TypeError):
        write_report(make_result(["a"]), tmp_path, title="T", extra={"model": object()})
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        write_report(make_result(["a"]), tmp_path / "file", title="T")


FIGURES = (
    plots.mask_histogram,
    plots.accuracy_curve,
    plots.magnitude_saliency,
    plots.objective_history,
    stats_plots.result_by_layer,
    stats_plots.result_by_depth,
)


@pytest.mark.parametrize("draw", FIGURES)
def test_plots_take_results_at_their_limits(draw: Callable[[DefenseResult], Figure]) -> None:
    result = make_result(["a", "b"], pruned=0)
    result.history.clear()
    for layer in result.neurons.values():
        layer.magnitude.zero_()
        layer.saliency.zero_()
    figure = draw(result)
    figure.canvas.draw()
    assert figure.axes


@pytest.mark.parametrize("draw", FIGURES)
def test_plots_leave_pyplot_alone(draw: Callable[[DefenseResult], Figure]) -> None:
    draw(make_result(["a", "b"])).canvas.draw()
    assert "matplotlib.pyplot" not in sys.modules


def plotted(figure: Figure, label: str) -> Any:
    return next(line for line in figure.axes[0].collections if line.get_label() == label)


def test_plots_show_the_figures_of_the_result() -> None:
    result = make_result(["a", "b"])
    bars = plots.mask_histogram(result).axes[0]
    assert [text.get_text() for text in bars.get_legend().get_texts()] == [
        "Pruned (3)",
        "Kept (21)",
    ]
    line = plots.accuracy_curve(result).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [point.accuracy for point in result.curve])
    rings = plotted(plots.magnitude_saliency(result), "Pruned").get_offsets()
    first = result.pruned[0]
    layer = result.neurons[first.layer]
    np.testing.assert_allclose(
        rings[0], [float(layer.magnitude[first.index]), float(layer.saliency[first.index])]
    )
    titles = [axes.get_title(loc="left") for axes in plots.objective_history(result).axes]
    assert titles == ["Suppression", "Mask fitting"]
