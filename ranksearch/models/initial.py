"""Starting weights for networks that are trained here or run without pretrained ones.

He, Zhang, Ren, Sun, "Delving Deep into Rectifiers" (2015), equation 10: variance ``2 / fan`` keeps the signal's size
through ReLU layers, which networks without batch norm (VGG) need to give anything but their biases.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def he_normal(model: Model) -> Model:
    """Draw every convolution's kernel afresh from torch's global generator, with zero biases; returns ``model``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
