"""THE table of convolutions and formats that the conformance suite runs over.

Every format of the registry must be named in ``FORMATS``, with the layers that it is for and what composes its
stages' kernels to the kernel of the convolution they replace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Family = Literal["spatial", "pointwise", "depthwise"]
Compose = str | Callable[[Sequence[np.ndarray]], np.ndarray]
"""An einsum, or a function."""


@dataclass(frozen=True, kw_only=True)
class FormatCase:
    """What the suite knows of a format, without asking the format."""

    family: Family
    """The layers that it is for."""
    compose: Compose
    """Kernels of the stages, each ``(out, in, height, width)``, to ``(T, S, height, width)``; of one group."""
    ndims: tuple[int, ...] = (1, 2, 3)
    """Numbers of spatial axes that it is for."""
    nested: bool = True
    """Whether smaller ranks are slices of larger ones; else it is fitted."""


def _matrices_and_filters(stages: Sequence[np.ndarray]) -> np.ndarray:
    """Of CP: matrices, depthwise filters (of one channel a group, each along other axes), matrices."""
    sides = [np.eye(stages[0].shape[1])]
    filters = np.ones((1, 1, 1))
    for stage in stages:
        if stage.shape[2:] != (1, 1):
            # Outer products along axes of which one is 1; the first filter of all is a lone 1.
            filters = np.stack([np.kron(filters[i % len(filters)], own) for i, own in enumerate(stage[:, 0])])
            sides += [np.eye(len(stage))] if len(sides) == 1 else []
        else:
            sides[-1] = stage[..., 0, 0] @ sides[-1]
    return np.einsum("rs,rkl,tr->tskl", sides[0], filters, sides[1])


def _chain(stages: Sequence[np.ndarray]) -> np.ndarray:
    """Of the tensor chain: (R p, S), the shared (q, p, height, width), (T, R q)."""
    first, shared, last = stages
    q, p = shared.shape[:2]
    into, out_of = first.reshape(-1, p, first.shape[1]), last.reshape(last.shape[0], -1, q)
    return np.einsum("rps,qpkl,trq->tskl", into, shared, out_of)


FORMATS: dict[str, FormatCase] = {
    "tucker2": FormatCase(family="spatial", compose="asxy,bakl,tbzw->tskl"),
    "svd": FormatCase(family="pointwise", compose="rskl,trxy->tskl"),
    "spatial-svd": FormatCase(family="spatial", compose="rsky,trxl->tskl", ndims=(2,)),
    "channel-svd": FormatCase(family="spatial", compose="rskl,trxy->tskl"),
    "cp": FormatCase(family="spatial", compose="rsxy,rukl,trzw->tskl", nested=False),
    "cp4": FormatCase(family="spatial", compose=_matrices_and_filters, nested=False),
    "tkd-cp": FormatCase(family="spatial", compose=_matrices_and_filters, nested=False),
    "tensor-chain": FormatCase(family="spatial", compose=_chain, nested=False),
    "tensor-train": FormatCase(family="spatial", compose="asxy,bakz,cbwl,tcuv->tskl", ndims=(2,), nested=False),
}


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One dense layer and the shape of its input for one image, as the layer sees it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    family: Family
    ndim: int = 2
    groups: int = 1
    transposed: bool = False


def _conv(name: str, family: Family, build: Callable[[], Conv], *size_px: int) -> LayerCase:
    layer = build()
    return LayerCase(
        name=name,
        build=build,
        shape=(layer.in_channels, *size_px),
        family=family,
        ndim=len(size_px),
        groups=layer.groups,
        transposed=layer.transposed,
    )


LAYERS: tuple[LayerCase, ...] = (
    _conv("plain", "spatial", lambda: nn.Conv2d(6, 8, 3, padding=1), 7, 7),
    _conv("without bias", "spatial", lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False), 6, 6),
    _conv("one input channel", "spatial", lambda: nn.Conv2d(1, 5, 3), 6, 6),
    _conv("one output channel", "spatial", lambda: nn.Conv2d(5, 1, 3), 6, 6),
    _conv("many outputs", "spatial", lambda: nn.Conv2d(1, 24, 3, padding=1), 6, 6),
    _conv("stride on odd sizes", "spatial", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 7, 9),
    _conv("stride on even sizes", "spatial", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 8, 10),
    _conv("stride past the kernel", "spatial", lambda: nn.Conv2d(4, 6, 2, stride=3), 9, 10),
    _conv("rows unlike columns", "spatial", lambda: nn.Conv2d(4, 5, (3, 5), stride=(2, 1), padding=(0, 2)), 9, 8),
    _conv("a column", "spatial", lambda: nn.Conv2d(4, 5, (3, 1), padding=(1, 0)), 7, 6),
    _conv("a row", "spatial", lambda: nn.Conv2d(4, 5, (1, 3), stride=(2, 1)), 7, 6),
    _conv("even kernel", "spatial", lambda: nn.Conv2d(4, 5, (2, 4), padding=(1, 2)), 6, 7),
    _conv("dilated", "spatial", lambda: nn.Conv2d(4, 5, 3, padding=(2, 3), dilation=(2, 3)), 9, 11),
    _conv("dilated and strided", "spatial", lambda: nn.Conv2d(4, 5, 3, stride=2, padding=2, dilation=2), 9, 8),
    _conv("reflected", "spatial", lambda: nn.Conv2d(4, 5, 3, padding=(1, 2), padding_mode="reflect"), 6, 7),
    _conv("replicated", "spatial", lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1, padding_mode="replicate"), 6, 7),
    _conv("circular", "spatial", lambda: nn.Conv2d(4, 5, (3, 5), padding=(1, 2), padding_mode="circular"), 6, 7),
    _conv("same", "spatial", lambda: nn.Conv2d(4, 5, (3, 5), padding="same", dilation=(1, 2)), 6, 9),
    _conv("same, even kernel", "spatial", lambda: nn.Conv2d(4, 5, (2, 4), padding="same"), 6, 7),
    _conv("same, reflected", "spatial", lambda: nn.Conv2d(4, 5, 4, padding="same", padding_mode="reflect"), 6, 7),
    _conv("valid", "spatial", lambda: nn.Conv2d(4, 5, 3, padding="valid"), 6, 7),
    _conv("1x1", "pointwise", lambda: nn.Conv2d(6, 9, 1), 5, 4),
    _conv("1x1 strided", "pointwise", lambda: nn.Conv2d(9, 6, 1, stride=2, bias=False), 7, 8),
    _conv("1x1 padded", "pointwise", lambda: nn.Conv2d(5, 6, 1, padding=1), 4, 5),
    LayerCase(name="linear", build=lambda: nn.Linear(7, 10), shape=(7,), family="pointwise"),
    LayerCase(name="linear without bias", build=lambda: nn.Linear(10, 3, bias=False), shape=(10,), family="pointwise"),
    LayerCase(name="linear on tokens", build=lambda: nn.Linear(6, 9), shape=(5, 6), family="pointwise"),
    LayerCase(name="linear on a map", build=lambda: nn.Linear(6, 4), shape=(3, 2, 6), family="pointwise"),
    _conv("grouped", "spatial", lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), 6, 6),
    _conv("three groups", "spatial", lambda: nn.Conv2d(6, 9, (3, 2), stride=2, groups=3, bias=False), 7, 6),
    _conv("mirrored groups", "spatial", lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", groups=2), 6, 5),
    _conv("grouped, same", "spatial", lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2), 6, 5),
    _conv("grouped 1x1", "pointwise", lambda: nn.Conv2d(6, 4, 1, groups=2), 6, 6),
    _conv("depthwise", "depthwise", lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), 6, 6),
    _conv("depthwise, two each", "depthwise", lambda: nn.Conv2d(3, 6, 3, groups=3), 6, 6),
    _conv("1-d", "spatial", lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), 11),
    _conv("1-d dilated", "spatial", lambda: nn.Conv1d(3, 5, 3, dilation=2, bias=False), 10),
    _conv("1-d circular", "spatial", lambda: nn.Conv1d(3, 4, 4, padding=2, padding_mode="circular"), 9),
    _conv("1-d replicated", "spatial", lambda: nn.Conv1d(3, 4, 3, stride=3, padding=2, padding_mode="replicate"), 9),
    _conv("1-d same, even", "spatial", lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="reflect"), 9),
    _conv("1-d grouped", "spatial", lambda: nn.Conv1d(6, 9, 3, stride=2, padding=1, groups=3), 10),
    _conv("1-d 1x1", "pointwise", lambda: nn.Conv1d(5, 6, 1, stride=2), 9),
    _conv("3-d", "spatial", lambda: nn.Conv3d(3, 4, 3, padding=1), 4, 5, 3),
    _conv(
        "3-d, axes unlike",
        "spatial",
        lambda: nn.Conv3d(2, 4, (1, 3, 2), stride=(2, 1, 2), padding=(0, 1, 2), dilation=(1, 2, 3), bias=False),
        *(3, 5, 4),
    ),
    _conv("3-d replicated", "spatial", lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), 3, 4, 3),
    _conv("3-d same", "spatial", lambda: nn.Conv3d(2, 3, (3, 2, 1), padding="same", padding_mode="circular"), 3, 4, 3),
    _conv("3-d grouped", "spatial", lambda: nn.Conv3d(4, 6, (2, 1, 3), padding=(1, 0, 1), groups=2), 3, 3, 4),
    _conv("3-d 1x1", "pointwise", lambda: nn.Conv3d(4, 3, 1), 3, 2, 3),
    _conv("transposed", "spatial", lambda: nn.ConvTranspose2d(5, 4, 3, stride=2, padding=1, output_padding=1), 4, 5),
    _conv(
        "transposed, rows unlike columns",
        "spatial",
        lambda: nn.ConvTranspose2d(
            4, 5, (3, 2), stride=(1, 3), padding=(1, 0), dilation=(2, 1), output_padding=(1, 2), bias=False
        ),
        *(4, 3),
    ),
    _conv("transposed, cut", "spatial", lambda: nn.ConvTranspose2d(4, 5, 2, stride=2, padding=2), 5, 4),
    _conv(
        "transposed, grouped",
        "spatial",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=(0, 1), groups=2),
        *(4, 3),
    ),
    _conv("transposed 1x1", "pointwise", lambda: nn.ConvTranspose2d(5, 6, 1, stride=2, output_padding=1), 3, 4),
    _conv("transposed 1x1, grouped", "pointwise", lambda: nn.ConvTranspose2d(6, 4, 1, groups=2), 3, 4),
    _conv("transposed 1-d", "spatial", lambda: nn.ConvTranspose1d(4, 5, 4, stride=3, padding=1, output_padding=2), 5),
    _conv("transposed 1-d, grouped", "spatial", lambda: nn.ConvTranspose1d(6, 9, 3, dilation=2, groups=3), 5),
    _conv(
        "transposed 3-d",
        "spatial",
        lambda: nn.ConvTranspose3d(3, 4, (2, 3, 1), stride=(2, 1, 2), padding=(0, 1, 0), output_padding=(1, 0, 1)),
        *(2, 3, 2),
    ),
    _conv("transposed 3-d, grouped", "spatial", lambda: nn.ConvTranspose3d(4, 4, 2, groups=2, bias=False), 2, 3, 2),
)

PAIRS: tuple[tuple[str, LayerCase], ...] = tuple(
    (name, case)
    for name, form in FORMATS.items()
    for case in LAYERS
    if case.family == form.family and case.ndim in form.ndims
)
"""Every format with every layer that it is for."""


def border_rank(size: int = 4) -> Tensor:
    """A cube of rank 3 and border rank 2, a a b + a b a + b a a: rank 2 comes as near as you like and never there."""
    a, b = torch.eye(size, dtype=torch.float64)[:2]
    terms = ((a, a, b), (a, b, a), (b, a, a))
    return torch.stack([torch.einsum("i,j,k->ijk", *term) for term in terms]).sum(0)


def conv_like(*shape: int, noise: float = 0.02, seed: int = 0) -> Tensor:
    """A kernel (spatial, in, out) whose modes' spectra decay as 1 / n, with noise of this norm; float64, norm 1.

    The over-complete case of CP is (9, 32, 32) at rank 48: more components than channels.
    """
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(shape, generator=generator, dtype=torch.float64)
    for mode, size in enumerate(shape):
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        spectrum = 1 / torch.arange(1, size + 1, dtype=torch.float64)
        kernel = torch.tensordot(basis * spectrum, kernel.movedim(mode, 0), 1).movedim(0, mode)
    extra = torch.randn(shape, generator=generator, dtype=torch.float64)
    kernel = kernel / kernel.norm() + noise * extra / extra.norm()
    return kernel / kernel.norm()
