"""Several processes that share one defense: each computes on its part of every batch.

All of them hold the model and the clean set. What they exchange is small: gradients of masks or of
an offset, logits of the clean set, sums of statistics.
"""

from __future__ import annotations

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

    Attributes
    ----------
    rank, size
        Which of how many processes this is.

    Raises
    ------
    ValueError
        This process is not in the group.
    ConnectionError
        Raised by the methods that exchange something: another process failed or did not answer.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not in it")

    def part(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], float]:
        """Of tensors with one row a sample, the rows of this process, and their share of all.

        Where there are fewer rows than processes, some get the first row, with the share 0.
        """
        if self.size == 1:
            return tensors, 1.0
        mine = tuple(t.tensor_split(self.size)[self.rank] for t in tensors)
        if len(mine[0]) == 0:
            return tuple(t[:1] for t in tensors), 0.0
        return mine, len(mine[0]) / len(tensors[0])

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes, exchanged as one flat tensor."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        self._exchange(dist.all_reduce, flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.to(t.dtype).reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def rows(self, mine: Tensor, total: int) -> Tensor:
        """The rows that all processes computed for their parts of `total` samples, in order."""
        if self.size == 1:
            return mine
        rows = mine.new_zeros(total, *mine.shape[1:])
        own = rows.tensor_split(self.size)[self.rank]
        own.copy_(mine[: len(own)])
        return self.sum([rows])[0]  # exact: all but one of the addends are 0

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
def launched() -> Iterator[ProcessGroup | None]:
    """The group of all processes that `torchrun` started; None outside of it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield None
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
