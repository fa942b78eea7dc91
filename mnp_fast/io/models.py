"""Models from a factory in the user's own code and weights from an untrusted file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .errors import CheckpointError
from .weights import load_weights

LISTED = 5
SPEC_FORMS = "'package.module:factory' or 'path/to/file.py:factory'"


def build_model(spec: str, weights: str | os.PathLike[str]) -> nn.Module:
    """Build a model with a factory and load a checkpoint into it, strictly.

    The factory is code of the user's and is run; the checkpoint is not trusted and is only read.

    Parameters
    ----------
    spec
        `"package.module:factory"` or `"path/to/file.py:factory"`; the factory may be a dotted
        attribute (`"package.module:Models.small"`). It is called without arguments.
    weights
        A file that `load_weights` accepts.

    Returns
    -------
    nn.Module
        The model on the factory's device, in eval mode.

    Raises
    ------
    ValueError
        `spec` names nothing usable, or the factory fails or returns no `nn.Module`.
    FileNotFoundError
        The file of the factory or of the weights does not exist.
    CheckpointError
        The checkpoint cannot be read or does not fit the model.
    """
    model = _call_factory(spec)
    state = load_weights(weights)
    _check_fit(model, state, Path(weights))
    model.load_state_dict(state)
    return model.eval()


def _call_factory(spec: str) -> nn.Module:
    location, _, attribute = spec.rpartition(":")
    if not location or not attribute:
        raise ValueError(f"model spec '{spec}' is not of the form {SPEC_FORMS}")
    target: Any = _import(location, spec)
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ValueError(f"model spec '{spec}': '{location}' has no '{attribute}'")
        target = getattr(target, name)
    if not callable(target):
        raise ValueError(f"model spec '{spec}': '{attribute}' cannot be called")
    try:
        model = target()
    except Exception as error:
        raise ValueError(
            f"model spec '{spec}': the factory, called without arguments, failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model spec '{spec}': the factory returned a {type(model).__name__}, not an nn.Module"
        )
    return model


def _import(location: str, spec: str) -> ModuleType:
    try:
        if location.endswith(".py"):
            return _import_file(Path(location))
        return _import_module(location)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"model spec '{spec}': '{location}' cannot be imported "
            f"({type(error).__name__}: {error}); allowed: {SPEC_FORMS}"
        ) from error


def _import_module(name: str) -> ModuleType:
    here = os.getcwd()  # installed commands, unlike `python -m`, leave it out
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(here)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}' to take the model's factory from")
    name = f"_mnp_fast_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up while they are defined.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_fit(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    # Checkpoints from before torch 0.4.1 lack this counter, and torch fills it in.
    missing = [
        name for name in expected if name not in state and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {_shape(state[name])} in the file, {_shape(tensor)} in the model"
        for name, tensor in expected.items()
        if name in state and isinstance(tensor, Tensor) and tensor.shape != state[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {_first(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"'{path}' does not fit {type(model).__name__}; tensors " + "; ".join(problems)
        )


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _first(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
