"""A small residual network for 8x8 grey images of digits, trained in seconds on first use.

Residual blocks as in He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), with 1x1 shortcuts;
seven 3x3 convolutions of 32 and 64 channels, wide enough for their ranks to matter.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.data import Data, augmented, to_input
from ranksearch.errors import ModelError
from ranksearch.models.initial import he_normal
from ranksearch.space import AugmentSpec

EPOCHS = 16
BATCH_IMAGES = 64
LEARNING_RATE = 0.1
"""Largest of one cycle."""
WEIGHT_DECAY = 5e-4
AUGMENT = AugmentSpec(crop_px=1)


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels or stride != 1:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsCnn(nn.Module):
    """A stem, three residual blocks, and a linear classifier: 0.15 million parameters, 3.3 million MACs on 8x8."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.block1 = _Block(32, 32, 1)
        self.block2 = _Block(32, 64, 2)
        self.block3 = _Block(64, 64, 1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, 1, H, W)``."""
        x = F.relu(self.bn(self.stem(x)))
        x = self.block3(self.block2(self.block1(x)))
        logits: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return logits


def digits_cnn(num_classes: int = 10) -> DigitsCnn:
    """The network with its starting weights; ``digits_weights`` has trained ones."""
    return he_normal(DigitsCnn(num_classes))


def train_digits_cnn(data: Data, *, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> nn.Module:
    """The network trained on ``data.train``: SGD with momentum, one cycle of the learning rate.

    The same seed gives the same weights: torch's global generator and thread count are used afresh, and restored.

    Args:
        data: grey images, of any number of classes.
        seed: of the starting weights, the order of the images and their augmentation.
        progress: called with the epochs done and their total.

    Raises:
        ModelError: the images are not grey.
    """
    if data.input_shape[0] != 1:
        raise ModelError(
            f"digits-cnn is for images of one channel, found {data.input_shape[0]}. Give model.name and model.weights."
        )
    with _single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_cnn(data.classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _train(model, data, torch.Generator().manual_seed(seed), progress or (lambda done, total: None))
    trained: nn.Module = model.eval()
    return trained


def _train(model: nn.Module, data: Data, generator: torch.Generator, progress: Callable[[int, int], None]) -> None:
    images, labels = to_input(data.train.images, data), torch.from_numpy(np.array(data.train.labels))
    batches = max(1, len(labels) // BATCH_IMAGES)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=EPOCHS * batches)
    model.train()
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(labels), generator=generator).tensor_split(batches):
            logits = model(augmented(images[chosen], AUGMENT, generator))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        progress(epoch + 1, EPOCHS)


def digits_weights(
    cache: Path, data: Data, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Path:
    """The safetensors file of the weights trained on ``data``; trains and writes it (whole or not at all) if need be.

    The name carries a hash of the training images and labels, their normalisation, the seed and this recipe.

    Raises:
        ModelError: the images are not grey, or the file cannot be written.
    """
    file = cache / f"digits-cnn-{_key(data, seed)}.safetensors"
    if file.is_file():
        return file
    model = train_digits_cnn(data, seed=seed, progress=progress)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unfinished = Path(folder) / file.name
            save_file({name: x.contiguous() for name, x in model.state_dict().items()}, unfinished)
            os.replace(unfinished, file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write the weights {file}: {error}. Check the folder and the space left.") from error
    return file


def _key(data: Data, seed: int) -> str:
    digest = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8)
    digest.update(repr((seed, data.classes, data.mean, data.std, data.train.images.shape)).encode())
    digest.update(np.ascontiguousarray(data.train.images).data)
    digest.update(np.ascontiguousarray(data.train.labels).data)
    return digest.hexdigest()


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread: the order of sums, and so the last bits of the weights, would follow the machine otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
