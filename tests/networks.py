"""Small networks that vary what a graph can hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallNet(nn.Module):
    """A stem, 3x3, strided and dilated, 1x1, grouped and depthwise layers, a skip, and linear layers on tokens."""

    shape = (3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.ModuleDict(
            {
                "plain": nn.Conv2d(8, 8, 3, padding=1, bias=False),
                "strided": nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2),
                "point": nn.Conv2d(12, 10, 1),
                "grouped": nn.Conv2d(10, 10, 3, padding=1, groups=2),
                "depthwise": nn.Conv2d(10, 10, 3, padding=1, groups=10),
            }
        )
        self.tokens = nn.Linear(10, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.body["plain"](x)) + x
        for name in ("strided", "point", "grouped", "depthwise"):
            x = F.relu(self.body[name](x))
        tokens = F.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class SharedNet(nn.Module):
    """One convolution that runs three times, and one that runs once."""

    shape = (4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = torch.relu(self.shared(x))
        out: Tensor = self.last(x).mean((2, 3))
        return out


class GroupedNet(nn.Module):
    """Of images of one channel: a stem, a convolution in two groups, and a classifier of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 10, 3, padding=1, groups=2)
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class FragileNet(nn.Module):
    """Of digits; it cannot run with fewer than 2,400 of its 3,738 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        if (found := sum(parameter.numel() for parameter in self.parameters())) < 2400:
            raise ValueError(f"{found} parameters are too few")
        x = F.relu(self.two(F.relu(self.one(F.relu(self.stem(x))))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def small_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> SmallNet:
    torch.manual_seed(seed)
    net = SmallNet().to(dtype).eval()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
        net.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return net


def small_images(count: int = 32, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *SmallNet.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
