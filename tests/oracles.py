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


def kernel(name: str, stages: Sequence[Tensor]) -> np.ndarray:
    """Kernel ``(T, S, height, width)`` of a chain, float64."""
    whole = [stage.detach().double().reshape(*stage.shape, *[1] * (4 - stage.ndim)).numpy() for stage in stages]
    compose = FORMATS[name].compose
    return np.einsum(compose, *whole) if isinstance(compose, str) else compose(whole)


def with_kernel(layer: nn.Conv2d | nn.Linear, weight: np.ndarray, bias: Tensor) -> nn.Module:
    """torch's own layer of the same geometry, with this kernel and bias, in float64."""
    other = copy.deepcopy(layer).double()
    other.weight = nn.Parameter(torch.from_numpy(weight).reshape(layer.weight.shape))
    other.bias = nn.Parameter(bias.detach().double().clone())
    return other


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
    t, s, height, width = weight.shape
    if name == "spatial-svd":
        return weight.transpose(1, 2, 0, 3).reshape(s * height, t * width)
    return weight.reshape(t, -1)


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
