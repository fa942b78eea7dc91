"""The arguments of an exported graph's calls, from JSON to Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .pt2 import DTYPES, STRIDED

MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
SCALARS: dict[str, tuple[type, ...]] = {
    "as_int": (int,),
    "as_float": (int, float, str),
    "as_bool": (bool,),
    "as_string": (str,),
}


class RefusedError(Exception):
    """A reason not to load an exported graph."""


def decode(argument: dict[str, Any], values: Mapping[str, Any]) -> Any:
    """The value of an argument; `values` are those of the graph so far, by name.

    Devices become the CPU: a graph exported on a GPU is rebuilt on the CPU like its weights.

    Raises
    ------
    RefusedError
        Arguments of this kind are not supported.
    LookupError, TypeError, ValueError
        The argument is malformed.
    """
    ((kind, value),) = argument.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return values[value["name"]]
    if kind == "as_tensors":
        return [values[item["name"]] for item in value]
    if kind == "as_optional_tensors":
        return [decode(item, values) for item in value]
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        return values[value["as_name"]] if "as_name" in value else decode(value, values)
    if kind in ("as_sym_ints", "as_sym_bools", "as_sym_floats"):
        return [decode({kind[:-1]: item}, values) for item in value]
    if kind == "as_scalar_type":
        return DTYPES[value]
    if kind == "as_memory_format":
        return MEMORY_FORMATS[value]
    if kind == "as_layout" and value == STRIDED:
        return torch.strided
    if kind == "as_device":
        return torch.device("cpu")
    if kind in SCALARS:
        return _scalar(kind, value)
    if kind[:-1] in SCALARS:
        return [_scalar(kind[:-1], item) for item in value]
    raise RefusedError(f"its graph has an argument of kind '{kind}', which is not supported")


def _scalar(kind: str, value: Any) -> Any:
    fits = isinstance(value, SCALARS[kind]) and isinstance(value, bool) == (kind == "as_bool")
    if not fits:
        raise ValueError(f"{value!r} is no value {kind}")
    # JSON has no infinity; the schema spells it out.
    return float(value) if kind == "as_float" else value
