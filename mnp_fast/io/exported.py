"""A torch.export archive as an `nn.Module` whose layers can be masked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .errors import CheckpointError
from .exported_arguments import RefusedError
from .exported_graph import GraphBuilder
from .files import existing_file
from .pt2 import DTYPES, read_archive


def load_exported(path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild the model of a torch.export archive, without `torch.export.load`.

    Nothing in the archive is unpickled, evaluated or compiled: its JSON graph is rebuilt from a
    fixed list of operators, and sample inputs, shape guards and symbolic expressions are not read.

    Convolutions (2-D), linear layers and batch norms whose weights are the model's own become
    `nn.Conv2d`, `nn.Linear` and `nn.BatchNorm1d/2d/3d` under the paths they had in the model; all
    else stays a function call. A batch size that was fixed by the export is freed where the graph
    allows it.

    Parameters
    ----------
    path
        An archive that `torch.export.save` of torch 2.10 or later wrote of a program exported in
        eval mode with one tensor input, the batch first, and one tensor output. A sole output
        tensor in a tuple or dict is returned bare.

    Returns
    -------
    nn.Module
        An `fx.GraphModule` on the CPU in eval mode; outputs equal the exported program's.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CheckpointError
        The archive is damaged, unsafe, from training mode, uses an operator that is not allowed,
        has other inputs or outputs, or cannot run with more than one batch size.
    """
    path = existing_file(path)
    archive = read_archive(path)
    builder = GraphBuilder(archive)
    try:
        model = builder.build()
        _check_batches(model, builder.input_meta, path)
    except CheckpointError:
        raise
    except RefusedError as error:
        raise CheckpointError(f"'{path}' was not loaded: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"'{path}' is a damaged torch.export archive ({type(e).__name__}: {e})"
        ) from e
    return model


def _check_batches(model: fx.GraphModule, meta: dict[str, Any], path: Path) -> None:
    exported, *sizes = [_size(size) for size in meta["sizes"]]
    batch = 3 if exported == 2 else 2
    try:
        with torch.no_grad():
            output = model(torch.zeros(batch, *sizes, dtype=DTYPES[meta["dtype"]]))
    except Exception as error:
        raise CheckpointError(
            f"'{path}' was exported for batches of {exported} and does not run with {batch} "
            f"({type(error).__name__}: {error}); export it with "
            "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
        ) from error
    if output.shape[:1] != (batch,):
        raise CheckpointError(
            f"'{path}' returns a tensor {tuple(output.shape)} for {batch} images; one row an image "
            "is expected"
        )


def _size(size: dict[str, Any]) -> int:
    # An open size comes with the value it had during the export.
    return int(size["as_int"] if "as_int" in size else size["as_expr"]["hint"]["as_int"])
