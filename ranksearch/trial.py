"""Proposals and trials: what a strategy asks for, and what came of it; no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from math import isfinite, isnan, nan, sqrt
from typing import Any, Final, Self

from ranksearch.space import BudgetSpec

MAXIMISED = frozenset({"accuracy"})
"""Objectives where more is better; the others are minimised."""


Settings = dict[str, float | int | str | None]
"""Of a funnel run, by the names of :class:`ranksearch.funnel.FunnelSpec`."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Ranks to try: one candidate of the price table for every searched layer; or a funnel run, which ends in some."""

    choices: tuple[int, ...]
    """Index of the candidate of each searched layer, in the table's order. Of a funnel run: what it starts from, in
    each layer to be gated a candidate of its format, as :meth:`ranksearch.table.PriceTable.gated` has them."""
    origin: str
    """The strategy that proposed it."""
    note: dict[str, Any] = field(default_factory=dict)
    """What the strategy wants to find again beside the trial (JSON types): its only memory."""
    settings: Settings = field(default_factory=dict)
    """Of a funnel run; empty where the choices themselves are to be tried."""
    fidelity: float = 1.0
    """Share of the space's training that the network gets before it is scored; on the front are those of 1 alone."""

    @property
    def funnel(self) -> bool:
        """Whether it is a funnel run."""
        return bool(self.settings)


class Signal(Enum):
    """What a strategy answers when it has no proposal."""

    WAIT = "wait"
    """Nothing before a running trial ends."""
    DONE = "done"
    """Nothing more at all."""


WAIT: Final = Signal.WAIT
DONE: Final = Signal.DONE


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("accuracy_search", "loss", "seconds"), (int, float)),
    **dict.fromkeys(("macs", "params", "report_images"), (int,)),
    **dict.fromkeys(("accuracy", "latency_ms"), (int, float, type(None))),
    **dict.fromkeys(("bit_operations", "weight_bytes"), (int, type(None))),
    **dict.fromkeys(("report_right", "weights"), (str, type(None))),
    "details": (dict,),
    "layers": (dict, type(None)),
}
"""Types of an outcome's fields in JSON."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The measurements of one evaluated proposal."""

    accuracy_search: float
    """Top-1 accuracy on the search-validation images, 0 to 1."""
    loss: float
    """Cross-entropy on the search-validation images, nats per image."""
    macs: int
    """MACs per image, counted on the network that was built."""
    params: int
    seconds: float
    """Wall time of the evaluation."""
    accuracy: float | None = None
    """Top-1 accuracy on the report images; measured only for trials that may be on the front, unless the space asks
    for all."""
    report_images: int = 0
    report_right: str | None = None
    """Which report images were classified rightly, so that networks can be compared image by image: one bit an image,
    the first in the highest place of the first byte, in base64."""
    weights: str | None = None
    """File of the compressed weights, relative to the study's folder; only for trials that may be on the front."""
    details: dict[str, Any] = field(default_factory=dict)
    """How it was built (factor kind, recalibration, divergence, fine-tuning loss; a funnel run's history), JSON types.
    """
    latency_ms: float | None = None
    """Predicted milliseconds of one batch, where latencies were measured."""
    bit_operations: int | None = None
    """Per image, of networks of few bits."""
    weight_bytes: int | None = None
    """Of all its numbers: weights of few bits with their scales, and the rest in float32; of networks of few bits."""
    layers: dict[str, Any] | None = None
    """The layers of a funnel run's rank map, each as the JSON of a :class:`ranksearch.rankmap.LayerRanks`; None where
    the proposal's choices are the rank map."""

    def __post_init__(self) -> None:
        if not (isfinite(self.loss) and 0.0 <= self.accuracy_search <= 1.0):
            raise ValueError(f"an outcome needs a finite loss and an accuracy in [0, 1], found {self}")
        # A driver removes weights that are no longer wanted: a study from elsewhere must not name other files.
        if self.weights is not None and (self.weights in ("", ".", "..") or set(self.weights) & {"/", "\\", "\0"}):
            raise ValueError(f"weights must be a file of the study's folder, found {self.weights!r}")

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The outcome written by ``to_json``; TypeError or ValueError where it is none."""
        wrong = [name for name, kinds in _KINDS.items() if name in data and not isinstance(data[name], kinds)]
        if wrong:
            raise TypeError(f"an outcome's {wrong[0]} cannot be {data[wrong[0]]!r}")
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One try of one proposal, as the study records it."""

    number: int
    """Number in the study, from 0."""
    index: int
    """Number of the proposal, from 0; a retried proposal keeps its index, and so its seed."""
    attempt: int = 0
    """0, or 1 where the proposal is tried once more after an interruption; of funnel runs, which go on from where they
    were, also more."""
    proposal: Proposal
    state: str
    """``RUNNING``, ``COMPLETE`` or ``FAIL``: Optuna's names."""
    values: tuple[float, ...] | None = None
    """The objectives, in the space's order and natural direction, if complete."""
    constraints: tuple[float, ...] = ()
    """At most 0 where the budget's limits hold."""
    outcome: Outcome | None = None
    reason: str | None = None
    """Why it failed."""
    start_ms: int = 0
    """When it began, milliseconds since 1970."""
    end_ms: int = 0
    """When it ended, likewise; 0 while it runs."""
    retry: bool = False
    """Whether it failed by an interruption, and its proposal is to be tried once more."""

    @property
    def within_limits(self) -> bool:
        """Complete and within the budget's limits, whatever its fidelity."""
        return self.state == "COMPLETE" and all(constraint <= 0 for constraint in self.constraints)

    @property
    def feasible(self) -> bool:
        """Complete, trained as the space says, and within the budget's limits."""
        return self.within_limits and self.proposal.fidelity == 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker needs to evaluate one trial: everything else it holds already."""

    number: int
    """The trial's number."""
    choices: tuple[int, ...]
    seed: int
    index: int = 0
    """The proposal's number."""
    settings: Settings = field(default_factory=dict)
    """Of a funnel run; empty where the choices themselves are to be scored."""
    fidelity: float = 1.0
    """Share of the space's training."""
    keep: bool = False
    """Whether the weights are kept, and the report images scored, whatever the outcome."""
    incumbents: tuple[tuple[float, ...], ...] = ()
    """Objectives (minimised) of the front when the task was handed out: a trial that one of them dominates will not
    be on the front, so it is not scored on the report images and its weights are not kept."""

    @property
    def checkpoint(self) -> str:
        """Name of the file that a funnel run goes on from, whichever try of the proposal it is."""
        return checkpoint_name(self.index)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a trial has no outcome."""

    reason: str
    interrupted: bool = False
    """Whether the trial was cut short from outside (a killed worker or driver) rather than by what it computed: such
    a proposal is tried once more."""
    spared: bool = False
    """Whether an interruption cannot have been the trial's doing: its try does not count."""
    exhausted: bool = False
    """Whether memory was short; an engine that runs several tasks side by side tries such a one once more, alone."""


def best_within(trials: Iterable[Trial], macs: float) -> Trial | None:
    """The most accurate complete trial (search images) of at most so many MACs, of equal ones the cheapest.

    Trials that were not trained as the space says are left out.
    """
    whole = [(t, t.outcome) for t in trials if t.outcome is not None and t.proposal.fidelity == 1]
    scored = [(trial, outcome) for trial, outcome in whole if outcome.macs <= macs * (1 + 1e-12)]
    best = max(scored, key=lambda pair: (pair[1].accuracy_search, -pair[1].macs), default=None)
    return None if best is None else best[0]


RECENT = 50
"""Trials from which the present rate is taken."""


def ends_per_second(ended: Sequence[Trial], *, since_ms: int = 0) -> float:
    """Trials that end in a second, over the last ones; 0 where that cannot be said.

    Args:
        ended: trials by the time of their end.
        since_ms: when the present driver began: what was begun before says nothing of its rate.
    """
    ends = [trial.end_ms for trial in ended[-RECENT:] if trial.start_ms >= since_ms]
    taken_ms = max(ends) - min(ends) if ends else 0
    return 1000 * (len(ends) - 1) / taken_ms if taken_ms > 0 else 0.0


def checkpoint_name(index: int) -> str:
    """The checkpoint's file of the proposal of this number."""
    return f"{index}.pt"


def objective_values(outcome: Outcome, objectives: tuple[str, ...]) -> tuple[float, ...]:
    """The objectives of an outcome in their natural direction; accuracy and loss are those on the search images."""
    known = {
        "accuracy": outcome.accuracy_search,
        "loss": outcome.loss,
        "macs": float(outcome.macs),
        "params": float(outcome.params),
        "latency": outcome.latency_ms if outcome.latency_ms is not None else nan,
        "bit-operations": nan if outcome.bit_operations is None else float(outcome.bit_operations),
    }
    return tuple(known[name] for name in objectives)


def minimised(values: tuple[float, ...], objectives: tuple[str, ...]) -> tuple[float, ...]:
    """Objective values with the sign changed where more is better, as :mod:`ranksearch.front` takes them."""
    return tuple(-v if name in MAXIMISED else v for v, name in zip(values, objectives, strict=True))


LIMITS: Final = ("max_macs_ratio", "max_latency_ratio", "max_drop")
"""The budget's limits on an outcome."""


def constraints(outcome: Outcome, budget: BudgetSpec, dense: Mapping[str, float]) -> dict[str, float]:
    """The budget's limits on an outcome, each kept where the value is at most 0.

    ``dense`` has the dense network's ``macs`` and ``accuracy_search``, and ``latency_ms`` where that is limited.
    """
    limits: dict[str, float] = {}
    if budget.max_macs_ratio is not None:
        limits["max_macs_ratio"] = outcome.macs / dense["macs"] - budget.max_macs_ratio
    if budget.max_latency_ratio is not None and outcome.latency_ms is not None:
        limits["max_latency_ratio"] = outcome.latency_ms / dense["latency_ms"] - budget.max_latency_ratio
    if budget.max_drop is not None:
        limits["max_drop"] = 100 * (dense["accuracy_search"] - outcome.accuracy_search) - budget.max_drop
    # What lies right at a limit keeps it, however the difference was rounded.
    return {name: round(over, 10) for name, over in limits.items()}


NORMAL: Final = 1.959963984540054
"""Within so many standard errors of its mean a normal quantity lies 95 times of 100."""


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy measured on so many images."""
    if not images or isnan(accuracy):
        return nan, nan
    z = NORMAL
    centre = (accuracy + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * sqrt(accuracy * (1 - accuracy) / images + z * z / (4 * images**2))
    return centre - half, centre + half
