"""Funnel runs as trials: the published settings at the budget's targets first, then what a sampler of Optuna suggests.

A funnel run (B.-S. Chu and C.-R. Lee, arXiv 2112.03690) trains the network under a penalty that closes ranks, and ends
in a rank map with trained weights. The paper tunes the penalty's strength and the fall of its c by hand; here they are
explored, with the MACs to end at, or, where there are none, with the threshold under which gates are closed. The
trials that are learnt from are the funnel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from ranksearch.strategies.asking import Asker, Params
from ranksearch.strategies.history import proposals_made, run, runs
from ranksearch.strategies.random import ATTEMPTS
from ranksearch.table import GATEABLE, PriceTable
from ranksearch.trial import DONE, Proposal, Settings, Signal, Trial

NAME: Final = "funnel"
TARGETS: Final = (0.5, 0.7, 0.35)
"""MACs to end at, as shares of the dense network's, where the space names none."""
PENALTIES: Final = ("funnel", "l1", "l2")

PUBLISHED: Final[Settings] = {
    "strength": 0.005,
    "c_start": 1.0,
    "c_end": 1e-4,
    "decay": "exponential",
    "threshold": 1e-2,
}
RANGES: Final[dict[str, BaseDistribution]] = {
    "target": FloatDistribution(0.0, 1.0),
    "strength": FloatDistribution(5e-4, 0.5, log=True),
    "c_start": FloatDistribution(0.1, 10.0, log=True),
    "c_end": FloatDistribution(1e-4, 1e-2, log=True),
    "decay": CategoricalDistribution(("exponential", "linear", "per-gate")),
    "threshold": FloatDistribution(1e-3, 0.1, log=True),
}
"""Settings that are explored; the published ones are among them."""
_OF_THE_FUNNEL = ("c_start", "c_end", "decay")


@dataclass(frozen=True, kw_only=True)
class FunnelSearch:
    """Funnel runs; DONE where no layer can be gated, or the sampler finds nothing new."""

    asker: Asker
    formats: Sequence[str] = GATEABLE
    """The space's formats: a layer takes the first of them that can be gated."""
    format: str | None = None
    """The format of all gated layers instead."""
    targets: Sequence[float] = TARGETS
    """MACs to end at, as shares of the dense network's: each is tried as published, then any between the least and the
    largest of them. None at all: the MACs are what strength and threshold leave."""
    settle_steps: int = 50
    """Steps at full rank, without the penalty."""
    penalty_steps: int = 400
    """Steps under the penalty."""
    weight_rate: float = 1e-3
    """Learning rate of everything but the gates, until gates are closed."""
    gate_rate: float = 1e-2
    """Learning rate of the gates."""
    penalty: str = "funnel"
    """``funnel``, or for comparison ``l1`` or ``l2``, which have no c."""
    mac_weighted: bool = True
    """Whether a gate's strength is in proportion to the MACs of its rank."""
    scale_free: bool = False
    """Whether a gate counts with the norm of its column in the last stage."""

    def __post_init__(self) -> None:
        if not all(0 < target <= 1 for target in self.targets):
            raise ValueError(f"targets must be shares of the dense MACs, above 0 and at most 1, found {self.targets}")
        counts = (self.settle_steps, self.penalty_steps)
        if not all(type(count) is int for count in counts) or self.settle_steps < 0 or self.penalty_steps < 1:
            raise ValueError(f"settle_steps must be a whole number, and penalty_steps one from 1 on, found {counts}")
        if min(self.weight_rate, self.gate_rate) <= 0:
            raise ValueError(f"rates must be above 0, found {self.weight_rate} and {self.gate_rate}")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, found {self.penalty!r}")
        if not all(type(switch) is bool for switch in (self.mac_weighted, self.scale_free)):
            raise ValueError(
                f"mac_weighted and scale_free must be true or false, found {self.mac_weighted!r}, {self.scale_free!r}"
            )
        if self.format is not None and self.format not in GATEABLE:
            raise ValueError(f"format must be one of {', '.join(GATEABLE)}, found {self.format!r}")

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next funnel run, or DONE."""
        choices = table.gated([self.format] if self.format else self.formats)
        if choices == table.dense:
            return DONE
        known, space = runs(trials), self.space()
        targets: tuple[float | None, ...] = tuple(dict.fromkeys(self.targets)) or (None,)
        for target in targets:
            published = self._proposal(choices, {"target": target}, {"given": True})
            if run(published) not in known:
                return published

        def fresh(params: Params) -> bool:
            return run(self._proposal(choices, params, {})) not in known

        past = [trial for trial in trials if trial.proposal.funnel and _within(trial.proposal.settings, space)]
        params, note = self.asker.suggest(
            space, past, lambda t: _params(t, space), proposals_made(trials), fresh, ATTEMPTS
        )
        return self._proposal(choices, params, note) if fresh(params) else DONE

    def check_sampler(self) -> None:
        """Ask once, of no trials; raises ValueError where the sampler is not for such a space."""
        self.asker.suggest(self.space(), (), lambda trial: {}, 0, lambda params: True, 1)

    def space(self) -> dict[str, BaseDistribution]:
        """What is explored: name to distribution."""
        names = ["strength", *(_OF_THE_FUNNEL if self.penalty == "funnel" else ())]
        space = {name: RANGES[name] for name in [*names, *(() if self.targets else ("threshold",))]}
        if self.targets:
            space["target"] = FloatDistribution(min(self.targets), max(self.targets))
        return space

    def _proposal(self, choices: tuple[int, ...], params: Params, note: dict[str, Any]) -> Proposal:
        """The funnel run of these parameters, the published ones for what they lack."""
        settings: Settings = {
            "target": None,
            **PUBLISHED,
            "settle_steps": self.settle_steps,
            "penalty_steps": self.penalty_steps,
            "weight_rate": self.weight_rate,
            "gate_rate": self.gate_rate,
            "penalty": self.penalty,
            "mac_weighted": self.mac_weighted,
            "scale_free": self.scale_free,
            **params,
        }
        return Proposal(choices=choices, origin=NAME, note=note, settings=settings)


def _params(trial: Trial, space: dict[str, BaseDistribution]) -> Params:
    return {name: trial.proposal.settings[name] for name in space}


def _within(settings: Settings, space: dict[str, BaseDistribution]) -> bool:
    """Whether a run has a point in the space: it may be of other options than today's."""
    return all(_holds(kind, settings.get(name)) for name, kind in space.items())


def _holds(kind: BaseDistribution, value: Any) -> bool:
    if isinstance(kind, CategoricalDistribution):
        return value in kind.choices
    return value is not None and isinstance(kind, FloatDistribution) and kind.low <= value <= kind.high
