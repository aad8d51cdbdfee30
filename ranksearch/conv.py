"""The geometry of one convolution, and what it costs; no tensors.

Conventions, stated once: one multiply-accumulate is one MAC; MACs are per image; bias additions are not
counted as MACs but bias values are counted as parameters. A linear layer is a 1x1 convolution on a
1x1 image (on a P x 1 image where it is applied to P positions). Kernels are ``(T, S / groups, *kernel)``, out before
in, for transposed convolutions too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, Self, get_args

Size = tuple[int, ...]
"""One number for each of one to three spatial axes."""
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True, kw_only=True)
class Conv:
    """One convolution of one to three dimensions, plain or transposed, or a linear layer, at a known input size."""

    in_channels: int
    out_channels: int
    kernel: Size = (1, 1)
    stride: Size = (1, 1)
    padding: Size = (0, 0)
    """Padding of every axis, the same at both ends unless ``padding_same`` is set."""
    dilation: Size = (1, 1)
    groups: int = 1
    bias: bool = True
    padding_mode: PaddingMode = "zeros"
    padding_same: bool = False
    """PyTorch's ``padding='same'``: the output has the size of the input (stride 1)."""
    size: Size = (1, 1)
    """Input size in pixels: length, or height and width, or depth, height and width."""
    linear: bool = False
    transposed: bool = False
    output_padding: Size = (0, 0)
    """Rows and columns that a transposed convolution adds at the far end of its output."""
    tied: int = 1
    """So many consecutive groups share one kernel."""

    def __post_init__(self) -> None:
        sizes = (self.kernel, self.stride, self.dilation, self.padding, self.size, self.output_padding)
        if len({len(size) for size in sizes}) != 1 or not 1 <= self.ndim <= 3:
            raise ValueError(f"the sizes of a convolution are one to three numbers each, of all alike, found {self}")
        positive = (self.in_channels, self.out_channels, self.groups, self.tied, *self.kernel, *self.stride)
        positive += (*self.dilation, *self.size)
        if not all(isinstance(n, int) for n in (*positive, *self.padding, *self.output_padding)):
            raise ValueError(f"the sizes of a convolution are integers, found {self}")
        if self.padding_mode not in get_args(PaddingMode):
            raise ValueError(f"padding_mode must be one of {', '.join(get_args(PaddingMode))}, found {self}")
        if min(positive) < 1 or min(*self.padding, *self.output_padding) < 0:
            raise ValueError(f"a convolution needs positive sizes, found {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"groups must divide both channel counts, found {self}")
        if self.groups % self.tied:
            raise ValueError(f"tied must divide groups, found {self}")
        if self.transposed and (self.padding_same or self.padding_mode != "zeros"):
            raise ValueError(f"a transposed convolution is padded by a number of zeros, found {self}")
        if any(self.output_padding) and not self.transposed:
            raise ValueError(f"output_padding is for transposed convolutions, found {self}")

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def output_size(self) -> Size:
        """Output size in pixels."""
        if self.padding_same:
            return self.size
        spans = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(self.dilation, self.kernel, self.padding, strict=True)]
        axes = zip(self.size, spans, self.stride, self.output_padding, strict=True)
        if self.transposed:
            return tuple((n - 1) * stride + span + extra for n, span, stride, extra in axes)
        return tuple((n - span) // stride + 1 for n, span, stride, _ in axes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image; a transposed convolution does its work once an input pixel."""
        pixels = prod(self.size if self.transposed else self.output_size)
        return pixels * self.out_channels * self.in_channels // self.groups * prod(self.kernel)

    @property
    def params(self) -> int:
        """Weights and biases."""
        return prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the kernel, ``(T / tied, S / groups, *kernel)``."""
        return (self.out_channels // self.tied, self.in_channels // self.groups, *self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether no output pixel sees more than one input pixel."""
        return prod(self.kernel) == 1

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel, and there are several."""
        return self.groups == self.in_channels > 1

    @property
    def group(self) -> Conv:
        """One of the groups, as a convolution of its own."""
        if self.groups == 1:
            return self
        return self.resized(
            in_channels=self.in_channels // self.groups, out_channels=self.out_channels // self.groups, groups=1
        )

    def times(self, count: int) -> Conv:
        """``count`` such convolutions side by side, as the groups of one."""
        return self.resized(
            in_channels=count * self.in_channels, out_channels=count * self.out_channels, groups=count * self.groups
        )

    def pointwise_to(self, out_channels: int, *, bias: bool = False) -> Conv:
        """A 1x1 convolution on this one's input: the usual first stage of a format."""
        return self._pointwise(self.in_channels, out_channels, self.size, bias)

    def after(self, out_channels: int, *, bias: bool) -> Conv:
        """A 1x1 convolution on this one's output: the usual last stage of a format."""
        return self._pointwise(self.out_channels, out_channels, self.output_size, bias)

    def _pointwise(self, in_channels: int, out_channels: int, size: Size, bias: bool) -> Conv:
        one, none = (1,) * self.ndim, (0,) * self.ndim
        return Conv(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel=one,
            stride=one,
            padding=none,
            dilation=one,
            output_padding=none,
            size=size,
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
