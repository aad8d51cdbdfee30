"""Strategies: arithmetic on the price table and the trials so far, which says what to try next.

To add one, write a frozen dataclass with ``propose`` in a file of this folder, whose answer depends on nothing but its
own fields and the arguments, and which never proposes choices (of a funnel run: with settings) that a trial had
before; where it only picks rank maps off the price table, a ``Rule`` of ``ladder.py`` is enough. Add a function that
makes it from the space's ``strategy`` section to ``STRATEGIES``. Add it to the table in
``tests/conformance/test_strategies.py``, which then tests everything a strategy must keep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from ranksearch.errors import Problem, SpaceError
from ranksearch.space import StrategySpec
from ranksearch.strategies import auto
from ranksearch.strategies.alds import Alds
from ranksearch.strategies.auto import Auto
from ranksearch.strategies.energy import Energy
from ranksearch.strategies.eps import Eps
from ranksearch.strategies.evbmf import Evbmf
from ranksearch.strategies.greedy import Greedy
from ranksearch.strategies.greedy_multi_step import GreedyMultiStep
from ranksearch.strategies.history import proposals_made, tried
from ranksearch.strategies.hull import Cost
from ranksearch.strategies.knapsack import Knapsack
from ranksearch.strategies.ladder import Ladder, Rule
from ranksearch.strategies.lc import Lc
from ranksearch.strategies.random import Random
from ranksearch.strategies.rungs import Rungs, Strategy
from ranksearch.strategies.uniform import Uniform
from ranksearch.strategies.water_filling import WaterFilling
from ranksearch.table import GATEABLE, MEASURED, PREDICTED, ROUNDING, PriceTable
from ranksearch.trial import Proposal, Signal, Trial

if TYPE_CHECKING:
    from ranksearch.strategies.asking import Asker

__all__ = [
    "DEFAULT_SAMPLERS",
    "READ_PRICES",
    "READ_SPECTRA",
    "STRATEGIES",
    "USER",
    "Strategy",
    "Terms",
    "build_strategy",
    "prices_read",
    "runs_funnels",
]

USER = "user"
"""Origin of the proposals that are the user's own rank maps."""


Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a space asks of any strategy, beside the section that is its own."""

    seed: int
    objectives: tuple[str, ...]
    """Names of the trials' values, in their order."""
    targets: tuple[float, ...] = ()
    """Shares of the dense network's MACs that matter most."""
    max_macs_ratio: float = inf
    """Rank maps with a larger share of the MACs are of no use."""
    max_latency_ratio: float = inf
    """Likewise of the dense network's latency."""
    least_accuracy: float = 0.0
    """Networks that are less accurate on the search images are of no use."""
    worst_loss: float = inf
    """Nor are those of a larger loss than a guess."""
    formats: tuple[str, ...] = ()
    """The space's formats; empty where they are not known."""

    @property
    def limits(self) -> dict[str, Any]:
        """Targets and largest ratios as they are compared with: what meets one exactly is within it."""
        return {
            "targets": tuple(target * ROUNDING for target in self.targets),
            "max_macs_ratio": self.max_macs_ratio * ROUNDING,
            "max_latency_ratio": self.max_latency_ratio * ROUNDING,
        }


Maker = Callable[[StrategySpec, Terms], Strategy]
"""Makes a strategy from the space's section and its terms; raises SpaceError."""


def _ladder(kind: type[Rule]) -> Maker:
    """The maker of a rule's ladder."""
    return lambda spec, terms: Ladder(rule=_built(kind, spec, terms), **terms.limits)


def _built(kind: type[Built], spec: StrategySpec, terms: Terms, **given: Any) -> Built:
    """``kind`` with the spec's options for its fields, but for those ``given``.

    A field ``price`` is the spec's, ``cost`` the first one of the objectives, ``targets`` that of the terms where they
    have some.
    """
    fields = signature(kind).parameters
    taken = [name for name in fields if name not in ("price", *given)]
    if spec.options and not taken:
        _refuse_options(spec)
    problems = [_unknown_option(spec, option, taken) for option in spec.options if option not in taken]
    if "price" in fields:
        problems += _unknown_price(spec)
        given |= {} if spec.price is None else {"price": spec.price}
    if "cost" in taken:
        given["cost"] = next((name for name in terms.objectives if name in get_args(Cost)), "macs")
    if "targets" in taken and terms.targets:
        given["targets"] = terms.targets
    if not problems:
        try:
            return kind(**(given | spec.options))
        except (TypeError, ValueError) as error:
            rule, remedy = f"the strategy `{spec.name}` must accept its options ({error})", "Correct them."
            problems.append(_problem("options", rule, repr(spec.options), remedy))
    raise SpaceError("space", problems)


def _alds(spec: StrategySpec, terms: Terms) -> Strategy:
    return _built(Alds, spec, terms, seed=terms.seed, **terms.limits)


def _auto(spec: StrategySpec, terms: Terms) -> Strategy:
    given = {name: getattr(terms, name) for name in ("seed", "objectives", "least_accuracy", "worst_loss")}
    return _built(Auto, spec, terms, **given, **terms.limits)


def _greedy_multi_step(spec: StrategySpec, terms: Terms) -> Strategy:
    return _built(GreedyMultiStep, spec, terms, batch=spec.batch)


def _random(spec: StrategySpec, terms: Terms) -> Strategy:
    return _built(Random, spec, terms, seed=terms.seed)


def _optuna(spec: StrategySpec, terms: Terms) -> Strategy:
    from ranksearch.strategies.optuna import NAME, Optuna

    return Optuna(asker=_asker(NAME, spec.sampler or DEFAULT_SAMPLERS[NAME], spec.options, terms))


def _funnel(spec: StrategySpec, terms: Terms) -> Strategy:
    from ranksearch.strategies.funnel import NAME, FunnelSearch

    # As a seed it leaves the sampler to the strategy that it seeds: that one's may be for whole numbers only.
    named = spec.sampler if spec.name == NAME else None
    asker = _asker(NAME, named or DEFAULT_SAMPLERS[NAME], {}, terms)
    made = _built(FunnelSearch, spec, terms, asker=asker, formats=terms.formats or GATEABLE)
    try:
        made.check_sampler()
    except ValueError as error:
        rule, remedy = f"the sampler must be for real numbers and categories ({error})", "Take another, such as `tpe`."
        raise SpaceError("space", [_problem("sampler", rule, repr(named), remedy)]) from error
    wanted = [made.format] if made.format else list(GATEABLE)
    if terms.formats and not set(wanted) & set(terms.formats):
        rule = "a funnel run needs a format whose ranks are the channels between its stages"
        remedy = f"Add {' or '.join(f'`{name}`' for name in wanted)}."
        problem = Problem(address="$.formats", rule=rule, value=", ".join(terms.formats), remedy=remedy)
        raise SpaceError("space", [problem])
    return made


def _asker(origin: str, name: str, options: Mapping[str, Any], terms: Terms) -> Asker:
    # Optuna is imported only by searches that use it.
    from ranksearch.strategies.asking import Asker
    from ranksearch.strategies.samplers import DEFAULTS, check_options, find_sampler

    sampler = find_sampler(name)
    if isinstance(sampler, Problem):
        raise SpaceError("space", [sampler])
    if problems := check_options(sampler, options):
        raise SpaceError("space", problems)
    known = DEFAULTS.get((origin, name), {}) | dict(options)
    return Asker(origin=origin, sampler=sampler, options=known, seed=terms.seed, objectives=terms.objectives)


STRATEGIES: dict[str, Maker] = {
    "auto": _auto,
    "uniform": _ladder(Uniform),
    "energy": _ladder(Energy),
    "water-filling": _ladder(WaterFilling),
    "lc": _ladder(Lc),
    "eps": _ladder(Eps),
    "evbmf": _ladder(Evbmf),
    "alds": _alds,
    "greedy": _ladder(Greedy),
    "greedy-multi-step": _greedy_multi_step,
    "knapsack": _ladder(Knapsack),
    "random": _random,
    "optuna": _optuna,
    "funnel": _funnel,
}
"""The strategies by their names in a space file."""

DEFAULT_SAMPLERS = {"optuna": "nsga2", "funnel": "tpe"}
"""Optuna's sampler of the strategies that ask one, where the space names none."""

READ_PRICES = frozenset({"auto", "knapsack", "greedy", "lc", "eps"})
"""Strategies that reckon with the price that the space names."""

READ_SPECTRA = frozenset({"water-filling", "evbmf", "alds"})
"""Strategies that read the spectra of the kernels off the price table."""

_SEEDED = frozenset({"optuna"})
"""Strategies that learn from other strategies' points, which are therefore tried first."""


@dataclass(frozen=True, kw_only=True)
class _Seeded:
    """The user's rank maps first, then some points of each seed, then the main strategy's."""

    user: tuple[tuple[int, ...], ...]
    seeds: tuple[tuple[str, Strategy], ...]
    seed_points: int
    main: Strategy

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        known = tried(trials)
        for choices in self.user:
            if choices not in known:
                return Proposal(choices=choices, origin=USER)
        for name, strategy in self.seeds:
            if proposals_made(trials, name) < self.seed_points:
                proposal = strategy.propose(table, trials)
                if isinstance(proposal, Proposal):
                    return proposal
        return self.main.propose(table, trials)


def runs_funnels(spec: StrategySpec) -> bool:
    """Whether some trials of the strategy or of its seeds are funnel runs."""
    return spec.name == "funnel" or (spec.name in _SEEDED and "funnel" in spec.seeds)


def prices_read(spec: StrategySpec) -> set[str]:
    """The prices that the strategy, or a seed of its, reckons with."""
    names = READ_PRICES & {spec.name, *(spec.seeds if spec.name in _SEEDED else ())}
    return {spec.price or (auto.PRICE if name == auto.NAME else PREDICTED) for name in names}


def build_strategy(spec: StrategySpec, terms: Terms, *, seed_choices: Sequence[tuple[int, ...]] = ()) -> Strategy:
    """The strategy of a space file: it never proposes the same rank map twice with the same share of the training.

    Args:
        spec: the space's ``strategy`` section.
        terms: what the rest of the space asks of it.
        seed_choices: the user's own rank maps as indices of the table's candidates; they are tried first.

    Raises:
        SpaceError: an unknown strategy or sampler, options that it does not take, or formats that it cannot use.
    """
    named = {"$.strategy.name": spec.name} | {f"$.strategy.seeds[{i}]": name for i, name in enumerate(spec.seeds)}
    problems = [_unknown(address, name) for address, name in named.items() if name not in STRATEGIES]
    plain = spec.model_copy(update={"options": {}})
    names = [name for name in dict.fromkeys(spec.seeds) if spec.name in _SEEDED and name != spec.name]
    seeds: dict[str, Strategy] = {}
    try:
        # An unknown strategy may have been meant to be Optuna's: its sampler is checked too, to tell all at once.
        main = STRATEGIES[spec.name](spec, terms) if spec.name in STRATEGIES else _optuna(plain, terms)
        seeds = {name: STRATEGIES[name](plain, terms) for name in names if name in STRATEGIES}
    except SpaceError as error:
        problems += error.problems
    if problems:
        raise SpaceError("space", problems)
    whole = _Seeded(
        user=tuple(dict.fromkeys(tuple(choices) for choices in seed_choices)),
        seeds=tuple(seeds.items()),
        seed_points=spec.seed_points,
        main=main,
    )
    if not spec.rungs:
        return whole
    return Rungs(
        main=whole,
        shares=tuple(spec.rungs),
        promote=spec.promote,
        objectives=terms.objectives,
        targets=terms.limits["targets"],
    )


def _unknown(address: str, name: str) -> Problem:
    near = get_close_matches(name, STRATEGIES, n=1)
    remedy = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(STRATEGIES)}."
    return Problem(address=address, rule="a strategy must be known", value=repr(name), remedy=remedy)


def _unknown_option(spec: StrategySpec, option: str, known: Collection[str]) -> Problem:
    near = get_close_matches(option, known, n=1)
    remedy = f"Did you mean `{near[0]}`?" if near else f"It takes: {', '.join(known)}."
    return _problem(f"options.{option}", f"unknown option of the strategy `{spec.name}`", "", remedy)


def _unknown_price(spec: StrategySpec) -> list[Problem]:
    known = (PREDICTED, *MEASURED)
    if spec.price is None or spec.price in known:
        return []
    near = get_close_matches(spec.price, known, n=1)
    remedy = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(known)}."
    return [_problem("price", "a price must be known", repr(spec.price), remedy)]


def _refuse_options(spec: StrategySpec) -> None:
    if spec.options:
        rule = f"the strategy `{spec.name}` takes no options"
        raise SpaceError("space", [_problem("options", rule, repr(spec.options), "Remove them.")])


def _problem(place: str, rule: str, value: str, remedy: str) -> Problem:
    return Problem(address=f"$.strategy.{place}", rule=rule, value=value, remedy=remedy)
