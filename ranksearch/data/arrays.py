"""Sources that are arrays: ``.npz`` files, and the digits that come with scikit-learn."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ranksearch.data.splits import Split, make_split
from ranksearch.errors import DataError
from ranksearch.space import DataSpec

DIGITS_VALIDATION = 800
"""Of the 1,797 digits."""
_KEYS = ("images", "labels", "classes")


def digits(spec: DataSpec) -> tuple[Split, Split]:
    """Training and validation images: 1,797 digits of 8x8 pixels, shuffled by a fixed seed; 0 to 16 becomes 0 to 255.

    From scikit-learn: the test set of "Optical Recognition of Handwritten Digits" (Alpaydin, Kaynak 1998).
    """
    if spec.train or spec.validation:
        raise DataError(
            "data.source digits is embedded and takes no files, found data.train or data.validation. "
            "Set data.source to npz or folder, or leave them out."
        )
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    order = np.random.default_rng(0).permutation(len(images))
    everything = make_split(images[order], labels[order], place="digits")
    return everything[:-DIGITS_VALIDATION], everything[-DIGITS_VALIDATION:]


def read_npz(spec: DataSpec) -> tuple[Split, Split, int]:
    """Training images, validation images and the number of classes.

    Each file has ``images`` (uint8, or float32 from 0 to 1; ``(N, H, W, C)`` or ``(N, H, W)``) and ``labels``
    (integers, ``(N,)``), and may list the ``classes``; without a list there are as many as the largest label says.

    Raises:
        DataError: a file is missing, cannot be read, or breaks a rule.
    """
    found: list[Any] = []
    train = _joined("data.train", spec.train, spec.root, found)
    validation = _joined("data.validation", spec.validation, spec.root, found)
    if any(not np.array_equal(classes, found[0]) for classes in found):
        raise DataError("all files of data.train and data.validation must list the same classes. Correct `classes`.")
    classes = len(found[0]) if found else 1 + int(max(train.labels.max(), validation.labels.max()))
    return train, validation, classes


def _joined(place: str, files: Sequence[str], root: str | None, classes: list[Any]) -> Split:
    """The images of ``files``, one after the other; appends the lists of classes found to ``classes``."""
    if not files:
        raise DataError(f"{place} must name at least one .npz file, found none. Name files under data.root.")
    splits = []
    for name in files:
        file = Path(root or ".").expanduser() / name
        arrays = _arrays(file)
        if "classes" in arrays:
            classes.append(np.atleast_1d(arrays["classes"]))
        splits.append(make_split(arrays["images"], arrays["labels"], place=str(file)))
    kinds = {(split.images.shape[1:], split.images.dtype.name) for split in splits}
    if len(kinds) > 1:
        raise DataError(f"files of {place} must hold images of one shape and type, found {sorted(kinds)}.")
    return Split(
        images=np.concatenate([split.images for split in splits]),
        labels=np.concatenate([split.labels for split in splits]),
    )


def _arrays(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"a file of data must exist, found no file {file}. Check data.root and the names under it.")
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            arrays: dict[str, Any] = {name: archive[name] for name in _KEYS if name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{file} must be an .npz archive of plain arrays: {error}. Write it with numpy.savez."
        ) from error
    missing = [name for name in ("images", "labels") if name not in arrays]
    if missing:
        raise DataError(f"{file} must hold the arrays images and labels, {' and '.join(missing)} missing. Add them.")
    return arrays
