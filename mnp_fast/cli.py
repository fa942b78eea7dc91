"""The command line: `mnp-fast demo`, `defend`, `detect`, `stats`, `info`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from .config import DefenseConfig
from .distributed import launched

if TYPE_CHECKING:
    from torch import Tensor, nn

app = typer.Typer(
    help="Find and remove the neurons that carry a backdoor, from a small clean set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

INTERRUPTED = 130
LIKELY = 3  # `detect` found a backdoor


@contextmanager
def _reported(checkpoint: Path | None = None) -> Iterator[None]:
    """Turn expected errors into one line, and Ctrl-C into how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        hint = ""
        if checkpoint is not None and checkpoint.exists():
            hint = f": run the same command again to go on from {checkpoint}"
        errors.print(f"Interrupted{hint}.", markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        errors.print(f"Error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what was built, what is used, and why something is not."""
    from .info import build_info

    facts = build_info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table("", "", show_header=False, box=None)
    for key, value in facts.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for name, item in parts:
            if isinstance(item, dict):
                item = [f"{candidate}: {state}" for candidate, state in item.items()]
            text = ", ".join(item) if isinstance(item, list) else str(item)
            table.add_row(f"{key} {name}".strip().replace("_", " "), text)
    console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report and figure.")] = Path("out/demo"),
    attack: Annotated[
        str, typer.Option(help="badnets, blend or sig; none trains a clean model.")
    ] = "badnets",
    seed: Annotated[int, typer.Option(help="Seed of data split, training and defense.")] = 0,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network's stem.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 20,
) -> None:
    """Train a backdoored network on real handwritten digits, defend it, show before and after."""
    from .demo.run import checkpoint_path, run_demo

    with _reported(checkpoint_path(out, attack, seed, width, epochs)):
        run_demo(out, attack=attack, seed=seed, width=width, epochs=epochs, console=console)


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between, not {text!r}") from None


Data = Annotated[
    Path,
    typer.Option(
        help="Clean images: a folder with one subfolder a class, an .npz with images "
        "(N, C, H, W) and labels, or a folder with CIFAR-10's python batches."
    ),
]
# Optional[...]: Typer evaluates it on Python 3.10.
Model = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="module:factory or file.py:factory, called without arguments."),
]
Weights = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--checkpoint", help="The factory's weights: safetensors, or torch's format."),
]
Exported = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="A torch.export archive, instead of --model and --checkpoint."),
]
Mean = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Mean of each channel that the model expects removed, as 0.5,0.5,0.5."),
]
Std = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Standard deviation of each channel to divide by."),
]
ImageSize = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Resize the images of a folder to this many pixels."),
]
Samples = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=2, help="Use this many images, drawn by the seed; all by default."),
]


def _check_source(model: str | None, checkpoint: Path | None, exported: Path | None) -> None:
    if (exported is None) == (model is None) or (model is None) != (checkpoint is None):
        raise ValueError("give either --model with --checkpoint, or --exported")


def _network(model: str | None, checkpoint: Path | None, exported: Path | None) -> nn.Module:
    from . import io

    if exported is not None:
        return io.load_exported(exported)
    assert model is not None
    assert checkpoint is not None
    return io.build_model(model, checkpoint)


def _clean_data(
    data: Path,
    image_size: int | None,
    mean: str | None,
    std: str | None,
    samples: int | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    from . import io
    from .data import CleanSet

    images, labels = io.load_clean_data(
        data, image_size=image_size, mean=_numbers(mean, "--mean"), std=_numbers(std, "--std")
    )
    if samples is not None and samples < len(labels):
        images, labels = CleanSet(images, labels).batches(samples, seed)[0]
    return images, labels


@app.command()
def defend(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the purified weights and the report.")],
    model: Model = None,
    checkpoint: Weights = None,
    exported: Exported = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    samples: Samples = None,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="A setting of DefenseConfig, as name=value; repeatable."),
    ] = None,
    restart: Annotated[
        bool, typer.Option(help="Ignore the checkpoint of an interrupted run.")
    ] = False,
) -> None:
    """Purify a model of your own with a small set of clean images.

    Under torchrun, the processes share the work.
    """
    resume_file = out / "checkpoint.pt"
    with _reported(resume_file), launched() as processes:
        from . import io
        from .defend import defend as run_defense
        from .report import write_report

        _check_source(model, checkpoint, exported)
        config = DefenseConfig(**_settings(settings or []))
        first = processes.rank == 0  # the only one that writes
        if first:
            io.ensure_writable(out)
        clean = _clean_data(data, image_size, mean, std, samples, config.seed)
        network = _network(model, checkpoint, exported)
        if restart and first:
            resume_file.unlink(missing_ok=True)
        result = run_defense(
            network, clean, config, checkpoint=resume_file, console=console, group=processes.group
        )
        if not first:
            return
        io.save_weights(result.model.state_dict(), out / "purified.safetensors")
        io.save_weights(result.masks, out / "masks.safetensors")
        report = write_report(result, out, title=f"Defense of {model or exported}")
        resume_file.unlink(missing_ok=True)
        console.print(result.outcome())
        console.print(f"Weights, masks and report: {report.parent}", soft_wrap=True)


@app.command()
def detect(
    data: Data,
    model: Model = None,
    checkpoint: Weights = None,
    exported: Exported = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    samples: Samples = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every random order.")] = 0,
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A calibration on models like yours; the package's own by default."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for detection.json and figures; nothing is written without."),
    ] = None,
) -> None:
    """Tell whether a model of your own has a backdoor, from a small set of clean images.

    Exits with 3 where one is likely. Under torchrun, the processes share the work.
    """
    with _reported(), launched() as processes:
        from . import io
        from .detection import Calibration
        from .detection.detect import detect as run_detection
        from .stats_report import write_detection

        _check_source(model, checkpoint, exported)
        first = processes.rank == 0
        if first and out is not None:
            io.ensure_writable(out)
        known = Calibration.load() if calibration is None else Calibration.load(calibration)
        clean = _clean_data(data, image_size, mean, std, samples, seed)
        found = run_detection(
            _network(model, checkpoint, exported),
            clean,
            known.config(seed),
            calibration=known,
            console=console,
            group=processes.group,
        )
        if not first:
            return
        console.print(found.outcome())
        console.print(f"Calibrated on: {known.described()}.", soft_wrap=True)
        if out is not None:
            write_detection(found, out)
            console.print(f"Figures and JSON: {out}", soft_wrap=True)
        if found.verdict:
            raise typer.Exit(LIKELY)


@app.command()
def stats(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for neurons.csv, neurons.json and figures.")],
    model: Model = None,
    checkpoint: Weights = None,
    exported: Exported = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    samples: Samples = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every random order.")] = 0,
    saliency: Annotated[str, typer.Option(help="taylor, fisher or ablation.")] = "taylor",
    magnitude: Annotated[
        str, typer.Option(help="l1, l2, linf, effective or spectral, to compare with.")
    ] = "l1",
    precision: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Of ablation: a standard error in nats at which a neuron is done."),
    ] = None,
) -> None:
    """Write magnitude, saliency and deviation of every neuron of a model of your own.

    Under torchrun, the processes share the work.
    """
    ablates = saliency == "ablation"
    resume_file = out / "ablation.pt"
    with _reported(resume_file if ablates else None), launched() as processes:
        from . import io
        from .stats import neuron_stats
        from .stats_report import write_stats

        _check_source(model, checkpoint, exported)
        first = processes.rank == 0
        if first:
            io.ensure_writable(out)
        clean = _clean_data(data, image_size, mean, std, samples, seed)
        found = neuron_stats(
            _network(model, checkpoint, exported),
            clean,
            saliency,
            magnitude=magnitude,
            precision=precision,
            seed=seed,
            checkpoint=resume_file if ablates else None,
            console=console,
            group=processes.group,
        )
        if not first:
            return
        write_stats(found, out)
        resume_file.unlink(missing_ok=True)
        table = Table("Correlation of magnitude and saliency", "value", "95 % interval")
        for name, estimate in vars(found.correlation).items():
            interval = f"{estimate.low:.2f} to {estimate.high:.2f}"
            table.add_row(name.replace("_", " "), f"{estimate.value:.2f}", interval)
        console.print(table)
        console.print(f"Neurons and figures: {out}", soft_wrap=True)


def _settings(assignments: list[str]) -> dict[str, Any]:
    known: dict[str, type[Any]] = {f.name: type(f.default) for f in fields(DefenseConfig)}
    values = {}
    for assignment in assignments:
        name, found, text = assignment.partition("=")
        if not found or name not in known:
            raise ValueError(
                f"--set takes name=value with a name of {', '.join(known)}; got {assignment!r}"
            )
        try:
            values[name] = known[name](text)
        except ValueError:
            raise ValueError(
                f"--set {name} needs a value of type {known[name].__name__}, not {text!r}"
            ) from None
    return values


if __name__ == "__main__":
    app()
