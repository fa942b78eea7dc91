"""Tensors in and out of files, without ever executing what a file contains."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError
from .files import atomic_path, existing_file

NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net")
PARALLEL_PREFIX = "module."
SAFETENSORS_HEADER_LIMIT = 100_000_000
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a model's tensors from a safetensors file or a torch checkpoint.

    The content decides which of the two it is, not the suffix. A torch checkpoint may be the state
    dict itself or hold it under `"state_dict"`, `"model_state_dict"`, `"model"` or `"net"`. The
    prefix `"module."` that `DataParallel` adds is removed when all names have it.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    dict
        Dense CPU tensors by name, in the file's dtypes; all values are finite.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CheckpointError
        The file is damaged, asks for code to be run (which is refused), holds no mapping of names
        to tensors, or has NaN or infinite weights.
    """
    path = existing_file(path)
    if is_safetensors(path):
        content: Any = _load_safetensors(path)
    else:
        content = load_checkpoint(path)
        for key in NESTED_UNDER:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
                break
    state = _named_tensors(content, path)
    if state and all(name.startswith(PARALLEL_PREFIX) for name in state):
        state = {name.removeprefix(PARALLEL_PREFIX): tensor for name, tensor in state.items()}
    check_tensors(state, path)
    return state


def save_weights(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write tensors by name to a safetensors file, atomically.

    Tensors of any device and stride are written as dense CPU copies; those that share memory are
    written once each.

    Raises
    ------
    TypeError
        A value of `state` is no tensor; the message names it.
    OSError
        The file cannot be written.
    """
    dense: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state[{name!r}] is a {type(value).__name__}, not a tensor")
        tensor = value.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory.
        dense[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with atomic_path(path) as temporary:
        save_file(dense, temporary)


def save_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values to a file, atomically.

    Plain values are `None`, bool, int, float and str: what `load_checkpoint` reads back.

    Raises
    ------
    TypeError
        `state` holds anything else; the message says where.
    OSError
        The file cannot be written.
    """
    _check_plain(state, "state")
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read what `save_checkpoint` wrote, tensors on the CPU.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CheckpointError
        The file is damaged or asks for code to be run (which is refused).
    """
    path = existing_file(path)
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(_refusal(path, str(error))) from error
        except Exception as error:  # for damaged archives torch raises OSError, too
            if "TorchScript" in str(error):
                raise CheckpointError(
                    f"'{path}' was refused and nothing in it was run: it is a TorchScript archive, "
                    "which holds code; save model.state_dict() instead"
                ) from error
            raise CheckpointError(
                f"'{path}' is not a readable torch checkpoint; it is truncated, damaged or of "
                f"another format ({type(error).__name__})"
            ) from error


def is_safetensors(path: Path) -> bool:
    """Whether the file starts like safetensors: the header's length, 8 bytes, then its `{`."""
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return head[8:] == b"{" and length <= SAFETENSORS_HEADER_LIMIT


def check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not dense and finite; the message names the first one.

    Raises
    ------
    CheckpointError
        A tensor of `state` is sparse, quantized, without data, or has NaN or infinite values.
    """
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"'{path}': tensor '{name}' is not a dense tensor with data")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"'{path}': tensor '{name}' has NaN or infinite values")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is a truncated or damaged safetensors file ({error})"
        ) from error


def _refusal(path: Path, reason: str) -> str:
    # torch names the import it refused; its advice to allow it is not for untrusted files.
    names = sorted(set(_GLOBAL.findall(reason)))
    if names:
        return (
            f"'{path}' was refused and nothing in it was run: besides tensors its pickle asks for "
            f"{', '.join(names)}, which can execute code; save model.state_dict() instead"
        )
    if "Unsupported" in reason:
        return (
            f"'{path}' was refused and nothing in it was run: its pickle holds more than tensors "
            "and plain values; save model.state_dict() instead"
        )
    return f"'{path}' is not a readable torch checkpoint; it is truncated, damaged or not a pickle"


def _named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"'{path}' holds a {type(content).__name__}, not a mapping of names to tensors"
        )
    if not content:
        raise CheckpointError(f"'{path}' holds no tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"'{path}' is not a mapping of names to tensors: entry {name!r} is a "
                f"{type(value).__name__}; a state dict may also lie under one of "
                f"{', '.join(NESTED_UNDER)}"
            )
    return dict(content)


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where} has a key of type {type(key).__name__}, not str or int")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, (Tensor, bool, int, float, str)):
        raise TypeError(
            f"{where} is a {type(value).__name__}; a checkpoint holds tensors, None, bool, int, "
            "float, str, and dicts, lists and tuples of these"
        )
