"""The small clean set: what is accepted, and the checks before any work is done with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from . import backends
from .distributed import ALONE, Processes
from .seeds import mixed


@dataclass(frozen=True)
class CleanSet:
    """Images ``(N, *)`` and labels, int64 (N,), on one device; the processes that share them."""

    images: Tensor
    labels: Tensor
    processes: Processes = ALONE

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, *seed: int) -> list[tuple[Tensor, Tensor]]:
        """Batches in an order that depends on the integers of `seed` alone."""
        generator = torch.Generator().manual_seed(mixed(*seed))
        order = torch.randperm(len(self), generator=generator)
        order = order.to(self.labels.device)
        return [(self.images[part], self.labels[part]) for part in order.split(size)]


def clean_set(data: Any) -> CleanSet:
    """Gather and check `data`: a pair (images, labels), or an iterable of such batches.

    Raises
    ------
    TypeError
        `data` is neither.
    ValueError
        No or too few samples, shapes or dtypes that do not fit, NaN or infinity, negative labels.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(map(torch.is_tensor, data)):
        images, labels = data
    elif isinstance(data, Iterable):
        images, labels = _gather(data)
    else:
        raise TypeError(
            "data must be a pair (images, labels) of tensors or an iterable of such batches, "
            f"such as a DataLoader, not {type(data).__name__}"
        )
    if images.dim() < 2 or not images.is_floating_point():
        raise ValueError(
            "data: images must be a floating-point tensor (N, C, H, W), "
            f"not {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"data: labels must be an integer tensor (N,), not {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if len(images) != len(labels):
        raise ValueError(f"data: {len(images)} images but {len(labels)} labels")
    if len(images) < 2:
        raise ValueError(
            f"data: at least 2 samples are needed, and some of every class are best; got "
            f"{len(images)}"
        )
    if images.device != labels.device:
        raise ValueError(f"data: images are on {images.device}, labels on {labels.device}")
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"data: {int(bad.sum())} images hold NaN or infinity, the first of them image {first}"
        )
    if labels.min() < 0:
        raise ValueError(f"data: labels must not be negative, found {int(labels.min())}")
    return CleanSet(images, labels.to(torch.int64))


def _gather(batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"data: every batch must be a pair (images, labels), not {type(batch).__name__}"
            )
        images.append(torch.as_tensor(batch[0]))
        labels.append(torch.as_tensor(batch[1]))
    if not images:
        raise ValueError("data is empty: no batches")
    return torch.cat(images), torch.cat(labels)


def check_model(model: nn.Module, data: CleanSet) -> int:
    """Check that the classifier is sound and takes the data; returns its number of classes.

    Raises
    ------
    TypeError
        `model` is not a module, or is in a `DistributedDataParallel`.
    ValueError
        Weights with NaN or infinity, other devices than the data's, images that the model cannot
        process, outputs that are not logits (N, classes), labels beyond the classes.
    RuntimeError
        They are on a CUDA device whose kernels are missing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model is a DistributedDataParallel; give its .module and the group")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != data.images.device:
            raise ValueError(
                f"model and data are on different devices: {name} on {tensor.device}, "
                f"images on {data.images.device}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"model: {name} holds NaN or infinity")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"model: {name} is {tensor.dtype}, too coarse to fit masks; use float32 or float64"
            )
    backends.check_device(data.images.device)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            logits = model.eval()(data.images[:2])
    except Exception as error:
        raise ValueError(
            f"model cannot process images of shape {tuple(data.images.shape[1:])}: {error}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not torch.is_tensor(logits) or logits.dim() != 2 or len(logits) != 2:
        what = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(f"model must return logits (N, classes) for N images, not {what}")
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"model must tell at least 2 classes apart, not {classes}")
    if int(data.labels.max()) >= classes:
        raise ValueError(
            f"data: label {int(data.labels.max())} is beyond the model's {classes} classes "
            f"(0 to {classes - 1})"
        )
    return classes


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor, processes: Processes = ALONE, batch_size: int = 256
) -> Tensor:
    """Logits (N, classes) of the model in its present mode; the same in all processes."""
    logits = [
        torch.cat([model(batch) for batch in part.split(batch_size)])
        for (part,), _ in processes.parts(images)
    ]
    return processes.rows(logits, len(images))


def evaluate(model: nn.Module, data: CleanSet) -> tuple[float, float]:
    """Accuracy in percent and mean cross-entropy in nats of the model in its present mode."""
    logits = predict(model, data.images, data.processes)
    accuracy = 100 * (logits.argmax(1) == data.labels).double().mean().item()
    return accuracy, F.cross_entropy(logits.double(), data.labels).item()
