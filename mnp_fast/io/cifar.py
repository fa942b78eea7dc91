"""CIFAR-10's python batches, read by an unpickler that can build nothing but byte arrays."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

FOLDER = "cifar-10-batches-py"
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
META = "batches.meta"
PIXELS = (3, 32, 32)


def batch_folder(path: Path) -> Path | None:
    """The folder with CIFAR-10's batches if `path` is or holds it, else None."""
    for folder in (path / FOLDER, path):
        if any((folder / name).is_file() for names in BATCHES.values() for name in names):
            return folder
    return None


def load_cifar(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read a split's batches: images, uint8 (N, 3, 32, 32), and labels, int64 (N,).

    Batches that are absent are passed over as long as one is there. Raises `DataError`.
    """
    files = [folder / name for name in BATCHES[split] if (folder / name).is_file()]
    if not files:
        raise DataError(f"'{folder}' has no CIFAR-10 {split} batch: {', '.join(BATCHES[split])}")
    parts = [_batch(file) for file in files]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def cifar_class_names(folder: Path) -> list[str]:
    """The names of the ten classes from `batches.meta`. Raises `DataError`."""
    file = folder / META
    if not file.is_file():
        raise DataError(f"'{folder}' has no file {META}, which names the classes")
    names = _entry(_unpickle(file), "label_names", file)
    if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
        raise DataError(f"'{file}': label_names is not a list of names")
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _batch(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = _unpickle(file)
    data, labels = _entry(content, "data", file), _entry(content, "labels", file)
    pixels = data.array if isinstance(data, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != np.prod(PIXELS):
        raise DataError(f"'{file}': data is not a uint8 array (N, {np.prod(PIXELS)})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"'{file}': labels is not a list of integers")
    if len(labels) != len(pixels):
        raise DataError(f"'{file}': {len(pixels)} images but {len(labels)} labels")
    return pixels.reshape(-1, *PIXELS), np.array(labels, dtype=np.int64)


def _entry(content: Any, key: str, file: Path) -> Any:
    if isinstance(content, dict):
        for name in (key.encode(), key):
            if name in content:
                return content[name]
    raise DataError(f"'{file}' is not a CIFAR-10 batch: it has no entry '{key}'")


def _unpickle(file: Path) -> Any:
    with file.open("rb") as stream:
        try:
            return _Unpickler(stream, encoding="bytes").load()
        except DataError as error:
            raise DataError(f"'{file}' {error}") from error
        except Exception as error:
            raise DataError(
                f"'{file}' is a truncated or damaged pickle ({type(error).__name__}: {error})"
            ) from error


class _Dtype:
    """Stands in for `numpy.dtype`, of which only bytes are accepted."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise ValueError(f"array of dtype {code!r}; uint8 is expected")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment mean nothing to single bytes."""


class _Array:
    """Stands in for `numpy.ndarray`: takes its pickled state, checks it, keeps a uint8 array."""

    array: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise ValueError("array of something else than bytes")
        flat = np.frombuffer(data, dtype=np.uint8)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding!r}; latin1 is expected")
    return text.encode("latin1")


# No object of numpy's is built: its own unpickling trusts the shapes and flags it is given.
STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise DataError(
                f"was refused and nothing in it was run: its pickle asks for {module}.{name}, "
                "which CIFAR-10's batches have no use for"
            )
        return STAND_INS[module, name]
