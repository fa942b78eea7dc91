"""The demo: train a backdoored network on real images, defend it, show before and after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from rich.table import Table

from ..config import DefenseConfig
from ..defend import defend
from ..io import atomic_path, ensure_writable, save_weights
from ..report import write_report
from .attacks import ATTACKS, poison
from .digits import load_digits
from .figure import demo_figure
from .resnet import ResNet18
from .train import accuracy, attack_success_rate, train

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..result import DefenseResult
    from .attacks import Trigger
    from .digits import Digits

POISON_RATE = 0.1


def checkpoint_path(out: Path, attack: str, seed: int, width: int, epochs: int) -> Path:
    """Where the defense of these settings can be resumed; other settings have another file."""
    return out / f"checkpoint-{attack}-{seed}-{width}-{epochs}.pt"


def run_demo(
    out: Path,
    *,
    attack: str = "badnets",
    seed: int = 0,
    width: int = 16,
    epochs: int = 20,
    console: Console,
) -> DefenseResult:
    """Run one attack and its defense; write weights, report and figure into `out`.

    Parameters
    ----------
    out
        Folder; created if needed.
    attack
        A name of `mnp_fast.demo.attacks.ATTACKS`, or `"none"` for a model without a backdoor.
    seed
        Seed of the data split, the training and the defense.
    width, epochs
        Channels of the network's stem, and epochs of its training.
    console
        Where progress and the table are shown.

    Raises
    ------
    ValueError
        Unknown attack.
    OSError
        The folder cannot be written; found before any training.
    """
    if attack not in (*ATTACKS, "none"):
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)} or none, not {attack!r}")
    trigger = ATTACKS.get(attack)
    out = ensure_writable(out)
    digits = load_digits(seed)

    start = time.perf_counter()
    model = trained_model(digits, trigger, seed, width, epochs, console)
    trained = time.perf_counter() - start
    save_weights(model.state_dict(), out / "model.safetensors")
    before = measure(model, digits, trigger)

    checkpoint = checkpoint_path(out, attack, seed, width, epochs)
    result = defend(
        model, digits.clean, DefenseConfig(seed=seed), checkpoint=checkpoint, console=console
    )
    after = measure(result.model, digits, trigger)
    result.seconds = {"train": trained, **result.seconds}

    save_weights(result.model.state_dict(), out / "purified.safetensors")
    write_report(
        result,
        out,
        title=f"{attack} on handwritten digits" if trigger else "A clean model of the digits",
        extra={
            "attack": attack,
            "seed": seed,
            "before": before,
            "after": after,
            "neurons": sum(len(mask) for mask in result.masks.values()),
            "neurons_pruned": len(result.pruned),
        },
    )
    with atomic_path(out / "demo.png") as path:
        demo_figure(digits, trigger, before, after, result).savefig(path, format="png")
    checkpoint.unlink(missing_ok=True)
    _show(before, after, result, out, console)
    return result


def trained_model(
    digits: Digits,
    trigger: Trigger | None,
    seed: int,
    width: int,
    epochs: int,
    console: Console,
) -> nn.Module:
    """The network trained on digits of which `trigger` poisoned some; in eval mode."""
    images, labels = digits.train
    if trigger is not None:
        images, labels = poison(images, labels, trigger, POISON_RATE, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet18(width)
    steps = train(model, images, labels, epochs=epochs, seed=seed)
    for _ in track(steps, description="Training", total=epochs, console=console):
        pass
    return model


def measure(model: nn.Module, digits: Digits, trigger: Trigger | None) -> dict[str, float | None]:
    """Accuracy and attack success rate on the held-back images, in percent."""
    return {
        "accuracy": accuracy(model, *digits.test),
        "asr": None if trigger is None else attack_success_rate(model, *digits.test, trigger),
    }


def _show(
    before: dict[str, float | None],
    after: dict[str, float | None],
    result: DefenseResult,
    out: Path,
    console: Console,
) -> None:
    table = Table("On held-back images", "before", "after")
    for key, name in (("accuracy", "clean accuracy"), ("asr", "attack success rate")):
        if before[key] is not None:
            table.add_row(name, f"{before[key]:.1f} %", f"{after[key]:.1f} %")
    console.print(table)
    console.print(result.outcome())
    times = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    console.print(f"Time: {times}.")
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
    console.print(f"Figure: {out / 'demo.png'}", soft_wrap=True)
