"""Images that models of the benchmark are trained, defended and tested on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mnp_fast.demo.digits import Digits, load_digits

DIGITS_CLEAN = 180  # a tenth of the digits, so that a defense can be given 1, 5 and 10 %
CIFAR_CLEAN = 5000
CIFAR_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CIFAR_TEST = ("test_batch.bin",)
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue planes


def load(name: str, size: int, seed: int, folder: Path | None) -> Digits:
    """Training, clean and test images of `"digits"` or `"cifar10"`, split by the seed.

    Parameters
    ----------
    name
        The data set.
    size
        Pixels a side: any for digits, 32 for CIFAR-10.
    seed
        Of the split. CIFAR-10's clean images are taken from its training images.
    folder
        Where CIFAR-10's binary version lies (`data_batch_1.bin` and so on).

    Raises
    ------
    ValueError
        Another data set or size, no folder, or files that are not CIFAR-10's.
    FileNotFoundError
        The folder has not all files.
    """
    if name == "digits":
        return load_digits(seed, size, DIGITS_CLEAN)
    if name != "cifar10":
        raise ValueError(f"data must be digits or cifar10, not {name!r}")
    if size != 32 or folder is None:
        raise ValueError("cifar10 needs size 32 and the folder of its binary version")
    images, labels = _cifar(folder, CIFAR_TRAIN)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    clean, train = order[:CIFAR_CLEAN], order[CIFAR_CLEAN:]
    return Digits(
        (images[train], labels[train]), (images[clean], labels[clean]), _cifar(folder, CIFAR_TEST)
    )


def _cifar(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], float32 (N, 3, 32, 32), and labels, int64 (N,), of some files."""
    parts = []
    for name in names:
        content = (folder / name).read_bytes()
        if not content or len(content) % RECORD:
            raise ValueError(f"'{folder / name}' is not a binary batch of CIFAR-10: wrong length")
        parts.append(torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, RECORD))
    records = torch.cat(parts)
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise ValueError(f"'{folder}' does not hold CIFAR-10: label {int(labels.max())}")
    return records[:, 1:].reshape(-1, 3, 32, 32).float() / 255, labels
