"""What a rank map records of its search, loaded again: the data, the dense network, how it was scored."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from ranksearch.config import load_space
from ranksearch.data import Data, load_data
from ranksearch.errors import DataError, ModelError, RankMapError
from ranksearch.export import load_compressed, read_compressed
from ranksearch.location import located_data
from ranksearch.models import build_model, digits_weights
from ranksearch.preparation import Notify, check_classes, weights_hash
from ranksearch.rankmap import ModelRecord, RankMap
from ranksearch.space import DataSpec, ModelSpec
from ranksearch.surgery import apply_rank_map

RECORDED = "recorded"
"""In place of a file or folder: the data that the rank map's search used."""

_DEFAULTS = {"seed": 0, "batch_images": 256, "cpus_per_trial": 1, "gpus_per_trial": 0}
_LEAST = {"batch_images": 1, "cpus_per_trial": 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The networks of a rank map, in evaluation mode on the CPU, and the images to see them on."""

    rank_map: RankMap
    dense: nn.Module
    compressed: nn.Module
    data: Data | None
    """None where no images were asked for."""
    stored: bool
    """Whether the compressed weights were stored with the map, not decomposed afresh."""
    same_dense: bool
    """Whether the dense weights are those that the map was searched with."""


def check_factories(rank_map: RankMap, *, model: str | None, data: str | None) -> None:
    """Refuse functions that only the map names: one from elsewhere may name any, with any arguments.

    Raises:
        RankMapError: there is one that neither ``model`` nor the space file ``data`` names too.
    """
    known = {model}
    path = Path(data).expanduser() if data not in (None, RECORDED) else None
    if path is not None and path.is_file():
        space = load_space(path)
        # What is called with the map's own options, not the file's, is known only where these are the same.
        known.add(space.model.name if space.model.options == rank_map.model.options else None)
    named = [rank_map.model.name] if model in (None, rank_map.model.name) else []
    recorded = rank_map.provenance.get("data")
    read = data is not None or trained_here(rank_map.model)
    if isinstance(recorded, dict) and read and (path is None or not path.is_file()):
        named.append(str(recorded.get("source")))
    strangers = [name for name in named if ":" in name and name not in known]
    if strangers:
        raise RankMapError(
            f"a function that a rank map names is called only where you name it too, the map names {strangers[0]}. "
            "Give --trust if the map is yours or you know what the function does, or --data SPACE.yaml that names it."
        )


def read_pair(
    file: Path,
    *,
    data: str | None,
    weights: Path | None,
    cache: Path,
    notify: Notify,
    afresh: bool = False,
    trust: bool = False,
) -> Pair:
    """The networks of a rank map, or of compressed weights, which carry one.

    Args:
        file: the map, whose weights are used where it names them, or the weights.
        data: ``"recorded"`` by the map's search, a space file, a folder that replaces the recorded root, or None.
        weights: of the dense network; those the map records by default.
        cache: folder of decompositions and trained networks.
        notify: told what is being done.
        afresh: whether to decompose, weight-only, though there are stored weights.
        trust: whether functions that the map alone names are imported and called.

    Raises:
        RankMapError, ModelError, DataError, SpaceError: something cannot be read, or does not fit the map.
    """
    rank_map, stored = read_compressed(file)
    if not trust:
        check_factories(rank_map, model=None, data=data)
    loaded = None if data is None else load_recorded(rank_map, data, cache, notify)
    teacher = loaded
    if teacher is None and weights is None and trained_here(rank_map.model):
        teacher = load_recorded(rank_map, RECORDED, cache, notify)
    dense, found = dense_network(rank_map.model, weights, teacher, cache, notify)
    if loaded is not None:
        check_classes(dense, loaded)
    if stored is None or afresh:
        notify("decomposing layers", 0, 1)
        compressed = apply_rank_map(rank_map, dense, cache=cache)
    else:
        compressed = load_compressed(rank_map, dense, stored)
    return Pair(
        rank_map=rank_map,
        dense=dense,
        compressed=compressed.eval(),
        data=loaded,
        stored=stored is not None and not afresh,
        same_dense=rank_map.model.weights_sha256 in (None, found.weights_sha256),
    )


def scoring_of(rank_map: RankMap) -> tuple[int, int, torch.device]:
    """How the search scored: CPU threads, images at a time, and the device where this machine has it.

    Raises:
        RankMapError: the map records no number.
    """
    on_gpu = provenance_of(rank_map, "gpus_per_trial") > 0 and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return int(provenance_of(rank_map, "cpus_per_trial")), int(provenance_of(rank_map, "batch_images")), device


def provenance_of(rank_map: RankMap, key: str) -> Any:
    """A number that the map records of its search, or its default; raises :class:`RankMapError` where it is none."""
    value, least = rank_map.provenance.get(key, _DEFAULTS[key]), _LEAST.get(key, 0)
    number = isinstance(value, int) or (isinstance(value, float) and key == "gpus_per_trial" and isfinite(value))
    if isinstance(value, bool) or not number or value < least:
        kind = "number" if key == "gpus_per_trial" else "whole number"
        raise RankMapError(
            f"provenance.{key} of the rank map must be a {kind} from {least} on, found {value!r}. Export it again."
        )
    return value


def load_recorded(rank_map: RankMap, data: str, cache: Path, notify: Notify) -> Data:
    """The data named on a command line, for the network of a map."""
    spec = _data_spec(rank_map, data)
    found = load_data(
        spec,
        cache=cache,
        seed=provenance_of(rank_map, "seed"),
        progress=lambda done, total: notify("reading images", done, total),
    )
    if found.input_shape != rank_map.model.input_shape:
        raise DataError(
            f"images must have the shape {rank_map.model.input_shape} (channels, height, width) of the rank map, found "
            f"{found.input_shape}. Give the data of that network."
        )
    return found


def _data_spec(rank_map: RankMap, data: str) -> DataSpec:
    path = Path(data).expanduser()
    if data != RECORDED and path.is_file():
        return located_data(load_space(path).data, path.resolve().parent)
    try:
        recorded = DataSpec.model_validate(rank_map.provenance["data"])
    except (KeyError, ValidationError) as error:
        raise RankMapError(
            "the rank map must record its data, or a space file with a data section must be given, found neither. "
            "Give --data SPACE.yaml."
        ) from error
    if data == RECORDED:
        return recorded
    if not path.is_dir():
        raise DataError(f"data must be a space file, a folder or `{RECORDED}`, found {data!r}. Check the path.")
    if recorded.source not in ("npz", "folder"):
        raise DataError(
            f"a folder replaces the root of .npz files or image folders, the data that the rank map records come from "
            f"{recorded.source!r}. Give a space file with the data, or `{RECORDED}`."
        )
    return recorded.model_copy(update={"root": str(path.resolve())})


def trained_here(record: ModelRecord) -> bool:
    """Whether the dense network has no weights file but the one trained on its data."""
    return record.name == "digits-cnn" and not (record.weights and Path(record.weights).is_file())


def dense_network(
    record: ModelRecord, weights: Path | None, data: Data | None, cache: Path, notify: Notify
) -> tuple[nn.Module, ModelRecord]:
    """The dense network, on the CPU, and its record."""
    file = weights or (Path(record.weights) if record.weights else None)
    if weights is None and data is not None and trained_here(record):
        file = digits_weights(
            cache, data, progress=lambda done, total: notify("training the digits network", done, total)
        )
    if file is None and ":" not in record.name:
        raise ModelError(f"the dense weights of {record.name} must be given, found none. Give --weights FILE.")
    if file is not None and not file.is_file():
        raise ModelError(f"the dense weights {file} of {record.name} must exist. Give --weights FILE.")
    model = build_model(ModelSpec(name=record.name, options=record.options), weights=file)
    known = record.model_copy(
        update={"weights": str(file.resolve()) if file else None, "weights_sha256": weights_hash(model)}
    )
    return model, known
