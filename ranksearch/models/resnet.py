"""Residual networks for ImageNet.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), table 1; in bottleneck blocks the 3x3
convolution carries the stride. State-dict keys, order and shapes are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ranksearch.models.initial import he_normal


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(*_conv_bn(in_channels, out_channels, 1, stride))


class _Basic(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(in_channels, width, 3, stride)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = _conv_bn(width, width, 3)
        self.downsample = _projection(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x))
        out: Tensor = self.relu(y)
        return out


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(in_channels, width, 1)
        self.conv2, self.bn2 = _conv_bn(width, width, 3, stride)
        self.conv3, self.bn3 = _conv_bn(width, 4 * width, 1)
        self.relu = nn.ReLU()
        self.downsample = _projection(in_channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """A 7x7 stem, four stages of residual blocks, global average pooling and a linear classifier."""

    def __init__(self, block: type[_Basic] | type[_Bottleneck], blocks: Sequence[int], num_classes: int) -> None:
        super().__init__()

        def stage(in_channels: int, width: int, count: int, stride: int) -> nn.Sequential:
            first = block(in_channels, width, stride)
            return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(count - 1)))

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(64, 64, blocks[0], 1)
        self.layer2 = stage(64 * block.expansion, 128, blocks[1], 2)
        self.layer3 = stage(128 * block.expansion, 256, blocks[2], 2)
        self.layer4 = stage(256 * block.expansion, 512, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, 3, H, W)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(num_classes: int = 1000) -> ResNet:
    """ResNet-18: 11.7 million parameters, 1.81 GMACs on 224x224."""
    return he_normal(ResNet(_Basic, (2, 2, 2, 2), num_classes))


def resnet34(num_classes: int = 1000) -> ResNet:
    """ResNet-34: 21.8 million parameters, 3.66 GMACs on 224x224."""
    return he_normal(ResNet(_Basic, (3, 4, 6, 3), num_classes))


def resnet50(num_classes: int = 1000) -> ResNet:
    """ResNet-50: 25.6 million parameters, 4.09 GMACs on 224x224."""
    return he_normal(ResNet(_Bottleneck, (3, 4, 6, 3), num_classes))
