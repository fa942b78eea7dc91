"""Networks under attack: trained once, kept with their figures, and checked.

python -m benchmarks.population --seeds 0,1                       # all attacks and a clean model
python -m benchmarks.population --arch vgg13-bn --attacks wanet
python -m benchmarks.population --paper --data DIR                # CIFAR-10, the paper's setting

A model is stored as soon as it is trained, and not trained again; interrupted, the same command
goes on with the next one. Exits with 1 if an attack did not take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mnp_fast.demo.attacks import TARGET, Trigger
from mnp_fast.demo.digits import Digits
from mnp_fast.demo.train import accuracy, train
from mnp_fast.io import atomic_path, ensure_writable, load_weights, save_weights

from .architectures import ARCHITECTURES, build
from .attacks import ATTACKS, Attack, poison, success
from .attacks.attack import CLASSES
from .data import load

ROOT = Path(__file__).parent.parent
STORE = ROOT / "out" / "population"
CLEAN = "none"
TOOK, COST = 90.0, 2.0  # least attack success rate, most points of accuracy lost to the attack
ROUNDING = 1.0  # points; a trigger that is trained for depends a little on the number of threads
KINDS = (CLEAN, *ATTACKS)
COLUMNS = {
    "accuracy": "ACC",
    "asr": "ASR",
    "robust": "robust ACC",
    "clean_accuracy": "ACC of the clean model",
    "clean_asr": "its ASR",
}


@dataclass(frozen=True)
class Setting:
    """What a model depends on: the seed is that of split, attack, weights and batches.

    `target` is the class that the attack leads to; clean models have 0.
    """

    attack: str
    seed: int = 0
    arch: str = "resnet18"
    width: int = 8
    size: int = 16
    data: str = "digits"
    epochs: int = 20
    target: int = TARGET

    def __post_init__(self) -> None:
        for name, allowed in (("attack", KINDS), ("arch", tuple(ARCHITECTURES))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        if not 0 <= self.target < CLASSES:
            raise ValueError(f"target must be from 0 to {CLASSES - 1}, not {self.target}")

    @property
    def poisoning(self) -> Attack:
        """The attack, towards the setting's class."""
        return replace(ATTACKS[self.attack], target_class=self.target)

    @property
    def clean(self) -> Setting:
        """The setting without its attack."""
        return replace(self, attack=CLEAN, target=TARGET)

    @property
    def key(self) -> str:
        """A name for files."""
        return "-".join(map(str, asdict(self).values()))


# ResNet-18 of full width; of the 5,000 clean images a defense gets 500 with `--clean 500`.
PAPER = {"arch": "resnet18", "width": 64, "size": 32, "data": "cifar10", "epochs": 100}


@dataclass
class Subject:
    """A trained network in eval mode, its images, and the attack's trigger (None without attack).

    `figures` has `accuracy`, and for attacks `asr` (attack success rate) and `robust` (accuracy on
    triggered images), all in percent of held-back images; for attacks also `clean_accuracy` and
    `clean_asr` of the clean model of the same setting, given the same trigger.
    """

    setting: Setting
    model: nn.Module
    data: Digits
    trigger: Trigger | None
    figures: dict[str, float]


def subject(setting: Setting, folder: Path | None = None, store: Path = STORE) -> Subject:
    """The network of a setting, trained and stored if it is not yet.

    Raises
    ------
    ValueError, FileNotFoundError
        As `benchmarks.data.load` says.
    CheckpointError
        The stored weights are damaged.
    RuntimeError
        The stored figures are not reproduced: attack, data or torch have changed since.
    """
    data = load(setting.data, setting.size, setting.seed, folder)
    images, labels = data.train
    trigger = None
    if setting.attack != CLEAN:
        # Made anew where a model is stored: a trigger can be a generator of its own.
        poisoned = poison(setting.poisoning, images, labels, setting.seed)
        images, labels, trigger = poisoned.images, poisoned.labels, poisoned.trigger
    model = build(setting.arch, setting.width, setting.seed)
    weights = ensure_writable(store) / f"{setting.key}.safetensors"
    file = weights.with_suffix(".json")
    if file.exists():
        model.load_state_dict(load_weights(weights))
        figures = json.loads(file.read_text())
        now = measure(model.eval(), setting, trigger, data)
        if any(abs(now[key] - figures[key]) > ROUNDING for key in now):
            raise RuntimeError(f"'{weights}' has other figures now than when trained; delete it")
        return Subject(setting, model, data, trigger, figures)
    augment = shifted if setting.data == "cifar10" else None
    for _ in train(
        model, images, labels, epochs=setting.epochs, seed=setting.seed, augment=augment
    ):
        pass
    figures = measure(model, setting, trigger, data)
    if trigger is not None:
        clean = subject(setting.clean, folder, store).model
        reference = measure(clean, setting, trigger, data)
        figures |= {f"clean_{key}": reference[key] for key in ("accuracy", "asr")}
    save_weights(model.state_dict(), weights)
    with atomic_path(file) as path:
        path.write_text(json.dumps(figures) + "\n")
    return Subject(setting, model, data, trigger, figures)


def measure(
    model: nn.Module, setting: Setting, trigger: Trigger | None, data: Digits
) -> dict[str, float]:
    """Figures of a model on held-back images, as `Subject` has them."""
    figures = {"accuracy": accuracy(model, *data.test)}
    if trigger is not None:
        figures["asr"], figures["robust"] = success(model, setting.poisoning, trigger, *data.test)
    return figures


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels over zeros, every other one mirrored."""
    size, count = images.shape[-1], len(images)
    padded = nn.functional.pad(images, [4] * 4)
    corners = torch.randint(9, (2, count), generator=generator)
    rows, columns = corners[..., None] + torch.arange(size)
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns, columns.flip(1))
    return padded.permute(0, 2, 3, 1)[
        torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]
    ].permute(0, 3, 1, 2)


def failures(figures: dict[str, float]) -> list[str]:
    """Why an attack did not take, by its model's figures; empty if it did."""
    found = []
    if figures["asr"] < TOOK:
        found.append(f"ASR below {TOOK:g} %")
    if figures["accuracy"] < figures["clean_accuracy"] - COST:
        found.append(f"more than {COST:g} points of accuracy lost")
    return found


def settings(attacks: list[str], seeds: list[int], options: dict[str, Any]) -> Iterator[Setting]:
    """All combinations; those of a seed together, the clean model first."""
    for seed in seeds:
        for attack in dict.fromkeys([CLEAN, *attacks]):
            yield Setting(attack, seed, **options)


def main(
    attacks: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(ATTACKS),
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "0",
    arch: Annotated[str, typer.Option(help=", ".join(ARCHITECTURES))] = "resnet18",
    width: Annotated[int, typer.Option(help="Channels of the stem.")] = 8,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 16,
    epochs: Annotated[int, typer.Option(help="Of the training.")] = 20,
    paper: Annotated[bool, typer.Option(help="CIFAR-10, ResNet-18, width 64.")] = False,
    data: Annotated[Optional[Path], typer.Option(help="CIFAR-10, binary version.")] = None,  # noqa: UP045
    store: Annotated[Path, typer.Option(help="Folder of models.")] = STORE,
) -> None:
    """Train what is missing; print whether each attack took."""
    options = PAPER if paper else {"arch": arch, "width": width, "size": size, "epochs": epochs}
    console = Console()
    table = Table("attack", "seed", *COLUMNS.values(), "check")
    failed = False
    for setting in settings(attacks.split(","), list(map(int, seeds.split(","))), options):
        console.print(setting.key, style="dim")
        figures = subject(setting, data, store).figures
        found = [] if setting.attack == CLEAN else failures(figures)
        failed |= bool(found)
        verdict = "" if setting.attack == CLEAN else ", ".join(found) or "took"
        cells = [f"{figures[key]:.1f}" if key in figures else "" for key in COLUMNS]
        table.add_row(setting.attack, str(setting.seed), *cells, verdict)
    console.print(table)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
