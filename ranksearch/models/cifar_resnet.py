"""Residual networks for 32x32 images, depth 6n + 2.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), section 4.2. Option A shortcuts have no
weights: every second pixel, and zeros for the new channels; option B shortcuts are 1x1 convolutions. State-dict keys
are those of akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.errors import ModelError
from ranksearch.models.initial import he_normal


class _Subsample(nn.Module):
    """Option A: every ``stride``-th pixel, and zero channels at both ends: ``(N, S, H, W)`` to ``(N, T, H', W')``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Sequential()
        if in_channels != out_channels or stride != 1:
            if shortcut == "A":
                self.shortcut = _Subsample(in_channels, out_channels, stride)
            else:
                conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A stem, three stages of ``blocks`` residual blocks with 16, 32 and 64 channels, and a linear classifier."""

    def __init__(self, blocks: int, *, num_classes: int, shortcut: str) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ModelError(f"option shortcut must be A or B, found {shortcut!r}. Correct model.options.shortcut.")

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            first = _Block(in_channels, out_channels, stride, shortcut)
            return nn.Sequential(first, *(_Block(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)))

        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, 3, H, W)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return logits


def resnet20(num_classes: int = 10, shortcut: str = "A") -> CifarResNet:
    """ResNet-20: 0.27 million parameters, 40.6 million MACs on 32x32."""
    return he_normal(CifarResNet(3, num_classes=num_classes, shortcut=shortcut))


def resnet32(num_classes: int = 10, shortcut: str = "A") -> CifarResNet:
    """ResNet-32."""
    return he_normal(CifarResNet(5, num_classes=num_classes, shortcut=shortcut))


def resnet44(num_classes: int = 10, shortcut: str = "A") -> CifarResNet:
    """ResNet-44."""
    return he_normal(CifarResNet(7, num_classes=num_classes, shortcut=shortcut))


def resnet56(num_classes: int = 10, shortcut: str = "A") -> CifarResNet:
    """ResNet-56."""
    return he_normal(CifarResNet(9, num_classes=num_classes, shortcut=shortcut))


def resnet110(num_classes: int = 10, shortcut: str = "A") -> CifarResNet:
    """ResNet-110."""
    return he_normal(CifarResNet(18, num_classes=num_classes, shortcut=shortcut))
