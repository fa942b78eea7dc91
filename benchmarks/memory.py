"""Peak memory of a mask step, each competitor's in a process of its own.

It is the growth of the resident memory over that before the step, when network and images are in
memory already: what torch allocates and what operators allocate beside it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import typer

from .networks import network
from .step import LIMIT, MASK_STEPS, PUBLIC, batch_of, exact_mask_gradients
from .timing import OURS, Case, Tensors

ROOT = Path(__file__).parent.parent


def cases(quick: bool) -> Iterator[Case]:
    """The standard ResNet-18 for small images."""
    width, size, batch = (8, 16, 8) if quick else (64, 32, 32)
    model, (x, labels) = network(width), batch_of(size, batch)
    names = [PUBLIC, OURS] if quick else MASK_STEPS
    peaks: list[float] = []
    yield Case(
        f"memory of a mask step, ResNet-18 width {width}, {size}x{size}, batch {batch}",
        {name: partial(child, peaks, name, width, size, batch) for name in names},
        norms(exact_mask_gradients(model, x, labels)),
        limit=LIMIT,
        different=frozenset({PUBLIC}),
        reading=peaks.pop,
        metric="MiB",
        heavy=True,
    )


def norms(gradients: Tensors) -> Tensors:
    """One number a layer."""
    return (torch.stack([gradient.double().norm() for gradient in gradients]),)


def child(peaks: list[float], name: str, width: int, size: int, batch: int) -> Tensors:
    """Run `main` in a fresh process; adds the peak in MiB and returns the gradients' norms."""
    threads = torch.get_num_threads()
    given = [name, *map(str, (width, size, batch, threads))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    peaks.append(found["peak"])
    return (torch.tensor(found["norms"], dtype=torch.float64),)


def main(name: str, width: int, size: int, batch: int, threads: int) -> None:
    """Print the peak of two steps of a competitor, as JSON."""
    torch.set_num_threads(threads)
    step = MASK_STEPS[name](network(width), *batch_of(size, batch))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # Linux: makes the highest resident size start at the present one.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    gradients = step()
    peak = resident("VmHWM") - before
    typer.echo(json.dumps({"peak": peak, "norms": norms(gradients)[0].tolist()}))


def resident(field: str) -> float:
    """A field of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    typer.run(main)
