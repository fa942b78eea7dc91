"""Random small networks, and random masks, from a seed."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

ACTIVATIONS = nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Hardswish, nn.GELU, nn.Identity
POOLS = (
    lambda: nn.MaxPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    lambda: nn.ZeroPad2d((0, 1, 1, 0)),
    lambda: nn.Dropout2d(),
)


class RandomNetwork(nn.Module):
    """A random program of convolutions, norms, sums, products, concatenations and pools.

    Every step takes the latest image, or an earlier one as well, and makes another.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = draw = random.Random(seed)
        self.steps: list[tuple[str, str, int]] = []
        shapes = [(3, 7, 8)]
        for number in range(draw.randint(3, 9)):
            kind = draw.choice(
                ["conv", "conv", "conv", "depthwise", "sum", "product", "cat", "pool"]
            )
            other = draw.randrange(len(shapes))
            c, *size = shapes[-1]
            name, module = f"step{number}", nn.Identity()
            if kind in ("conv", "depthwise"):
                module = self.block(c, kind == "depthwise")
                kind = "apply"
            elif kind == "pool":
                module, kind = draw.choice(POOLS)(), "apply"
            elif kind == "cat":
                other = draw.choice([i for i, s in enumerate(shapes) if list(s[1:]) == size])
            elif tuple(shapes[other]) != (c, *size):
                # What is added, or multiplied, is made to fit.
                module = nn.Sequential(
                    nn.Conv2d(shapes[other][0], c, 1), nn.AdaptiveAvgPool2d(size)
                )
            self.add_module(name, module)
            self.steps.append((kind, name, other))
            shapes.append(tuple(self.run(torch.zeros(1, 3, 7, 8))[-1].shape[1:]))
        features, hidden = shapes[-1][0] * shapes[-1][1] * shapes[-1][2], draw.randint(5, 9)
        self.hidden, self.norm = nn.Linear(features, hidden), nn.BatchNorm1d(hidden)
        self.fc = nn.Linear(hidden, 3)
        del self.draw

    def block(self, c: int, depthwise: bool) -> nn.Sequential:
        draw = self.draw
        groups = c if depthwise else draw.choice([g for g in (1, 1, 1, 2, 3) if c % g == 0])
        kernel = draw.choice([1, 2, 3])
        out = groups * (draw.choice([1, 2]) if depthwise else draw.choice([4, 6, 8]) // groups)
        conv = nn.Conv2d(
            c,
            out,
            kernel,
            padding=draw.choice([0, kernel // 2, kernel // 2, "same"]),
            dilation=1,
            groups=groups,
            bias=draw.random() < 0.5,
            padding_mode=draw.choice(["zeros", "zeros", "zeros", "circular", "replicate"]),
        )
        norm = [nn.BatchNorm2d(out)] if draw.random() < 0.7 else []
        return nn.Sequential(conv, *norm, draw.choice(ACTIVATIONS)())

    def run(self, x: Tensor) -> list[Tensor]:
        images = [x]
        for kind, name, other in self.steps:
            module = getattr(self, name)
            if kind == "apply":
                images.append(module(images[-1]))
            elif kind == "sum":
                images.append(images[-1] + module(images[other]))
            elif kind == "product":
                images.append(torch.sigmoid(module(images[other])) * images[-1])
            else:
                images.append(torch.cat([images[other], images[-1]], 1))
        return images

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.run(x)[-1], 1)
        return self.fc(torch.tanh(self.norm(self.hidden(x))))


def silence(masks: dict[str, nn.Parameter], seed: int) -> None:
    """Set random masks to 0, of some layers all, and of some none; others to any number."""
    draw = random.Random(seed)
    for mask in masks.values():
        share = draw.choice([0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7] * 4 + [1])
        for i in range(len(mask)):
            mask.data[i] = 0 if draw.random() < share else draw.uniform(0.2, 1)
