"""The price table: which layers are searched, and what every candidate costs and is predicted to lose.

Every layer is prepared once per format and kind of factors, which predicts the error of all its candidates; their
factors are slices of that, or fitted when a trial first asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ranksearch.conv import Conv
from ranksearch.decompositions import (
    FORMATS,
    Kind,
    Prepared,
    Ranks,
    Statistics,
    check_ranks,
    compressed_stages,
    error,
    max_rank,
    rank_grid,
)
from ranksearch.errors import (
    BudgetError,
    DecompositionError,
    Problem,
    RankError,
    RankMapError,
    SpaceError,
    UnsupportedLayer,
)
from ranksearch.factors import prepared_factors
from ranksearch.rankmap import RankMap
from ranksearch.space import BudgetSpec, PinnedSpec, QuantiseSpec, Space
from ranksearch.surgery import Layer, count_macs, count_params, find_layers, kernel_of
from ranksearch.table import DENSE, FLOAT_BITS, Candidate, LayerPrices, PriceTable

Factors = dict[tuple[str, str, Kind], dict[str, Tensor]]
"""(layer, format, kind) to the prepared tensors."""


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
            max_rank(FORMATS[name], layer.conv)
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
                found[name, form, kind] = prepared_factors(form, selection.layers[name].conv, weight, known, cache)
        except DecompositionError as error:
            if name in selection.pinned:
                raise DecompositionError(f"{name}, which is pinned, cannot be decomposed: {error}") from error
            failed[name] = str(error)
        else:  # only in every kind: a candidate may be built in any
            factors |= found
    made = {name for name, _, _ in factors}
    return factors, {name: reason for name, reason in failed.items() if name not in made}


def price(
    space: Space, selection: Selection, factors: Factors, maps: Sequence[RankMap] = ()
) -> tuple[PriceTable, dict[str, str]]:
    """The price table of the decomposed layers, and the layers that have nothing to offer with the reason.

    ``maps`` are the user's own, whose ranks are candidates whatever the space's are.

    Raises:
        RankMapError: a map has ranks that its layer cannot have, or that cost no less than dense.
        SpaceError: no layer has a candidate that costs less than dense.
        BudgetError: even the cheapest rank map breaks the space's MAC limit.
    """
    kind = kinds(space)[-1]
    layers, dear = [], {}
    for name in selection.searched:
        own = _own_ranks(selection.layers[name], name, maps)
        candidates = _candidates(space, selection, factors, name, own)
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
    quantise = space.quantise or _NOTHING
    pinned = []
    for name, pin in selection.pinned.items():
        conv, prepared = selection.layers[name].conv, factors[name, pin.format, kind]
        pinned.append((name, conv, _candidate(pin.format, conv, tuple(pin.ranks), prepared, quantise.other_bits)))
    convs = [layer.conv for layer in layers] + [conv for _, conv, _ in pinned]
    table = PriceTable(
        layers=tuple(layers),
        other_macs=selection.macs - sum(c.macs for c in convs) + sum(c.macs for _, _, c in pinned),
        other_params=selection.params - sum(c.params for c in convs) + sum(c.params for _, _, c in pinned),
        dense_macs=selection.macs,
        dense_params=selection.params,
        pinned=tuple(pinned),
        other_bits=quantise.other_bits,
        activation_bits=quantise.activation_bits,
    )
    check_reachable(table, space.budget)
    return table, dear


def check_reachable(table: PriceTable, budget: BudgetSpec) -> None:
    """Check that a rank map keeps the budget's limits, each by itself; that on the latency once latencies are known.

    Raises:
        BudgetError: even the cheapest, or the fastest, does not.
    """
    macs, fastest = table.least_macs / table.dense_macs, table.least_latency_ratio
    for name, limit, least, found in (
        ("max_macs_ratio", budget.max_macs_ratio, macs, f"cheapest rank map keeps {macs:.3f} of the MACs"),
        ("max_latency_ratio", budget.max_latency_ratio, fastest, f"fastest one takes {fastest:.3f} of the latency"),
    ):
        if limit is not None and least > limit:
            raise BudgetError(
                f"$.budget.{name} must be reachable: it is {limit}, and the {found}. Raise it, allow smaller "
                "ranks.ratios, or search more layers."
            )


def _own_ranks(layer: Layer, name: str, maps: Sequence[RankMap]) -> set[tuple[str, Ranks]]:
    """The formats and ranks that the user's maps give a layer."""
    found = {(m.layers[name].format, m.layers[name].ranks) for m in maps if name in m.layers}
    for form, ranks in found:
        try:
            check_ranks(FORMATS[form], layer.conv, ranks)
        except (KeyError, RankError, UnsupportedLayer) as error:
            raise RankMapError(
                f"$.strategy.seed_maps: a map must fit the network, found {form} {ranks} for {name} ({error}). "
                "Remove the map, or make it for this network."
            ) from error
        macs = sum(stage.macs for stage in compressed_stages(FORMATS[form], layer.conv, ranks))
        if macs >= layer.conv.macs:  # no candidate: the map would be tried with other ranks than its own
            raise RankMapError(
                f"$.strategy.seed_maps: the layers of a map must cost less than dense, found {form} {ranks} for {name} "
                f"at {macs} MACs of {layer.conv.macs}. Leave the layer out of the map: it is dense then."
            )
    return found


def _candidates(
    space: Space, selection: Selection, factors: Factors, name: str, own: Collection[tuple[str, Ranks]]
) -> tuple[Candidate, ...]:
    """Candidates of one layer that cost less than dense: the ``own`` ones, and those that none of their format beats.

    A candidate beats another of its width that has no fewer MACs and no less error. Across formats the error says too
    little of the accuracy to decide: what a search learns, and a measured price, does.
    """
    conv, kind = selection.layers[name].conv, kinds(space)[-1]
    quantise = space.quantise or _NOTHING
    widths = sorted(quantise.weight_bits)
    found: list[Candidate] = []
    for form in selection.searched[name]:
        if (name, form, kind) not in factors:
            continue
        prepared = factors[name, form, kind]
        named = [ranks for other, ranks in own if other == form]
        for ranks in dict.fromkeys((*rank_grid(FORMATS[form], conv, space.ranks), *named)):
            found += [_candidate(form, conv, ranks, prepared, bits) for bits in widths]
    found.sort(key=lambda c: (c.macs, c.bits, c.error, c.params, c.format, c.ranks))
    kept: list[Candidate] = []
    least: dict[tuple[str, int], float] = {}
    for candidate in found:
        asked_for = (candidate.format, candidate.ranks) in own
        alike = candidate.format, candidate.bits
        lowest = least.get(alike, inf)
        if candidate.macs < conv.macs and (asked_for or space.ranks.joint or candidate.error < lowest):
            kept.append(candidate)
            least[alike] = min(lowest, candidate.error)
    return (*kept, Candidate(format=DENSE, macs=conv.macs, params=conv.params, error=0.0, bits=quantise.other_bits))


_NOTHING = QuantiseSpec.model_construct(
    weight_bits=cast(Any, [FLOAT_BITS]), other_bits=FLOAT_BITS, activation_bits=FLOAT_BITS
)
"""The widths of a network that is not quantised."""

_ROUNDING = {4: 0.0115, 8: 0.0001, FLOAT_BITS: 0.0}
"""Relative squared error of a factor's weights rounded to so many bits, about: normal numbers in rows of 144 to 200,000
lose 0.0116 to 0.0130 and 0.00004 to 0.00009 to ``rounding.rounded``."""


def _candidate(form: str, conv: Conv, ranks: Ranks, prepared: Prepared, bits: int) -> Candidate:
    stages = compressed_stages(FORMATS[form], conv, ranks)
    return Candidate(
        format=form,
        ranks=ranks,
        macs=sum(stage.macs for stage in stages),
        params=sum(stage.params for stage in stages),
        error=error(FORMATS[form], conv, prepared, ranks) + len(stages) * _ROUNDING[bits],
        bits=bits,
    )
