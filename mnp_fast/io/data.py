"""The small clean set a defender owns, from the layouts it usually comes in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cifar import BATCHES, batch_folder, cifar_class_names, load_cifar
from .errors import DataError
from .folder import class_folders, load_folder, resize


def load_clean_data(
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    split: str = "train",
) -> tuple[Tensor, Tensor]:
    """Read labelled images; nothing in the files is executed.

    Parameters
    ----------
    path
        One of

        - a folder with one subfolder of images per class: the sorted names give the labels 0, 1, …;
        - an `.npz` file with `images` (N, C, H, W), uint8 or float, and integer `labels` (N,);
        - a folder that is or holds CIFAR-10's `cifar-10-batches-py`.
    image_size
        Size in pixels to resize to, (height, width) or one number for both; bilinear with
        antialiasing. Without it the images must share a size.
    mean, std
        Per-channel normalisation `(image - mean) / std`, C numbers each, `std` > 0; both or
        neither.
    split
        CIFAR-10 only: `"train"` (`data_batch_1` to `5`, those present) or `"test"`.

    Returns
    -------
    images : Tensor
        float32 (N, C, H, W). 8- and 16-bit pixels are scaled to [0, 1], floats of an `.npz` are
        kept; then normalised if asked for. C is 1 for a folder whose images are all gray.
    labels : Tensor
        int64 (N,), from 0.

    Raises
    ------
    FileNotFoundError
        There is no such path.
    DataError
        The files are damaged, unsafe, incomplete, or hold values that are not allowed.
    ValueError
        An argument is out of its range (`DataError` is a `ValueError` too).
    """
    path = _existing(path)
    size = _checked_size(image_size)
    if split not in BATCHES:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(map(repr, BATCHES))}")
    cifar = batch_folder(path) if path.is_dir() else None
    if cifar is not None:
        pixels, classes = load_cifar(cifar, split)
        images, labels = _scaled(pixels, cifar), torch.from_numpy(classes)
    elif path.is_dir():
        images, labels = load_folder(path, size)
    else:
        images, labels = _load_npz(path)
    _check_values(images, labels, path)
    if size is not None:
        images = resize(images, size)
    return _normalised(images, mean, std), labels


def class_names(path: str | os.PathLike[str]) -> list[str]:
    """The class names of a data set, in the order of the labels.

    Names of the subfolders, CIFAR-10's own names, or "0", "1", … for an `.npz` file.

    Raises
    ------
    FileNotFoundError
        There is no such path.
    DataError
        The data set cannot be read.
    """
    path = _existing(path)
    if path.is_dir():
        cifar = batch_folder(path)
        if cifar is not None:
            return cifar_class_names(cifar)
        return [folder.name for folder in class_folders(path)]
    _, labels = _load_npz(path)
    return [str(label) for label in range(int(labels.max()) + 1)]


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no data at '{path}'")
    return path


def _checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(
            f"image_size is {image_size!r}; allowed: a positive number of pixels or two, "
            "(height, width)"
        )
    return size[0], size[1]


def _load_npz(path: Path) -> tuple[Tensor, Tensor]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"'{path}' is not an .npz archive")
        with archive:
            arrays = {name: archive[name] for name in ("images", "labels") if name in archive.files}
            found = ", ".join(archive.files) or "nothing"
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"'{path}' cannot be read as an .npz archive of plain arrays; pickled content is "
            f"refused and not run ({type(error).__name__}: {error})"
        ) from error
    for name in ("images", "labels"):
        if name not in arrays:
            raise DataError(f"'{path}' has no array '{name}'; it holds {found}")
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"'{path}': images has shape {images.shape}; (N, C, H, W) is expected")
    if labels.ndim != 1 or len(labels) != len(images):
        raise DataError(
            f"'{path}': labels has shape {labels.shape}; ({len(images)},) is expected, one an image"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"'{path}': labels are {labels.dtype}; integers are allowed")
    return _scaled(images, path), torch.from_numpy(labels.astype(np.int64))


def _scaled(images: NDArray[Any], path: Path) -> Tensor:
    if images.dtype == np.uint8:
        return torch.from_numpy(images.astype(np.float32)).div_(255)
    if images.dtype.kind == "f":
        return torch.from_numpy(images.astype(np.float32))
    raise DataError(f"'{path}': images are {images.dtype}; uint8 and float are allowed")


def _check_values(images: Tensor, labels: Tensor, path: Path) -> None:
    if len(labels) == 0:
        raise DataError(f"'{path}' holds no images")
    if int(labels.min()) < 0:
        raise DataError(f"'{path}': label {int(labels.min())}; labels count from 0")
    broken = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise DataError(f"'{path}': image {broken[0]} has NaN or infinite values")


def _normalised(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    if mean is None and std is None:
        return images
    if mean is None or std is None:
        raise ValueError("mean and std are given together or not at all")
    channels = images.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not np.isfinite(values).all():
            raise ValueError(
                f"{name} is {list(values)}; the images have {channels} channels, so {channels} "
                "finite numbers are allowed"
            )
    if min(std) <= 0:
        raise ValueError(f"std is {list(std)}; only numbers above 0 are allowed")
    shape = (1, channels, 1, 1)
    return (images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
