"""The study: the one record of a search's trials, in Optuna's durable storage, and what can be read from it.

Only the driver writes. A trial is created RUNNING with its proposal and finished with its outcome or its reason, so a
driver killed at any moment loses at most what ran; :meth:`Study.recover` mends that at the next start. While the
storage is away the driver waits, the result that it could not record kept in a file, the spool.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from ranksearch import frames, pictures
from ranksearch.drawing import figure
from ranksearch.errors import StudyError
from ranksearch.front import Front, hypervolume, non_dominated
from ranksearch.lock import DatabaseLock
from ranksearch.parameters import importance, parameters_of
from ranksearch.patience import Patience
from ranksearch.pictures import Progress
from ranksearch.rankmap import RankMap
from ranksearch.right import Right
from ranksearch.setting import Setting
from ranksearch.space import Space
from ranksearch.spool import Spool
from ranksearch.trial import (
    MAXIMISED,
    Failure,
    Outcome,
    Proposal,
    Trial,
    checkpoint_name,
    constraints,
    minimised,
    objective_values,
)

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

logging.getLogger("optuna").setLevel(logging.WARNING)

T = TypeVar("T")

_FIDELITY = "fidelity"
"""Name of the constraint that trials have which were not trained as the space says."""

INTERRUPTED = "interrupted: the driver ended before the trial did"


class Study:
    """One search: its setting, its trials and its front."""

    def __init__(
        self,
        name: str,
        folder: Path,
        storage: BaseStorage,
        study_id: int,
        setting: Setting,
        uid: str,
        *,
        patience: Patience | None = None,
        lock: DatabaseLock | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.setting = setting
        self.uid = uid
        """Tells studies of one name apart, wherever their folders are moved."""
        self._storage = storage
        self._study_id = study_id
        self._ids: dict[int, int] = {}
        self._lasting = Patience(name, seconds=0.0, away=lambda error: False)
        """What waits for the storage: a driver does, whoever only reads is told at once."""
        self._patience = patience or self._lasting
        self._right = Right(name, folder, storage, study_id, lock)
        self._spool = Spool(folder / "spool.jsonl", uid)
        self._written = json.dumps(setting.to_json())

    @property
    def space(self) -> Space:
        """The search space."""
        return self.setting.space

    @property
    def weights_folder(self) -> Path:
        """Folder of the weights of the trials on the front."""
        return self.folder / "weights"

    @property
    def checkpoints_folder(self) -> Path:
        """Folder of what funnel runs that have not ended go on from."""
        return self.folder / "checkpoints"

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Hold the right to write: one driver a study; raises :class:`StudyError` where another one holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._right.held(self._patience):
            reading, self._lasting = self._lasting, self._patience
            try:
                yield
            finally:
                self._lasting = reading

    # Writing: the driver only.

    def _write(self, act: Callable[[bool], T], lost: Callable[[], None] = lambda: None) -> T:
        """Write to the storage, or wait for it; see :class:`~ranksearch.patience.Patience`."""

        def checked(again: bool) -> T:
            self._right.check()
            return act(again)

        return self._lasting(checked, lost=lost)

    def begin(self, proposal: Proposal, *, index: int, attempt: int = 0) -> Trial:
        """Record a proposal as a RUNNING trial."""
        params, distributions = parameters_of(proposal, self.setting.table)
        attrs = {"index": index, "attempt": attempt, "origin": proposal.origin, "note": proposal.note}
        if proposal.fidelity < 1:
            attrs["fidelity"] = proposal.fidelity
        if proposal.funnel:
            attrs |= {"choices": list(proposal.choices), "settings": proposal.settings, "stamp": self._stamp(index)}
        template = create_trial(state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=attrs)

        def create(again: bool) -> tuple[int, int]:
            # The connection may have been lost after the trial was made.
            made = self._made(index, attempt) if again else None
            trial_id = made if made is not None else self._storage.create_new_trial(self._study_id, template)
            return trial_id, self._storage.get_trial_number_from_id(trial_id)

        trial_id, number = self._write(create)
        self._ids[number] = trial_id
        return Trial(
            number=number,
            index=index,
            attempt=attempt,
            proposal=proposal,
            state="RUNNING",
            start_ms=_ms(template.datetime_start),
        )

    def start(self, trial: Trial) -> None:
        """Note that a RUNNING trial goes to a worker: an interruption from now on may be its own doing."""
        self._write(lambda _: self._storage.set_trial_user_attr(self._ids[trial.number], "started", True))

    def _made(self, index: int, attempt: int) -> int | None:
        """The storage's number of this try of a proposal, where it is there."""
        found = self._storage.get_all_trials(self._study_id, deepcopy=False)
        tries = (t for t in found if (t.user_attrs.get("index"), t.user_attrs.get("attempt")) == (index, attempt))
        return next((t._trial_id for t in tries), None)

    def finish(self, trial: Trial, result: Outcome | Failure) -> Trial:
        """Record what came of a RUNNING trial; while the storage is away it is kept in the spool."""
        spooled = False

        def spool() -> None:
            nonlocal spooled
            spooled = self._spool.put(trial, result)

        ended = self._write(partial(self._record, trial, result), spool)
        if spooled:
            self._spool.drop(trial)
        return ended

    def _record(self, trial: Trial, result: Outcome | Failure, again: bool) -> Trial:
        """Record a result; ``again`` says that this was tried before."""
        trial_id = self._ids[trial.number]
        if again and (found := self._storage.get_trial(trial_id)).state.is_finished():
            return self._trial(found)
        if isinstance(result, Failure):
            may = result.spared or trial.attempt <= self._spared(trial.index) or self._moved_on(trial)
            retry = result.interrupted and may
            self._storage.set_trial_user_attr(trial_id, "spared", result.spared)
            self._storage.set_trial_user_attr(trial_id, "reason", result.reason)
            self._storage.set_trial_user_attr(trial_id, "retry", retry)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
        else:
            self._storage.set_trial_user_attr(trial_id, "outcome", result.to_json())
            self._complete(trial_id, result, trial.proposal.fidelity)
        # As it is read ever after, by another driver too, the time of its end with it.
        return self._trial(self._storage.get_trial(trial_id))

    def _spared(self, index: int) -> int:
        """How many tries of a proposal do not count."""
        found = self._storage.get_all_trials(self._study_id, deepcopy=False)
        return sum(t.user_attrs.get("index") == index and bool(t.user_attrs.get("spared")) for t in found)

    def _moved_on(self, trial: Trial) -> bool:
        """Whether a funnel run has left a checkpoint since this try began: then another one gets further."""
        if not trial.proposal.funnel:
            return False
        return self._stamp(trial.index) not in (0, self._attrs(trial, False).get("stamp", 0))

    def _stamp(self, index: int) -> int:
        """When a proposal's checkpoint was written, in nanoseconds; 0 without one.

        Only whether it changed counts, since a clock may jump.
        """
        try:
            return (self.checkpoints_folder / checkpoint_name(index)).stat().st_mtime_ns
        except OSError:
            return 0

    def _complete(self, trial_id: int, outcome: Outcome, fidelity: float) -> None:
        limits = self.constraints(outcome)
        if fidelity < 1:
            # More training may make up for a drop; and Optuna's own tools leave such a trial off the front, too.
            limits = {key: value for key, value in limits.items() if key != "max_drop"} | {_FIDELITY: 1 - fidelity}
        for key, value in limits.items():
            self._storage.set_trial_system_attr(trial_id, f"constraints:{key}", value)
        values = objective_values(outcome, tuple(self.space.objectives))
        self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)

    def recover(self, reason: str = INTERRUPTED, *, spared: bool = False) -> list[Trial]:
        """End the trials that a killed or stopped driver left RUNNING; returns them.

        Those whose outcome was recorded, or is in the spool, are complete; the others fail for ``reason``, and are to
        be tried once more. ``spared``: that is not their doing, however often; nor is it of those that had not started.
        """
        self._write(lambda _: None)  # the spool is not another driver's
        spooled = self._spool.read()
        ended = []
        for trial in self.trials():
            if trial.state == "RUNNING":
                recorded = self._write(partial(self._attrs, trial))
                outcome = recorded.get("outcome")
                waited = not recorded.get("started", False)
                ended_so = Failure(reason=reason, interrupted=True, spared=spared or waited)
                result = spooled.get(trial.number, ended_so)
                ended.append(self.finish(trial, result if outcome is None else Outcome.from_json(outcome)))
        self._spool.clear()
        return ended

    def _attrs(self, trial: Trial, _again: bool) -> dict[str, Any]:
        """What the storage has of a trial beside its parameters."""
        return dict(self._storage.get_trial(self._ids[trial.number]).user_attrs)

    def extend(self, trials: int) -> None:
        """Change how many proposals the search may try, to no fewer than it has; :class:`StudyError` below one."""
        if trials < 1:
            raise StudyError(f"a search must try at least one proposal, found {trials} trials. Ask for more.")
        made = 1 + max((trial.index for trial in self.trials()), default=-1)
        budget = self.space.budget.model_copy(update={"trials": max(trials, made)})
        changed = {**self.setting.__dict__, "space": self.space.model_copy(update={"budget": budget})}
        self.setting = Setting(**changed)
        document = json.dumps(self.setting.to_json())
        self._write(lambda _: self._storage.set_study_user_attr(self._study_id, "ranksearch", document))

    # Reading.

    def reread(self) -> None:
        """Take over the setting as a resume in another process may have changed it."""
        written = str(self._storage.get_study_user_attrs(self._study_id)["ranksearch"])
        if written != self._written:
            self._written, self.setting = written, Setting.from_json(json.loads(written))

    def constraints(self, outcome: Outcome) -> dict[str, float]:
        """The budget's limits on an outcome, each kept where the value is at most 0."""
        return constraints(outcome, self.space.budget, self.setting.dense)

    def trials(self, known: Mapping[int, Trial] | None = None) -> list[Trial]:
        """Every trial, in order of numbers; those ``known`` by their numbers have ended and are taken as they are."""
        frozen = self._lasting(lambda _: self._storage.get_all_trials(self._study_id, deepcopy=False))
        read = known or {}
        try:
            return [read.get(one.number) or self._trial(one) for one in sorted(frozen, key=lambda one: one.number)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StudyError(
                f"the trials of {self.name} cannot be read ({type(error).__name__}: {error}). The study is damaged, or "
                "not one of ranksearch's: restore it from a copy, or search again."
            ) from error

    def _trial(self, frozen: FrozenTrial) -> Trial:
        self._ids[frozen.number] = frozen._trial_id
        attrs = frozen.user_attrs
        named = attrs.get("choices") or [frozen.params[layer.name] for layer in self.setting.table.layers]
        proposal = Proposal(
            choices=tuple(map(int, named)),
            origin=attrs["origin"],
            note=attrs["note"],
            settings=dict(attrs.get("settings", {})),
            fidelity=float(attrs.get("fidelity", 1.0)),
        )
        complete = frozen.state == TrialState.COMPLETE
        values = tuple(map(float, frozen.values)) if complete else None
        if values is not None and len(values) != len(self.space.objectives):
            raise ValueError(f"trial {frozen.number} has {len(values)} values for {self.space.objectives}")
        return Trial(
            number=frozen.number,
            index=int(attrs["index"]),
            attempt=int(attrs["attempt"]),
            proposal=proposal,
            state=frozen.state.name,
            values=values,
            constraints=_by_name(frozen.constraints),
            outcome=Outcome.from_json(attrs["outcome"]) if complete else None,
            reason=attrs.get("reason"),
            start_ms=_ms(frozen.datetime_start),
            end_ms=_ms(frozen.datetime_complete),
            retry=bool(attrs.get("retry", False)),
        )

    def front_trials(self, trials: list[Trial] | None = None) -> list[Trial]:
        """The feasible trials that no other dominates, by increasing MACs (membership: the search images)."""
        feasible = [t for t in (self.trials() if trials is None else trials) if t.feasible]
        points = [self.point(trial) for trial in feasible]
        members = [feasible[i] for i in non_dominated(points)]
        return sorted(members, key=lambda t: (cast(Outcome, t.outcome).macs, t.number))

    def growing_front(self) -> Front[Trial]:
        """A front, empty yet, that takes trials one by one; its members are those that :meth:`front_trials` finds."""
        return Front(lambda trial: self.point(trial) if trial.feasible else None, lambda trial: trial.number)

    def point(self, trial: Trial) -> tuple[float, ...]:
        """The objectives of a complete trial, minimised."""
        return minimised(cast(tuple[float, ...], trial.values), tuple(self.space.objectives))

    def hypervolume(self, trials: list[Trial]) -> float:
        """Share (0 to 1) of the objectives' box that the feasible trials dominate.

        The box reaches from the ideal (accuracy 1, loss 0, no cost) to accuracy 0, the loss of a uniform guess, and
        the dense network's cost.
        """
        worst = {
            "accuracy": 0.0,
            "loss": math.log(max(2, self.setting.classes)),
            "macs": float(self.setting.dense["macs"]),
            "params": float(self.setting.dense["params"]),
            "latency": self.setting.dense.get("latency_ms", math.nan),
            "bit-operations": float(self.setting.table.dense_bit_operations),
        }
        scale = [1.0 if name in MAXIMISED else worst[name] for name in self.space.objectives]
        reference = tuple(worst[name] / s for name, s in zip(self.space.objectives, scale, strict=True))
        feasible = [self.point(trial) for trial in trials if trial.feasible]
        points = [tuple(x / s for x, s in zip(point, scale, strict=True)) for point in feasible]
        return hypervolume([points[i] for i in non_dominated(points)], reference)

    def trials_frame(self, trials: list[Trial] | None = None) -> pd.DataFrame:
        """Every trial as a row: number, state, reason, origin, the measurements, ``on_front``."""
        trials = self.trials() if trials is None else trials
        return frames.trials_frame(trials, self.front_trials(trials), self.setting.dense["macs"])

    def front(self, trials: list[Trial] | None = None) -> pd.DataFrame:
        """The Pareto front by increasing MACs: trial, accuracy (report images) with its 95 % interval, costs."""
        return frames.front_frame(self.front_trials(trials), self.setting.dense["macs"])

    def course(self, trials: list[Trial] | None = None) -> list[Progress]:
        """The hypervolume after each trial that ended, in the order in which they did."""
        ended = sorted(
            (t for t in (self.trials() if trials is None else trials) if t.end_ms), key=lambda t: (t.end_ms, t.number)
        )
        front = self.growing_front()
        points: list[Progress] = []
        for trial in ended:
            before = points[-1].hypervolume if points else 0.0
            value = self.hypervolume(list(front)) if front.take(trial) else before
            points.append(Progress(trials=len(points) + 1, end_ms=trial.end_ms, hypervolume=value))
        return points

    def importance(self, of: str = "accuracy", trials: list[Trial] | None = None) -> dict[str, float]:
        """How much each layer's choice decides whether an objective is among the best tenth: shares of 1, by layer.

        It is Optuna's PED-ANOVA, of the complete trials but funnel runs; empty where fewer than ten are there.

        Args:
            of: the objective.
            trials: those to judge by, where they have been read already.

        Raises:
            ValueError: the search has no such objective.
        """
        return importance(self.space.objectives, self.setting.table, self.trials() if trials is None else trials, of)

    # Pictures, as interactive Plotly figures.

    def plot_front(self, *baselines: Study) -> Figure:
        """Accuracy against GMACs: the front, dominated trials, the budget, dense, and the fronts of other studies.

        Raises:
            StudyError: another study is of another network or other data.
        """
        from ranksearch.plots import front_figure

        if strangers := [study.name for study in baselines if not self.setting.comparable(study.setting)]:
            raise StudyError(
                f"fronts on the same axes must be of the same network and data as {self.name}, found "
                f"{', '.join(strangers)} of other weights, another forward pass or other images. Draw those apart."
            )
        trials = self.trials()
        return front_figure(
            self.trials_frame(trials),
            self.front(trials),
            dense=self.setting.dense,
            title=f"{self.name}: {self.setting.model.name}",
            budget=self.space.budget,
            baselines={study.name: study.front() for study in baselines},
        )

    def plot_hypervolume(self, *others: Study, axis: Literal["trials", "time"] = "trials") -> Figure:
        """Hypervolume over ``trials`` or ``time``, beside that of other studies."""
        courses = {study.name: study.course() for study in (self, *others)}
        return figure(pictures.hypervolume_picture(courses, axis))

    def plot_ranks(self) -> Figure:
        """The ranks of every layer along the front."""
        return figure(pictures.ranks_picture(self.setting, self.front_trials()))

    def plot_macs(self, *trials: int) -> Figure:
        """Share of the MACs by layer: of the dense network, and of trials by their numbers, the knee by default."""
        known = {trial.number: trial for trial in self.trials()}
        chosen = trials or (self.rank_map(knee=True).provenance["trial"],)
        if missing := [number for number in chosen if number not in known]:
            raise StudyError(f"trials must be those of {self.name}, found {missing}. See `ranksearch trials`.")
        return figure(pictures.macs_picture(self.setting, [known[number] for number in chosen]))

    def plot_importance(self, of: str = "accuracy") -> Figure:
        """Which layers decide about an objective."""
        return figure(pictures.importance_picture(self.importance(of), of))

    def plot_sensitivity(self, price: str | None = None) -> Figure:
        """What compressing one layer alone loses, predicted or measured, against its MACs."""
        return figure(pictures.sensitivity_picture(self.setting.table, price))

    def plot_gates(self, trial: int) -> Figure:
        """The open gates of each layer over the steps of a funnel run."""
        found = next((one for one in self.trials() if one.number == trial), None)
        if found is None:
            raise StudyError(f"the trial must be one of {self.name}, found {trial}. See `ranksearch trials`.")
        return figure(pictures.gates_picture(found))

    def rank_map(
        self,
        *,
        trial: int | None = None,
        max_macs_ratio: float | None = None,
        max_gmacs: float | None = None,
        max_latency_ratio: float | None = None,
        max_drop: float | None = None,
        knee: bool = False,
    ) -> RankMap:
        """The rank map of a trial, picked by exactly one rule (accuracies: on the search images).

        Args:
            trial: the trial of this number, on the front or not.
            max_macs_ratio: the most accurate of the front with at most this share of the dense MACs.
            max_gmacs: the most accurate of the front with at most so many GMACs.
            max_latency_ratio: the same with at most this share of the dense network's predicted latency.
            max_drop: the cheapest of the front that loses at most so many percentage points.
            knee: the point of the front furthest below the line through its ends.

        Raises:
            ValueError: not exactly one rule is given.
            BudgetError: no trial fits; the message names the nearest.
        """
        from ranksearch.export import choose, rank_map_of

        rules: dict[str, Any] = {
            "trial": trial,
            "max_macs_ratio": max_macs_ratio,
            "max_gmacs": max_gmacs,
            "max_latency_ratio": max_latency_ratio,
            "max_drop": max_drop,
        }
        given = [name for name, value in rules.items() if value is not None] + ["knee"] * knee
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"exactly one rule picks a trial, found {found}. Give one of {', '.join(rules)}, knee.")
        return rank_map_of(self, choose(self, knee_point=knee, **rules))


def _by_name(constraints: Mapping[str, float]) -> tuple[float, ...]:
    """The values of the budget's limits in the order of their names: a database gives them back in any."""
    return tuple(value for key, value in sorted(constraints.items()) if key != _FIDELITY)


def _ms(moment: datetime | None) -> int:
    return 0 if moment is None else round(moment.timestamp() * 1000)
