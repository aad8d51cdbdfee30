"""A synthetic image folder: no data set is needed to test what reads one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def make_image_folder(
    root: Path,
    *,
    classes: int = 3,
    images_per_class: int = 8,
    size_px: tuple[int, int] = (40, 48),
    splits: Sequence[str] = ("train", "val"),
    suffix: str = ".png",
    seed: int = 0,
) -> Path:
    """Write ``root/<split>/class<i>/<j><suffix>``: noise around a colour of the class, every image different.

    Args:
        root: made if it does not exist.
        classes: sub-folders of each split.
        images_per_class: images in each sub-folder.
        size_px: height and width.
        splits: folders under ``root``.
        suffix: ``.png`` is lossless, ``.jpg`` is not.
        seed: of the pixels.
    """
    generator = np.random.default_rng(seed)
    colours = generator.integers(60, 196, (classes, 3))
    for split in splits:
        for i, colour in enumerate(colours):
            folder = root / split / f"class{i}"
            folder.mkdir(parents=True)
            for j in range(images_per_class):
                noise = generator.integers(-60, 60, (*size_px, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(folder / f"{j}{suffix}")
    return root
