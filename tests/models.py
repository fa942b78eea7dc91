"""Small networks with the structures that wrapping must understand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnp_fast.demo.resnet import ResNet18


def randomize(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and weights that are not 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model


class PreActivation(nn.Module):
    """Norms registered in another order than they are used, as in pre-activation networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return self.fc((x + y).mean((2, 3)))


class NoNorm(nn.Module):
    """Convolutions with biases and hidden linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding="valid", padding_mode="zeros")
        self.grouped = nn.Conv2d(5, 10, 2, padding="same", groups=5)
        self.circular = nn.Conv2d(10, 4, 3, padding=1, padding_mode="circular")
        self.hidden = nn.Linear(4 * 7 * 7, 9)
        self.fc = nn.Linear(9, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.circular(F.relu(self.grouped(F.relu(self.conv(x))))))
        return self.fc(torch.tanh(self.hidden(x.flatten(1))))


class Dynamic(nn.Module):
    """Control flow that symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(5)  # registered before its convolution
        self.conv = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        if x.sum() > 1e6:
            x = x / 2
        return self.fc(x.mean((2, 3)))


class Shared(nn.Module):
    """One convolution read by two norms, one norm on two convolutions, one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(4)
        self.bn_b = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn_c = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.bn_d = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn_a(x) + self.bn_b(x)
        x = self.bn_c(self.conv2(x)) + self.bn_c(self.conv3(x))
        x = self.bn_d(self.twice(self.bn_d(self.twice(x))))
        return self.fc(x.mean((2, 3)))


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation behind it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class TimmNormAct(NormAct):
    """One with the name of timm's, which is what it is known by."""

    __module__, __qualname__ = "timm.layers.norm_act", "BatchNormAct2d"


def resnet() -> nn.Module:
    return ResNet18(8)


def bare_norms() -> nn.Module:
    """Norms without weights, and without running statistics."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def fully_convolutional() -> nn.Module:
    """The output layer is a convolution with a norm behind it."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


MODELS = {
    "resnet": resnet,
    "pre-activation": PreActivation,
    "no norm": NoNorm,
    "bare norms": bare_norms,
    "fully convolutional": fully_convolutional,
    "shared": Shared,
}
