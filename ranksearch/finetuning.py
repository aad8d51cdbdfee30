"""The full fine-tuning of a rank map: its network trained to the end, beside the dense one trained alike if asked for.

A killed fine-tuning goes on when the same command is given again: each network has a checkpoint beside the output,
which is removed when the output is written. Report images are scored before the training and after it, and decide
nothing.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from ranksearch.data import Data
from ranksearch.errors import ModelError, RankMapError
from ranksearch.evaluation import as_deployed, deployed_ranges, reproducible, score
from ranksearch.export import save_compressed
from ranksearch.factors import store
from ranksearch.preparation import Notify, silent
from ranksearch.rankmap import RankMap, WidthsRecord
from ranksearch.recorded import RECORDED, Pair, read_pair, scoring_of
from ranksearch.refit import Chain
from ranksearch.retraining import Epoch, Retraining, Schedule
from ranksearch.rounding import round_for_good, round_while_training, widths_of
from ranksearch.space import FineTuneSpec, TrackingSpec
from ranksearch.storage import Store
from ranksearch.surgery import channels_last
from ranksearch.table import FLOAT_BITS
from ranksearch.training import computes_bfloat16, steps_of
from ranksearch.trial import interval

if TYPE_CHECKING:
    from ranksearch.tracking import RetrainingRun

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One network on the report images."""

    accuracy: float
    """Top-1, 0 to 1."""
    accuracy_low: float
    """Lower end of Wilson's 95 % interval."""
    accuracy_high: float
    accuracy_search: float
    """On the search-validation images."""
    loss: float
    """Cross-entropy on the search-validation images, nats per image."""


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What a fine-tuning ended in."""

    rank_map: RankMap
    """With the new weights and metrics."""
    scores: Mapping[str, Scored]
    """``dense``, ``before``, ``after``, and where it was asked for ``baseline``: the dense network trained alike."""
    curves: Mapping[str, list[Epoch]]
    """``compressed``, and where it was asked for ``baseline``."""
    report_images: int
    files: tuple[Path, ...]


def finetune(
    file: Path,
    output: Path,
    *,
    spec: FineTuneSpec,
    ema_decay: float = 0.999,
    baseline: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: Device = "auto",
    data: str = RECORDED,
    weights: Path | None = None,
    trust: bool = False,
    tracking: TrackingSpec | None = None,
    storage: str | Path | None = None,
    notify: Notify = silent,
    watch: Callable[[str, Epoch], None] = lambda name, epoch: None,
) -> FineTuned:
    """Train the network of a rank map, and write the map with its new weights.

    It starts from the map's weights, or where it has none from weight-only factors.

    Args:
        file: the map, or compressed weights that carry one.
        output: the new map, ``.json``; the weights go beside it, as ``.safetensors``, those of the baseline as
            ``-dense.safetensors``.
        spec: length, rates, distillation.
        ema_decay: of the average of the weights; 0 keeps none.
        baseline: whether the dense network is trained on the same schedule too.
        seed: of batches and their changes.
        threads: of the CPU, in training; those that PyTorch is set to by default.
        device: ``auto`` takes a GPU where there is one.
        data: ``"recorded"`` by the map's search, a space file, or a folder that replaces the recorded root.
        weights: of the dense network; those the map records by default.
        trust: whether functions that the map alone names are imported and called.
        tracking: the MLflow store; None tracks nothing.
        storage: where the cache and the default store are.
        notify: told what is being done.
        watch: told of every epoch that this call makes, with ``compressed`` or ``baseline``.

    Raises:
        RankMapError, ModelError, DataError, SpaceError, TrackingError: something cannot be read or written.
        FloatingPointError: a loss is not finite.
    """
    _check_output(output, file)
    where = Store(storage)
    pair = read_pair(file, data=data, weights=weights, cache=where.cache, notify=notify, trust=trust)
    images, rank_map = cast(Data, pair.data), pair.rank_map
    if not steps_of(spec, len(images.train)):
        raise ModelError("a fine-tuning makes at least one step, found epochs 0. Give --epochs.")
    place = _device(device)
    schedule = Schedule(
        spec=spec,
        dtype=_dtype(spec, place),
        ema_decay=ema_decay,
        seed=seed,
        threads=threads or torch.get_num_threads(),
        batch_images=scoring_of(rank_map)[1],
    )
    trainings = _trainings(pair, schedule, output, place, baseline)
    run = None if tracking is None else _tracked(tracking, where, output, rank_map, schedule, trainings)
    widths = rank_map.widths
    scores = {"dense": _scored(pair.dense, images, rank_map)}
    scores["before"] = _scored(pair.compressed, images, rank_map, widths)
    trained: dict[str, nn.Module] = {}
    with reproducible(schedule.threads):
        for name, training in trainings.items():
            trained[name] = _trained(name, training, run, notify, watch)
            round_for_good(trained[name])
    scores["after"] = _scored(trained["compressed"], images, rank_map, widths)
    if baseline:
        scores["baseline"] = _scored(trained["baseline"], images, rank_map)
    curves = {name: training.curve for name, training in trainings.items()}
    found, files = _written(trained, output, _described(rank_map, schedule, scores, curves, len(images.report)))
    if run is not None:
        _finished(run, scores, found)
    shutil.rmtree(_checkpoints(output), ignore_errors=True)
    return FineTuned(rank_map=found, scores=scores, curves=curves, report_images=len(images.report), files=files)


def _check_output(output: Path, file: Path) -> None:
    if output.suffix != ".json" or not output.resolve().parent.is_dir() or output.is_dir():
        raise RankMapError(
            f"the new rank map must be a .json file in a folder that exists, found {output}. The weights go beside it."
        )
    if output.resolve() == file.resolve():
        raise RankMapError(f"the new rank map must not replace the one it starts from, {file}. Give another file.")


def _checkpoints(output: Path) -> Path:
    """The folder of the checkpoints, while there are some."""
    return output.resolve().parent / f".{output.name}.checkpoints"


def _device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("a GPU must be there to train on one, found none. Give --device cpu.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(spec: FineTuneSpec, device: torch.device) -> torch.dtype:
    if spec.dtype == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    found: torch.dtype = getattr(torch, spec.dtype)
    return found


def _trainings(
    pair: Pair, schedule: Schedule, output: Path, device: torch.device, baseline: bool
) -> dict[str, Retraining]:
    """The trainings that are asked for, each where its checkpoint is."""
    dense = channels_last(copy.deepcopy(pair.dense).eval().to(device))
    layers = pair.rank_map.layers
    # Rounded factors stay where they are rounded: bringing them to another gauge would undo it.
    chains = {n: (x.format, x.geometry, x.ranks) for n, x in layers.items() if x.bits == FLOAT_BITS}
    starts: dict[str, tuple[nn.Module, Mapping[str, Chain], WidthsRecord | None]]
    starts = {"compressed": (pair.compressed, chains, pair.rank_map.widths)}
    if baseline:
        starts["baseline"] = (pair.dense, {}, None)
    found: dict[str, Retraining] = {}
    for name, (start, replaced, widths) in starts.items():
        model = channels_last(copy.deepcopy(start).eval().to(device))
        with reproducible(schedule.threads):
            ranges = deployed_ranges(model, widths, cast(Data, pair.data))
        if widths is not None:
            bits = {layer: record.bits for layer, record in layers.items()}
            round_while_training(model, widths_of(model, bits, widths.other_bits))
        found[name] = Retraining(
            model,
            dense,
            cast(Data, pair.data),
            schedule,
            chains=replaced,
            ranges=ranges,
            checkpoint=_checkpoints(output) / f"{name}.pt",
        )
    return found


def _trained(
    name: str,
    training: Retraining,
    run: RetrainingRun | None,
    notify: Notify,
    watch: Callable[[str, Epoch], None],
) -> nn.Module:
    seen = len(training.curve)
    prefix = "" if name == "compressed" else f"{name}_"

    def grown(curve: list[Epoch]) -> None:
        if run is not None:
            run.log(prefix, [asdict(epoch) for epoch in curve])
        for epoch in curve[seen:][-1:]:
            watch(name, epoch)

    what = f"fine-tuning the {'compressed' if name == 'compressed' else 'dense'} network"
    return training.run(progress=lambda done, total: notify(what, done, total), watch=grown)


def _scored(model: nn.Module, data: Data, rank_map: RankMap, widths: WidthsRecord | None = None) -> Scored:
    """As ``ranksearch evaluate`` scores: with the threads, the batches and the device of the search."""
    count, batch_images, device = scoring_of(rank_map)
    model = channels_last(copy.deepcopy(model).eval().to(device))
    with reproducible(count), as_deployed(model, widths, data):
        search, report = (
            score(model, split, data, batch_images=batch_images, device=device) for split in (data.search, data.report)
        )
    low, high = interval(report.accuracy, report.images)
    return Scored(
        accuracy=report.accuracy,
        accuracy_low=low,
        accuracy_high=high,
        accuracy_search=search.accuracy,
        loss=search.loss,
    )


def _described(
    rank_map: RankMap,
    schedule: Schedule,
    scores: Mapping[str, Scored],
    curves: Mapping[str, list[Epoch]],
    report_images: int,
) -> RankMap:
    """The map with what was measured and how it was trained."""
    after, dense = scores["after"], scores["dense"]
    metrics: dict[str, float | int | None] = {
        "accuracy": after.accuracy,
        "accuracy_search": after.accuracy_search,
        "loss": after.loss,
        "report_images": report_images,
        "dense_accuracy": dense.accuracy,
        "dense_accuracy_search": dense.accuracy_search,
        "dense_loss": dense.loss,
        "accuracy_before_finetune": scores["before"].accuracy,
    }
    if "baseline" in scores:
        metrics["dense_accuracy_finetuned"] = scores["baseline"].accuracy
    record = {**_settings(schedule), "curves": {name: [asdict(e) for e in curve] for name, curve in curves.items()}}
    return rank_map.model_copy(
        update={"metrics": metrics, "weights": None, "provenance": {**rank_map.provenance, "finetune": record}}
    )


def _settings(schedule: Schedule) -> dict[str, Any]:
    """The schedule in JSON types."""
    others = {name: value for name, value in asdict(schedule).items() if name not in ("spec", "dtype")}
    dtype = str(schedule.dtype).removeprefix("torch.")
    return {**schedule.spec.model_dump(mode="json"), **others, "dtype": dtype}


def _written(trained: Mapping[str, nn.Module], output: Path, rank_map: RankMap) -> tuple[RankMap, tuple[Path, ...]]:
    weights, files = output.with_suffix(".safetensors"), [output]
    found = save_compressed(trained["compressed"].state_dict(), rank_map, weights, output)
    files.append(weights)
    if "baseline" in trained:
        dense = output.with_name(f"{output.stem}-dense.safetensors")
        store(trained["baseline"].state_dict(), dense)
        files.append(dense)
    found.save(output)
    return found, tuple(files)


def _tracked(
    spec: TrackingSpec,
    where: Store,
    output: Path,
    rank_map: RankMap,
    schedule: Schedule,
    trainings: Mapping[str, Retraining],
) -> RetrainingRun:
    from ranksearch.tracking import RetrainingRun

    text = "\n".join([str(output.resolve()), *(f"{k}: {v.identity}" for k, v in trainings.items())])
    params = {**_settings(schedule), "model": rank_map.model.name, "macs": rank_map.macs, "output": str(output)}
    uid = hashlib.sha256(text.encode()).hexdigest()[:32]
    return RetrainingRun(spec, where.folder, name=output.stem, uid=uid, params=params)


def _finished(run: RetrainingRun, scores: Mapping[str, Scored], rank_map: RankMap) -> None:
    metrics = {
        f"final_{name}_{key}": float(value) for name, one in scores.items() for key, value in asdict(one).items()
    }
    run.finish(
        {**metrics, "macs_ratio": rank_map.macs_ratio}, {"ranksearch.study": str(rank_map.provenance.get("study", ""))}
    )
