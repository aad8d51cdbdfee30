"""Images with labels in three disjoint splits: training (its first images calibrate), search-validation, report.

Images are channels-last arrays, ``(N, H, W, C)``; ``to_input`` makes network inputs of them, ``augmented`` changes
those at random. To add a source: a function from a ``DataSpec`` to training and validation images, called by
``load_data``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ranksearch.data.arrays import digits, read_npz
from ranksearch.data.folder import read_folder
from ranksearch.data.splits import Data, Split, divide, draw, make_split, without_duplicates
from ranksearch.data.tensors import augmented, to_input
from ranksearch.errors import DataError
from ranksearch.factory import call_factory
from ranksearch.space import DataSpec

__all__ = ["Data", "Split", "augmented", "load_data", "to_input"]

Progress = Callable[[int, int], None]
"""Called with the images done and their total."""


def load_data(spec: DataSpec, *, cache: Path, seed: int, progress: Progress | None = None) -> Data:
    """The data of a search.

    Validation images keep the order of their files, whatever the seed, so that search-validation and report images
    never mix between searches; the files of an image folder are taken in the order of a hash of their names.

    Args:
        spec: the ``data`` section of a space file.
        cache: folder where the decoded images of an image folder are stored.
        seed: draws the training images where ``spec.train_images`` is fewer than there are.
        progress: called while an image folder is decoded.

    Raises:
        DataError: something is missing, empty, of wrong type or shape, or the splits overlap.
    """
    if ":" in spec.source:
        data = _from_factory(spec, seed)
    elif spec.source == "digits":
        train, validation = digits(spec)
        data = _assembled(spec, _drawn(train, spec, seed), *divide(validation, spec), classes=10)
    elif spec.source == "npz":
        train, validation, classes = read_npz(spec)
        data = _assembled(spec, _drawn(train, spec, seed), *divide(validation, spec), classes=classes)
    elif spec.source == "folder":
        train, validation, classes = read_folder(spec, cache=cache, seed=seed, progress=progress)
        data = _assembled(spec, train, *divide(validation, spec), classes=classes)
    else:
        raise DataError(
            f"data.source must be digits, npz, folder or package.module:function, found {spec.source!r}. Correct it."
        )
    return without_duplicates(data)


def _assembled(spec: DataSpec, train: Split, search: Split, report: Split, *, classes: int) -> Data:
    return Data(
        train=train,
        search=search,
        report=report,
        classes=classes,
        mean=tuple(spec.mean),
        std=tuple(spec.std),
        augment=spec.augment,
        calibration_images=min(spec.calibration_images, len(train)),
    )


def _drawn(train: Split, spec: DataSpec, seed: int) -> Split:
    return train[draw(len(train), spec.train_images, seed)]


def _from_factory(spec: DataSpec, seed: int) -> Data:
    """What the user's function returns: a ``Data``, or a dict of three pairs (images, labels)."""
    made = call_factory(spec.source, spec.options, DataError)
    if isinstance(made, Data):
        return made
    names = ("train", "search", "report")
    if not isinstance(made, dict) or set(made) != set(names):
        found = sorted(map(str, made)) if isinstance(made, dict) else type(made).__name__
        raise DataError(
            f"{spec.source} must return a ranksearch.data.Data, or a dict with train, search and report, each a pair "
            f"(images, labels), found {found}. Correct the function."
        )
    splits: dict[str, Split] = {}
    for name in names:
        if not isinstance(made[name], tuple | list) or len(made[name]) != 2:
            raise DataError(
                f"{spec.source}: {name} must be a pair (images, labels), found {type(made[name]).__name__}."
            )
        splits[name] = make_split(*made[name], place=f"{spec.source}: {name}")
    splits["train"] = _drawn(splits["train"], spec, seed)
    for name, most in (("search", spec.search_images), ("report", spec.report_images)):
        if most is not None and most > len(splits[name]):
            raise DataError(
                f"data.{name}_images must be at most the {len(splits[name])} images that {spec.source} gives, "
                f"found {most}. Ask for fewer."
            )
        splits[name] = splits[name][:most]
    classes = 1 + max(int(np.max(split.labels)) for split in splits.values())
    return _assembled(spec, splits["train"], splits["search"], splits["report"], classes=classes)
