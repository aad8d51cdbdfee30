"""The price table: which layers are searched, and what every candidate costs and is predicted to lose.

Every layer is decomposed once per format and kind of factors, at full rank, and kept on disk under a hash of all it
depends on; candidates are slices of that.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, Kind, Statistics, check_ranks, compressed_stages, prepare
from ranksearch.errors import BudgetError, DecompositionError, Problem, RankError, SpaceError, UnsupportedLayer
from ranksearch.space import PinnedSpec, RanksSpec, Space
from ranksearch.surgery import Layer, count_macs, count_params, find_layers, kernel_of
from ranksearch.table import DENSE, Candidate, LayerPrices, PriceTable

Factors = dict[tuple[str, str, Kind], dict[str, Tensor]]
"""(layer, format, kind) to the prepared tensors."""

_CACHE_VERSION = "1"
"""Part of every cache key: raised when a format's prepared tensors change their meaning."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The layers of a network, sorted by what a space does with them."""

    searched: dict[str, tuple[str, ...]]
    """Layer to the formats that can factorise it."""
    pinned: dict[str, PinnedSpec]
    dense: dict[str, str]
    """Layer to the reason why it stays dense."""
    layers: dict[str, Layer]
    macs: int
    """MACs per image of the whole dense network."""
    params: int
    input_shape: tuple[int, int, int]

    def convs(self) -> dict[str, Conv]:
        """Geometry of the searched and the pinned layers."""
        return {name: self.layers[name].conv for name in self.layers if name in self.searched or name in self.pinned}


def select(space: Space, model: nn.Module, input_shape: tuple[int, int, int]) -> Selection:
    """Sort the layers of ``model`` by the space's patterns, formats and pins.

    Raises:
        SpaceError: unknown formats, patterns that match nothing, pins that cannot be, or no layer left to search.
    """
    layers = {layer.name: layer for layer in find_layers(model, input_shape)}
    problems = unknown_formats(space) + _idle_patterns(space, layers)
    macs = count_macs(model, input_shape)
    searched: dict[str, tuple[str, ...]] = {}
    pinned: dict[str, PinnedSpec] = {}
    dense: dict[str, str] = {}
    for name, layer in layers.items():
        pin = next((value for pattern, value in space.fix.items() if fnmatchcase(name, pattern)), None)
        reason = "pinned to dense" if pin == DENSE else _left_out(space, layers, layer, macs) if pin is None else None
        if isinstance(pin, PinnedSpec) and not problems:
            problems += _impossible_pin(name, layer, pin)
            pinned[name] = pin
        elif reason is None and pin is None:
            formats, reason = _usable_formats(space, layer)
            if formats:
                searched[name] = formats
        if reason is not None:
            dense[name] = reason
    if not problems and not searched:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:4])
        problems.append(
            Problem(
                address="$.layers",
                rule="at least one layer must be searched",
                value=reasons or "no layers",
                remedy="Widen layers.include, lower layers.min_share, or add formats.",
            )
        )
    if problems:
        raise SpaceError(space.name or "space", problems)
    return Selection(
        searched=searched,
        pinned=pinned,
        dense=dense,
        layers=layers,
        macs=macs,
        params=count_params(model),
        input_shape=input_shape,
    )


def unknown_formats(space: Space) -> list[Problem]:
    """The names of formats in a space that are none."""
    named = [(f"$.formats[{i}]", name) for i, name in enumerate(space.formats)]
    named += [(f"$.fix.{key}.format", pin.format) for key, pin in space.fix.items() if isinstance(pin, PinnedSpec)]
    return [
        Problem(
            address=address,
            rule="a format must be known",
            value=repr(name),
            remedy=f"Take one of {', '.join(FORMATS)}.",
        )
        for address, name in named
        if name not in FORMATS
    ]


def _idle_patterns(space: Space, layers: Mapping[str, Layer]) -> list[Problem]:
    named = [(f"$.layers.include[{i}]", p) for i, p in enumerate(space.layers.include)]
    named += [(f"$.layers.exclude[{i}]", p) for i, p in enumerate(space.layers.exclude)]
    named += [(f"$.fix.{pattern}", pattern) for pattern in space.fix]
    return [
        Problem(
            address=address,
            rule="a layer pattern must match at least one layer",
            value=repr(pattern),
            remedy=f"Layers are named like {', '.join(list(layers)[:4])}; `ranksearch inspect` lists them.",
        )
        for address, pattern in named
        if not any(fnmatchcase(name, pattern) for name in layers)
    ]


def _left_out(space: Space, layers: Mapping[str, Layer], layer: Layer, macs: int) -> str | None:
    """Why a layer is not searched, or None."""
    spec, name = space.layers, layer.name
    if any(fnmatchcase(name, pattern) for pattern in spec.exclude):
        return "excluded"
    if layer.calls != 1:
        return _shared(layer)
    if spec.include:
        return None if any(fnmatchcase(name, pattern) for pattern in spec.include) else "not included"
    if name == next((x.name for x in layers.values() if not x.conv.linear), None):
        return "stem (first convolution); include it by name to search it"
    if name == next((x.name for x in reversed(list(layers.values())) if x.conv.linear), None):
        return "classifier (last linear layer); include it by name to search it"
    if layer.conv.macs < spec.min_share * macs:
        return f"{layer.conv.macs / macs:.2%} of the MACs, under layers.min_share"
    return None


def _shared(layer: Layer) -> str:
    return f"run {layer.calls} times in one forward pass: its weights are shared"


def _usable_formats(space: Space, layer: Layer) -> tuple[tuple[str, ...], str | None]:
    """The space's formats that can factorise a layer, or the reasons why none can."""
    usable, reasons = [], []
    for name in space.formats:
        try:
            FORMATS[name].max_rank(layer.conv)
            usable.append(name)
        except KeyError:
            continue
        except UnsupportedLayer as error:
            reasons.append(str(error))
    return tuple(usable), None if usable else "; ".join(dict.fromkeys(reasons))


def _impossible_pin(name: str, layer: Layer, pin: PinnedSpec) -> list[Problem]:
    try:
        if layer.calls != 1:
            raise UnsupportedLayer(_shared(layer))
        check_ranks(FORMATS[pin.format], layer.conv, tuple(pin.ranks))
    except (RankError, UnsupportedLayer) as error:
        return [
            Problem(address=f"$.fix ({name})", rule=str(error), value="", remedy="Correct the format or the ranks.")
        ]
    return []


def kinds(space: Space) -> tuple[Kind, ...]:
    """The kinds of factors that a space's candidates may take."""
    chosen = space.evaluation.factors
    return ("weight-only", "activation-aware") if chosen == "auto" else (chosen,)


def decompose(
    space: Space,
    selection: Selection,
    model: nn.Module,
    statistics: Mapping[str, Statistics],
    *,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Factors, dict[str, str]]:
    """Prepare every searched and pinned layer in every format and kind, from the cache where it is there.

    Returns:
        the prepared tensors, and the layers that no format could decompose with the reason.

    Raises:
        DecompositionError: a pinned layer cannot be decomposed.
    """
    wanted = [(name, form) for name, forms in selection.searched.items() for form in forms]
    wanted += [(name, pin.format) for name, pin in selection.pinned.items()]
    factors: Factors = {}
    failed: dict[str, str] = {}
    for i, (name, form) in enumerate(wanted):
        if progress is not None:
            progress(i, len(wanted))
        weight, _ = kernel_of(model.get_submodule(name))
        found: Factors = {}
        try:
            for kind in kinds(space):
                known = statistics[name] if kind == "activation-aware" else None
                found[name, form, kind] = _cached(form, selection.layers[name].conv, weight, known, cache)
        except DecompositionError as error:
            if name in selection.pinned:
                raise DecompositionError(f"{name}, which is pinned, cannot be decomposed: {error}") from error
            failed[name] = str(error)
        else:  # only in every kind: a candidate may be built in any
            factors |= found
    made = {name for name, _, _ in factors}
    return factors, {name: reason for name, reason in failed.items() if name not in made}


def _cached(form: str, conv: Conv, weight: Tensor, statistics: Statistics | None, cache: Path) -> dict[str, Tensor]:
    """Prepared tensors from the cache, or computed and stored; an unreadable entry is computed again."""
    path = cache / "factors" / f"{_key(form, conv, weight, statistics)}.safetensors"
    if path.exists():
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
    prepared = prepare(FORMATS[form], conv, weight, statistics)
    store(prepared, path)
    return prepared


def store(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; raises OSError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(_apart(tensors), name, metadata=metadata)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another: a module may be registered under two names."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        apart[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return apart


def _key(form: str, conv: Conv, weight: Tensor, statistics: Statistics | None) -> str:
    """Hash of all that prepared tensors depend on."""
    tensors = [weight]
    if statistics is not None:
        tensors += [
            statistics.input_moment,
            statistics.patch_mean,
            statistics.output_mean,
            statistics.output_covariance,
        ]
    return content_hash(tensors, f"{_CACHE_VERSION} {form} {conv}")


def content_hash(tensors: Iterable[Tensor], text: str = "") -> str:
    """Hash of a text and of tensors: dtype, shape and values."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def price(space: Space, selection: Selection, factors: Factors) -> tuple[PriceTable, dict[str, str]]:
    """The price table of the decomposed layers, and the layers that have nothing to offer with the reason.

    Raises:
        SpaceError: no layer has a candidate that costs less than dense.
        BudgetError: even the cheapest rank map breaks the space's MAC limit.
    """
    kind = kinds(space)[-1]
    layers, dear = [], {}
    for name in selection.searched:
        candidates = _candidates(space, selection, factors, name)
        if len(candidates) > 1:
            layers.append(LayerPrices(name=name, conv=selection.layers[name].conv, candidates=candidates))
        elif any(key[0] == name for key in factors):
            dear[name] = "no candidate costs less than dense"
    if not layers:
        raise SpaceError(
            space.name or "space",
            [
                Problem(
                    address="$.ranks",
                    rule="at least one layer must have a candidate that costs less than dense",
                    value=f"none in {len(selection.searched)} layers",
                    remedy="Allow smaller ranks.ratios, or other formats.",
                )
            ],
        )
    pinned = []
    for name, pin in selection.pinned.items():
        conv, energy = selection.layers[name].conv, factors[name, pin.format, kind]["energy"]
        pinned.append((name, conv, _candidate(pin.format, conv, tuple(pin.ranks), energy)))
    convs = [layer.conv for layer in layers] + [conv for _, conv, _ in pinned]
    table = PriceTable(
        layers=tuple(layers),
        other_macs=selection.macs - sum(c.macs for c in convs) + sum(c.macs for _, _, c in pinned),
        other_params=selection.params - sum(c.params for c in convs) + sum(c.params for _, _, c in pinned),
        dense_macs=selection.macs,
        dense_params=selection.params,
        pinned=tuple(pinned),
    )
    limit = space.budget.max_macs_ratio
    if limit is not None and table.least_macs > limit * table.dense_macs:
        raise BudgetError(
            f"$.budget.max_macs_ratio must be reachable: it is {limit}, and the cheapest rank map of this space keeps "
            f"{table.least_macs / table.dense_macs:.3f} of the MACs. Raise it, allow smaller ranks.ratios, or search "
            "more layers."
        )
    return table, dear


def _candidates(space: Space, selection: Selection, factors: Factors, name: str) -> tuple[Candidate, ...]:
    """Candidates of one layer that cost less than dense and that no other beats in both MACs and error."""
    conv, kind = selection.layers[name].conv, kinds(space)[-1]
    found: list[Candidate] = []
    for form in selection.searched[name]:
        if (name, form, kind) not in factors:
            continue
        energy = factors[name, form, kind]["energy"]
        for ranks in _rank_grid(space.ranks, FORMATS[form].max_rank(conv)):
            found.append(_candidate(form, conv, ranks, energy))
    found.sort(key=lambda c: (c.macs, c.error, c.params, c.format, c.ranks))
    kept: list[Candidate] = []
    for candidate in found:
        if candidate.macs < conv.macs and (not kept or space.ranks.joint or candidate.error < kept[-1].error):
            kept.append(candidate)
    return (*kept, Candidate(format=DENSE, macs=conv.macs, params=conv.params, error=0.0))


def _candidate(form: str, conv: Conv, ranks: tuple[int, ...], energy: Tensor) -> Candidate:
    stages = compressed_stages(FORMATS[form], conv, ranks)
    return Candidate(
        format=form,
        ranks=ranks,
        macs=sum(stage.macs for stage in stages),
        params=sum(stage.params for stage in stages),
        error=max(0.0, 1.0 - float(energy[tuple(r - 1 for r in ranks)])),
    )


def _rank_grid(spec: RanksSpec, bounds: Sequence[int]) -> list[tuple[int, ...]]:
    """The rank tuples to offer within ``bounds``."""

    def rank(ratio: float, bound: int) -> int:
        multiple = spec.rank_multiple
        return min(bound, max(1, math.ceil(round(ratio * bound / multiple, 6))) * multiple)

    if spec.values is not None:
        return list(product(*(sorted({min(value, bound) for value in spec.values}) for bound in bounds)))
    if spec.joint:
        grid = [tuple(rank(ratio, bound) for bound in bounds) for ratio in sorted(spec.ratios)]
    else:
        grid = list(product(*(sorted({rank(ratio, bound) for ratio in spec.ratios}) for bound in bounds)))
    return list(dict.fromkeys(grid))
