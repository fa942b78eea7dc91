"""Exact ablation: what the clean loss of every sample becomes when one neuron is silenced."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import CleanSet
from ..fingerprint import fingerprint
from ..frozen import frozen_weights
from ..heads import names_of_heads
from ..io import ensure_writable, load_checkpoint, save_checkpoint
from ..progress import progress_bars
from ..seeds import mixed
from ..wrap import masks
from .saliency import check_wrapped, layers_mixing_samples
from .tail import Known, Tail

if TYPE_CHECKING:
    from rich.console import Console

SAVE_SECONDS = 10.0  # between two writings of a checkpoint
ROWS = 256  # samples of a batch where the whole network runs again


def ablation(
    masked: nn.Module,
    data: CleanSet,
    *,
    batch_size: int = 32,
    precision: float | None = None,
    neurons: dict[str, Tensor] | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> dict[str, Tensor]:
    """The change of every sample's loss when the mask of one neuron, and no other, is 0.

    Exact: of a model that can be traced, all that a neuron touches is computed again, and the rest
    is computed once (see `mnp_fast.stats.tail`). Layers of other models, and those followed by what
    that code does not know, cost a run of the network a neuron.

    Parameters
    ----------
    masked
        A wrapped model in eval mode. Its masks may have any value and stay as they are.
    data
        The clean set. Its processes share the neurons of every layer.
    batch_size
        Samples whose values are kept at a time, at least 1.
    precision
        A neuron's remaining samples are left out once the standard error of its mean change is at
        most this, in nats; positive. Samples then come in an order that depends on `seed` alone.
        All of them by default.
    neurons
        Those to silence, by name of their layer, int64 each; all by default.
    seed
        Of the samples' order under `precision`.
    checkpoint
        File that is written every few seconds; if it exists, the run it belongs to goes on from
        there. It is left for the caller to delete.
    console
        Where progress is shown; nowhere if not given.

    Returns
    -------
    dict of str to Tensor
        By name of the masked layer, float64 (samples, neurons) on the CPU: the cross-entropy of a
        sample in nats with the neuron silenced, minus that without. NaN for what was left out.

    Raises
    ------
    ValueError
        `masked` is not wrapped or in train mode; a number out of its range; the checkpoint of
        another run.
    CheckpointError
        The checkpoint is damaged.
    OSError
        The checkpoint's folder cannot be written.
    """
    check_wrapped(masked, batch_size)
    if precision is not None and not 0 < precision < math.inf:
        raise ValueError(f"precision must be positive and finite, not {precision}")
    for name, chosen in (neurons or {}).items():
        count = len(masks(masked).get(name, ()))
        if ((chosen < 0) | (chosen >= count)).any():
            raise ValueError(
                f"neurons: layer {name!r} has {count} neurons, indices must be below that and not "
                f"negative; got {int(chosen.min())} to {int(chosen.max())}"
            )
    run = _Ablation(masked, data, batch_size, precision, neurons, seed, checkpoint)
    with torch.no_grad(), frozen_weights(masked):
        return run(console)


class _Ablation:
    def __init__(
        self,
        masked: nn.Module,
        data: CleanSet,
        batch_size: int,
        precision: float | None,
        neurons: dict[str, Tensor] | None,
        seed: int,
        checkpoint: str | os.PathLike[str] | None,
    ) -> None:
        self.masked, self.data, self.precision = masked, data, precision
        every = {name: torch.arange(len(mask)) for name, mask in masks(masked).items()}
        chosen = every if neurons is None else neurons
        self.chosen = {name: chosen.get(name, every[name][:0]) for name in every}
        order = torch.arange(len(data))
        if precision is not None:
            order = torch.randperm(
                len(data), generator=torch.Generator().manual_seed(mixed(seed, len(data)))
            )
        self.batches = order.split(batch_size)
        self.changes = {
            name: torch.full((len(data), len(mask)), math.nan, dtype=torch.float64)
            for name, mask in masks(masked).items()
        }
        self.done = 0  # of the layers of all batches, in order
        self.silencer = _Silencer(masked, data)
        self.saved = time.monotonic()
        first = data.processes.rank == 0
        self.checkpoint = Path(checkpoint) if checkpoint is not None and first else None
        if checkpoint is not None or data.processes.size > 1:
            settings = {
                "batch_size": batch_size,
                "precision": precision,
                "seed": seed,
                "neurons": {name: chosen.tolist() for name, chosen in self.chosen.items()},
            }
            self.fingerprint = fingerprint(masked, data, settings)
            if len(set(data.processes.gather(self.fingerprint))) > 1:
                raise ValueError(
                    "processes were given different models, data, settings or versions"
                )
        if self.checkpoint is not None:
            ensure_writable(self.checkpoint.parent)
            if self.checkpoint.exists():
                self._resume(self.checkpoint)
        self.done, self.changes = data.processes.gather((self.done, self.changes))[0]

    def __call__(self, console: Console | None) -> dict[str, Tensor]:
        names = [name for name, chosen in self.chosen.items() if len(chosen)]
        # Deeper layers are cheaper: less follows them.
        work = [len(self.chosen[name]) * (len(names) - i) for i, name in enumerate(names)]
        steps = [(batch, name) for batch in self.batches for name in names]
        first = self.data.processes.rank == 0
        with progress_bars(console if first else None) as progress:
            task = progress.add_task("Ablating", total=sum(work) * len(self.batches))
            for i, (batch, name) in enumerate(steps):
                if i >= self.done:
                    self._step(batch, name)
                    self.done = i + 1
                    self._save(at_once=self.done == len(steps))
                progress.advance(task, work[i % len(names)])
        return self.changes

    def _step(self, batch: Tensor, name: str) -> None:
        processes, chosen = self.data.processes, self._unsure(name)
        if not len(chosen):
            return
        found = torch.zeros(len(batch), len(chosen), dtype=torch.float64)
        silent = masks(self.masked)[name].cpu()[chosen] == 0  # these change nothing
        mine = (~silent).nonzero()[processes.rank :: processes.size, 0]
        if len(mine):
            found[:, mine] = self.silencer.changes(batch, name, chosen[mine]).cpu()
        (found,) = processes.sum([[found]])
        self.changes[name][batch[:, None], chosen] = found

    def _unsure(self, name: str) -> Tensor:
        """The neurons of a layer that need more samples."""
        chosen = self.chosen[name]
        if self.precision is None:
            return chosen
        changes = self.changes[name][:, chosen]
        count = changes.isfinite().sum(0)
        mean = changes.nanmean(0)
        variance = (changes - mean).square().nansum(0) / (count - 1).clamp(min=1)
        error = (variance / count.clamp(min=1)).sqrt()
        return chosen[(count < 2) | (error > self.precision)]

    def _save(self, at_once: bool) -> None:
        now = time.monotonic()
        if self.checkpoint is not None and (at_once or now - self.saved > SAVE_SECONDS):
            content = {"fingerprint": self.fingerprint, "done": self.done, "changes": self.changes}
            save_checkpoint(content, self.checkpoint)
            self.saved = now

    def _resume(self, path: Path) -> None:
        content = load_checkpoint(path)
        if not isinstance(content, dict) or content.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"checkpoint '{path}' belongs to another run (other model, data, settings or "
                "version); delete it to start anew"
            )
        self.done, self.changes = content["done"], content["changes"]


class _Silencer:
    """Silences neurons of one layer on one batch of samples, the fastest way that is right."""

    def __init__(self, masked: nn.Module, data: CleanSet) -> None:
        self.masked, self.data = masked, data
        self.tail = _tail(masked)
        # Heads have no masks of each sample in an ordinary call.
        self.by_mask = layers_mixing_samples(masked, data.images[:2]) | names_of_heads(masked)
        norms = (m for m in masked.modules() if isinstance(m, _BatchNorm))
        if any(norm.running_mean is None for norm in norms):
            self.tail = None  # every sample's values depend on the batch
            self.by_mask = set(masks(masked))
        self.batch: Tensor | None = None

    def changes(self, batch: Tensor, name: str, neurons: Tensor) -> Tensor:
        """Change of the loss, float64 (samples, neurons)."""
        if self.batch is not batch:
            self._take(batch)
        neurons = neurons.to(self.images.device)
        way = self._by_mask if name in self.by_mask else self._by_rows
        if self.tail is not None and self.tail.can_run(name, self.known):
            way = self._by_tail
        changes = self.losses.new_zeros(len(self.labels), len(neurons))
        for position, sample, logits in way(name, neurons):
            change = _losses(logits, self.labels[sample]) - self.losses[sample]
            changes[sample, position] = change
        return changes

    def _take(self, batch: Tensor) -> None:
        self.batch = batch
        rows = batch.to(self.data.labels.device)
        self.images, self.labels = self.data.images[rows], self.data.labels[rows]
        self.known = Known() if self.tail is None else self.tail.known(self.images)
        logits = self.masked(self.images) if self.tail is None else self.known[self.tail.logits]
        self.losses = _losses(logits, self.labels)

    def _by_tail(self, name: str, neurons: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        assert self.tail is not None
        return self.tail.silenced(self.known, name, neurons)

    def _by_rows(self, name: str, neurons: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The whole network, with masks of its own for every pair."""
        count = len(self.labels)
        mask = masks(self.masked)[name]
        positions = torch.arange(len(neurons), device=neurons.device)
        for part in positions.split(max(1, ROWS // count)):
            position = part.repeat_interleave(count)
            sample = torch.arange(count, device=neurons.device).repeat(len(part))
            rows = mask.repeat(len(sample), 1)
            rows.scatter_(1, neurons[position][:, None], 0)
            yield position, sample, self._logits(name, rows, self.images[sample])

    def _by_mask(self, name: str, neurons: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The whole network, neuron by neuron: where samples have no masks of their own."""
        sample = torch.arange(len(self.labels), device=neurons.device)
        for position, neuron in enumerate(neurons):
            mask = masks(self.masked)[name].clone()
            mask[neuron] = 0
            yield torch.full_like(sample, position), sample, self._logits(name, mask, self.images)

    def _logits(self, name: str, mask: Tensor, images: Tensor) -> Tensor:
        given = {f"{name}.mask": mask}
        logits: Tensor = torch.func.functional_call(
            self.masked, given, (images,), tie_weights=False
        )
        return logits


def _tail(masked: nn.Module) -> Tail | None:
    try:
        return Tail(masked)
    except Exception:
        return None  # as in `data_flow`: a trace may fail in any way


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.double(), labels, reduction="none")
