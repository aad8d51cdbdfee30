"""Data: sources, splits, the rules they keep, and network inputs against torchvision's and NumPy's arithmetic."""

from __future__ import annotations

import os
import pickle
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from ranksearch.data import Data, Split, augmented, load_data, to_input
from ranksearch.errors import DataError
from ranksearch.space import AugmentSpec, DataSpec
from tests.images import make_image_folder

RGB = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def random_images(count: int, *, seed: int = 0, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_npz(folder: Path, name: str, images: np.ndarray, labels: np.ndarray | None = None, **more: Any) -> None:
    labels = np.arange(len(images), dtype=np.uint8) % 4 if labels is None else labels
    np.savez(folder / name, images=images, labels=labels, **more)


def npz(folder: Path, **changes: Any) -> DataSpec:
    fields = {"source": "npz", "root": str(folder), "train": ["train.npz"], "validation": ["val.npz"], **RGB}
    return DataSpec(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty training and twenty validation images as .npz files."""
    write_npz(tmp_path, "train.npz", random_images(40))
    write_npz(tmp_path, "val.npz", random_images(20, seed=1))
    return tmp_path


def load(spec: DataSpec, cache: Path, seed: int = 0) -> Data:
    return load_data(spec, cache=cache / "cache", seed=seed)


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    data = load(DataSpec(), tmp_path)
    assert (len(data.train), len(data.search), len(data.report)) == (997, 400, 400)
    assert (data.input_shape, data.classes, data.calibration_images) == ((1, 8, 8), 10, 997)
    pixels, labels = load_digits(return_X_y=True)
    parts = (data.train, data.search, data.report)
    images = np.concatenate([part.images for part in parts]).reshape(-1, 64)
    ours = sorted(zip(map(bytes, images), np.concatenate([part.labels for part in parts]), strict=True))
    theirs = sorted(zip(map(bytes, np.round(pixels / 16 * 255).astype(np.uint8)), labels, strict=True))
    assert ours == theirs
    assert all(np.bincount(part.labels, minlength=10).min() > 0.05 * len(part) for part in parts)


def test_npz_keeps_the_order_of_files_and_images(folder: Path) -> None:
    write_npz(folder, "more.npz", random_images(10, seed=2))
    data = load(npz(folder, train=["train.npz", "more.npz"], calibration_images=45), folder)
    assert np.array_equal(data.train.images, np.concatenate([random_images(40), random_images(10, seed=2)]))
    assert np.array_equal(data.train.labels, np.r_[np.arange(40) % 4, np.arange(10) % 4])
    assert np.array_equal(data.search.images, random_images(20, seed=1)[:10])
    assert np.array_equal(data.report.images, random_images(20, seed=1)[10:])
    assert data.calibration_images == len(data.calibration) == 45
    assert data.input_shape == (3, 6, 5)
    assert data.train.labels.dtype == np.int64


def test_counts_of_images(folder: Path) -> None:
    data = load(npz(folder, search_images=3, report_images=5, train_images=7), folder)
    assert (len(data.train), len(data.search), len(data.report), data.calibration_images) == (7, 3, 5, 7)
    assert np.array_equal(data.report.images, random_images(20, seed=1)[3:8])
    assert len(load(npz(folder, search_images=3), folder).report) == 17


def test_the_seed_draws_training_images_only(folder: Path) -> None:
    spec = npz(folder, train_images=10)
    first, again, other = load(spec, folder, 1), load(spec, folder, 1), load(spec, folder, 2)
    assert np.array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.images, other.train.images)
    assert np.array_equal(first.search.images, other.search.images)
    everything = {bytes(image) for image in random_images(40)}
    assert {bytes(image) for image in first.train.images} < everything


def test_grey_and_float_images(tmp_path: Path) -> None:
    for name, seed in (("train.npz", 0), ("val.npz", 1)):
        write_npz(tmp_path, name, random_images(20, seed=seed, shape=(6, 5)).astype(np.float32) / 255)
    data = load(npz(tmp_path, mean=[0.5], std=[0.5]), tmp_path)
    assert data.train.images.shape == (20, 6, 5, 1)
    uint8 = Split(images=random_images(20, shape=(6, 5))[..., None], labels=data.train.labels)
    torch.testing.assert_close(to_input(data.train.images, data), to_input(uint8.images, data))


def test_natural_duplicates_leave_the_training_images(tmp_path: Path) -> None:
    train, validation = random_images(300), random_images(400, seed=1)
    train[5], train[9], train[200] = validation[3], validation[3], validation[350]
    write_npz(tmp_path, "train.npz", train)
    write_npz(tmp_path, "val.npz", validation)
    data = load(npz(tmp_path, calibration_images=299), tmp_path)
    assert data.dropped == 3
    assert np.array_equal(data.train.images, np.delete(train, [5, 9, 200], axis=0))
    assert np.array_equal(data.train.labels, np.delete(np.arange(300) % 4, [5, 9, 200]))
    assert np.array_equal(np.concatenate([data.search.images, data.report.images]), validation)
    assert data.calibration_images == 297


@pytest.mark.parametrize("case", ["train in search", "train in report", "search in report"])
def test_overlapping_splits_are_refused(tmp_path: Path, case: str) -> None:
    train, validation = random_images(300), random_images(400, seed=1)
    if case == "train in search":
        train[:3] = validation[:3]
    elif case == "train in report":
        train[:3] = validation[-3:]
    else:
        validation[:3] = validation[-3:]
    write_npz(tmp_path, "train.npz", train)
    write_npz(tmp_path, "val.npz", validation)
    with pytest.raises(DataError, match=r"disjoint, found 3 of 200 (search|report) images"):
        load(npz(tmp_path), tmp_path)


def test_the_same_file_twice_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="given twice"):
        load(npz(folder, validation=["train.npz"]), folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "nothing"}, ["data.source", "nothing"]),
        ({"source": "digits"}, ["takes no files"]),
        ({"train": []}, ["data.train", "at least one"]),
        ({"validation": []}, ["data.validation", "at least one"]),
        ({"train": ["nowhere.npz"]}, ["must exist", "nowhere.npz"]),
        ({"root": "/nowhere"}, ["must exist", "/nowhere/train.npz"]),
        ({"train": ["garbage.npz"]}, ["garbage.npz", "archive"]),
        ({"train": ["single.npy"]}, ["single.npy", "archive"]),
        ({"train": ["pickled.npz"]}, ["pickled.npz", "plain arrays"]),
        ({"train": ["no-labels.npz"]}, ["no-labels.npz", "labels missing"]),
        ({"train": ["empty.npz"]}, ["empty.npz", "at least one image"]),
        ({"train": ["lengths.npz"]}, ["lengths.npz", "found 9 for 10"]),
        ({"train": ["doubles.npz"]}, ["doubles.npz", "float64"]),
        ({"train": ["bright.npz"]}, ["bright.npz", "0 to 1", "2.0"]),
        ({"train": ["nan.npz"]}, ["nan.npz", "0 to 1", "nan"]),
        ({"train": ["flat.npz"]}, ["flat.npz", "(N, H, W, C)", "(10, 7)"]),
        ({"train": ["soft.npz"]}, ["soft.npz", "integers", "float64"]),
        ({"train": ["negative.npz"]}, ["0 to", "-1", "train"]),
        ({"train": ["beyond.npz"]}, ["0 to 2", "3", "train"]),
        ({"train": ["train.npz", "large.npz"]}, ["one shape", "data.train"]),
        ({"train": ["large.npz"]}, ["one shape", "search"]),
        ({"train": ["train.npz", "beyond.npz", "listed.npz"]}, ["same classes"]),
        ({"mean": [0.0], "std": [1.0]}, ["one value a channel", "1", "3 channels"]),
        ({"search_images": 20}, ["20 validation images", "20"]),
        ({"search_images": 10, "report_images": 11}, ["20 validation images", "10", "11"]),
        ({"report_images": 11}, ["20 validation images", "11"]),
    ],
)
def test_broken_data_says_why(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    images = random_images(10, seed=5)
    (folder / "garbage.npz").write_bytes(b"PK\x03\x04 and then nothing of the kind")
    np.save(folder / "single.npy", images)
    write_npz(folder, "pickled.npz", images, np.array([{}] * 10, dtype=object))
    np.savez(folder / "no-labels.npz", images=images)
    write_npz(folder, "empty.npz", images[:0])
    write_npz(folder, "lengths.npz", images, np.arange(9))
    write_npz(folder, "doubles.npz", images.astype(np.float64))
    write_npz(folder, "bright.npz", np.full((10, 6, 5, 3), 2, np.float32))
    write_npz(folder, "nan.npz", np.full((10, 6, 5, 3), np.nan, np.float32))
    write_npz(folder, "flat.npz", images[:, 0, :, 0].repeat(2, axis=1)[:, :7])
    write_npz(folder, "soft.npz", images, np.linspace(0, 1, 10))
    write_npz(folder, "negative.npz", images, np.arange(10) - 1)
    write_npz(folder, "beyond.npz", images, classes=np.array(["a", "b", "c"]))
    write_npz(folder, "listed.npz", images, classes=np.array(["a", "b", "d"]))
    write_npz(folder, "large.npz", random_images(10, shape=(7, 7, 3)))
    with pytest.raises(DataError) as caught:
        load(npz(folder, **changes), folder)
    for word in words:
        assert word in str(caught.value)


def test_too_few_validation_images(folder: Path) -> None:
    write_npz(folder, "val.npz", random_images(1, seed=1))
    with pytest.raises(DataError, match="out of the 1 validation images"):
        load(npz(folder), folder)


def pixels_of(path: Path, size_px: int | None, mode: str = "RGB") -> np.ndarray:
    """The image as torchvision's Resize and CenterCrop on PIL images bring it in, in Pillow's own words."""
    image = Image.open(path).convert(mode)
    if size_px is not None:
        short = round(size_px * 8 / 7)
        scale = short / min(image.size)
        width, height = (max(short, int(side * scale + 1e-9)) for side in image.size)
        left, top = round((width - size_px) / 2), round((height - size_px) / 2)
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop(
            (left, top, left + size_px, top + size_px)
        )
    return np.asarray(image)


def folder_spec(root: Path, **changes: Any) -> DataSpec:
    return DataSpec(**{"source": "folder", "root": str(root), "image_size_px": 28, **RGB, **changes})


@pytest.mark.parametrize("size_px", [(40, 48), (48, 40), (20, 20)])
def test_folder_holds_every_image_resized_and_labelled(tmp_path: Path, size_px: tuple[int, int]) -> None:
    root = make_image_folder(tmp_path / "images", size_px=size_px)
    data = load(folder_spec(root), tmp_path)
    assert (len(data.train), len(data.search), len(data.report), data.classes) == (24, 12, 12, 3)
    for parts, name in (((data.train,), "train"), ((data.search, data.report), "val")):
        found = sorted(
            (bytes(image), int(label)) for part in parts for image, label in zip(part.images, part.labels, strict=True)
        )
        files = sorted((root / name).glob("*/*"))
        wanted = sorted((pixels_of(file, 28).tobytes(), int(file.parent.name[-1])) for file in files)
        assert found == wanted


def test_any_prefix_of_a_folder_mixes_classes(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", images_per_class=40, size_px=(8, 8))
    data = load(folder_spec(root, image_size_px=None, search_images=30, report_images=30, train_images=60), tmp_path)
    assert (len(data.train), len(data.search), len(data.report)) == (60, 30, 30)
    for labels in (data.train.labels, data.search.labels, data.report.labels):
        assert np.bincount(labels, minlength=3).min() >= 4


def test_folder_is_decoded_once(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    calls: list[tuple[int, int]] = []

    def loaded(**changes: Any) -> Data:
        calls.clear()
        progress = lambda done, total: calls.append((done, total))  # noqa: E731
        return load_data(folder_spec(root, **changes), cache=tmp_path / "cache", seed=0, progress=progress)

    first = loaded()
    assert calls == [(24, 24), (24, 24)]
    again = loaded()
    assert calls == []
    assert np.array_equal(first.train.images, again.train.images)
    loaded(image_size_px=21)
    assert calls == [(24, 24), (24, 24)]
    Image.fromarray(random_images(1, shape=(40, 48, 3))[0]).save(root / "train" / "class0" / "0.png")
    changed = loaded()
    assert calls == [(24, 24)]
    assert not np.array_equal(first.train.images, changed.train.images)
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".npy"}


def test_folders_alike_have_their_own_images(tmp_path: Path) -> None:
    """Files of the same names, sizes and times: uncompressed ones out of an archive of fixed times are."""
    found = []
    for seed in range(2):
        root = make_image_folder(tmp_path / f"images-{seed}", suffix=".bmp", seed=seed)
        for file in root.rglob("*.bmp"):
            os.utime(file, (1e9, 1e9))
        found.append(load(folder_spec(root), tmp_path))
    assert not np.array_equal(found[0].train.images, found[1].train.images)


def test_folder_images_survive_pickling_and_are_read_only(tmp_path: Path) -> None:
    data = load(folder_spec(make_image_folder(tmp_path / "images")), tmp_path)
    assert not data.train.images.flags.writeable
    sent = pickle.loads(pickle.dumps(data, protocol=5))
    torch.testing.assert_close(to_input(sent.train.images, sent), to_input(data.train.images, data), rtol=0, atol=0)


def test_grey_folder(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    data = load(folder_spec(root, mean=[0.5], std=[0.2]), tmp_path)
    assert data.input_shape == (1, 28, 28)
    files = (root / "train").glob("*/*")
    assert {bytes(i) for i in data.train.images} == {pixels_of(file, 28, "L").tobytes() for file in files}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no root", ["data.root"]),
        ("no folder", ["must exist", "val"]),
        ("no images", ["found none", "val", ".png"]),
        ("strange class", ["dragon", "data.validation only"]),
        ("damaged", ["cannot read the image", "broken.png"]),
        ("sizes", ["one size", "data.image_size_px"]),
        ("no cache", ["cannot store images", "file-not-folder"]),
        ("count", ["24 validation images", "25"]),
    ],
)
def test_broken_folders_say_why(tmp_path: Path, case: str, words: list[str]) -> None:
    root = make_image_folder(
        tmp_path / "images", splits=["train"] if case in ("no folder", "no images") else ["train", "val"]
    )
    spec, cache = folder_spec(root), tmp_path / "cache"
    if case == "no root":
        spec = DataSpec(source="folder", **RGB)
    elif case == "no images":
        (root / "val" / "class0").mkdir(parents=True)
        (root / "val" / "class0" / "notes.txt").touch()
    elif case == "strange class":
        (root / "val" / "class1").rename(root / "val" / "dragon")
    elif case == "damaged":
        good = (root / "train" / "class0" / "0.png").read_bytes()
        (root / "train" / "class0" / "broken.png").write_bytes(good[: len(good) // 2])
    elif case == "sizes":
        spec = folder_spec(root, image_size_px=None)
        Image.fromarray(random_images(1, shape=(40, 40, 3))[0]).save(root / "train" / "class0" / "square.png")
    elif case == "no cache":
        cache = tmp_path / "file-not-folder"
        cache.touch()
    elif case == "count":
        spec = folder_spec(root, search_images=25)
    with pytest.raises(DataError) as caught:
        load_data(spec, cache=cache, seed=0)
    for word in words:
        assert word in str(caught.value)
    assert nothing_half_written(cache)


def nothing_half_written(cache: Path) -> bool:
    return not cache.is_dir() or all(file.suffix == ".npy" and np.load(file).size for file in cache.rglob("*"))


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond, as on a full disk
    try:
        with pytest.raises(DataError, match=r"cannot store images .* space left"):
            load(folder_spec(root), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())
    assert len(load(folder_spec(root), tmp_path).train) == 24


FACTORIES = """
import numpy as np
from ranksearch.data import Data, Split
from ranksearch.space import AugmentSpec
def pair(count, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return images, np.arange(count) % 3
def as_dict(count=20):
    return {"train": pair(count, 0), "search": pair(10, 1), "report": pair(10, 2)}
def overlapping():
    return {"train": pair(20, 0), "search": pair(10, 0), "report": pair(10, 2)}
def as_data():
    splits = {name: Split(images=i, labels=l) for name, (i, l) in as_dict().items()}
    return Data(**splits, classes=5, mean=(0.5,) * 3, std=(0.5,) * 3, augment=AugmentSpec(), calibration_images=4)
def two():
    return {"train": pair(20, 0), "search": pair(10, 1)}
def flat():
    return {"train": 1, "search": pair(10, 1), "report": pair(10, 2)}
def number():
    return 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_data.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    return "my_data"


def test_a_factory_beside_the_working_directory(factories: str, tmp_path: Path) -> None:
    spec = DataSpec(source=f"{factories}:as_dict", options={"count": 30}, train_images=25, search_images=8, **RGB)
    data = load(spec, tmp_path)
    assert (len(data.train), len(data.search), len(data.report), data.classes) == (25, 8, 10, 3)
    assert data.mean == tuple(RGB["mean"])
    made = load(DataSpec(source=f"{factories}:as_data"), tmp_path)
    assert (made.classes, made.calibration_images, made.mean) == (5, 4, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        ("overlapping", {}, ["disjoint"]),
        ("two", {}, ["train, search and report"]),
        ("flat", {}, ["train", "pair", "int"]),
        ("number", {}, ["ranksearch.data.Data", "int"]),
        ("as_dict", {"search_images": 11}, ["search_images", "10", "11"]),
        ("as_dict", {"options": {"size": 3}}, ["size", "count"]),
        ("nothing", {}, ["cannot import"]),
    ],
)
def test_broken_factories_say_why(
    factories: str, tmp_path: Path, source: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        load(DataSpec(source=f"{factories}:{source}", **RGB, **changes), tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_inputs_are_normalised_channels_last(folder: Path) -> None:
    data = load(npz(folder), folder)
    x = to_input(data.train.images, data)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.float32
    wanted = (data.train.images.astype(np.float64) / 255 - RGB["mean"]) / RGB["std"]
    np.testing.assert_allclose(x.numpy(), wanted.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert np.array_equal(data.train.images, random_images(40))


@given(count=st.integers(1, 9), size=st.tuples(st.integers(1, 7), st.integers(1, 7)), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_augmented_images_are_shifted_or_mirrored_originals(count: int, size: tuple[int, int], seed: int) -> None:
    images = torch.rand(count, 2, *size, generator=torch.Generator().manual_seed(seed)) + 1
    before = images.clone()
    spec = AugmentSpec(flip=True, crop_px=2)
    changed = augmented(images, spec, torch.Generator().manual_seed(seed))
    assert torch.equal(changed, augmented(images, spec, torch.Generator().manual_seed(seed)))
    assert torch.equal(images, before)
    height, width = size
    for original, result in zip(images.numpy(), changed.numpy(), strict=True):
        candidates = []
        for image in (original, original[:, :, ::-1]):
            padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
            candidates += [padded[:, y : y + height, x : x + width] for y in range(5) for x in range(5)]
        assert any(np.array_equal(result, candidate) for candidate in candidates)


def test_augmentation_uses_every_change_evenly() -> None:
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 1] = 1
    many = augmented(image.expand(9000, 1, 5, 5), AugmentSpec(flip=True, crop_px=1), torch.Generator().manual_seed(0))
    share = many.mean(0)[0]
    # The pixel, in column 1 or mirrored to 3, moves by -1, 0 or 1 each way; nothing leaves the image.
    wanted = torch.tensor([0, 1, 1, 1, 0])[:, None] * torch.tensor([1, 1, 2, 1, 1]) / 18
    torch.testing.assert_close(share, wanted, atol=0.01, rtol=0)


def test_no_augmentation_changes_nothing() -> None:
    images = torch.rand(3, 3, 4, 4)
    assert torch.equal(augmented(images, AugmentSpec(), torch.Generator()), images)


def test_cifar_is_loaded_fast_and_whole(real_data: Path, tmp_path: Path) -> None:
    train = ["cifar10-train-0.npz", "cifar10-train-1.npz"]
    spec = npz(real_data, train=train, validation=["cifar10-val.npz"])
    load(spec, tmp_path / "first")  # what is slow only once, as imports are
    began = time.process_time()
    data = load(spec, tmp_path / "second")
    seconds = time.process_time() - began
    validation = np.load(real_data / "cifar10-val.npz")
    assert np.array_equal(data.search.images, validation["images"][:2500])
    assert np.array_equal(data.report.images, validation["images"][2500:])
    assert np.array_equal(data.report.labels, validation["labels"][2500:])
    assert len(data.train) + data.dropped == 25_000
    assert (data.classes, data.calibration_images) == (10, 2048)
    assert seconds < 1.5
