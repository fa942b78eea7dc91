"""Masks in a training loop of one's own: learn which neurons a task does not need, and remove them.

    python examples/own_loop.py

A wrapped model is an ordinary module and its masks are ordinary parameters: any optimiser, schedule
or trainer takes them. Here the masks of a trained network are fitted to the training images with a
price on each of them, those that come out lowest are set to 0, and `compact` takes their channels
away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mnp_fast
from mnp_fast.demo.digits import load_digits
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.demo.train import accuracy, train


def fit_masks(
    masked: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, price: float
) -> None:
    """Fit the masks of a wrapped model by Adam, in place; its weights stay as they are.

    Parameters
    ----------
    masked
        A wrapped model.
    images, labels
        (N, C, H, W) and (N,).
    epochs
        Passes over the images.
    price
        Of the mean mask, in nats.
    """
    masks = tuple(mnp_fast.masks(masked).values())
    masked.eval().requires_grad_(False)  # batch norms in eval mode run fused
    for mask in masks:
        mask.requires_grad_(True)
    optimizer = torch.optim.Adam(masks, lr=0.02)
    with mnp_fast.frozen_weights(masked):
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(64):
                loss = F.cross_entropy(masked(images[batch]), labels[batch])
                loss = loss + price * torch.cat(masks).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for mask in masks:
                        mask.clamp_(0, 1)


@torch.no_grad()
def silence_lowest(masked: nn.Module, share: float) -> None:
    """Set the lowest `share` of all masks to 0 and the others to 1, in place."""
    masks = tuple(mnp_fast.masks(masked).values())
    bound = torch.cat(masks).quantile(share)
    for mask in masks:
        mask.copy_(mask > bound)


def main(train_epochs: int = 10, mask_epochs: int = 5) -> nn.Module:
    """Train, prune and shrink a network for digits; print what is left of it."""
    torch.manual_seed(0)
    digits, model = load_digits(seed=0), ResNet18(width=8)
    for _ in train(model, *digits.train, epochs=train_epochs):
        pass
    masked = mnp_fast.wrap(model)
    fit_masks(masked, *digits.train, epochs=mask_epochs, price=1.0)
    silence_lowest(masked, share=0.3)
    small = mnp_fast.compact(masked, (digits.test[0][:2],))
    for name, network in (("trained", model), ("pruned", masked), ("compact", small)):
        parameters = sum(p.numel() for p in network.parameters())
        print(f"{name}: {accuracy(network, *digits.test):.1f} %, {parameters} parameters")
    return small


if __name__ == "__main__":
    main()
