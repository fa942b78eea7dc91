"""The demo's defense in one process and in several: python -m benchmarks.shards.

Prints how far their masks are apart, in float32: with `shards`, and without.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from mnp_fast import DefenseConfig, defend
from mnp_fast.demo.attacks import badnets
from mnp_fast.demo.digits import load_digits
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.demo.run import trained_model
from mnp_fast.result import DefenseResult

from .defense import QUICK

MODEL, MASKS = "model.pt", "masks-{shards}.pt"


def configs(processes: int, base: DefenseConfig) -> list[DefenseConfig]:
    """With as many shards as processes, and without."""
    return [replace(base, shards=processes), base]


def _defend(model: nn.Module, config: DefenseConfig, group: dist.ProcessGroup | None) -> Tensor:
    """All masks that were fitted, after each other."""
    result: DefenseResult = defend(model, load_digits(config.seed).clean, config, group=group)
    return torch.cat(list(result.masks.values()))


def _work(rank: int, processes: int, folder: Path, width: int, base: DefenseConfig) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=processes)
    model = ResNet18(width)
    model.load_state_dict(torch.load(folder / MODEL, weights_only=True))
    for config in configs(processes, base):
        found = _defend(model, config, dist.group.WORLD)
        if rank == 0:
            torch.save(found, folder / MASKS.format(shards=config.shards))
    dist.destroy_process_group()


def main(
    processes: Annotated[int, typer.Option(min=2, help="Processes on this machine.")] = 2,
    quick: Annotated[
        bool, typer.Option(help="A small network, hardly trained nor defended.")
    ] = False,
) -> None:
    """Defend the demo's network in one process and in several, each with one thread."""
    torch.set_num_threads(1)
    width, epochs, base = (4, 1, QUICK) if quick else (16, 20, DefenseConfig())
    console = Console()
    digits = load_digits(base.seed)
    model = trained_model(digits, badnets, base.seed, width, epochs, Console(stderr=True))
    table = Table("shards", "masks", "largest difference", "equal to the last bit")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(model.state_dict(), folder / MODEL)
        spawn(_work, (processes, folder, width, base), nprocs=processes)
        for config in configs(processes, base):
            found = torch.load(folder / MASKS.format(shards=config.shards), weights_only=True)
            alone = _defend(model, config, None)
            difference = (found - alone).abs().max().item()
            equal = "yes" if torch.equal(found, alone) else "no"
            table.add_row(str(config.shards), str(len(alone)), f"{difference:.1e}", equal)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
