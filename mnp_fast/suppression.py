"""Clean suppression: damage what clean data needs, so that what is left shows the backdoor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import CleanSet, evaluate, predict
from .fusion import fuse_blocks
from .layers import MaskedConv2d
from .seeds import SUPPRESS, seeded

if TYPE_CHECKING:
    from .config import DefenseConfig

MAX_GRADIENT_NORM = 20.0
PART = 0.7  # of the clean set for one of several runs: another order alone changes little


def suppress(
    model: nn.Module, data: CleanSet, config: DefenseConfig, start: int = 0
) -> Iterator[tuple[float, float]]:
    """Gradient ascent on ``E[L(F(x; theta), y)] - mu * |theta|^2``, an epoch for every item taken.

    `model` is changed in place, batch statistics included: batch norm is in train mode, where the
    ascent favours one class far more consistently than in eval mode. Steps are plain SGD with the
    gradient's norm clipped, because longer ones fool the network in arbitrary ways. It stops after
    the step at which the accuracy on the clean set is low enough.

    Several processes all make the same steps, whose batch norms need the whole batch, and share
    the accuracy after each of them, which is most of the work.

    Parameters
    ----------
    model
        A plain network whose parameters take gradients; in eval mode when an item is yielded.
    data
        The clean set.
    config
        Its `suppress_*` and `seed`.
    start
        The epoch to go on from.

    Yields
    ------
    tuple of float
        Accuracy in percent and loss in nats on the clean set after the epoch.

    Raises
    ------
    ValueError
        The learning rate is so large that the loss is not finite.
    """
    if start and evaluate(model.eval(), data)[0] <= config.suppress_accuracy:
        return  # interrupted after the last epoch
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(
        parameters, lr=config.suppress_lr, weight_decay=2 * config.suppress_decay
    )
    for epoch in range(start, config.suppress_epochs):
        with seeded(data.images.device, config.seed, SUPPRESS, epoch):
            for images, labels in data.batches(
                config.suppress_batch_size, config.seed, SUPPRESS, epoch
            ):
                if len(labels) == 1:
                    continue  # batch norm needs two
                model.train()
                optimizer.zero_grad()
                (-F.cross_entropy(model(images), labels)).backward()
                nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
                optimizer.step()
                model.eval()
                accuracy, loss = evaluate(model, data)
                if not math.isfinite(loss):
                    raise ValueError(f"suppress_lr {config.suppress_lr} is too large: loss {loss}")
                if accuracy <= config.suppress_accuracy:
                    break
        data.processes.equalize([*parameters, *model.buffers()])
        yield accuracy, loss
        if accuracy <= config.suppress_accuracy:
            return


def on_kernels(model: nn.Module, data: CleanSet) -> tuple[nn.Module, CleanSet]:
    """A plain model, changed in place, and its data so that `suppress` runs on the CPU's kernels.

    Convolutions, their weights' gradients included, are this library's, and in eval mode what is
    behind them is one operator with them, under masks of 1 that take no gradients. On other
    devices both stay as they are.
    """
    convs = [module for module in model.modules() if type(module) is nn.Conv2d]
    if not convs or data.images.device.type != "cpu":
        return model, data
    for conv in convs:
        MaskedConv2d.adopt(conv, "filter").mask.requires_grad_(False)
    fuse_blocks(model, "auto")
    if data.images.dim() != 4:
        return model, data
    # Not contiguous(), which leaves images of one channel as they are.
    images = torch.empty_like(data.images, memory_format=torch.channels_last).copy_(data.images)
    return model, replace(data, images=images)


def parts(data: CleanSet, runs: int, seed: int) -> list[CleanSet]:
    """What each suppression works on: parts of the clean set drawn at random; of one, all of it."""
    if runs == 1:
        return [data]
    size = max(2, round(PART * len(data)))
    drawn = (data.batches(size, seed, run)[0] for run in range(runs))
    return [CleanSet(images, labels, data.processes) for images, labels in drawn]


def favour(suppressed: nn.Module, data: CleanSet) -> list[float]:
    """What a suppressed network gives each class: mean softmax over images of the others.

    In a backdoored network the attacker's class is among the first as a rule. NaN for a class that
    all images belong to.
    """
    return given(predict(suppressed, data.images, data.processes).softmax(1), data.labels)


def given(probabilities: Tensor, labels: Tensor) -> list[float]:
    """What each class is given: mean probability over images of the others; NaN without any."""
    own = F.one_hot(labels, probabilities.shape[1]).bool()
    favours: list[float] = (probabilities.masked_fill(own, 0).sum(0) / (~own).sum(0)).tolist()
    return favours


def favoured_classes(favours: Sequence[Sequence[float]]) -> dict[int, float]:
    """The mean of what suppressions favour, by class, most first; without classes of NaN."""
    means = torch.tensor(favours, dtype=torch.float64).mean(0)
    order = means.argsort(descending=True, stable=True).tolist()
    return {label: means[label].item() for label in order if not means[label].isnan()}
