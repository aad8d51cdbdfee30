"""Latency of a network on this machine: the median over repeated forward passes, after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.surgery import Shape, evaluating


@torch.no_grad()
def latency_ms(model: nn.Module, input_shape: Shape, *, batch_images: int = 1, seconds: float = 1.0) -> float:
    """Median milliseconds of one forward pass of ``batch_images`` images, eager, channels-last, float32.

    Runs for about ``seconds``, at least five times after two warm-up passes, on the model's device with the threads
    that PyTorch is set to.
    """
    device = next(model.parameters()).device
    images = torch.randn((batch_images, *input_shape), generator=torch.Generator().manual_seed(0))
    images = images.to(device)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)

    def run(images: Tensor) -> None:
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with evaluating(model):
        return median_ms(run, images, seconds=seconds)


def median_ms(run: Callable[[Tensor], Any], images: Tensor, *, seconds: float) -> float:
    """Median milliseconds of ``run`` on ``images``, repeated likewise."""
    times: list[float] = []
    for _ in range(2):
        run(images)
    ends = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < ends:
        started = time.perf_counter()
        run(images)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)
