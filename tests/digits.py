"""scikit-learn's digits as a data factory, whose report images can be spoilt to show that nobody looks at them."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits


def digits(train: int = 400, search: int = 200, report: int = 300, spoilt: bool = False) -> dict[str, Any]:
    """Images ``(N, 8, 8, 1)`` and labels of the three splits; ``spoilt``: the report labels are shifted by one."""
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) / 16 * 255).astype(np.uint8)
    ends = np.cumsum([train, search, report])
    splits = {
        name: (images[end - count : end], labels[end - count : end])
        for name, end, count in zip(("train", "search", "report"), ends, (train, search, report), strict=True)
    }
    if spoilt:
        splits["report"] = (splits["report"][0], (splits["report"][1] + 1) % 10)
    return splits
