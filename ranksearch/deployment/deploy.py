"""From a rank map to a file that the network runs from: written aside, read back, compared, and only then put in place.

The comparison is with the compressed network as it was built, before any folding, on real images; where the whole
numbers of a map with widths are written, with the simulation that its search scored.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import inf, isfinite
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.data import Data, to_input
from ranksearch.deployment.int8 import ONNX_INT8
from ranksearch.deployment.portable import ONNX, PT2, SAFETENSORS
from ranksearch.deployment.pt2e import PT2_INT8
from ranksearch.deployment.source import PYTHON
from ranksearch.deployment.target import Job, Runner, Target
from ranksearch.errors import ExportError, RanksearchError, first_line
from ranksearch.export import file_hash, load_compressed, read_compressed
from ranksearch.factors import threads
from ranksearch.handover import compress
from ranksearch.latency import median_ms
from ranksearch.models import build_model
from ranksearch.preparation import Notify, silent, versions
from ranksearch.rankmap import RankMap
from ranksearch.recorded import RECORDED, check_factories, load_recorded, scoring_of
from ranksearch.rounding import rounding_activations
from ranksearch.scoring import RANGE_IMAGES, deployed_ranges
from ranksearch.space import ModelSpec
from ranksearch.storage import Store
from ranksearch.surgery import count_macs, count_params, run_one

TARGETS: dict[str, Target] = {
    "safetensors": SAFETENSORS,
    "pt2": PT2,
    "pt2-int8": PT2_INT8,
    "onnx": ONNX,
    "onnx-int8": ONNX_INT8,
    "python": PYTHON,
}
NOISE = "noise"
"""In place of images: random ones, where the data cannot be had."""
IMAGES = 5000
"""Images on which an export is compared, at most: search-validation and report images."""
TOLERANCE = 1e-4
"""Largest difference of an output: absolute where no output is above 1, else as a share of the largest."""
LEAST_AGREEMENT = 0.9
"""Share of the images for which an export that is not exact must name the same class."""
LEAST_AGREEMENT_WHOLE = 0.97
"""The same, of the whole numbers of a map with widths beside the simulation of its search."""
CALIBRATION_IMAGES = 512
"""Images that such an export is calibrated on, at most."""
LATENCY_BATCHES = (1, 64)
"""Images at a time for which the export is timed."""
_NOISE_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """An exported network beside the one it was made from."""

    images: int
    source: str
    """``recorded``, a file or folder, or ``noise``."""
    top1_agreement: float
    """Share of the images for which both name the same class."""
    max_difference: float
    """Largest difference of any output."""
    largest_output: float
    """Largest magnitude of any output of the network it was made from."""
    accuracy: float | None
    """Top-1 accuracy of the exported network, 0 to 1, on these images; None on noise."""
    accuracy_before: float | None
    """Likewise, of the network it was made from."""
    latency_ms: dict[int, float]
    """Images at a time to milliseconds of one run of the export, on the CPU."""
    threads: int
    """Of the CPU, in all of this."""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What was written."""

    files: tuple[Path, ...]
    manifest: Path
    agreement: Agreement
    rank_map: RankMap
    macs: int
    """Per image, of the network that was written: folding and merging may have left fewer than the map's."""


def deploy(
    file: Path,
    output: Path,
    *,
    to: str,
    images: str | None = None,
    model: str | None = None,
    weights: Path | None = None,
    data: str | None = None,
    storage: str | Path | None = None,
    trust: bool = False,
    notify: Notify = silent,
) -> Deployed:
    """Write the compressed network of a rank map in a format that other programs run, with a manifest beside it.

    The weights are those stored with the map. Where it has none, or ``data`` or ``model`` is given, the dense network
    is decomposed afresh, as :func:`ranksearch.handover.compress` does.

    Args:
        file: the map, or compressed weights that carry one.
        output: file to write; the manifest's name is this with ``.manifest.json`` added.
        to: a key of ``TARGETS``.
        images: what to compare on: ``"recorded"`` by the map's search, a space file, a folder that replaces the
            recorded root, or ``"noise"``. By default ``data``, or else the recorded.
        model: architecture of the dense network.
        weights: of the dense network; only where that is decomposed.
        data: calibration images for activation-aware factors.
        storage: where the cache is.
        trust: whether functions that the map alone names are imported and called.
        notify: told what is being done.

    Raises:
        ExportError: the network cannot be written so, or does not compute the same when it is read back. Then no file
            is left.
        RankMapError, ModelError, DataError, SpaceError: something cannot be read, or does not fit the map.
    """
    target = _target(to, output)
    source = images or data or RECORDED
    if not trust:
        check_factories(read_compressed(file)[0], model=model, data=None if source == NOISE else source)
    _check_weights(file, weights, afresh=data is not None or model is not None)
    with tempfile.TemporaryDirectory() as folder:
        if data is not None or model is not None or read_compressed(file)[1] is None:
            afresh = Path(folder) / "afresh.safetensors"
            compress(file, afresh, model=model, weights=weights, data=data, storage=storage, trust=trust, notify=notify)
            file = afresh
        rank_map, stored = read_compressed(file)
        structure = build_model(ModelSpec(name=rank_map.model.name, options=rank_map.model.options), weights=None)
        network = load_compressed(rank_map, structure, cast(Path, stored))
    _check_outputs(run_one(network, rank_map.model.input_shape), rank_map)
    loaded = None if source == NOISE else load_recorded(rank_map, source, Store(storage).cache, notify)
    job = _job(target, rank_map, network, structure, loaded)
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".export-") as folder:
        aside = Path(folder) / output.name
        notify(f"writing {to}", 0, 1)
        _written(target, job, aside)
        agreement = _compared(target, job, aside, loaded, source, notify)
        manifest = _manifest(to, target, job, Path(folder), agreement, loaded)
        described = Path(folder) / f"{output.name}.manifest.json"
        described.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        files = [output.parent / found.name for found in sorted(Path(folder).iterdir()) if found != described]
        for found in sorted(Path(folder).iterdir()):
            os.replace(found, output.resolve().parent / found.name)
    return Deployed(
        files=tuple(files),
        manifest=output.parent / described.name,
        agreement=agreement,
        rank_map=rank_map,
        macs=manifest["macs"],
    )


def _target(to: str, output: Path) -> Target:
    if to not in TARGETS:
        raise ExportError(f"a network is exported to one of {', '.join(TARGETS)}, found {to!r}. Choose one.")
    target = TARGETS[to]
    if output.suffix != target.suffix:
        raise ExportError(f"a file of {to} must end in {target.suffix}, found {output}. Name it so.")
    if not output.resolve().parent.is_dir() or output.is_dir():
        raise ExportError(f"cannot write {output}: it must be a file in a folder that exists. Make the folder.")
    return target


def _check_weights(file: Path, weights: Path | None, *, afresh: bool) -> None:
    if weights is not None and not afresh and read_compressed(file)[1] is not None:
        raise ExportError(
            f"dense weights are for maps that are decomposed, and {file} has compressed weights stored, which are "
            f"exported as they are: {weights} would not be used. Give --data or --model too, which decompose afresh, "
            "or leave --weights out."
        )


def _check_outputs(outputs: Any, rank_map: RankMap) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not outputs.is_floating_point():
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ExportError(
            f"a network to be exported must give one tensor (N, classes), {rank_map.model.name} gives {found}. "
            "Wrap it in a model that does."
        )


def _job(target: Target, rank_map: RankMap, network: nn.Module, structure: nn.Module, data: Data | None) -> Job:
    """What is to be written; of a map with widths with the ranges of the simulation that it was scored in."""
    ranges = None
    if not target.exact and data is not None and rank_map.widths is not None:
        with threads(scoring_of(rank_map)[0]):
            ranges = deployed_ranges(network, rank_map.widths, data)
    return Job(
        rank_map=rank_map.model_copy(update={"weights": None}),
        network=network,
        structure=structure,
        calibration=_calibration(target, data, whole=ranges is not None),
        ranges=ranges,
    )


def _calibration(target: Target, data: Data | None, *, whole: bool) -> tuple[Tensor, ...]:
    """Batches that an export which is not exact is calibrated on; of whole numbers those that have given the ranges."""
    if target.exact or data is None:
        return ()
    images = data.calibration[: RANGE_IMAGES if whole else CALIBRATION_IMAGES]
    return tuple(to_input(images[start : start + 64], data) for start in range(0, len(images), 64))


def _written(target: Target, job: Job, path: Path) -> None:
    try:
        target.write(job, path)
    except (RanksearchError, OSError):
        raise
    except Exception as error:  # whatever the library of a format raises
        raise ExportError(
            f"{job.rank_map.model.name} cannot be written as {target.suffix}: {first_line(error)}. "
            f"Choose another of {', '.join(TARGETS)}."
        ) from error


@torch.no_grad()
def _compared(target: Target, job: Job, path: Path, data: Data | None, source: str, notify: Notify) -> Agreement:
    """Both networks on the images; raises :class:`ExportError` where they do not compute the same."""
    count, batch_images, _ = scoring_of(job.rank_map)
    total = _NOISE_IMAGES if data is None else min(IMAGES, len(data.search) + len(data.report))
    done = same = right = right_before = 0
    difference = largest = 0.0
    with threads(count), rounding_activations(job.network, job.ranges or {}):
        run = _runner(target, job, path)
        for images, labels in _batches(data, job.rank_map, total, batch_images):
            notify("comparing on images", done, total)
            ours = job.network(images)
            theirs = _outputs(run, images, ours, path)
            gap = float((ours - theirs).abs().max())
            difference = max(difference, gap if isfinite(gap) else inf)
            largest = max(largest, float(ours.abs().max()))
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            if labels is not None:
                right += int((theirs.argmax(1) == labels).sum())
                right_before += int((ours.argmax(1) == labels).sum())
            done += len(images)
        latencies = _latencies(run, job.rank_map)
    found = Agreement(
        images=done,
        source=source,
        top1_agreement=same / done,
        max_difference=difference,
        largest_output=largest,
        accuracy=None if data is None else right / done,
        accuracy_before=None if data is None else right_before / done,
        latency_ms=latencies,
        threads=count,
    )
    if target.exact:
        _check_same(found, path)
    least = LEAST_AGREEMENT if job.ranges is None else LEAST_AGREEMENT_WHOLE
    if not target.exact and (found.top1_agreement < least or not isfinite(difference)):
        raise ExportError(
            f"{path.name} must name the class of the network it was made from for {least:.0%} of the images, "
            f"it does for {found.top1_agreement:.1%}. No file was left; fine-tune the network, or use `--to onnx`."
        )
    return found


def _latencies(run: Runner, rank_map: RankMap) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    return {
        size: median_ms(run, torch.randn((size, *rank_map.model.input_shape), generator=generator), seconds=0.3)
        for size in LATENCY_BATCHES
    }


def _check_same(found: Agreement, path: Path) -> None:
    if found.max_difference > TOLERANCE * max(1.0, found.largest_output) or found.top1_agreement < 1:
        raise ExportError(
            f"an exported network must compute what the compressed one does: outputs within {TOLERANCE} of it (of the "
            f"largest output where that is above 1) and every class the same; {path.name}, read back, differs by up to "
            f"{found.max_difference:.3g} where the largest output is {found.largest_output:.3g}, and names the same "
            f"class for {found.top1_agreement:.2%} of {found.images} images. No file was left. Is there chance in the "
            "network's forward, or a value that is no number?"
        )


def _runner(target: Target, job: Job, path: Path) -> Runner:
    try:
        return target.read(job, path)
    except RanksearchError:
        raise
    except Exception as error:  # whatever the library of a format raises
        raise ExportError(
            f"an export must be readable, {path.name} is not: {first_line(error)}. No file was left; choose another "
            f"of {', '.join(TARGETS)}."
        ) from error


def _outputs(run: Runner, images: Tensor, like: Tensor, path: Path) -> Tensor:
    try:
        found = run(images)
    except RanksearchError:
        raise
    except Exception as error:  # whatever the library of a format raises
        raise ExportError(
            f"an export must run on images of shape {tuple(images.shape)}, {path.name} does not: {first_line(error)}. "
            f"No file was left; choose another of {', '.join(TARGETS)}."
        ) from error
    if found.shape != like.shape:
        raise ExportError(
            f"an export must give outputs {tuple(like.shape)} for images {tuple(images.shape)}, {path.name} gives "
            f"{tuple(found.shape)}. No file was left; choose another of {', '.join(TARGETS)}."
        )
    return found


def _batches(
    data: Data | None, rank_map: RankMap, total: int, batch_images: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and labels; the first batch is a single image, so that more than one size is tried."""
    ends = [0, 1, *range(1 + batch_images, total, batch_images), total]
    noise = torch.Generator().manual_seed(0)
    for start, end in pairwise(ends):
        if end <= start:
            continue
        if data is None:
            yield torch.randn((end - start, *rank_map.model.input_shape), generator=noise), None
            continue
        chosen = np.arange(start, end)
        split, first = data.search, len(data.search)
        parts = [(split, chosen[chosen < first]), (data.report, chosen[chosen >= first] - first)]
        images = np.concatenate([one.images[index] for one, index in parts])
        labels = np.concatenate([one.labels[index] for one, index in parts])
        yield to_input(images, data), torch.from_numpy(labels)


def _version(package: str) -> str:
    """Of the module: what it was installed from may have another name, as onnxruntime-gpu has."""
    return str(importlib.import_module(package).__version__)


def _manifest(
    to: str, target: Target, job: Job, folder: Path, agreement: Agreement, data: Data | None
) -> dict[str, Any]:
    """What was written, from what, with what, and how it compares; JSON types."""
    rank_map, built = job.rank_map, job.folded.model if target.folded else job.network
    known = {**versions(), **{name: _version(name) for name in target.packages}}
    files = {
        found.name: {"sha256": file_hash(found), "bytes": found.stat().st_size} for found in sorted(folder.iterdir())
    }
    shape = rank_map.model.input_shape
    return {
        "schema_name": "ranksearch/export",
        "version": 1,
        "format": to,
        "files": files,
        "input": {
            "shape": ["N", *shape],
            "dtype": "float32",
            "mean": None if data is None else list(data.mean),
            "std": None if data is None else list(data.std),
        },
        "macs": count_macs(built, shape),
        "params": count_params(built),
        "dense_macs": rank_map.dense_macs,
        "dense_params": rank_map.dense_params,
        "batch_norms_folded": job.folded.norms if target.folded else 0,
        "pointwise_merged": job.folded.merged if target.folded else 0,
        "whole_numbers": job.ranges is not None,
        "comparison": asdict(agreement),
        "metrics": dict(rank_map.metrics),
        "versions": dict(sorted(known.items())),
        "rank_map": rank_map.model_dump(mode="json"),
    }
