"""The demo over attacks and seeds: run what is missing, print the table, write the docs page.

python -m benchmarks.demo_results --run      # about a minute a model on two cores
python -m benchmarks.demo_results            # from the stored figures alone
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mnp_fast.demo.run import run_demo

ROOT = Path(__file__).parent.parent
KEPT = (
    *("attack", "seed", "before", "after", "neurons", "neurons_pruned", "repaired", "target"),
    "seconds",
)
HEAD = """# What the demo does, over attacks and seeds

Handwritten digits, ResNet-18 of width 16, 10 % of the training images poisoned, target class 0; the
defense has 100 clean images that were not trained on and default settings. Accuracy (ACC) and
attack success rate (ASR) in percent, on 500 held-back images; the number of neurons pruned, and
whether the rest was repaired; the class the defense suspects. `none` is a model without a backdoor.
Defaults were chosen on seeds 10 to 16, with exceptions that networks of seeds 0 to 2 led to:
`max_pruned` and `few`, `max_exposed`, `max_drop` with its standard error, `conspicuous`,
`untargeted`, `unsure_drop`, the repair, the second look, what norms remember, and the last look,
which came in after these figures. Seconds with one thread beside other work; the networks depend on
the number of threads and on the processor as well. Printed by `python -m benchmarks.demo_results`.

| attack | seed | ACC before | ACC after | ASR before | ASR after | pruned | suspect | defense (s) |
|---|---|---|---|---|---|---|---|---|
"""


def main(
    run: Annotated[bool, typer.Option(help="Run the models that have no figures yet.")] = False,
    attacks: Annotated[str, typer.Option(help="Names with commas between.")] = (
        "badnets,blend,sig,none"
    ),
    seeds: Annotated[str, typer.Option(help="Numbers with commas between.")] = "0,1,2",
    store: Annotated[Path, typer.Option(help="Folder of figures.")] = ROOT / "docs" / "results",
    page: Annotated[Path, typer.Option(help="Page to write.")] = ROOT / "docs" / "results.md",
) -> None:
    """Print a table of the demo's outcomes and write it to a page."""
    console = Console(stderr=True)
    rows = []
    for attack in attacks.split(","):
        for seed in map(int, seeds.split(",")):
            file = store / f"{attack}-{seed}.json"
            if not file.exists():
                if not run:
                    raise typer.BadParameter(f"no figures of {attack}, seed {seed}: use --run")
                console.print(f"{attack}, seed {seed}")
                store.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(_figures(attack, seed, console), indent=1) + "\n")
            rows.append(_row(json.loads(file.read_text())))
    text = HEAD + "".join(rows)
    page.write_text(text)
    typer.echo(text)


def _figures(attack: str, seed: int, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run_demo(Path(folder), attack=attack, seed=seed, console=console)
        report = json.loads((Path(folder) / "report.json").read_text())
    return {key: report[key] for key in KEPT}


def _row(figures: dict[str, Any]) -> str:
    before, after = figures["before"], figures["after"]
    repaired = "" if figures["repaired"] is None else ", repaired"
    numbers = [before["accuracy"], after["accuracy"], before["asr"], after["asr"]]
    cells = [
        figures["attack"],
        str(figures["seed"]),
        *("–" if number is None else f"{number:.1f}" for number in numbers),
        f"{figures['neurons_pruned']} of {figures['neurons']}{repaired}",
        str(figures["target"]),
        f"{sum(figures['seconds'].values()) - figures['seconds']['train']:.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    typer.run(main)
