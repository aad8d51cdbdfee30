"""Images as network inputs, and their random changes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ranksearch.data.splits import Data, Images
from ranksearch.space import AugmentSpec


def to_input(images: Images, data: Data, device: torch.device | str = "cpu") -> Tensor:
    """Network inputs: float32 ``(N, C, H, W)`` in channels-last memory, normalised by ``data.mean`` and ``data.std``.

    Args:
        images: uint8 ``(N, H, W, C)``, or float32 from 0 to 1.
        data: whose normalisation is used.
        device: where the inputs are made; uint8 images travel there as they are.
    """
    # A copy: images may be mapped read-only, which torch cannot express, and an axis of length 1 may have any stride,
    # by which torch chooses among kernels that differ in the last bits.
    x = torch.from_numpy(np.array(images, order="C")).to(device).permute(0, 3, 1, 2)
    scale = 255.0 if x.dtype == torch.uint8 else 1.0
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (data.mean, data.std))
    return x.to(torch.float32).div_(scale).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def augmented(
    images: Tensor,
    spec: AugmentSpec,
    generator: torch.Generator,
    *,
    batch: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """``images`` ``(N, C, H, W)``, each mirrored or not, and shifted by up to ``spec.crop_px`` over zeros.

    The zeros are those of normalised images (the mean colour). The same state of ``generator`` gives the same changes
    on any device. Where ``images`` are the ``part`` of a ``batch`` of so many, the changes of all of it are drawn.
    """
    count, _, height, width = images.shape

    def drawn(high: int) -> Tensor:
        all_of_them = torch.randint(high, (batch or count,), generator=generator, device=generator.device)
        return all_of_them[part].to(images.device)

    if spec.flip:
        images = torch.where(drawn(2).bool().view(-1, 1, 1, 1), images.flip(3), images)
    if spec.crop_px:
        pad, device = spec.crop_px, images.device
        padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
        rows = drawn(2 * pad + 1)[:, None] + torch.arange(height, device=device)
        columns = drawn(2 * pad + 1)[:, None] + torch.arange(width, device=device)
        image = torch.arange(count, device=device)
        images = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return images
