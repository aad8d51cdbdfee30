"""The full fine-tuning of a rank map: its network trained to the end, beside the dense one trained alike if asked for.

A killed fine-tuning goes on when the same command is given again: each network has a checkpoint beside the output,
which is removed when the output is written. Report images are scored before the training and after it, and decide
nothing. Several workers train on Ray, each on its share of every batch; all else is done in this process.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from ranksearch.data import Data
from ranksearch.errors import ModelError, RankMapError
from ranksearch.export import save_compressed
from ranksearch.factors import store
from ranksearch.joint import Crew, run_together
from ranksearch.preparation import Notify, silent
from ranksearch.rankmap import RankMap, WidthsRecord
from ranksearch.recorded import RECORDED, Pair, read_pair, scoring_of
from ranksearch.retraining import Epoch, Retraining, Schedule, Start
from ranksearch.rounding import round_for_good, widths_of
from ranksearch.scoring import as_deployed, deployed_ranges, reproducible, score
from ranksearch.space import FineTuneSpec, ResourcesSpec, TrackingSpec
from ranksearch.storage import Store
from ranksearch.surgery import channels_last
from ranksearch.table import FLOAT_BITS
from ranksearch.training import computes_bfloat16, steps_of
from ranksearch.trial import interval

if TYPE_CHECKING:
    from ranksearch.tracking import RetrainingRun

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes that train together on Ray."""

    count: int
    gpus: int = 0
    """Of each: one, or none to train on CPUs."""
    address: str = "local"
    """Ray cluster; ``local`` starts one on this machine, ``auto`` joins that of this machine."""


_AFTERWARDS = {"compressed": "after", "baseline": "baseline"}
"""What a training is called to what its network's score is."""


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
    workers: Workers | None = None,
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
        threads: of the CPU, in training; those that PyTorch is set to by default, of several workers one each.
        device: ``auto`` takes a GPU where there is one; of several workers their GPUs decide.
        workers: that train together; None trains in this process.
        data: ``"recorded"`` by the map's search, a space file, or a folder that replaces the recorded root.
        weights: of the dense network; those the map records by default.
        trust: whether functions that the map alone names are imported and called.
        tracking: the MLflow store; None tracks nothing.
        storage: where the cache and the default store are.
        notify: told what is being done.
        watch: told of every epoch that this call makes, with ``compressed`` or ``baseline``.

    Raises:
        RankMapError, ModelError, DataError, SpaceError, TrackingError: something cannot be read or written.
        EngineError: the workers do not fit the machines, or died.
        FloatingPointError: a loss is not finite.
    """
    _check_output(output, file)
    where = Store(storage)
    with _crew(workers, threads, notify) as crew:
        pair = read_pair(file, data=data, weights=weights, cache=where.cache, notify=notify, trust=trust)
        images, rank_map = cast(Data, pair.data), pair.rank_map
        _check_batches(spec, len(images.train), workers)
        place = torch.device("cpu") if workers else _device(device)
        schedule = _schedule(spec, workers, place, ema_decay, seed, threads, scoring_of(rank_map)[1])
        starts = _starts(pair, schedule, place, baseline)
        trainings = {k: start.build(place, checkpoint=_checkpoints(output) / f"{k}.pt") for k, start in starts.items()}
        run = None if tracking is None else _tracked(tracking, where, output, rank_map, schedule, trainings)
        scores = _scores(pair, {"dense": pair.dense, "before": pair.compressed})
        with reproducible(schedule.threads):
            trained = {k: _trained(k, starts[k], each, crew, run, notify, watch) for k, each in trainings.items()}
    scores |= _scores(pair, {_AFTERWARDS[name]: model for name, model in trained.items()})
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


@contextmanager
def _crew(workers: Workers | None, threads: int | None, notify: Notify) -> Iterator[Crew | None]:
    """The workers, where there are to be some, on Ray for the time being."""
    if workers is None:
        yield None
        return
    from ranksearch.engine.train import crew  # seconds of imports, so only where it is asked for

    resources = ResourcesSpec(
        engine="ray",
        workers=workers.count,
        cpus_per_trial=threads or 1,
        gpus_per_trial=workers.gpus,
        address=workers.address,
    )
    notify("reaching Ray", 0, 1)
    with crew(resources) as found:
        yield found


def _check_batches(spec: FineTuneSpec, images: int, workers: Workers | None) -> None:
    if not steps_of(spec, images):
        raise ModelError("a fine-tuning makes at least one step, found epochs 0. Give --epochs.")
    if workers and min(spec.batch_images, images) < workers.count:
        raise ModelError(
            f"each worker needs an image of every batch, found batches of {min(spec.batch_images, images)} images for "
            f"{workers.count} workers. Give fewer --workers, or larger batches with --batch-images."
        )


def _checkpoints(output: Path) -> Path:
    """The folder of the checkpoints, while there are some."""
    return output.resolve().parent / f".{output.name}.checkpoints"


def _device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("a GPU must be there to train on one, found none. Give --device cpu.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _schedule(
    spec: FineTuneSpec,
    workers: Workers | None,
    device: torch.device,
    ema_decay: float,
    seed: int,
    threads: int | None,
    batch_images: int,
) -> Schedule:
    return Schedule(
        spec=spec,
        dtype=_dtype(spec, torch.device("cuda") if workers and workers.gpus else device),
        ema_decay=ema_decay,
        seed=seed,
        threads=threads or (1 if workers else torch.get_num_threads()),
        batch_images=batch_images,
        workers=workers.count if workers else 1,
        gpus_per_worker=workers.gpus if workers else 0,
    )


def _dtype(spec: FineTuneSpec, device: torch.device) -> torch.dtype:
    if spec.dtype == "auto":
        if device.type == "cuda" and not torch.cuda.is_available():
            return torch.bfloat16  # GPUs of other machines, which nobody can ask yet
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    found: torch.dtype = getattr(torch, spec.dtype)
    return found


def _starts(pair: Pair, schedule: Schedule, device: torch.device, baseline: bool) -> dict[str, Start]:
    """What the trainings that are asked for begin with."""
    data = cast(Data, pair.data)
    layers = pair.rank_map.layers
    # Rounded factors stay where they are rounded: bringing them to another gauge would undo it.
    chains = {n: (x.format, x.geometry, x.ranks) for n, x in layers.items() if x.bits == FLOAT_BITS}
    bits: dict[str, int] = {}
    if (widths := pair.rank_map.widths) is not None:
        bits = widths_of(pair.compressed, {name: x.bits for name, x in layers.items()}, widths.other_bits)
    with reproducible(schedule.threads):
        ranges = deployed_ranges(channels_last(copy.deepcopy(pair.compressed).eval().to(device)), widths, data)
    start = Start(
        model=pair.compressed,
        dense=pair.dense,
        data=data,
        schedule=schedule,
        chains=chains,
        bits=bits,
        ranges=ranges,
    )
    if not baseline:
        return {"compressed": start}
    return {"compressed": start, "baseline": replace(start, model=pair.dense, chains={}, bits={}, ranges={})}


def _trained(
    name: str,
    start: Start,
    training: Retraining,
    crew: Crew | None,
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

    def progress(done: int, total: int) -> None:
        notify(what, done, total)

    if crew is None:
        model = training.run(progress=progress, watch=grown)
    else:
        notify("waiting for the workers", 0, 1)  # on a busy cluster as long as others have its CPUs
        model = run_together(crew, start, training, progress=progress, watch=grown)
    round_for_good(model)
    return model


def _scores(pair: Pair, networks: Mapping[str, nn.Module]) -> dict[str, Scored]:
    """Of networks by their names; the compressed one, ``before`` and ``after``, computes in its widths."""
    few, data = {"before": pair.rank_map.widths, "after": pair.rank_map.widths}, cast(Data, pair.data)
    return {name: _scored(model, data, pair.rank_map, few.get(name)) for name, model in networks.items()}


def _scored(model: nn.Module, data: Data, rank_map: RankMap, widths: WidthsRecord | None) -> Scored:
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
