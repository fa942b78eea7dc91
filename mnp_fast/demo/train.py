"""Train the demo's network and measure accuracy and attack success rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attacks import TARGET, Trigger


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 0.1,
    seed: int = 0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Iterator[float]:
    """Train in place, an epoch for every item taken; yields the epoch's mean loss in nats.

    SGD with Nesterov momentum 0.9, weight decay 5e-4 and a one-cycle schedule. `augment` changes
    each batch of images at random.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        total = 0.0
        model.train()
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            inputs = images[batch] if augment is None else augment(images[batch], generator)
            loss = F.cross_entropy(model(inputs), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        model.eval()
        yield total / len(images)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """Predicted classes, int64 (N,)."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(batch_size)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Clean accuracy in percent."""
    return 100 * (predict(model, images) == labels).double().mean().item()


def attack_success_rate(
    model: nn.Module, images: Tensor, labels: Tensor, trigger: Trigger
) -> float:
    """Percent of the images of other classes that the trigger sends to the target class."""
    others = trigger(images[labels != TARGET])
    return 100 * (predict(model, others) == TARGET).double().mean().item()
