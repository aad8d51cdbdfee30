"""The searches of a comparison: which strategies, each under the one space, and rank maps that were made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ranksearch.comparison.result import slug_of
from ranksearch.errors import Problem, SpaceError, StudyError
from ranksearch.launch import read_space
from ranksearch.rankmap import RankMap
from ranksearch.space import PinnedSpec, Space, StrategySpec
from ranksearch.strategies import DEFAULT_SAMPLERS, READ_PRICES, STRATEGIES
from ranksearch.study import Study

_WITH_SAMPLER = "optuna"
"""The strategy that a sampler may be named for."""
_NEVER_ASKED = "uniform"
"""The strategy of a study that evaluates given rank maps alone: its budget ends with them."""
TRAINED = "trained"
"""In the place of a strategy: the study that trains what the others chose."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a comparison."""

    label: str
    """What it is called: a strategy, ``optuna:sampler``, ``strategy@price``, or what the user calls rank maps."""
    spec: StrategySpec
    """How it proposes."""
    trials: int | None = None
    """Its budget where it is not the space's: of given rank maps, how many there are."""

    @property
    def slug(self) -> str:
        """The label as a part of names."""
        return slug_of(self.label)

    def space(self, space: Space, seed: int, targets: Sequence[float]) -> Space:
        """The space of this variant's search."""
        update: dict[str, Any] = {"targets": list(targets)}
        if self.trials is not None:
            update |= {"trials": self.trials, "minutes": None}
        budget = space.budget.model_copy(update=update)
        return space.model_copy(update={"strategy": self.spec, "seed": seed, "budget": budget})


def variants_of(space: Space, strategies: Sequence[str], maps: Mapping[str, Sequence[Path]]) -> list[Variant]:
    """The rows of a comparison.

    What the space says of its strategy (options, seeds, rank maps) goes with that strategy alone; but seeds that it
    names go with ``optuna``, whatever its own strategy: nothing else starts from some.

    Args:
        space: what is searched.
        strategies: names; ``optuna:sampler`` names a sampler, ``strategy@price`` the price that it reckons with.
        maps: row name to files of rank maps.

    Raises:
        SpaceError: naming every name that is unknown or given twice.
    """
    found, problems = [], []
    for i, label in enumerate(strategies):
        named, at, price = label.partition("@")
        name, colon, sampler = named.partition(":")
        spec = _spec(space.strategy, name, sampler or None)
        variant = Variant(label=label, spec=spec.model_copy(update={"price": price} if at else {}))
        found.append(variant)
        if colon and name != _WITH_SAMPLER:
            rule, remedy = f"only `{_WITH_SAMPLER}` takes a sampler", f"Name `{name}` alone."
            problems.append(Problem(address=f"strategies[{i}]", rule=rule, value=repr(label), remedy=remedy))
        elif at and name in STRATEGIES and name not in READ_PRICES:
            rule, remedy = f"only {', '.join(sorted(READ_PRICES))} take a price", f"Name `{named}` alone."
            problems.append(Problem(address=f"strategies[{i}]", rule=rule, value=repr(label), remedy=remedy))
        else:
            problems += _unknown(space, variant, f"strategies[{i}]")
    for label, files in maps.items():
        if not files:
            rule, remedy = "a row of rank maps must have a file", "Give one, or leave the row out."
            problems.append(Problem(address=f"maps.{label}", rule=rule, value="none", remedy=remedy))
        problems += _strange_formats(space, label, files)
        spec = given_maps(space.strategy, files)
        found.append(Variant(label=label, spec=spec, trials=len(files)))
    slugs = [variant.slug for variant in found]
    for variant, slug in zip(found, slugs, strict=True):
        if slugs.count(slug) > 1 or slug == TRAINED:
            rule, remedy = "the names of a comparison must differ", "Name each once."
            problems.append(Problem(address="strategies", rule=rule, value=repr(variant.label), remedy=remedy))
    if not found:
        remedy = "Name strategies, or give rank maps."
        problems.append(Problem(address="strategies", rule="there must be one at least", value="none", remedy=remedy))
    if problems:
        raise SpaceError("comparison", list(dict.fromkeys(problems)))
    return found


def check_variant(space: Space) -> None:
    """Check that a space may have the strategy that a comparison gave it, as if a file said so.

    Raises:
        SpaceError: such as of funnel runs on rungs.
    """
    try:
        Space.model_validate(space.model_dump())
    except ValidationError as error:
        rules = [str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors()]
        address, remedy = "strategies", "Leave the strategy out, or change the space with --set."
        problems = [Problem(address=address, rule=rule, value=space.strategy.name, remedy=remedy) for rule in rules]
        raise SpaceError("comparison", problems) from error


def given_maps(spec: StrategySpec, files: Sequence[Path]) -> StrategySpec:
    """The strategy section of a study that evaluates these rank maps."""
    update = {"name": _NEVER_ASKED, "seed_maps": [str(file) for file in files], "rungs": []}
    return _bare(spec).model_copy(update=update)


def _spec(spec: StrategySpec, name: str, sampler: str | None) -> StrategySpec:
    """The space's section for another strategy, or another sampler."""
    same_sampler = sampler in (None, spec.sampler or DEFAULT_SAMPLERS.get(name))
    if name != spec.name:
        update: dict[str, Any] = {"name": name, "sampler": None}
        if name == _WITH_SAMPLER:
            # Named by the space, they are meant for it: nothing else starts from seeds.
            seeds = spec.seeds if "seeds" in spec.model_fields_set else StrategySpec().seeds
            update |= {"sampler": sampler, "seeds": seeds}
        return _bare(spec).model_copy(update=update)
    return spec if same_sampler else spec.model_copy(update={"sampler": sampler, "options": {}})


def _bare(spec: StrategySpec) -> StrategySpec:
    """Without what belongs to one strategy."""
    return spec.model_copy(
        update={"options": {}, "seeds": [], "seed_maps": [], "seed_points": StrategySpec().seed_points}
    )


def _unknown(space: Space, variant: Variant, address: str) -> list[Problem]:
    """What is wrong with the names of a strategy, its sampler or its price; what else is, its own search tells."""
    try:
        read_space(variant.space(space, space.seed, ()))
    except SpaceError as error:
        price = "$.strategy.price" if variant.spec.price == space.strategy.price else address
        names = {"$.strategy.name": address, "$.strategy.sampler": address, "$.strategy.price": price}
        return [replace(p, address=names[p.address]) for p in error.problems if p.address in names]
    return []


def _strange_formats(space: Space, label: str, files: Sequence[Path]) -> list[Problem]:
    """Formats of rank maps that the space does not prepare: their layers would be left dense."""
    pinned = {pin.format for pin in space.fix.values() if isinstance(pin, PinnedSpec)}
    named = {layer.format for file in files for layer in RankMap.load(file).layers.values()}
    return [
        Problem(
            address=f"maps.{label}",
            rule="the formats of rank maps must be among the space's",
            value=repr(form),
            remedy=f"Give --set formats=[{', '.join([*space.formats, form])}].",
        )
        for form in sorted(named - pinned - {*space.formats})
    ]


def check_same(study: Study, space: Space) -> None:
    """Check that a study that is to be continued was made from this space.

    How long it may search, on what and where it is tracked may differ.

    Raises:
        StudyError: naming what differs.
    """
    there, here = (_flat(_comparable(one)) for one in (study.space, space))
    if space.ranks.rank_multiple is None:  # settled when the study was made
        here["ranks.rank_multiple"] = there["ranks.rank_multiple"]
    differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if differing:
        shown = "; ".join(f"$.{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differing[:4])
        raise StudyError(
            f"a comparison must go on under the space that it was begun with, {study.name} differs: {shown}. "
            "Take that space, or give the comparison another name with --study."
        )


def check_comparable(studies: Sequence[Study]) -> None:
    """Check that the searches are of one network on the same images: names of both may hold something else by now.

    Raises:
        StudyError: naming those that are not.
    """
    strange = [study.name for study in studies[1:] if not study.setting.comparable(studies[0].setting)]
    if strange:
        raise StudyError(
            f"a comparison must be of one network and the same images, {', '.join(strange)} had other weights, another "
            f"forward pass or other images than {studies[0].name}. Bring these back, or give the comparison another "
            "name with --study."
        )


def _comparable(space: Space) -> dict[str, Any]:
    """What decides over a trial's outcome."""
    free: Any = {
        "name": True,
        "tracking": True,
        "budget": {"trials", "minutes", "targets"},
        "resources": {"engine", "workers", "address"},
    }
    return space.model_dump(mode="json", exclude=free)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
