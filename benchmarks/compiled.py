"""torch.compile as a peer, which not every machine can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from .timing import Case, Function

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compile` for these shapes alone. It forgets what was compiled before: one a case."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def add_compiled(case: Case, name: str, make: Callable[[], Function], quick: bool = False) -> None:
    """Add a compiled competitor to a case, or the reason why it is excluded.

    Parameters
    ----------
    case
        What it computes.
    name
        The competitor's name.
    make
        Builds it with `compiled`.
    quick
        Exclude it, as compiling takes long.
    """
    if quick:
        case.excluded[name] = "compiling takes long; not with --quick"
        return
    try:
        function = make()
        function()
    except Exception as error:  # a missing compiler fails in many ways
        reason = str(error).strip().partition("\n")[0]
        case.excluded[name] = f"{type(error).__name__}: {reason}"
    else:
        case.functions[name] = function
