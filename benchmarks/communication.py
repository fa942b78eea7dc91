"""What processes exchange in a step of every phase: python -m benchmarks.communication.

It runs a few steps of each phase in processes on this machine, with gloo, and counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

import mnp_fast
from mnp_fast import DefenseConfig
from mnp_fast.data import CleanSet
from mnp_fast.demo.digits import load_digits
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.distributed import Processes
from mnp_fast.exposure import OffsetExposure
from mnp_fast.objectives import MaskFit
from mnp_fast.selection import cut_points
from mnp_fast.stats import saliency
from mnp_fast.suppression import suppress

CONFIG = DefenseConfig(
    suppress_epochs=1, suppress_accuracy=0.0, suppress_batch_size=32, offset_steps=40
)


class Counted(Processes):
    """Processes that note how often, how much and how long they exchange."""

    exchanges, bytes, seconds = 0, 0, 0.0

    def _exchange(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super()._exchange(collective, *args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.exchanges += 1
        self.bytes += sum(part.nbytes for part in args if isinstance(part, Tensor))


@dataclass
class Count:
    """Of one phase: its steps, and what they exchanged together."""

    phase: str
    steps: int
    exchanges: int
    bytes: int
    exchanging: float
    seconds: float


def phases(data: CleanSet) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Some steps of every phase on the demo's network: their number, and what runs them."""
    masked = mnp_fast.wrap(ResNet18().eval()).requires_grad_(False)
    for mask in mnp_fast.masks(masked).values():
        mask.requires_grad_(True)
    exposure = OffsetExposure(masked, data, 0, CONFIG)
    fit, batches = MaskFit(masked, exposure, data, CONFIG), -(-len(data) // CONFIG.fit_batch_size)
    cuts = cut_points(masked, [], exposure, data, CONFIG, False)
    return {
        "suppress": (
            -(-len(data) // CONFIG.suppress_batch_size),
            lambda: list(suppress(ResNet18(), data, CONFIG)),
        ),
        "expose": (CONFIG.offset_steps // 2, lambda: exposure.renew(1)),
        "fit": (batches, lambda: fit.epoch(0)),
        "select": (1, lambda: next(cuts)),
        "saliency": (1, lambda: saliency(masked, data, 250)),
    }


def count(processes: Counted) -> list[Count]:
    """What this process exchanges with the others, phase by phase."""
    data, counts = CleanSet(*load_digits(seed=0).clean, processes), []
    torch.manual_seed(0)
    for phase, (steps, run) in phases(data).items():
        processes.exchanges, processes.bytes, processes.seconds = 0, 0, 0.0
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        found = processes.exchanges, processes.bytes, processes.seconds
        counts.append(Count(phase, steps, *found, seconds))
    return counts


def table(counts: list[Count]) -> str:
    """The counts of a step, as Markdown."""
    lines = ["| phase | exchanges a step | bytes a step |", "|---|---|---|"]
    for c in counts:
        lines.append(f"| {c.phase} | {c.exchanges / c.steps:.2f} | {c.bytes / c.steps:,.0f} |")
    return "\n".join(lines)


def _work(rank: int, processes: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=processes)
    counts = count(Counted(dist.group.WORLD))
    if rank == 0:
        print(table(counts))
        for c in counts:
            each, share = 1000 * c.exchanging / c.exchanges, 100 * c.exchanging / c.seconds
            print(f"{c.phase}: {each:.2f} ms an exchange with waiting, {share:.0f} % of the time")
    dist.destroy_process_group()


def main(
    processes: Annotated[int, typer.Option(min=2, help="Processes on this machine.")] = 2,
) -> None:
    """Count what processes exchange in a step of every phase of a defense of the demo's network."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (processes, str(Path(folder) / "rendezvous")), nprocs=processes)


if __name__ == "__main__":
    typer.run(main)
