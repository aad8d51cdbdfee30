"""VGG networks for ImageNet.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2014), table 1, column D.
State-dict keys, order and shapes are torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn

from ranksearch.models.initial import he_normal

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the 3x3 convolutions; a 2x2 max-pooling ends each stage."""


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, then three linear layers."""

    def __init__(self, *, batch_norm: bool, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in STAGES:
            for width in widths:
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                # Not in place: a hook on the convolution must still find its own output afterwards.
                layers += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, 3, H, W)``."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def vgg16(num_classes: int = 1000) -> VGG:
    """VGG-16: 138 million parameters, 15.5 GMACs on 224x224."""
    return he_normal(VGG(batch_norm=False, num_classes=num_classes))


def vgg16_bn(num_classes: int = 1000) -> VGG:
    """VGG-16 with batch norm after every convolution."""
    return he_normal(VGG(batch_norm=True, num_classes=num_classes))
