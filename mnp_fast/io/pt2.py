"""Reading a torch.export archive (.pt2) as plain data.

`torch.export.load` must not see an untrusted file. It unpickles sample inputs, tensor subclasses
and custom objects without restriction; it evaluates the text of symbolic sizes and shape guards; it
looks operators up by any dotted path below `torch`; and it loads compiled libraries. So the archive
is read here for what it is, a zip of JSON and of raw tensor bytes, and all else in it is left alone
or refused.
"""

from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .weights import check_tensors

SCHEMA_MAJOR = 8
STRIDED = 7
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


@dataclass(frozen=True)
class Archive:
    """An exported program as plain data.

    Attributes
    ----------
    graph, signature
        The JSON objects of these names in torch's export schema.
    tensors
        Parameters, buffers and constants by their path in the model, on the CPU.
    parameters
        Those of `tensors` that are parameters.
    """

    graph: dict[str, Any]
    signature: dict[str, Any]
    tensors: dict[str, Tensor]
    parameters: frozenset[str]


def read_archive(path: Path) -> Archive:
    """Read the one exported program of an archive.

    Raises
    ------
    CheckpointError
        The archive is damaged, of another version of the format, or needs pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return _read(_Records(file, path), path)
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"'{path}' is not a torch.export archive; it is truncated, damaged or no .pt2"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"'{path}' is a damaged torch.export archive ({type(e).__name__}: {e})"
        ) from e


class _Records:
    """The archive's entries by name, without the folder that holds them all."""

    def __init__(self, file: zipfile.ZipFile, path: Path) -> None:
        self.file, self.path = file, path
        self.entries = {entry.filename.partition("/")[2]: entry for entry in file.infolist()}

    def bytes(self, name: str) -> bytes:
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"'{self.path}' has no entry '{name}'; it is damaged")
        # torch stores entries as they are; a compressed one could unpack to any size.
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"'{self.path}': entry '{name}' is compressed, which is refused")
        return self.file.read(entry)

    def json(self, name: str) -> Any:
        return json.loads(self.bytes(name))


def _read(records: _Records, path: Path) -> Archive:
    programs = [
        name.removeprefix("models/").removesuffix(".json")
        for name in records.entries
        if name.startswith("models/") and name.endswith(".json")
    ]
    if len(programs) != 1:
        raise CheckpointError(
            f"'{path}' holds {len(programs)} exported programs where one is expected; write it "
            "with torch.export.save of torch 2.10 or later (compiled packages are not loaded)"
        )
    if records.bytes("byteorder").decode() != sys.byteorder:
        raise CheckpointError(f"'{path}' was written on a machine of another byte order")
    program = records.json(f"models/{programs[0]}.json")
    version = program["schema_version"]["major"]
    if version != SCHEMA_MAJOR:
        raise CheckpointError(
            f"'{path}' has version {version} of the export schema; {SCHEMA_MAJOR} can be read"
        )
    tensors: dict[str, Tensor] = {}
    parameters: set[str] = set()
    for folder in ("weights", "constants"):
        config = records.json(f"data/{folder}/{programs[0]}_{folder}_config.json")["config"]
        storages: dict[str, bytearray] = {}
        for name, meta in config.items():
            tensors[name] = _tensor(records, f"data/{folder}/", name, meta, storages)
            if meta["is_param"]:
                parameters.add(name)
    check_tensors(tensors, path)
    module = program["graph_module"]
    return Archive(module["graph"], module["signature"], tensors, frozenset(parameters))


def _tensor(
    records: _Records, folder: str, name: str, meta: dict[str, Any], storages: dict[str, bytearray]
) -> Tensor:
    if meta["use_pickle"]:
        raise CheckpointError(
            f"'{records.path}' was refused and nothing in it was run: '{name}' is stored as a "
            "pickled object, which can execute code; only plain tensors are read"
        )
    info, file = meta["tensor_meta"], meta["path_name"]
    if info["dtype"] not in DTYPES or info["layout"] != STRIDED:
        raise CheckpointError(f"'{records.path}': tensor '{name}' is of a kind that is not read")
    dtype = DTYPES[info["dtype"]]
    sizes = [_integer(size) for size in info["sizes"]]
    if file not in storages:
        storages[file] = bytearray(records.bytes(folder + file))
    # Tensors of one record share its memory, as they did in the model.
    raw = storages[file]
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.as_strided(
        sizes, [_integer(step) for step in info["strides"]], _integer(info["storage_offset"])
    )


def _integer(size: dict[str, Any]) -> int:
    value = size["as_int"]
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value
