"""Several processes that share one defense: each computes on its part of every batch.

All of them hold the model and the clean set. What they exchange is small: gradients of masks or of
an offset, logits of the clean set, sums of statistics.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT = timedelta(minutes=10)  # of an exchange under torchrun; the others may still read images


class Processes:
    """The processes that share a batch among them.

    Parameters
    ----------
    group
        Their group; None for this process alone, which then exchanges nothing. Its timeout is how
        long one waits for the others.
    shards
        Parts that a batch is computed in; 1 for as many as there are processes. What is computed
        depends on this number, in its rounding, but not on how many processes share the parts.

    Attributes
    ----------
    rank, size
        Which of how many processes this is.
    shards
        Parts of a batch.

    Raises
    ------
    ValueError
        This process is not in the group; `shards` is no multiple of the number of processes.
    ConnectionError
        Raised by the methods that exchange something: another process failed or did not answer.
    """

    def __init__(self, group: ProcessGroup | None = None, shards: int = 1) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not in it")
        self.shards = self.size if shards == 1 else shards
        if self.shards % self.size:
            raise ValueError(
                f"shards must be 1 or a multiple of the {self.size} processes, not {shards}"
            )

    def parts(self, *tensors: Tensor) -> list[tuple[tuple[Tensor, ...], float]]:
        """Of tensors with one row a sample, the rows of each part of this process.

        Each with its share of all rows. Where there are fewer rows than parts, some get the first
        row, with the share 0.
        """
        found = []
        for rows in zip(*map(self._own, tensors), strict=True):
            share = len(rows[0]) / len(tensors[0])
            found.append((rows if share else tuple(t[:1] for t in tensors), share))
        return found

    def sum(self, addends: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The sums over the addends of all processes, as many of each; in their order.

        Exchanged as one flat tensor. Shapes and dtypes are those of the first addend.
        """
        like = addends[0]
        if len(addends) * self.size == 1:
            return list(like)
        flat = torch.stack([torch.cat([t.detach().reshape(-1) for t in one]) for one in addends])
        if self.size > 1:
            all_flat = [torch.empty_like(flat) for _ in range(self.size)]
            self._exchange(dist.all_gather, all_flat, flat)
            flat = torch.cat(all_flat)
        sums = flat.sum(0).split([t.numel() for t in like])
        return [part.to(t.dtype).reshape(t.shape) for part, t in zip(sums, like, strict=True)]

    def rows(self, mine: Sequence[Tensor], total: int) -> Tensor:
        """The rows that all processes computed for their parts of `total` samples, in order."""
        if self.shards == 1:
            return mine[0]
        rows = mine[0].new_zeros(total, *mine[0].shape[1:])
        for own, part in zip(self._own(rows), mine, strict=True):
            own.copy_(part[: len(own)])
        if self.size > 1:
            self._exchange(dist.all_reduce, rows)  # exact: all but one of the addends are 0
        return rows

    def equalize(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first process, so that rounding does not add up."""
        if self.size == 1:
            return
        of_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            of_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
        for parts in of_dtype.values():  # as one flat tensor: an exchange is mostly latency
            flat = torch.cat([part.reshape(-1) for part in parts])
            self._exchange(dist.broadcast, flat, group_src=0)
            for part, new in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
                part.copy_(new.reshape(part.shape))

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        self._exchange(dist.all_gather_object, values, value)
        return values

    def _own(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The rows of each part of this process."""
        each = self.shards // self.size
        return tensor.tensor_split(self.shards)[self.rank * each :][:each]

    def _exchange(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, **kwargs, group=self.group)
        except RuntimeError as error:
            raise ConnectionError(
                f"process {self.rank} of {self.size} lost the others: one of them failed, and its "
                f"own message says why, or did not answer in time ({error})"
            ) from error


ALONE = Processes()


@contextmanager
def launched() -> Iterator[Processes]:
    """All processes that `torchrun` started; this one alone outside of it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    processes = Processes(dist.group.WORLD)
    try:
        yield processes
    finally:
        # Gloo's threads end with the last reference to the group. One that still drops a tensor
        # while the interpreter ends aborts the process.
        processes.group = None
        dist.destroy_process_group()
        gc.collect()
