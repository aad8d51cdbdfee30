"""Densely connected networks for ImageNet.

Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks" (2017), table 1: every layer sees the
concatenation of all before it in its block. State-dict keys, order and shapes are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.models.initial import he_normal


class _Layer(nn.Module):
    """``(N, S, H, W)`` to ``(N, growth, H, W)`` through a 1x1 bottleneck of ``4 * growth`` channels."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        out: Tensor = self.conv2(F.relu(self.norm2(y)))
        return out


class _Block(nn.Module):
    def __init__(self, in_channels: int, growth: int, count: int) -> None:
        super().__init__()
        for i in range(count):
            self.add_module(f"denselayer{i + 1}", _Layer(in_channels + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat([x, layer(x)], dim=1)
        return x


def _transition(channels: int) -> nn.Sequential:
    """Half the channels, half the height and width."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


class DenseNet(nn.Module):
    """A 7x7 stem, dense blocks with transitions between them, and a linear classifier."""

    def __init__(self, *, growth: int, blocks: Sequence[int], stem: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv0=nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(stem),
                relu0=nn.ReLU(),
                pool0=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        channels = stem
        for i, count in enumerate(blocks):
            self.features.add_module(f"denseblock{i + 1}", _Block(channels, growth, count))
            channels += count * growth
            if i + 1 < len(blocks):
                self.features.add_module(f"transition{i + 1}", _transition(channels))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, 3, H, W)``."""
        x = F.relu(self.features(x))
        logits: Tensor = self.classifier(torch.mean(x, dim=(2, 3)))
        return logits


def densenet121(num_classes: int = 1000) -> DenseNet:
    """DenseNet-121: 8.0 million parameters, 2.83 GMACs on 224x224."""
    return he_normal(DenseNet(growth=32, blocks=(6, 12, 24, 16), stem=64, num_classes=num_classes))
