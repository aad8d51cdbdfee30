"""How well a network does: on a split of the images, to the same bits every time, and as it would be deployed.

What is deployed with activations of few bits is scored with them rounded, in ranges that calibration images give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ranksearch.data import Data, Split, to_input
from ranksearch.factors import threads
from ranksearch.rounding import Clip, Range, ranges, rounding_activations, widths_of
from ranksearch.table import FLOAT_BITS

RANGE_IMAGES = 128
"""Calibration images that ranges of activations are found on."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a network does on one split."""

    accuracy: float
    """Top-1, 0 to 1."""
    loss: float
    """Cross-entropy, nats per image."""
    images: int
    right: bytes = b""
    """Which images were classified rightly: one bit an image, eight in a byte, the first in the highest place. Nothing
    where only the rest was kept."""


@torch.no_grad()
def score(model: nn.Module, split: Split, data: Data, *, batch_images: int, device: torch.device) -> Score:
    """Accuracy and loss of ``model`` on a split, in float32."""
    right, loss = [], 0.0
    for start in range(0, len(split.labels), batch_images):
        labels = torch.as_tensor(split.labels[start : start + batch_images]).to(device)
        outputs = model(to_input(split.images[start : start + batch_images], data, device)).float()
        right.append((outputs.argmax(1) == labels).cpu().numpy())
        loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
    each, images = np.concatenate(right), len(split.labels)
    return Score(
        accuracy=int(each.sum()) / images, loss=loss / images, images=images, right=np.packbits(each).tobytes()
    )


class Widths(Protocol):
    """What of a search's or a rank map's widths activations need."""

    @property
    def activation_bits(self) -> int: ...  # noqa: D102
    @property
    def clip(self) -> Clip: ...  # noqa: D102


@contextmanager
def as_deployed(model: nn.Module, widths: Widths | None, data: Data) -> Iterator[None]:
    """Meanwhile activations are rounded as ``widths`` say, in the ranges of the weights that ``model`` begins with."""
    with rounding_activations(model, deployed_ranges(model, widths, data)):
        yield


def deployed_ranges(model: nn.Module, widths: Widths | None, data: Data) -> dict[str, Range]:
    """Ranges, on the first calibration images, of what goes into every layer; None, and 32 bits, round nothing."""
    if widths is None or widths.activation_bits == FLOAT_BITS:
        return {}
    images = to_input(data.calibration[:RANGE_IMAGES], data, next(model.parameters()).device)
    return ranges(model, widths_of(model, {}, FLOAT_BITS), images, widths.clip)


@contextmanager
def reproducible(count: int) -> Iterator[None]:
    """``count`` CPU threads, and on GPUs kernels that give the same bits every time, in float32 proper.

    Everything is put back as it was.
    """
    with threads(count), torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
        yield
