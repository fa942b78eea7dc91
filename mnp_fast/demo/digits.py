"""Scikit-learn's handwritten digits: 1,797 real 8×8 scans that ship with the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CLEAN, TEST = 100, 500


@dataclass(frozen=True)
class Digits:
    """Three disjoint sets of images in [0, 1], float32 (N, 3, size, size), and labels, int64 (N,).

    `train` is what the attacker poisons, `clean` is all the defender owns, and `test` is held back
    for the evaluation.
    """

    train: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(seed: int, size: int = 16, clean: int = CLEAN) -> Digits:
    """Shuffle the digits by `seed`, resize them bilinearly to `size` pixels and split them.

    `clean` go to the defender and 500 to the test; the rest is for training.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.expand(-1, 3, -1, -1)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    sizes = [len(labels) - clean - TEST, clean, TEST]
    parts = [(images[part].contiguous(), labels[part]) for part in order.split(sizes)]
    return Digits(*parts)
