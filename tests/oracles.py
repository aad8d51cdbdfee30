"""What is true, by code that the package does not share: NumPy, tensorly, and torch's own modules and counters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import FORMATS


def weight(layer: nn.Module) -> np.ndarray:
    """Kernel ``(T, S / groups, *kernel)`` of torch's own layer, or of one with tied groups, float64."""
    found = layer.weight.detach().double().numpy()
    conv = getattr(layer, "conv", layer)  # what a layer of tied groups runs
    return _turned(found, conv.groups // getattr(conv, "tied", 1)) if getattr(conv, "transposed", False) else found


def _turned(found: np.ndarray, groups: int) -> np.ndarray:
    """Out and in exchanged in every group, as torch's transposed layers have them."""
    return np.concatenate([part.swapaxes(0, 1) for part in np.split(found, groups)])


def kernel(name: str, stages: Sequence[np.ndarray], groups: int = 1) -> np.ndarray:
    """Kernel ``(T, S / groups, *kernel)`` of a chain of kernels, those of every group composed apart."""
    ndim = max(stage.ndim for stage in stages) - 2
    # The einsum knows two axes: of one, the other is 1; of three, the last two go together.
    whole = [s.reshape(*s.shape[:2], *(s.shape[2:3] or (1,)), int(np.prod(s.shape[3:]))) for s in stages]
    chunks = zip(*(np.split(stage, groups) for stage in whole), strict=True)
    compose = FORMATS[name].compose
    composed = np.concatenate([np.einsum(compose, *c) if isinstance(compose, str) else compose(c) for c in chunks])
    sizes = [max(s.shape[axis] for s in stages if s.ndim > axis) for axis in range(2, 2 + ndim)]
    return composed.reshape(*composed.shape[:2], *sizes)


def with_kernel(layer: nn.Module, kernel: np.ndarray, bias: Tensor) -> nn.Module:
    """torch's own layer of the same geometry, with this kernel and bias, in float64."""
    other = copy.deepcopy(layer).double()
    if getattr(layer, "transposed", False):
        kernel = _turned(kernel, layer.groups)
    other.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(kernel)).reshape(layer.weight.shape))
    other.bias = nn.Parameter(bias.detach().double().clone())
    return other


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Patches ``(N P, S, *kernel)`` under the kernel: torch's own layer with an output for every kernel element."""
    size = weight(layer).shape[2:]
    elements = x.shape[1] * int(np.prod(size))
    one_hot = np.eye(elements).reshape(elements, x.shape[1], *size)
    other = copy.deepcopy(layer)
    other.groups, other.bias = 1, None
    other.weight = nn.Parameter(torch.from_numpy(one_hot.swapaxes(0, 1) if layer.transposed else one_hot).to(x.dtype))
    return other(x).detach().movedim(1, -1).reshape(-1, x.shape[1], *size)


def macs(module: nn.Module, x: Tensor) -> int:
    """MACs of one image by PyTorch's counter."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(x[:1])
    return counter.get_total_flops() // 2


def params(module: nn.Module) -> int:
    """Values in the module's state."""
    return sum(value.numel() for value in module.state_dict().values())


def truncation(matrix: np.ndarray, rank: int) -> float:
    """Least squared error of any matrix of this rank (Eckart and Young)."""
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def unfolded(name: str, weight: np.ndarray) -> np.ndarray:
    """The kernel as the matrix that a one-rank format truncates."""
    if name == "spatial-svd":
        t, s, height, width = weight.shape
        return weight.transpose(1, 2, 0, 3).reshape(s * height, t * width)
    return weight.reshape(weight.shape[0], -1)


def hosvd(weight: np.ndarray, r_in: int, r_out: int) -> np.ndarray:
    """Truncated higher-order SVD of the channel modes: tensorly's Tucker-2 before its first iteration."""
    (core, (last, first)), _ = partial_tucker(
        weight, rank=[r_out, r_in], modes=[0, 1], init="svd", svd="truncated_svd", n_iter_max=0
    )
    return np.asarray(tensorly.tenalg.multi_mode_dot(core, [last, first], modes=[0, 1]))


def unbeaten(points: Sequence[tuple[float, ...]]) -> set[tuple[float, ...]]:
    """The points that no other is at least as good as everywhere and better somewhere."""
    beaten = {
        p for p, q in itertools.product(points, repeat=2) if p != q and all(y <= x for x, y in zip(p, q, strict=True))
    }
    return set(points) - beaten
