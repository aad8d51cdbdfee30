"""From a space to a bench: everything that is done once, before the first trial.

The network and the data are read, the layers selected, the calibration statistics gathered, every layer decomposed
at full rank, the candidates priced, and the dense network scored.
"""

from __future__ import annotations

import builtins
import importlib.metadata
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.calibration import collect, sample_outputs
from ranksearch.conv import Conv
from ranksearch.data import Data, load_data, to_input
from ranksearch.decompositions import Statistics
from ranksearch.errors import DataError, ModelError, Problem, SpaceError, StudyError
from ranksearch.evaluation import Bench, device_of
from ranksearch.factors import cached, content_hash, store_cached
from ranksearch.interpolation import interpolated, sampled
from ranksearch.latency import LatencyTable, latencies, rank_multiple, with_latencies
from ranksearch.measurement import ONWARD, PRICES
from ranksearch.mirror import fetch, offer
from ranksearch.models import build_model, digits_weights, load_weights
from ranksearch.prices import Map, Measured, measure, with_prices
from ranksearch.pricing import Factors, Selection, check_reachable, decompose, kinds, price, select
from ranksearch.rankmap import ModelRecord, RankMap
from ranksearch.scoring import Score, score
from ranksearch.setting import Setting
from ranksearch.space import LatencySpec, Space
from ranksearch.spectra import with_spectra
from ranksearch.strategies import READ_SPECTRA, prices_read, runs_funnels
from ranksearch.surgery import channels_last, count_macs, count_params
from ranksearch.table import GATEABLE, PREDICTED, PriceTable
from ranksearch.training import computes_bfloat16, steps_of

Notify = Callable[[str, int, int], None]
"""Called with what is being done, and how many parts of how many are done."""

_PIXELS = 64
"""Output pixels of an image at which regression targets are kept."""


_PRICE_BATCH, _PRICE_BATCH_VALUES = 32, 2**20
"""Images that prices are measured on at a time, at most, and the values that they have together, at most: all their
activations and gradients are held."""
_PARALLEL_MACS = 1e11
"""Work that takes a core some seconds: less is done before other workers have started."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """The dense network of a space with its data."""

    space: Space
    model: nn.Module
    data: Data
    record: ModelRecord
    selection: Selection

    def inputs(self, images: int | None = None) -> Iterator[Tensor]:
        """Calibration images (the first ``images``), batch by batch, as network inputs."""
        chosen = self.data.calibration[:images]
        size = self.space.evaluation.batch_images
        for start in range(0, len(chosen), size):
            yield to_input(chosen[start : start + size], self.data, device_of(self.space))


def read_network(space: Space, cache: Path, notify: Notify = silent) -> Network:
    """Read data and network, and select the layers.

    Raises:
        DataError, ModelError, SpaceError: as reading and selecting them do.
    """
    weights = Path(space.model.weights) if space.model.weights else None
    model = build_model(space.model, weights=weights)  # before the images, which may take long to decode
    data = load_data(
        space.data, cache=cache, seed=space.seed, progress=lambda done, total: notify("reading images", done, total)
    )
    if space.model.name == "digits-cnn" and weights is None:
        weights = digits_weights(
            cache, data, progress=lambda done, total: notify("training the digits network", done, total)
        )
        load_weights(model, weights)
    record = ModelRecord(
        name=space.model.name,
        options=space.model.options,
        input_shape=data.input_shape,
        weights=str(weights) if weights else None,
        weights_sha256=weights_hash(model),
    )
    selection = select(space, model, data.input_shape)
    check_classes(model, data)
    model = channels_last(model.to(device_of(space)))
    return Network(space=space, model=model, data=data, record=record, selection=selection)


@torch.no_grad()
def check_classes(model: nn.Module, data: Data) -> None:
    """Check that the network, in evaluation mode, has an output for every class of the data.

    Raises:
        ModelError: its output is not a tensor.
        DataError: it has too few outputs.
    """
    outputs: Any = model(to_input(data.report.images[:1], data, next(model.parameters()).device))
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the network must return one tensor of logits (images, classes), found {type(outputs).__name__}. "
            "Wrap it in a module whose forward returns the logits alone, in a factory package.module:function."
        )
    if outputs.ndim != 2 or outputs.shape[1] < data.classes:
        raise DataError(
            f"labels must lie among the network's outputs, found {data.classes} classes for outputs of shape "
            f"{tuple(outputs.shape)}. Correct the labels, or model.options (num_classes)."
        )


def weights_hash(model: nn.Module) -> str:
    """Hash of a network's state: names, shapes and values; counters of batches seen are left out."""
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    return content_hash(state.values(), " ".join(state))


def statistics_of(network: Network, convs: Mapping[str, Conv], cache: Path, notify: Notify) -> dict[str, Statistics]:
    """Statistics of the named layers on the calibration images, from the cache where they are there."""
    images = torch.tensor(network.data.calibration)  # copied: torch warns of images that are mapped read-only
    text = f"{network.record.weights_sha256} {sorted(convs.items())} {network.data.mean} {network.data.std}"
    # Equal weights may stand in another forward pass: the outputs tell.
    with torch.no_grad():
        outputs = network.model(next(network.inputs()))
    path = cache / "statistics" / f"{content_hash([images, outputs], text)}.safetensors"
    fields = tuple(Statistics.__dataclass_fields__)
    device = device_of(network.space)
    fetched = False
    if (flat := cached(path)) is None and (fetched := fetch(path, cache)):
        flat = cached(path)
    if flat is not None:
        return {name: Statistics(**{f: flat[f"{name}/{f}"].to(device) for f in fields}) for name in convs}
    total = len(network.data.calibration)

    def told() -> Iterator[Tensor]:
        done = 0
        for batch in network.inputs():
            notify("collecting statistics", done, total)
            done += len(batch)
            yield batch

    found = collect(network.model, convs, told())
    store_cached({f"{name}/{f}": getattr(s, f) for name, s in found.items() for f in fields}, path)
    offer(path, cache, anew=fetched)
    return found


def with_rank_multiple(network: Network, cache: Path, notify: Notify = silent, *, timed: bool = False) -> Network:
    """The network, with a space that says its rank multiple; measured where its latency counts and it was left open.

    Args:
        network: the dense network.
        cache: folder of the cache.
        notify: told what is being timed.
        timed: measure it even where no objective or limit is the latency.

    Raises:
        LatencyError: latencies cannot be measured, or those brought along not be read.
    """
    space = network.space
    if space.ranks.rank_multiple is not None:
        return network
    found, spec = 1, space.latencies or LatencySpec()
    if spec.table is not None:
        found = LatencyTable.load(Path(spec.table)).rank_multiple
    elif timed or space.needs_latencies:
        layers = [(network.selection.layers[n].conv, forms[0]) for n, forms in network.selection.searched.items()]
        found = rank_multiple(
            layers,
            spec,
            threads=space.resources.threads,
            device=device_of(space),
            versions=versions(),
            cache=cache,
            progress=notify,
        )
    ranks = space.ranks.model_copy(update={"rank_multiple": found})
    return replace(network, space=space.model_copy(update={"ranks": ranks}))


def factorise(network: Network, cache: Path, notify: Notify = silent) -> tuple[Factors, dict[str, str]]:
    """The prepared factors of every layer, and the layers that could not be decomposed with the reason."""
    statistics = statistics_of(network, network.selection.convs(), cache, notify)
    return decompose(
        network.space,
        network.selection,
        network.model,
        statistics,
        cache=cache,
        progress=lambda done, total: notify("decomposing layers", done, total),
    )


def settle(
    network: Network,
    factors: Factors,
    failed: Mapping[str, str],
    cache: Path,
    notify: Notify = silent,
    map: Map = builtins.map,
    *,
    priced: bool = True,
) -> Setting:
    """Price the candidates and score the dense network: the setting of a new search.

    Args:
        network: the dense network with its data.
        factors: as :func:`factorise` gives them, as is ``failed``.
        failed: layers that could not be decomposed, with the reason.
        cache: folder of the cache.
        notify: told what is being done.
        map: measures prices in parallel where that takes long; the setting does not depend on it.
        priced: measure the prices that the strategy reckons with; without them it cannot search.

    Raises:
        BudgetError, SpaceError: no candidate meets the budget, or no layer has one.
        LatencyError: latencies that the space asks for cannot be measured or read.
        RankMapError: a map of the user's cannot be read, or has impossible ranks, or such as cost no less than dense.
    """
    space, selection = network.space, network.selection
    maps = [RankMap.load(path) for path in space.strategy.seed_maps]
    table, dear = price(space, selection, factors, maps)
    strategies = {space.strategy.name, *space.strategy.seeds}
    if runs_funnels(space.strategy):
        _check_gateable(space, table)
    if READ_SPECTRA & strategies:
        table = with_spectra(table, network.model)
    priced_seconds = 0.0
    if priced and (prices := prices_read(space.strategy) - {PREDICTED}):
        measured = _measured(network, table, factors, prices, cache, notify, map)
        table, priced_seconds = with_prices(table, measured.prices), measured.seconds
    if space.latencies is not None:
        latencies = latencies_of(network, table, cache, notify)
        table = with_latencies(table, latencies, faster="latency" in space.objectives)
        check_reachable(table, space.budget)  # candidates that are no faster than dense are gone
    notify("scoring the dense network", 0, 1)
    search, report = _dense_scores(network, cache)
    return Setting(
        space=space,
        table=table,
        model=network.record,
        data_digest=network.data.digest,
        dense={
            "accuracy": report.accuracy,
            "accuracy_search": search.accuracy,
            "loss": search.loss,
            "macs": count_macs(network.model, network.data.input_shape),
            "params": count_params(network.model),
            **({} if table.timing is None else {"latency_ms": table.timing.dense_ms}),
        },
        left_dense={**selection.dense, **failed, **dear},
        classes=network.data.classes,
        dtype=_fine_tuning_dtype(network),
        versions=versions(),
        priced_seconds=priced_seconds,
    )


@torch.no_grad()
def _dense_scores(network: Network, cache: Path) -> tuple[Score, Score]:
    """Of the dense network on the search and on the report images, from the cache where they are there."""
    data, device, batch = network.data, device_of(network.space), network.space.evaluation.batch_images
    # Equal weights may stand in another forward pass, and other devices round otherwise: outputs tell.
    outputs = network.model(to_input(data.search.images[:batch], data, device))
    about = (network.record.weights_sha256, data.digest, data.mean, data.std, batch, torch.get_num_threads(), device)
    path = cache / "scores" / f"{content_hash([outputs], ' '.join(map(str, about)))}.safetensors"
    splits = (data.search, data.report)
    known = cached(path)
    if known is None:
        found = [score(network.model, split, data, batch_images=batch, device=device) for split in splits]
        known = {f: torch.tensor([getattr(s, f) for s in found], dtype=torch.float64) for f in ("accuracy", "loss")}
        store_cached(known, path)
    pairs = zip(known["accuracy"].tolist(), known["loss"].tolist(), splits, strict=True)
    search, report = (Score(accuracy=a, loss=loss, images=len(split.labels)) for a, loss, split in pairs)
    return search, report


def check_dense(network: Network, setting: Setting, cache: Path) -> None:
    """Check that the dense network still does on the search images what it did when the study began.

    Raises:
        StudyError: its forward pass has changed, of which the hash of the weights says nothing.
    """
    search, _ = _dense_scores(network, cache)
    if not setting.loses(search.loss):
        raise StudyError(
            f"the network must do what it did when the study began, found a loss of {search.loss:.6g} on the search "
            f"images for {setting.dense['loss']:.6g}: the forward pass of {network.record.name} has changed since. "
            "Restore it, or search again."
        )


def latencies_of(network: Network, table: PriceTable, cache: Path, notify: Notify = silent) -> LatencyTable:
    """The latencies of all candidates of ``table``, as the space wants them: measured, or brought along.

    Raises:
        LatencyError: they cannot be measured or read.
    """
    space = network.space
    return latencies(
        network.model,
        network.data.input_shape,
        table,
        space.latencies or LatencySpec(),
        threads=space.resources.threads,
        versions=versions(),
        rank_multiple=space.ranks.multiple,
        cache=cache,
        progress=notify,
    )


def _check_gateable(space: Space, table: PriceTable) -> None:
    """Raise :class:`SpaceError` where no searched layer has a candidate that a funnel run can gate, in float32."""
    if space.quantise is not None:
        problem = Problem(
            address="$.quantise",
            rule="a funnel run trains in float32",
            value="widths of few bits",
            remedy="Leave out `quantise`, or take another strategy.",
        )
        raise SpaceError(space.name or "space", [problem])
    wanted = space.strategy.options.get("format") if space.strategy.name == "funnel" else None
    if table.gated([wanted] if wanted else space.formats) == table.dense:
        found = sorted({c.format for layer in table.layers for c in layer.candidates if not c.dense})
        problem = Problem(
            address="$.formats",
            rule="a funnel run needs a layer without groups with a candidate whose ranks are its stages' channels",
            value=f"candidates in {', '.join(found)}",
            remedy=f"Add one of {', '.join(GATEABLE)}, widen layers.include, or take another strategy.",
        )
        raise SpaceError(space.name or "space", [problem])


def _measured(
    network: Network,
    table: PriceTable,
    factors: Factors,
    prices: Collection[str],
    cache: Path,
    notify: Notify,
    map: Map,
) -> Measured:
    """These prices of all candidates, on the first calibration images; such as take long are measured of some."""
    space, data, device = network.space, network.data, device_of(network.space)
    images = data.calibration[: space.strategy.price_images]
    # What is measured on the layer's own output runs nothing downstream of it.
    onward, points = (table.dense_macs, space.strategy.price_points) if ONWARD & set(prices) else (0, None)
    some = sampled(table, points)
    macs = sum(c.macs + onward for layer in some.layers for c in layer.candidates) * len(images)
    found = measure(
        network.model,
        some,
        factors,
        to_input(images, data, device),
        torch.tensor(data.train.labels[: len(images)]),
        kind=kinds(space)[-1],
        prices=[price for price in PRICES if price in prices],
        batch_images=max(1, min(_PRICE_BATCH, _PRICE_BATCH_VALUES // images[0].size)),
        threads=space.resources.threads,
        stabiliser=space.stabilise,
        cache=cache,
        map=map if macs >= _PARALLEL_MACS else builtins.map,
        progress=lambda done, total: notify("measuring prices", done, total),
    )
    return replace(found, prices=interpolated(table, points, found.prices))


def _fine_tuning_dtype(network: Network) -> str:
    """Settled once a search by the hardware: a stopwatch might answer differently for the next trial."""
    space, spec = network.space, network.space.evaluation.fine_tune
    trained = steps_of(spec, len(network.data.train)) > 0 or runs_funnels(space.strategy)
    if not trained or spec.dtype != "auto":
        return "float32" if spec.dtype == "auto" else spec.dtype
    return "bfloat16" if computes_bfloat16(device_of(space)) else "float32"


def versions() -> dict[str, str]:
    """What the result depends on: packages, Python, processor."""
    packages = ("torch", "numpy", "optuna", "ray", "mlflow", "tensorly", "ranksearch")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version(), "platform": platform.platform(), "cores": str(os.cpu_count())}


@torch.no_grad()
def make_bench(
    network: Network, factors: Factors, setting: Setting, weights_folder: Path, cache: Path, notify: Notify
) -> Bench:
    """The bench of a search: what every evaluation needs, as arrays."""
    space, evaluation = setting.space, setting.space.evaluation
    if network.data.digest != setting.data_digest:
        raise StudyError(
            f"the data must be those of the study, the images of {space.data.root or space.data.source} have changed "
            "since. Restore them, or search again."
        )
    missing = [n for n, layer in setting.table.picked(setting.table.dense).items() if n not in network.selection.layers]
    if missing:
        raise StudyError(f"the network no longer has the layers {', '.join(missing[:3])} of the study. Search again.")
    notify("gathering the dense network's outputs", 0, 1)
    samples = {}
    if evaluation.refit:
        found = sample_outputs(
            network.model, setting.table.convs, network.inputs(evaluation.refit_images), pixels=_PIXELS, seed=space.seed
        )
        samples = {name: (s.pixels.cpu().numpy(), s.outputs.cpu().numpy()) for name, s in found.items()}
    select_images = network.data.calibration[-evaluation.select_images :]
    size = evaluation.batch_images
    logits = [
        network.model(to_input(select_images[i : i + size], network.data, device_of(space))).float()
        for i in range(0, len(select_images), size)
    ]
    state = {key: value.cpu().numpy() for key, value in network.model.state_dict().items()}
    if device_of(space).type == "cuda":  # the workers need the memory
        network.model.cpu()
        torch.cuda.empty_cache()
    return Bench(
        space=space,
        data=network.data,
        table=setting.table,
        dense=setting.dense,
        state=state,
        factors={key: {k: v.cpu().numpy() for k, v in tensors.items()} for key, tensors in factors.items()},
        samples=samples,
        logits=torch.cat(logits).cpu().numpy(),
        dtype=setting.dtype,
        weights_folder=weights_folder,
        checkpoints_folder=weights_folder.parent / "checkpoints",
        cache=cache,
    )
