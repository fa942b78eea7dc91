"""How much the clean loss depends on each neuron, to first order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import CleanSet
from ..heads import attention_of, masked_by_rows, names_of_heads
from ..wrap import masked_layers, masks


class Saliency(NamedTuple):
    """How much the clean loss depends on each neuron of a layer; (neurons,) each.

    The loss is ``L = mean_n l_n`` over N samples, l_n the cross-entropy of sample n alone in nats;
    m_k is the mask of neuron k, and ``g[n, k] = d l_n / d m_k``, not divided by N.

    Attributes
    ----------
    taylor
        ``|m_k * mean_n g[n, k]|``: first-order estimate of how much L changes when m_k goes to 0.
        Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), take its
        square, which has the same order.
    taylor_sample
        ``mean_n |m_k * g[n, k]|``: the same of each l_n, so that samples do not cancel out. At
        least `taylor`. As in Molchanov et al., "Pruning Convolutional Neural Networks for Resource
        Efficient Inference" (arXiv 1611.06440), but summed over pixels instead of averaged.
    fisher
        ``mean_n (m_k * g[n, k])**2``: empirical Fisher information, at least the square of
        `taylor_sample`. Twice the estimate of Theis et al. (arXiv 1801.05787), and 1 / N of that of
        Liu et al. (arXiv 2108.00708), both for masks of 1.
    """

    taylor: Tensor
    taylor_sample: Tensor
    fisher: Tensor


def saliency(masked: nn.Module, data: CleanSet, batch_size: int) -> dict[str, Saliency]:
    """All saliencies of every masked layer, by its name, from one forward and backward.

    Every layer gets a row of masks for each sample, and the operators return its gradient.

    Parameters
    ----------
    masked
        A wrapped model in eval mode. Masks may have any value; they and all gradients stay as they
        are.
    data
        The clean set. Results depend neither on the order of its samples nor on `batch_size` or the
        number of processes that share it, up to rounding.
    batch_size
        Samples in a batch, at least 1.

    Returns
    -------
    dict of str to Saliency
        In the masks' dtypes. `taylor_sample` and `fisher` are NaN for layers whose input does not
        have the samples, and nothing else, on its first axis, or an attention's on its batch axis.
        A layer that the output does not depend on has 0.
        Batch norms without running statistics let the samples of a batch interact: their g is the
        gradient of the batch's summed loss by the masks of sample n.

    Raises
    ------
    ValueError
        `masked` is not wrapped or in train mode, or `batch_size` is below 1.
    """
    check_wrapped(masked, batch_size)
    mixed = layers_mixing_samples(masked, data.images[:2])
    given = {name: mask.detach() for name, mask in masks(masked).items()}
    parts = []
    for images, labels in _parts(data):
        total = torch.cat(list(given.values())).new_zeros(3, sum(map(len, given.values())))
        for changes in _changes(masked, images, labels, batch_size, mixed):
            total += torch.stack([changes.sum(0), changes.abs().sum(0), changes.square().sum(0)])
        parts.append([total])
    (totals,) = data.processes.sum(parts)
    means = (totals / len(data)).split([len(value) for value in given.values()], 1)
    result = {}
    for (name, value), mean in zip(given.items(), means, strict=True):
        taylor, taylor_sample, fisher = mean.to(value.dtype)
        if name in mixed:
            taylor_sample, fisher = torch.full((2, len(value)), torch.nan).to(value)
        result[name] = Saliency(taylor.abs(), taylor_sample, fisher)
    return result


def sample_changes(masked: nn.Module, data: CleanSet, batch_size: int) -> dict[str, Tensor]:
    """What the saliencies are made of: ``m_k * g[n, k]``, (samples, neurons), of every layer.

    As `saliency` otherwise. Layers without a gradient of each sample have the mean in every row.
    """
    check_wrapped(masked, batch_size)
    mixed = layers_mixing_samples(masked, data.images[:2])
    sizes = {name: len(mask) for name, mask in masks(masked).items()}
    nothing = data.images.new_zeros(0, sum(sizes.values()))
    mine = [
        torch.cat([nothing, *_changes(masked, images, labels, batch_size, mixed)])
        for images, labels in _parts(data)
    ]
    rows = data.processes.rows(mine, len(data))
    parts = dict(zip(sizes, rows.split(list(sizes.values()), 1), strict=True))
    return {
        name: part.mean(0, keepdim=True).expand_as(part) if name in mixed else part
        for name, part in parts.items()
    }


def _parts(data: CleanSet) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of each part of this process; none in those beyond the samples."""
    return [
        (images, labels) if share else (images[:0], labels[:0])
        for (images, labels), share in data.processes.parts(data.images, data.labels)
    ]


def _changes(
    masked: nn.Module, images: Tensor, labels: Tensor, batch_size: int, mixed: set[str]
) -> Iterator[Tensor]:
    """``m_k * g[n, k]``, (samples, neurons of all layers), of every batch."""
    if not len(labels):
        return
    values = {name: mask.detach() for name, mask in masks(masked).items()}
    given = torch.cat(list(values.values()))
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    heads = names_of_heads(masked) - mixed
    with _frozen(masked):
        for images, labels in batches:
            with torch.enable_grad():
                rows = {
                    name: value.detach() if name in mixed else value.expand(len(labels), -1)
                    for name, value in values.items()
                }
                leaves = [row.requires_grad_() for row in rows.values()]
                with masked_by_rows(masked, {name: rows[name] for name in heads}) as replaced:
                    given_masks = {f"{name}.mask": row for name, row in rows.items()} | replaced
                    logits = torch.func.functional_call(
                        masked, given_masks, (images,), tie_weights=False
                    )
                loss = F.cross_entropy(logits, labels, reduction="sum")
                grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
            yield given * torch.cat([_per_sample(grad, len(labels)) for grad in grads], 1)


def check_wrapped(masked: nn.Module, batch_size: int) -> None:
    """Raise ValueError unless samples have losses and gradients of their own."""
    if not masks(masked):
        raise ValueError(f"masked: {type(masked).__name__} has no masks; wrap it first")
    if masked.training:
        raise ValueError("masked must be in eval mode: in train mode, samples have no own gradient")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


def _per_sample(grad: Tensor, samples: int) -> Tensor:
    """One row a sample, with the right sum where the gradient has but one row in all."""
    return grad if grad.dim() == 2 else (grad / samples).expand(samples, -1)


@torch.no_grad()
def layers_mixing_samples(masked: nn.Module, images: Tensor) -> set[str]:
    """Names of the masked layers whose input has not the samples alone on its axis of samples."""
    mixed = set()

    def look(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs["query"] if "query" in kwargs else (*args, *kwargs.values())[0]
        axis, axes = 0, 2 + len(getattr(layer, "kernel_size", ()))
        if isinstance(layer, nn.MultiheadAttention):
            axis, axes = (0 if layer.batch_first else 1), 3
        if x.dim() < axes or x.shape[axis] != len(images):
            mixed.add(name)

    readers: dict[str, nn.Module] = dict(masked_layers(masked))
    readers |= {name: attention_of(masked, name) for name in names_of_heads(masked)}
    hooks = [
        reader.register_forward_pre_hook(partial(look, name), with_kwargs=True)
        for name, reader in readers.items()
    ]
    try:
        masked(images)
    finally:
        for hook in hooks:
            hook.remove()
    return mixed


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the parameters: those of weights would double the work."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
