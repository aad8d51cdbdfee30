"""The geometry of one convolution, and what it costs; no tensors.

Conventions, stated once: one multiply-accumulate is one MAC; MACs are per image; bias additions are not
counted as MACs but bias values are counted as parameters. A linear layer is a 1x1 convolution on a
1x1 image (on a P x 1 image where it is applied to P positions).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, Self, get_args

Size = tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True, kw_only=True)
class Conv:
    """One two-dimensional convolution, or a linear layer, at a known input size."""

    in_channels: int
    out_channels: int
    kernel: Size = (1, 1)
    stride: Size = (1, 1)
    padding: Size = (0, 0)
    """Leading padding (rows, columns), the same at both ends unless ``padding_same`` is set."""
    dilation: Size = (1, 1)
    groups: int = 1
    bias: bool = True
    padding_mode: PaddingMode = "zeros"
    padding_same: bool = False
    """PyTorch's ``padding='same'``: the output has the size of the input (stride 1)."""
    size: Size = (1, 1)
    """Input height and width in pixels."""
    linear: bool = False

    def __post_init__(self) -> None:
        pairs = (self.kernel, self.stride, self.dilation, self.padding, self.size)
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"the sizes of a convolution are pairs (rows, columns), found {self}")
        positive = (self.in_channels, self.out_channels, self.groups, *self.kernel, *self.stride, *self.dilation)
        if not all(isinstance(n, int) for n in (*positive, *self.padding, *self.size)):
            raise ValueError(f"the sizes of a convolution are integers, found {self}")
        if self.padding_mode not in get_args(PaddingMode):
            raise ValueError(f"padding_mode must be one of {', '.join(get_args(PaddingMode))}, found {self}")
        if min(positive) < 1 or min(self.padding) < 0 or min(self.size) < 1:
            raise ValueError(f"a convolution needs positive sizes, found {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"groups must divide both channel counts, found {self}")

    @property
    def output_size(self) -> Size:
        """Output height and width in pixels."""
        if self.padding_same:
            return self.size
        h, w = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return h, w

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image."""
        return prod(self.output_size) * self.out_channels * self.in_channels // self.groups * prod(self.kernel)

    @property
    def params(self) -> int:
        """Weights and biases."""
        weights = self.out_channels * self.in_channels // self.groups * prod(self.kernel)
        return weights + (self.out_channels if self.bias else 0)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the kernel, ``(T, S / groups, height, width)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether every output pixel sees one input pixel only."""
        return self.kernel == (1, 1)

    def pointwise_to(self, out_channels: int, *, bias: bool = False) -> Conv:
        """A 1x1 convolution on this one's input: the usual first stage of a format."""
        return Conv(
            in_channels=self.in_channels, out_channels=out_channels, size=self.size, bias=bias, linear=self.linear
        )

    def after(self, out_channels: int, *, bias: bool) -> Conv:
        """A 1x1 convolution on this one's output: the usual last stage of a format."""
        return Conv(
            in_channels=self.out_channels,
            out_channels=out_channels,
            size=self.output_size,
            bias=bias,
            linear=self.linear,
        )

    def resized(self, **changes: Any) -> Conv:
        """The same convolution with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; ``from_json`` reads it back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The convolution written by ``to_json``."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)
