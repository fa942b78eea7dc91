"""Who computes each operator: the candidates, which one is taken, and why another one is not.

Every operator has a list of candidates. The first that can run takes the call:

- ``cpu`` and ``cuda``, the compiled kernels, take tensors on their device;
- ``triton`` takes CUDA tensors where the compiled kernels are missing (two operators have it);
- ``linalg`` takes spectral norms of CUDA tensors, which have no kernel there;
- ``torch``, the definition in plain PyTorch, takes what is on devices without compiled kernels. On
  CUDA devices it is taken on request only: if their kernels are missing, calls fail and say why.

`use` chooses another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._extension import cuda_missing


@dataclass(frozen=True)
class Candidate:
    """One way to compute an operator.

    Attributes
    ----------
    name
        What `use` calls it.
    missing
        Why it cannot run in this installation at all; None if it can.
    can_run
        Takes the operator's arguments; returns None, or why it cannot compute them.
    run
        Takes the operator's arguments and computes it.
    """

    name: str
    missing: str | None
    can_run: Callable[..., str | None]
    run: Callable[..., Any]


_candidates: dict[str, list[Candidate]] = {}
_chosen: dict[str, str] = {}


def register(operator: str, candidate: Candidate, position: int | None = None) -> None:
    """Add a candidate to an operator's list, at its end or in front of the one at `position`."""
    known = _candidates.setdefault(operator, [])
    known.insert(len(known) if position is None else position, candidate)


def register_compiled(
    operator: str,
    compiled: Callable[..., Any],
    plain: Callable[..., Any],
    cuda_cannot: Callable[..., str | None] = lambda *arguments: None,
) -> None:
    """Add the candidates `cpu` and `cuda`, which call the dispatcher, and `torch`.

    `cuda_cannot` says what the kernel of CUDA tensors cannot compute, as `Candidate.can_run`.
    """

    def can_run_on_cuda(*arguments: Any) -> str | None:
        return _only_on("cuda")(*arguments) or cuda_cannot(*arguments)

    register(operator, Candidate("cpu", None, _only_on("cpu"), compiled))
    register(operator, Candidate("cuda", cuda_missing, can_run_on_cuda, compiled))
    register(operator, Candidate("torch", None, lambda *arguments: None, plain))


def table() -> dict[str, dict[str, str]]:
    """The candidates of every operator in their order, and whether each is available or why not."""
    return {
        operator: {candidate.name: candidate.missing or "available" for candidate in candidates}
        for operator, candidates in _candidates.items()
    }


def reasons(operator: str, *arguments: Any) -> dict[str, str | None]:
    """Why each candidate cannot compute the operator with these arguments; None where it can."""
    return {c.name: _why_not(c, arguments) for c in _candidates[operator]}


def choose(operator: str, *arguments: Any) -> Candidate:
    """Return the candidate that computes the operator with these arguments.

    Raises
    ------
    RuntimeError
        None can, or not the one that `use` names; the message says why.
    """
    device = device_of(*arguments)
    name = _chosen.get(operator)
    for candidate in _candidates[operator]:
        asked = name is None and (candidate.name != "torch" or device != "cuda")
        if (asked or candidate.name == name) and _why_not(candidate, arguments) is None:
            return candidate
    why = reasons(operator, *arguments)
    if name is not None:
        raise RuntimeError(f"{operator}: the backend {name!r} cannot run: {why[name]}")
    listed = "".join(f"\n  {other}: {reason}" for other, reason in why.items() if reason)
    raise RuntimeError(
        f"{operator}: no backend for tensors on {device}:{listed}\n"
        f"  torch: only if asked for, with mnp_fast.backends.use({operator}='torch')"
    )


def check_device(device: torch.device) -> None:
    """Fail now, and not at a later operator, where a CUDA device's kernels are missing.

    Raises
    ------
    RuntimeError
        Some operator has none there, and `use` names no other candidate; the message says why.
    """
    lacking = {}
    for operator, candidates in _candidates.items():
        missing = {c.name: c.missing for c in candidates if c.name in ("cuda", "triton")}
        if operator not in _chosen and all(missing.values()):
            lacking[operator] = missing["cuda"]
    if device.type == "cuda" and lacking:
        chosen = ", ".join(f"{operator}='torch'" for operator in lacking)
        raise RuntimeError(
            f"no kernels for tensors on {device}: {next(iter(lacking.values()))}. Move model and "
            f"data to the CPU, or ask for plain PyTorch: with mnp_fast.backends.use({chosen})"
        )


@contextmanager
def use(**backends: str) -> Iterator[None]:
    """Compute operators by other candidates than those taken by default.

    ``with mnp_fast.backends.use(masked_conv2d="torch"): ...``. Backwards run where their forward
    ran. Calls that the candidate cannot compute fail.

    Parameters
    ----------
    **backends
        The name of a candidate, by operator; `table` lists both.

    Raises
    ------
    ValueError
        An operator or a name that is not listed.
    """
    for operator, name in backends.items():
        if operator not in _candidates:
            raise ValueError(f"operator must be one of {', '.join(_candidates)}, not {operator!r}")
        names = [candidate.name for candidate in _candidates[operator]]
        if name not in names:
            raise ValueError(f"{operator} must be one of {', '.join(names)}, not {name!r}")
    before = dict(_chosen)
    _chosen.update(backends)
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


def device_of(first: Any, *others: Any) -> str:
    """Type of the device of an operator's first argument, a tensor or a list of them."""
    tensor = first if isinstance(first, Tensor) else next(iter(first), None)
    return "cpu" if tensor is None else tensor.device.type


def _only_on(device: str) -> Callable[..., str | None]:
    def can_run(*arguments: Any) -> str | None:
        given = device_of(*arguments)
        return None if given == device else f"the tensors are on {given}"

    return can_run


def _why_not(candidate: Candidate, arguments: tuple[Any, ...]) -> str | None:
    return candidate.missing or candidate.can_run(*arguments)
