"""Clean suppression: damage what clean data needs, so that what is left shows the backdoor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from .data import evaluate, predict
from .seeds import SUPPRESS, seeded

if TYPE_CHECKING:
    from .config import DefenseConfig
    from .data import CleanSet

MAX_GRADIENT_NORM = 20.0


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


def favour(suppressed: nn.Module, data: CleanSet) -> torch.Tensor:
    """What a suppressed network gives each class, (classes,): mean softmax over other images.

    In a backdoored network the attacker's class is among the first as a rule. NaN for a class that
    all images belong to.
    """
    probabilities = predict(suppressed, data.images, data.processes).softmax(1)
    own = F.one_hot(data.labels, probabilities.shape[1]).bool()
    return probabilities.masked_fill(own, 0).sum(0) / (~own).sum(0)


def favoured_classes(suppressed: nn.Module, data: CleanSet) -> dict[int, float]:
    """What a suppressed network gives each class, most first; without those of NaN."""
    means = favour(suppressed, data)
    order = means.argsort(descending=True, stable=True).tolist()
    return {label: means[label].item() for label in order if not means[label].isnan()}
