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
from collections import Counter
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .channel_means import channel_means
from .norm_means import NormMeans, hooked
from .seeds import DRIFT
from .suppression import given

if TYPE_CHECKING:
    from .data import CleanSet

BATCH = 256
FACTOR = 5.0  # times the drift that images are moved; half of a poisoning rate of 10 %
ENOUGH = 100  # clean images whose means are not too noisy to follow
NOISE = 0.5  # standard deviations of images: what the clean means' own noise may grow to by it
RIDGE = 1e-3  # pulls the classes' frequencies in training to those of the clean set
NO_DRIFT = 1e-3  # length in standard deviations below which a norm's drift counts for less
NO_CHANGE = 1e-3  # and a change of its input


class Drift:
    """The drift of a network's batch norms from the statistics of a clean set.

    Parameters
    ----------
    model
        A plain network; it is copied.
    masked
        The same network wrapped, or itself: whose inputs shall agree with the drift.
    data
        The clean set.

    Attributes
    ----------
    norms
        The batch norms, by name, that have running statistics and run once in a forward pass; where
        there are none, nothing else must be used.
    trust
        In (0, 1], lower where there are so few clean images that their means are noisy.
    means
        Runs the masked network: logits, and the means (channels,) of all norms' inputs.
    """

    def __init__(self, model: nn.Module, masked: nn.Module, data: CleanSet) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.data, self.trust = data, min(1.0, len(data) / ENOUGH)
        self.norms = _norms(self.model, data.images[:2])
        if self.norms:
            self.means = NormMeans(masked, self.norms)
            self._measure()

    @torch.no_grad()
    def favours(self) -> list[float]:
        """What the network gives each class once its norms' inputs are moved along the drift.

        As `mnp_fast.suppression.favour`: mean softmax over images of the other classes, NaN for a
        class that all belong to. The channel means of all inputs are moved to `FACTOR` times the
        drift, less where clean images are few.
        """
        factor = min(FACTOR, NOISE * math.sqrt(len(self.data)))
        targets = (self.clean + factor * (self.running - self.clean)).split(self.sizes)
        target_of: dict[nn.Module, Tensor] = dict(zip(self.norms.values(), targets, strict=True))

        def move(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = inputs
            moved = target_of[norm] - channel_means(x)
            return (x + moved.reshape(-1, *[1] * (x.dim() - 2)),)

        # Shuffled, and as large as each other, for a batch is moved by its own mean.
        parts = math.ceil(len(self.data) / BATCH)
        batches = self.data.batches(math.ceil(len(self.data) / parts), DRIFT)
        with hooked(self.norms.values(), move):
            logits = torch.cat([self.model(images) for images, _ in batches])
        return given(logits.softmax(1), torch.cat([labels for _, labels in batches]))

    def agreement(self, before: Tensor, after: Tensor) -> Tensor:
        """How far the norms' inputs were moved as the training images moved them, in [-1, 1].

        The mean over norms of the cosine between the drift that other frequencies of the classes
        do not explain and the change of the means (channels,), both in units of the norm's standard
        deviation. Differentiable.
        """
        change = (after - before) / self.deviation
        squares = self._by_norm(change.square()).clamp(min=NO_CHANGE**2)
        return (self._by_norm(change * self.direction) / squares.sqrt()).mean()

    def _measure(self) -> None:
        """Channel means of clean images, and the drift beyond other frequencies of the classes."""
        norms = list(self.norms.values())
        self.sizes = [norm.num_features for norm in norms]
        self.running = torch.cat([cast("Tensor", norm.running_mean) for norm in norms])
        variances = [cast("Tensor", norm.running_var) + norm.eps for norm in norms]
        self.deviation = torch.cat(variances).sqrt()
        self.lengths = torch.tensor(self.sizes, device=self.running.device)
        _, classes, counts = self.data.labels.unique(return_inverse=True, return_counts=True)
        means = self.running.new_zeros(len(counts), len(self.running))
        for images, labels in zip(self.data.images.split(BATCH), classes.split(BATCH), strict=True):
            means.index_add_(0, labels, self._by_image(images))
        means /= counts[:, None]
        frequencies = (counts / counts.sum()).double()
        offered, wanted = (means / self.deviation).T, self.running / self.deviation
        mixture = _mixture(offered.double(), wanted.double(), frequencies).to(means.dtype)
        self.clean = frequencies.to(means.dtype) @ means
        drift = wanted - offered @ mixture
        size = self._by_norm(drift.square()).sqrt().clamp(min=NO_DRIFT)
        self.direction = drift / size.repeat_interleave(self.lengths)

    @torch.no_grad()
    def _by_image(self, images: Tensor) -> Tensor:
        """Means (N, channels) of all norms' inputs by image."""
        found: dict[nn.Module, Tensor] = {}

        def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[norm] = inputs[0].flatten(2).mean(2) if inputs[0].dim() > 2 else inputs[0]

        with hooked(self.norms.values(), note):
            self.model(images)
        return torch.cat([found[norm] for norm in self.norms.values()], 1)

    def _by_norm(self, values: Tensor) -> Tensor:
        """Sums (norms,) of values (channels,)."""
        return torch.segment_reduce(values, "sum", lengths=self.lengths)


def _norms(model: nn.Module, images: Tensor) -> dict[str, _BatchNorm]:
    """The batch norms, by name, that have running statistics and run once for these images."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    runs = Counter[nn.Module]()
    with torch.no_grad(), hooked(norms.values(), lambda norm, _: runs.update([norm])):
        model(images)
    return {name: norm for name, norm in norms.items() if runs[norm] == 1}


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
