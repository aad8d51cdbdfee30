"""What data is: validated splits, how validation images are divided, and that no image stands in two splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ranksearch.errors import DataError
from ranksearch.space import AugmentSpec, DataSpec

Images = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
NATURAL_DUPLICATES = 0.01
"""Share of the search or report images that may stand in another split too: data sets have a few such; a file given
twice has many."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Images with their labels."""

    images: Images
    """uint8 ``(N, H, W, C)``, or float32 ``(N, H, W, C)`` on the scale 0 to 1."""
    labels: npt.NDArray[np.int64]
    """``(N,)``, from 0."""

    def __post_init__(self) -> None:
        shape, dtype = self.images.shape, self.images.dtype
        if dtype not in (np.uint8, np.float32):
            raise DataError(f"images must be uint8, or float32 from 0 to 1, found {dtype}. Convert them.")
        if len(shape) != 4 or 0 in shape[1:]:
            raise DataError(f"images must have the shape (N, H, W, C), found {shape}. Reshape them.")
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise DataError(
                f"labels must be integers of shape (N,), found {self.labels.dtype} {self.labels.shape}. Convert them."
            )
        if len(self.labels) != shape[0]:
            raise DataError(f"there must be one label an image, found {len(self.labels)} for {shape[0]}.")
        if shape[0] == 0:
            raise DataError("a split must hold at least one image, found none. Give more images.")
        if dtype == np.float32:
            low, high = float(self.images.min()), float(self.images.max())
            if not (low >= 0 and high <= 1):  # NaN is neither
                raise DataError(f"float32 images must lie from 0 to 1, found {low} to {high}. Rescale them.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | npt.NDArray[Any]) -> Split:
        return Split(images=self.images[chosen], labels=self.labels[chosen])


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """The three splits of a search, with what it takes to feed them to a network."""

    train: Split
    """For calibration and fine-tuning."""
    search: Split
    """Scores trials."""
    report: Split
    """Scores the front."""
    classes: int
    mean: tuple[float, ...]
    """Of each channel, on the scale 0 to 1."""
    std: tuple[float, ...]
    augment: AugmentSpec
    """What fine-tuning does to training images."""
    calibration_images: int
    """The first so many of the training images calibrate."""
    dropped: int = 0
    """Training images left out because they also stand among the search or report images."""
    digest: str = ""
    """Hash of all images and labels of the three splits."""

    def __post_init__(self) -> None:
        shape = self.train.images.shape[1:]
        for name, split in self._named():
            if split.images.shape[1:] != shape:
                raise DataError(
                    f"images of all splits must have one shape, found {shape} in train and {split.images.shape[1:]} in "
                    f"{name}. Bring them to one size."
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.classes:
                raise DataError(
                    f"labels must lie from 0 to {self.classes - 1} (there are {self.classes} classes), "
                    f"found {low} to {high} in {name}. Correct the labels, or the list of classes."
                )
        if len(self.mean) != shape[2] or len(self.std) != shape[2]:
            raise DataError(
                f"data.mean and data.std must have one value a channel, found {len(self.mean)} and {len(self.std)} "
                f"for {shape[2]} channels. Give the values that the network was trained with."
            )
        if min(self.std) <= 0:
            raise DataError(f"data.std must be positive, found {self.std}. Correct them.")
        if not 1 <= self.calibration_images <= len(self.train):
            raise DataError(
                f"calibration images must be among the {len(self.train)} training images, found "
                f"{self.calibration_images}. Ask for 1 to {len(self.train)}."
            )

    def _named(self) -> tuple[tuple[str, Split], ...]:
        return ("train", self.train), ("search", self.search), ("report", self.report)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one network input."""
        _, height, width, channels = self.train.images.shape
        return channels, height, width

    @property
    def calibration(self) -> Images:
        """The training images that collect statistics, refit and recalibrate."""
        return self.train.images[: self.calibration_images]


def make_split(images: Any, labels: Any, *, place: str) -> Split:
    """A split of array-likes: images ``(N, H, W)`` get a channel, labels of any integer type become int64.

    Raises:
        DataError: they break a rule of splits; the message begins with ``place``.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if np.issubdtype(labels.dtype, np.integer):
        labels = labels.astype(np.int64)
    try:
        return Split(images=images, labels=labels)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def draw(count: int, most: int | None, seed: int) -> slice | npt.NDArray[np.int64]:
    """Which of ``count`` items to take, at most ``most``: all, or some drawn by ``seed``, in their order."""
    if most is None or most >= count:
        return slice(None)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def counts(available: int, spec: DataSpec) -> tuple[int, int]:
    """How many validation images are for search and report.

    Raises:
        DataError: there are too few.
    """
    search = available // 2 if spec.search_images is None else spec.search_images
    report = available - search if spec.report_images is None else spec.report_images
    if search < 1 or report < 1 or search + report > available:
        asked = "default" if spec.report_images is None else str(spec.report_images)
        raise DataError(
            f"search and report images must come out of the {available} validation images, at least one each, found "
            f"{search} for data.search_images and {asked} for data.report_images. Ask for fewer, or give more images."
        )
    return search, report


def divide(validation: Split, spec: DataSpec) -> tuple[Split, Split]:
    """The search images, which are the first, and the report images, which follow; raises like :func:`counts`."""
    search, report = counts(len(validation), spec)
    return validation[:search], validation[search : search + report]


def without_duplicates(data: Data) -> Data:
    """``data`` without the training images that stand, to the byte, among the others; with its digest.

    Raises:
        DataError: so many search or report images stand in another split that a file must have been given twice.
    """
    train, search, report = (_digests(split.images) for _, split in data._named())
    for name, own, others in (
        ("search", search, {*train, *report}),
        ("report", report, {*train, *search}),
    ):
        twice = sum(digest in others for digest in own)
        if twice > NATURAL_DUPLICATES * len(own):
            raise DataError(
                f"the splits must be disjoint, found {twice} of {len(own)} {name} images in another split too. "
                "Give different images in data.train and data.validation; was a file given twice?"
            )
    data = replace(data, digest=_digest(data, (train, search, report)))
    held_out = {*search, *report}
    kept = np.array([digest not in held_out for digest in train])
    if kept.all():
        return data
    split = data.train[kept]
    calibration = min(data.calibration_images, len(split))
    return replace(data, train=split, calibration_images=calibration, dropped=data.dropped + int((~kept).sum()))


def _digests(images: Images) -> list[bytes]:
    return [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]


def _digest(data: Data, images: tuple[list[bytes], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for (name, split), digests in zip(data._named(), images, strict=True):
        digest.update(f"{name} {len(digests)}".encode() + b"".join(digests) + split.labels.tobytes())
    return digest.hexdigest()
