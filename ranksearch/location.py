"""Where the files of a space are: its paths made absolute, so that a study can be continued from any folder."""

from __future__ import annotations

import os
from pathlib import Path

from ranksearch.errors import ModelError
from ranksearch.models import find_weights
from ranksearch.space import DataSpec, Space


def located(space: Space, base: Path | None = None) -> Space:
    """The space with its paths made absolute, so that the study can be continued from any folder.

    Relative rank maps are looked for in the working directory, then in ``base`` (the space file's folder), the data as
    :func:`located_data` does; weights in ``data.root`` first, then in ``base``, then in the working directory.

    Raises:
        ModelError: weights that cannot be found, or that are needed and not given.
    """
    data = located_data(space.data, base)
    weights = space.model.weights
    if weights is not None:
        given = [Path(data.root)] if space.data.root and data.root else []
        weights = str(find_weights(weights, [*given, *reversed(_folders(base))]).resolve())
    elif ":" not in space.model.name and space.model.name != "digits-cnn":
        raise ModelError(
            f"$.model.weights must name the pretrained weights of {space.model.name}, found none. "
            "Give a safetensors file or a state dict, e.g. --set model.weights=resnet20.safetensors."
        )
    maps = [_absolute(path, base) for path in space.strategy.seed_maps]
    latency = space.latency
    if latency is not None and latency.table is not None:
        latency = latency.model_copy(update={"table": _absolute(latency.table, base)})
    return space.model_copy(
        update={
            "data": data,
            "model": space.model.model_copy(update={"weights": weights}),
            "strategy": space.strategy.model_copy(update={"seed_maps": maps}),
            "latency": latency,
        }
    )


def located_data(spec: DataSpec, base: Path | None = None) -> DataSpec:
    """The data with an absolute root: of the working directory and ``base``, the first that has the training files."""
    files = {"npz": spec.train, "folder": spec.train or ["train"]}.get(spec.source)
    if files is None and spec.root is None:
        return spec
    root = _absolute(spec.root or ".", base, holding=(files or ["."])[0])
    return spec.model_copy(update={"root": root})


def _folders(base: Path | None) -> list[Path]:
    return [Path.cwd(), *([base] if base else [])]


def _absolute(path: str, base: Path | None, holding: str = ".") -> str:
    """``path`` under the first folder where ``holding`` is in it, else where it exists, else the working directory."""
    places = [folder / os.path.expanduser(path) for folder in _folders(base)]
    found = [p for p in places if (p / holding).exists()] or [p for p in places if p.exists()] or places
    return str(found[0].resolve())
