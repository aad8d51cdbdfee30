"""What comes after a search: a trial's rank map and weights, a map applied afresh, and either beside the dense network.

Accuracies are those of the report images, scored as the trial was: with its batch size, its threads, its device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ranksearch.calibration import collect
from ranksearch.data import Data, to_input
from ranksearch.errors import RankMapError, RebuildError
from ranksearch.export import rank_map_of, read_compressed, save_compressed
from ranksearch.folding import folded
from ranksearch.latency import latency_ms
from ranksearch.launch import rebuild
from ranksearch.preparation import Notify, silent
from ranksearch.rankmap import ModelRecord, RankMap
from ranksearch.recorded import (
    RECORDED,
    Pair,
    check_factories,
    dense_network,
    load_recorded,
    read_pair,
    scoring_of,
    trained_here,
)
from ranksearch.scoring import Score, as_deployed, reproducible, score
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.surgery import apply_rank_map, channels_last, check_fits, count_macs, count_params
from ranksearch.trial import Outcome, Trial, interval

LATENCY_BATCHES = (1, 64)
"""Images at a time for which latency is measured."""
_LATENCY_SECONDS = 0.3
_CPU = torch.device("cpu")


def export_trial(
    study: Study, trial: Trial, store: Store, rank_map: Path, *, weights: Path | None = None, notify: Notify = silent
) -> RankMap:
    """Write the rank map of a complete trial, and its compressed weights if ``weights`` names a file.

    A trial on the front has its weights in the study; any other is built again from its seed, and the map then
    carries the report accuracy measured on the network that was built.

    Raises:
        RebuildError: the network built again does not score as the trial did.
        RankMapError: a file cannot be written.
    """
    _check_targets(rank_map, weights)
    found = rank_map_of(study, trial)
    if weights is None:
        found.save(rank_map)
        return found
    state, outcome = _kept_weights(study, trial) or _rebuilt(study, trial, store, notify)
    found = rank_map_of(study, replace(trial, outcome=outcome))
    found = save_compressed(state, found, weights, rank_map)
    try:
        found.save(rank_map)
    except RankMapError:
        weights.unlink(missing_ok=True)
        raise
    return found


def _check_targets(rank_map: Path, weights: Path | None) -> None:
    for file in (rank_map, *([weights] if weights else [])):
        if not file.resolve().parent.is_dir() or file.is_dir():
            raise RankMapError(f"cannot write {file}: it must be a file in a folder that exists. Make the folder.")
    if weights is not None and weights.suffix == ".json":
        raise RankMapError(f"weights are a safetensors file, found {weights}. Name it with .safetensors.")


def _kept_weights(study: Study, trial: Trial) -> tuple[Mapping[str, Tensor], Outcome] | None:
    outcome = cast(Outcome, trial.outcome)
    file = study.weights_folder / outcome.weights if outcome.weights else None
    if file is None or not file.exists():
        return None
    try:
        return load_file(file), outcome
    except (OSError, SafetensorError) as error:
        raise RankMapError(
            f"cannot read the weights of trial {trial.number}, {file}: {error}. Remove the file; the trial is then "
            "built again."
        ) from error


def _rebuilt(study: Study, trial: Trial, store: Store, notify: Notify) -> tuple[Mapping[str, Tensor], Outcome]:
    recorded = cast(Outcome, trial.outcome)
    with tempfile.TemporaryDirectory() as folder:
        outcome = rebuild(study, trial, store, Path(folder), notify)
        state = load_file(Path(folder) / cast(str, outcome.weights))
    if (outcome.accuracy_search, outcome.macs) != (recorded.accuracy_search, recorded.macs):
        raise RebuildError(
            f"trial {trial.number} built again must score as recorded: accuracy_search {recorded.accuracy_search} at "
            f"{recorded.macs} MACs, found {outcome.accuracy_search} at {outcome.macs}. Versions, processor or data "
            "differ from those of the search: export on the machine that searched, or a trial on the front."
        )
    return state, outcome


def compress(
    rank_map: Path,
    output: Path,
    *,
    model: str | None = None,
    weights: Path | None = None,
    data: str | None = None,
    storage: str | Path | None = None,
    trust: bool = False,
    notify: Notify = silent,
) -> RankMap:
    """Decompose a dense network afresh at the ranks of a map, and write the compressed weights to ``output``.

    Args:
        rank_map: the map, or compressed weights that carry one.
        output: safetensors file to write; it carries the map.
        model: architecture; that of the map by default.
        weights: of the dense network; those the map records by default.
        data: a space file, a folder or ``"recorded"``: its calibration images make the factors activation-aware.
            Without, they are weight-only.
        storage: where the cache is.
        trust: whether functions that the map alone names are imported and called.
        notify: told what is being done.

    Returns:
        the map written: that of ``rank_map`` with the network's record, without the trial's measurements.

    Raises:
        RankMapError: the map is for another model, or a file cannot be read or written.
        ModelError, DataError, SpaceError: network or data cannot be read.
    """
    _check_targets(output, output)
    found = RankMap.load(rank_map) if rank_map.suffix == ".json" else read_compressed(rank_map)[0]
    record, cache = found.model, Store(storage).cache
    if not trust:
        check_factories(found, model=model, data=data)
    if model is not None and model != record.name:
        record = ModelRecord(name=model, input_shape=record.input_shape)
    loaded = load_recorded(found, data, cache, notify) if data is not None else None
    if loaded is None and weights is None and trained_here(record):
        loaded = load_recorded(found, RECORDED, cache, notify)
    dense, record = dense_network(record, weights, loaded, cache, notify)
    statistics = None
    if data is not None and loaded is not None:
        convs = check_fits(found, dense)
        statistics = collect(channels_last(dense), convs, _batches(loaded, scoring_of(found)[1], notify))
    notify("decomposing layers", 0, 1)
    compressed = apply_rank_map(found, dense, statistics, cache=cache)
    factors = "weight-only" if statistics is None else "activation-aware"
    applied = found.model_copy(
        update={
            "model": record,
            "metrics": {},
            "macs": count_macs(compressed, record.input_shape),
            "params": count_params(compressed),
            "provenance": {**found.provenance, "applied_afresh": factors},
        }
    )
    return save_compressed(compressed.state_dict(), applied, output)


def _batches(data: Data, size: int, notify: Notify) -> Iterator[Tensor]:
    total = len(data.calibration)
    for start in range(0, total, size):
        notify("collecting statistics", start, total)
        yield to_input(data.calibration[start : start + size], data, _CPU)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One network on the report images and on this machine."""

    accuracy: float
    """Top-1, 0 to 1."""
    accuracy_low: float
    """Lower end of Wilson's 95 % interval."""
    accuracy_high: float
    loss: float
    """Cross-entropy, nats per image."""
    images: int
    macs: int
    """MACs per image."""
    params: int
    latency_ms: Mapping[int, float]
    """Batch size to milliseconds of one forward pass, batch norms folded and 1x1 neighbours merged."""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types, with ``gmacs`` and one ``latency_ms_batch_N`` a batch size."""
        fields = {name: value for name, value in asdict(self).items() if name != "latency_ms"}
        latencies = {f"latency_ms_batch_{size}": value for size, value in self.latency_ms.items()}
        return {**fields, "gmacs": self.macs / 1e9, **latencies}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A compressed network beside its dense one."""

    rank_map: RankMap
    dense: Measured
    compressed: Measured
    factors: str
    """``stored`` weights, or ``weight-only``: decomposed afresh, as the map has no weights."""
    threads: int
    """CPU threads of scores and latencies."""
    same_dense: bool
    """Whether the dense weights are those that the map was searched with."""


def compare(
    file: Path,
    *,
    data: str = RECORDED,
    weights: Path | None = None,
    storage: str | Path | None = None,
    trust: bool = False,
    notify: Notify = silent,
) -> Comparison:
    """Score a compressed network and the dense one on the report images, and measure their cost.

    Args:
        file: a rank map, whose weights are used where it names them, or compressed weights.
        data: ``"recorded"`` by the map's search, a space file, or a folder that replaces the recorded root.
        weights: of the dense network; those the map records by default.
        storage: where the cache is.
        trust: whether functions that the map alone names are imported and called.
        notify: told what is being done.

    Raises:
        RankMapError, ModelError, DataError, SpaceError: something cannot be read, or does not fit the map.
    """
    pair = read_pair(file, data=data, weights=weights, cache=Store(storage).cache, notify=notify, trust=trust)
    return compare_pair(pair, notify)


def compare_pair(pair: Pair, notify: Notify = silent) -> Comparison:
    """The same for networks that are read already, with images; they end on the device of the search."""
    rank_map, loaded = pair.rank_map, cast(Data, pair.data)
    count, batch_images, device = scoring_of(rank_map)
    measured = []
    with reproducible(count):
        for i, (name, model) in enumerate((("dense", pair.dense), ("compressed", pair.compressed))):
            notify(f"measuring the {name} network", i, 2)
            model = channels_last(model.eval().to(device))
            widths = rank_map.widths if name == "compressed" else None
            with as_deployed(model, widths, loaded):
                found = score(model, loaded.report, loaded, batch_images=batch_images, device=device)
            measured.append(_measured(model, loaded, found))
    return Comparison(
        rank_map=rank_map,
        dense=measured[0],
        compressed=measured[1],
        factors="stored" if pair.stored else "weight-only",
        threads=count,
        same_dense=pair.same_dense,
    )


def _measured(model: nn.Module, data: Data, found: Score) -> Measured:
    low, high = interval(found.accuracy, found.images)
    quick = folded(model, data.input_shape).model
    return Measured(
        accuracy=found.accuracy,
        accuracy_low=low,
        accuracy_high=high,
        loss=found.loss,
        images=found.images,
        macs=count_macs(model, data.input_shape),
        params=count_params(model),
        latency_ms={
            size: latency_ms(quick, data.input_shape, batch_images=size, seconds=_LATENCY_SECONDS)
            for size in LATENCY_BATCHES
        },
    )
