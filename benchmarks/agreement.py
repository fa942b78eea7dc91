"""How well cheap saliencies rank neurons, beside exact ablation: python -m benchmarks.agreement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from mnp_fast import neuron_stats
from mnp_fast.stats import FEWEST, NeuronStats
from mnp_fast.stats.correlation import Array, ranks, spearman

from .detection import IMAGES
from .population import CLEAN, KINDS, STORE, Setting, subject

SALIENCIES = ("taylor", "fisher")
FIGURES = Path(__file__).parent.parent / "docs" / "results" / "agreement.json"


def main(
    attack: Annotated[str, typer.Option(help=f"{', '.join(KINDS)}.")] = CLEAN,
    seed: Annotated[int, typer.Option(min=0, help="Of the model.")] = 2,
    width: Annotated[int, typer.Option(min=1, help="Channels of the stem.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="Of training.")] = 20,
    store: Annotated[Path, typer.Option(help="Folder of trained models.")] = STORE,
    stored: Annotated[bool, typer.Option(help="Print the documentation's figures alone.")] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045 (Typer evaluates it on Python 3.10)
        typer.Option("--json", help="File for the table."),
    ] = None,
) -> None:
    """Train a model of the digits and compare saliencies on its 100 clean images."""
    if stored:
        return _show(json.loads(FIGURES.read_text()))
    if attack not in KINDS:
        raise typer.BadParameter(f"attack must be one of {', '.join(KINDS)}")
    setting = Setting(attack, seed, width=width, epochs=epochs)
    found = subject(setting, store=store)
    images, labels = (part[:IMAGES] for part in found.data.clean)
    exact = neuron_stats(
        found.model, (images, labels), "ablation", bootstrap=0, console=Console(stderr=True)
    )
    rows = []
    for kind in SALIENCIES:
        other = neuron_stats(found.model, (images, labels), kind, bootstrap=0)
        rows.append(
            [
                kind,
                _cell(_by_layer(other, exact, lambda values: values)),
                _cell(_by_layer(other, exact, np.abs)),
                f"{100 * _shared(_all(other), _all(exact)):.0f} %",
            ]
        )
    figures = {"model": setting.key, "rows": rows}
    _show(figures)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


def _show(figures: dict[str, Any]) -> None:
    console = Console(width=100)
    head = ("saliency", "change of the loss", "its absolute value", "largest 10 %")
    table = Table(*head, title=figures["model"])
    for row in figures["rows"]:
        table.add_row(*row)
    console.print(table)
    console.print(
        "Spearman's correlation with exact ablation, mean over layers (lowest, highest); of the "
        "10 % of the neurons whose silencing costs most, the share that is found."
    )


def _by_layer(stats: NeuronStats, exact: NeuronStats, of_exact: Callable[[Array], Array]) -> Array:
    values = [
        spearman(layer.saliency, of_exact(exact.layers[name].saliency))
        for name, layer in stats.layers.items()
        if len(layer.saliency) >= FEWEST
    ]
    return np.array([value for value in values if np.isfinite(value)])


def _all(stats: NeuronStats) -> Array:
    return np.concatenate([layer.saliency for layer in stats.layers.values()])


def _shared(a: Array, b: Array) -> float:
    """Share of the largest tenth of b that is in that of a."""
    count = max(1, len(a) // 10)
    return float(np.mean(ranks(a)[np.argsort(b)[-count:]] > len(a) - count))


def _cell(values: Array) -> str:
    return f"{values.mean():.2f} ({values.min():.2f}, {values.max():.2f})"


if __name__ == "__main__":
    typer.run(main)
