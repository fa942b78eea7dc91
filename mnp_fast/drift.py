"""What batch norms remember of training images that clean ones do not explain.

A running mean is that of the images a network was trained on, poisoned ones among them. How far it
is from the mean over clean images, the drift, points to where poisoned images lie (the evidence of
BNP, Zheng et al., NeurIPS 2022, which prunes the channels that differ most). It tells two things
without any trigger: which class the network comes to when its inputs are moved further that way,
and whether an offset does to all norms what the training images did.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .seeds import DRIFT
from .suppression import given

if TYPE_CHECKING:
    from .data import CleanSet

BATCH = 256
FACTOR = 5.0  # times the drift that images are moved; half of a poisoning rate of 10 %
ENOUGH = 100  # clean images whose means are not too noisy to follow
NOISE = 0.5  # standard deviations of images: what the clean means' own noise may grow to by it
RIDGE = 1e-3  # pulls the classes' frequencies in training to those of the clean set
NO_DRIFT = 1e-3  # length in standard deviations below which a norm counts for less


class Drift:
    """The drift of a network's batch norms from the statistics of a clean set.

    Parameters
    ----------
    model
        A plain network; it is copied.
    data
        The clean set.

    Attributes
    ----------
    norms
        The batch norms with running statistics that run once in a forward pass; where there are
        none, the methods must not be called.
    trust
        In (0, 1], lower where there are so few clean images that their means are noisy.
    """

    def __init__(self, model: nn.Module, data: CleanSet) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.data, self.trust = data, min(1.0, len(data) / ENOUGH)
        candidates = [
            module
            for module in self.model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        runs = self._inputs(data.images[:2], candidates)
        self.norms = [norm for norm in candidates if len(runs[norm]) == 1]
        if self.norms:
            self._measure()

    @torch.no_grad()
    def favours(self) -> list[float]:
        """What the network gives each class once its norms' inputs are moved along the drift.

        As `mnp_fast.suppression.favour`: mean softmax over images of the other classes, NaN for a
        class that all belong to. The channel means of all inputs are moved to `FACTOR` times the
        drift, less where clean images are few.
        """
        factor = min(FACTOR, NOISE * math.sqrt(len(self.data)))
        targets: dict[nn.Module, Tensor] = {
            norm: clean + factor * (_running_mean(norm) - clean)
            for norm, clean in zip(self.norms, self.clean, strict=True)
        }

        def move(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            moved = targets[norm] - _by_image(inputs[0]).mean(0)
            return (inputs[0] + moved.reshape(-1, *[1] * (inputs[0].dim() - 2)),)

        # Shuffled, and as large as each other, for a batch is moved by its own mean.
        parts = math.ceil(len(self.data) / BATCH)
        batches = self.data.batches(math.ceil(len(self.data) / parts), DRIFT)
        with self._hooked(move, self.norms):
            logits = torch.cat([self.model(images) for images, _ in batches])
        return given(logits.softmax(1), torch.cat([labels for _, labels in batches]))

    def agreement(self, images: Tensor) -> Tensor:
        """How far images move the norms' inputs as the training images did, in [-1, 1].

        The mean over norms of the cosine between the drift that other frequencies of the classes
        do not explain and the change of the channel means against the clean images', both in units
        of the norm's standard deviation. Differentiable by the images (N, *).
        """
        found = self._inputs(images, self.norms)
        cosines = [
            F.cosine_similarity(
                (found[norm][0].mean(0) - clean) / _deviation(norm), drift, dim=0, eps=NO_DRIFT
            )
            for norm, clean, drift in zip(self.norms, self.clean, self.drift, strict=True)
        ]
        return torch.stack(cosines).mean()

    @torch.no_grad()
    def _measure(self) -> None:
        """Channel means of clean images, and the drift beyond other frequencies of the classes."""
        _, classes, counts = self.data.labels.unique(return_inverse=True, return_counts=True)
        means = [
            _running_mean(norm).new_zeros(len(counts), norm.num_features) for norm in self.norms
        ]
        for images, labels in zip(self.data.images.split(BATCH), classes.split(BATCH), strict=True):
            found = self._inputs(images, self.norms)
            for norm, sums in zip(self.norms, means, strict=True):
                sums.index_add_(0, labels, found[norm][0])
        for sums in means:
            sums /= counts[:, None]
        frequencies = (counts / counts.sum()).double()
        scales = [_deviation(norm) for norm in self.norms]
        wanted = torch.cat([_running_mean(n) / s for n, s in zip(self.norms, scales, strict=True)])
        offered = torch.cat([(m / s).T for m, s in zip(means, scales, strict=True)]).double()
        mixture = _mixture(offered, wanted.double(), frequencies).to(wanted.dtype)
        self.clean = [frequencies.to(m.dtype) @ m for m in means]
        self.drift = [
            (_running_mean(norm) - mixture @ m) / scale
            for norm, m, scale in zip(self.norms, means, scales, strict=True)
        ]

    def _inputs(self, images: Tensor, norms: list[_BatchNorm]) -> dict[nn.Module, list[Tensor]]:
        """Means (N, C) of the norms' inputs by image, one for each time that a norm runs."""
        found: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}
        with self._hooked(lambda norm, inputs: found[norm].append(_by_image(inputs[0])), norms):
            self.model(images)
        return found

    @contextmanager
    def _hooked(
        self,
        hook: Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None],
        norms: list[_BatchNorm],
    ) -> Iterator[None]:
        handles = [norm.register_forward_pre_hook(hook) for norm in norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _mixture(offered: Tensor, wanted: Tensor, frequencies: Tensor) -> Tensor:
    """Frequencies of the classes, of sum 1, by which their means come nearest to the wanted ones.

    Ridge regression towards the given frequencies; `offered` is (channels, classes).
    """
    channels, classes = offered.shape
    ones = offered.new_ones(classes, 1)
    ridge = RIDGE * torch.eye(classes, dtype=offered.dtype, device=offered.device)
    left = torch.cat(
        [
            torch.cat([offered.T @ offered / channels + ridge, ones], 1),
            torch.cat([ones.T, ones.new_zeros(1, 1)], 1),
        ]
    )
    right = torch.cat(
        [offered.T @ wanted / channels + RIDGE * frequencies, frequencies.sum()[None]]
    )
    return torch.linalg.solve(left, right)[:classes]


def _by_image(inputs: Tensor) -> Tensor:
    """Means (N, C) of a norm's inputs (N, C, *)."""
    return inputs.flatten(2).mean(2) if inputs.dim() > 2 else inputs


def _running_mean(norm: _BatchNorm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _deviation(norm: _BatchNorm) -> Tensor:
    assert norm.running_var is not None
    return (norm.running_var + norm.eps).sqrt()
