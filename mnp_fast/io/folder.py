"""Images in a folder with one subfolder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError

# Pillow hands EPS files to an interpreter; only pure image formats are opened.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    *(".pbm", ".pgm", ".pnm", ".ppm"),
)


def class_folders(path: Path) -> list[Path]:
    """The visible subfolders of `path`, sorted by name."""
    return sorted(
        (entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
        key=lambda entry: entry.name,
    )


def load_folder(path: Path, image_size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Read all images below `path`, float32 (N, C, H, W) in [0, 1], and labels, int64 (N,).

    C is 1 if all images are gray, else 3. Raises `DataError`.
    """
    folders = class_folders(path)
    if not folders:
        raise DataError(
            f"data folder '{path}' has no subfolders; one per class is expected, or an .npz file, "
            "or CIFAR-10's python batches"
        )
    images: list[Tensor] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"class folder '{folder}' has no images ({', '.join(SUFFIXES)})")
        for file in files:
            image = _read(file)
            if image_size is not None:
                image = resize(image[None], image_size)[0]
            elif images and image.shape[1:] != images[0].shape[1:]:
                raise DataError(
                    f"image '{file}' is {_size(image)} pixels where the others are "
                    f"{_size(images[0])}; give image_size to resize them"
                )
            images.append(image)
            labels.append(label)
    channels = max(image.shape[0] for image in images)
    stacked = torch.stack([image.expand(channels, -1, -1) for image in images])
    return stacked, torch.tensor(labels, dtype=torch.int64)


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize float images (N, C, H, W) to `size` (H, W), bilinearly with antialiasing."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(
        images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True
    )


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.mode.startswith("I;16"):
                pixels = np.asarray(image, dtype=np.float32) / 65535
            elif image.mode in ("1", "L", "LA"):
                pixels = np.asarray(image.convert("L"), dtype=np.float32) / 255
            elif image.mode in ("I", "F"):
                raise DataError(f"image '{file}' has 32-bit pixels; 8 or 16 bits are allowed")
            else:
                pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"image '{file}' cannot be read ({type(error).__name__}: {error})"
        ) from error
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def _size(image: Tensor) -> str:
    return f"{image.shape[1]}×{image.shape[2]}"
