"""What each defense leaves of each attack: run what is missing, write a page and a picture.

python -m benchmarks.effectiveness --quick               # few cells, few epochs: minutes
python -m benchmarks.effectiveness --seeds 0,1,2         # all attacks, ours and all peers
python -m benchmarks.effectiveness --defenses "mnp;ablation;sensitivity" --clean 18
python -m benchmarks.effectiveness --page                # from the stored figures alone

A cell is one model under one defense with so many clean images. Cells of a model are run together,
ours apart, and stored at once; interrupted, or stopped by `--minutes`, the same command goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from mnp_fast.io import atomic_path, ensure_writable

from .attacks import ATTACKS
from .blind import run_blind
from .defenses import OURS, defense, names
from .effectiveness_page import stored, write_page
from .population import PAPER, STORE, Setting, Subject, measure, settings, subject

ROOT = Path(__file__).parent.parent
CELLS = ROOT / "docs" / "results" / "effectiveness"
PAGE = ROOT / "docs" / "effectiveness.md"
QUICK_ATTACKS, QUICK_DEFENSES, QUICK_EPOCHS = "badnets,blend", f"{OURS};clp;fine-tuning", 8


@dataclass(frozen=True)
class Cell:
    """One model, one defense, and how many clean images it gets."""

    setting: Setting
    defense: str
    clean: int

    def file(self, cells: Path) -> Path:
        """Where the cell's figures are stored."""
        name = self.defense.replace(":", "_").replace(",", "_")
        return cells / self.setting.key / f"{name}-{self.clean}.json"


def run_cells(
    cells: Sequence[Cell], trained: Subject, store: Path, folder: Path
) -> Iterator[dict[str, Any]]:
    """Figures of one model's cells with as many clean images, run in one process.

    Accuracy, asr and robust accuracy before and after, in percent; or an error.
    """
    setting, (images, labels) = trained.setting, trained.data.clean
    count = cells[0].clean
    if not 2 <= count <= len(labels):
        raise ValueError(f"clean must be between 2 and {len(labels)}, not {count}")
    outcomes = run_blind(
        [cell.defense for cell in cells],
        trained.model,
        (setting.arch, setting.width),
        (images[:count], labels[:count]),
        setting.seed,
        hidden=[store, folder],
    )
    for cell, outcome in zip(cells, outcomes, strict=True):
        figures: dict[str, Any] = {"cell": asdict(cell), "before": trained.figures}
        if outcome.model is None:
            yield {**figures, "error": outcome.error}
            continue
        after = measure(outcome.model, setting, trained.trigger, trained.data)
        cut, neurons = pruned(trained.model, outcome.model)
        yield {**figures, "after": after, "pruned": cut, "neurons": neurons, "s": outcome.seconds}


def check_model(trained: Subject, folder: Path) -> None:
    """Refuse a model that the stored cells of its setting are not of.

    Raises
    ------
    ValueError
        Their figures before the defense differ.
    """
    found = stored(folder)
    if found and found[0]["before"] != trained.figures:
        raise ValueError(
            f"'{folder}' has cells of another model of this setting, with figures "
            f"{found[0]['before']}, not {trained.figures}: delete them, or restore the model"
        )


@torch.no_grad()
def pruned(before: nn.Module, after: nn.Module) -> tuple[int, int]:
    """Channels whose norm's weight, or whose filter, has become zero; and all channels of norms."""
    was, now = (_dead(model) for model in (before, after))
    total = sum(len(m.weight) for m in before.modules() if isinstance(m, nn.BatchNorm2d))
    return int((now & ~was).sum()), total


def _dead(model: nn.Module) -> Tensor:
    """For each channel of each norm and convolution, whether its weights are all zero."""
    layers = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.Conv2d))]
    return torch.cat([(m.weight.reshape(len(m.weight), -1) == 0).all(1) for m in layers])


def wanted(
    attacks: list[str],
    seeds: list[int],
    defenses: list[str],
    clean: list[int],
    options: dict[str, Any],
) -> Iterator[list[Cell]]:
    """All cells in groups that run together; clean models too, which a defense should leave."""
    ours = [[name] for name in defenses if name.partition(":")[0] == OURS]
    others = [name for name in defenses if [name] not in ours]
    for setting in settings(attacks, seeds, options):
        for count, group in product(clean, [*ours, others]):
            yield [Cell(setting, name, count) for name in group]


def main(
    quick: Annotated[bool, typer.Option(help="A look: two attacks, three defenses.")] = False,
    attacks: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(ATTACKS),
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "0",
    defenses: Annotated[
        str, typer.Option(help="Names or groups (peers, ablation, sensitivity), ; between.")
    ] = f"{OURS};peers",
    clean: Annotated[
        str,
        typer.Option(help="Numbers of clean images; 18,90,180: 1, 5, 10 % of digits."),
    ] = "100",
    arch: Annotated[str, typer.Option(help="As in benchmarks.population.")] = "resnet18",
    width: Annotated[int, typer.Option(help="Channels of the stem.")] = 8,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 16,
    epochs: Annotated[int, typer.Option(help="Of the models' training.")] = 20,
    paper: Annotated[bool, typer.Option(help="CIFAR-10, ResNet-18, width 64.")] = False,
    data: Annotated[Optional[Path], typer.Option(help="CIFAR-10, binary version.")] = None,  # noqa: UP045
    minutes: Annotated[float, typer.Option(help="Start no cell after so long.")] = 55,
    page: Annotated[bool, typer.Option(help="Only write the page.")] = False,
    store: Annotated[Path, typer.Option(help="Folder of models.")] = STORE,
    cells: Annotated[Path, typer.Option(help="Folder of figures.")] = CELLS,
    out: Annotated[Path, typer.Option(help="Page to write; its picture goes beside.")] = PAGE,
) -> None:
    """Run the cells that have no figures, and write the page."""
    start, console = time.monotonic(), Console(stderr=True)
    options = PAPER if paper else {"arch": arch, "width": width, "size": size, "epochs": epochs}
    if quick:
        attacks, defenses = QUICK_ATTACKS, QUICK_DEFENSES
        options = {**options, "epochs": QUICK_EPOCHS}
    chosen, left = names(defenses), 0
    for name in chosen:
        defense(name)  # a wrong name is found before any work
    numbers = [list(map(int, text.split(","))) for text in (seeds, clean)]
    trained: Subject | None = None
    for group in wanted(attacks.split(","), numbers[0], chosen, numbers[1], options):
        missing = [cell for cell in group if not cell.file(cells).exists()]
        if page or not missing:
            continue
        if time.monotonic() - start > 60 * minutes:
            left += len(missing)
            continue
        if trained is None or trained.setting != missing[0].setting:
            trained = subject(missing[0].setting, data, store)
            check_model(trained, missing[0].file(cells).parent)
        for cell, figures in zip(missing, run_cells(missing, trained, store, cells), strict=True):
            after = [f"{key} {value:.1f}" for key, value in figures.get("after", {}).items()]
            told = ", ".join(after) or figures["error"]
            console.print(f"{cell.setting.key}  {cell.defense}  {cell.clean} clean  ", told)
            file = cell.file(cells)
            ensure_writable(file.parent)
            with atomic_path(file) as path:
                path.write_text(json.dumps(figures, indent=1) + "\n")
    if left:
        console.print(f"{left} cells are left: repeat the command to go on")
    typer.echo(write_page(cells, out))


if __name__ == "__main__":
    typer.run(main)
