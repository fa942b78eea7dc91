"""How much memory the CPU kernels keep between calls."""

from __future__ import annotations

from ._extension import _C


def memory_budget() -> int:
    """Bytes of workspace that are kept between calls at most."""
    return _C.memory_budget()


def set_memory_budget(size: int) -> None:
    """Limit the workspace that is kept between calls, and free what is kept now.

    Kernels need memory for packed weights, transformed images and gradients. It is kept for later
    calls, because fresh memory costs a page fault every 4 KiB; beyond the limit it is freed when
    its call ends. It is one limit for the whole process, 512 MiB at first. Blocks of up to 64 KiB
    are not counted: each thread keeps at most 1 MiB of them.

    Parameters
    ----------
    size
        Bytes; 0 keeps nothing but such small blocks.

    Raises
    ------
    ValueError
        The size is negative.
    """
    if size < 0:
        raise ValueError(f"size must be at least 0 bytes, not {size}")
    _C.set_memory_budget(size)
