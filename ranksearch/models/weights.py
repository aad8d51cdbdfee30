"""Pretrained weights from a file into a network, checked key by key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ranksearch.errors import ModelError

_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")
"""Checkpoints of torchvision before 0.2 write ``denselayer1.norm.1.weight`` for ``denselayer1.norm1.weight``."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` with the weights in a safetensors file or a ``torch.save`` state dict.

    The state dict may lie under a key ``state_dict`` or ``model``, and its names may begin with ``module.``;
    ``num_batches_tracked`` may be missing. The model is changed only when everything fits.

    Raises:
        ModelError: the file cannot be read, or names, shapes or values do not fit.
    """
    tensors = _renamed(_read(path), model.state_dict().keys())
    _check_fit(model, tensors, path)
    check_finite(tensors, str(path))
    model.load_state_dict(tensors, strict=False)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ModelError if a tensor holds NaN or infinite values, naming those that do."""
    bad = [name for name, x in tensors.items() if x.is_floating_point() and not bool(torch.isfinite(x).all())]
    if bad:
        raise ModelError(
            f"weights must be finite, found NaN or infinite values in {_few(bad)} of {source}. Give sound weights."
        )


def find_weights(weights: str, folders: Iterable[Path]) -> Path:
    """The weights file: ``weights`` itself where absolute, else the first of ``folders`` that has it.

    Raises:
        ModelError: there is no such file; the message names every place looked at.
    """
    file = Path(weights).expanduser()
    places = [file] if file.is_absolute() else [Path(folder).expanduser() / file for folder in folders]
    for place in places:
        if place.is_file():
            return place.resolve()
    looked = ", ".join(str(place) for place in places)
    raise ModelError(f"the weights file {weights} must exist, looked for {looked}. Correct model.weights.")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, unwrapped."""
    if not path.is_file():
        raise ModelError(f"the weights file must exist, found no file {path}. Correct model.weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read the weights {path}: {error}. Check the file.") from error
    except Exception as error:  # torch.load raises whatever unpickling meets; what it says is for programmers
        raise ModelError(
            f"cannot read the weights {path}, it is damaged or of another kind ({type(error).__name__}). Give a "
            "safetensors file, or a state dict written by torch.save."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise ModelError(
            f"weights must be a mapping of names to tensors, found {type(content).__name__} in {path}. "
            "Write them with torch.save(model.state_dict(), path)."
        )
    return {str(name): x for name, x in content.items()}


def _renamed(tensors: dict[str, Tensor], known: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under the model's names: no ``module.`` prefix, no old DenseNet names."""
    names = set(known)
    if tensors and all(name.startswith("module.") for name in tensors) and names.isdisjoint(tensors):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    newer = {name: _OLD_DENSENET.sub(r"\1\2", name) for name in tensors}
    return {newer[name] if newer[name] in names else name: x for name, x in tensors.items()}


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(x.shape)} for {tuple(own[name].shape)}"
        for name, x in tensors.items()
        if name in own and own[name].shape != x.shape
    ]
    found = {"missing keys": missing, "unexpected keys": unexpected, "mismatched shapes": shapes}
    problems = "; ".join(f"{kind}: {_few(names)}" for kind, names in found.items() if names)
    if problems:
        raise ModelError(
            f"weights must fit the model {type(model).__name__}, but {path} has {problems}. "
            "Check model.name, model.options and model.weights."
        )


def _few(names: Sequence[str], most: int = 4) -> str:
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
