"""Image folders, ``root/train/<class>/<image>``: decoded once, resized and cropped, and stored as one array.

The images are resized so that the short side is 8/7 of the wanted size (256 for 224), then cropped at the centre, as
networks trained on ImageNet are evaluated (He et al. 2015, section 3.4; the rounding is torchvision's).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from ranksearch.data.splits import Split, counts, draw, make_split
from ranksearch.errors import DataError
from ranksearch.space import DataSpec

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_CHUNK = 256
"""Images decoded before they are written."""
Mode = Literal["L", "RGB"]


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    name: str
    """Relative to the data's root."""
    class_name: str


def read_folder(
    spec: DataSpec, *, cache: Path, seed: int, progress: Callable[[int, int], None] | None
) -> tuple[Split, Split, int]:
    """Training images, the validation images that are needed, and the number of classes.

    The classes are the sorted names of the sub-folders; images are grey if ``spec.mean`` has one value, else RGB.

    Raises:
        DataError: a folder is missing or empty, an image cannot be read, or the images cannot be stored.
    """
    if spec.root is None:
        raise DataError("data.root must be given for data.source folder. Set it to the folder of the images.")
    root = Path(spec.root).expanduser()
    train = _listed(root, spec.train or ["train"], "data.train")
    validation = _listed(root, spec.validation or ["val"], "data.validation")
    classes = sorted({file.class_name for file in train})
    strange = sorted({file.class_name for file in validation} - set(classes))
    if strange:
        raise DataError(
            f"classes of the validation images must be those of the training images, found {', '.join(strange[:4])} "
            "in data.validation only. Rename the folders."
        )
    chosen = draw(len(train), spec.train_images, seed)
    train = train[chosen] if isinstance(chosen, slice) else [train[i] for i in chosen]
    validation = validation[: sum(counts(len(validation), spec))]
    mode: Mode = "L" if len(spec.mean) == 1 else "RGB"
    number = {name: i for i, name in enumerate(classes)}

    def split(files: Sequence[_File]) -> Split:
        images = _decoded(files, spec.image_size_px, mode, cache, progress)
        return make_split(images, np.array([number[file.class_name] for file in files]), place=str(root))

    return split(train), split(validation), len(classes)


def _listed(root: Path, folders: Sequence[str], place: str) -> list[_File]:
    """The images in the class folders of ``folders``, ordered by a hash of their names: any prefix mixes classes."""
    files: list[_File] = []
    for folder in folders:
        if not (root / folder).is_dir():
            raise DataError(f"a folder of {place} must exist, found no folder {root / folder}. Check data.root.")
        for class_folder in sorted(entry for entry in (root / folder).iterdir() if entry.is_dir()):
            files += [
                _File(path=path, name=f"{folder}/{class_folder.name}/{path.name}", class_name=class_folder.name)
                for path in class_folder.iterdir()
                if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
            ]
    if not files:
        raise DataError(
            f"{place} must hold images as <class>/<image>, found none in {', '.join(folders)} under {root}. "
            f"Suffixes read: {', '.join(sorted(SUFFIXES))}."
        )
    return sorted(files, key=lambda file: (hashlib.blake2b(file.name.encode(), digest_size=8).digest(), file.name))


def _decoded(
    files: Sequence[_File], size_px: int | None, mode: Mode, cache: Path, progress: Callable[[int, int], None] | None
) -> npt.NDArray[np.uint8]:
    """uint8 ``(N, H, W, C)``, mapped from the stored file, which is written first if there is none."""
    store = cache / f"images-{_key(files, size_px, mode)}.npy"
    try:
        if not store.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            _write(store, files, size_px, mode, progress)
        # The plain view of the map pickles without a detour and is read page by page all the same.
        return np.asarray(np.load(store, mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot store images in {store}: {error}. Check the folder and the space left.") from error


def _write(
    store: Path, files: Sequence[_File], size_px: int | None, mode: Mode, progress: Callable[[int, int], None] | None
) -> None:
    """Write the images whole or not at all; by plain writes, since a map on a full disk ends the process."""
    shape = _read(files[0], size_px, mode).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape)}
    with tempfile.TemporaryDirectory(dir=store.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        unfinished = Path(folder) / store.name
        with unfinished.open("wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, len(files), _CHUNK):
                chunk = files[start : start + _CHUNK]
                for file, image in zip(chunk, pool.map(lambda f: _read(f, size_px, mode), chunk), strict=True):
                    if image.shape != shape:
                        raise DataError(
                            f"images must have one size unless data.image_size_px is given, found {image.shape[:2]} in "
                            f"{file.path} and {shape[:2]} in {files[0].path}. Give data.image_size_px."
                        )
                    out.write(image.data)
                if progress is not None:
                    progress(start + len(chunk), len(files))
        os.replace(unfinished, store)


def _read(file: _File, size_px: int | None, mode: Mode) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(file.path) as opened:
            image = opened.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {file.path}: {error}. Replace or remove it.") from error
    if size_px is not None:
        image = _resized(image, size_px)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels if mode == "RGB" else pixels[..., np.newaxis])


def _resized(image: Image.Image, size_px: int) -> Image.Image:
    short_px = round(size_px * 8 / 7)
    width, height = image.size
    if width <= height:
        width, height = short_px, int(short_px * height / width)
    else:
        width, height = int(short_px * width / height), short_px
    left, top = round((width - size_px) / 2), round((height - size_px) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size_px, top + size_px))


def _key(files: Sequence[_File], size_px: int | None, mode: Mode) -> str:
    digest = hashlib.blake2b(repr((1, size_px, mode)).encode(), digest_size=12)
    for file in files:
        stat = file.path.stat()
        about = (str(file.path.resolve()), file.name, stat.st_size, stat.st_mtime_ns)
        digest.update(repr(about).encode())
    return digest.hexdigest()
