"""What MLflow shows of a search: the parent run's parameters and documents, a record of every trial, the front."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ranksearch.drawing import page, png
from ranksearch.export import choose, rank_map_of
from ranksearch.pictures import (
    gates_picture,
    hypervolume_picture,
    importance_picture,
    macs_picture,
    ranks_picture,
    sensitivity_picture,
)
from ranksearch.space import Space
from ranksearch.strategies import DEFAULT_SAMPLERS
from ranksearch.study import Study
from ranksearch.table import DENSE, FLOAT_BITS, Candidate, PriceTable
from ranksearch.tracking.store import shown
from ranksearch.tracking.story import about, about_trial, inputs, view_tag
from ranksearch.tracking.tracker import NOTE, Tracker, TrialRecord
from ranksearch.trial import Trial

_logger = logging.getLogger("ranksearch")


@contextmanager
def connected(space: Space, folder: Path) -> Iterator[Tracker]:
    """The connection to MLflow, closed at the end whatever happens; the default store is in ``folder``.

    Raises:
        TrackingError: the store cannot be reached.
    """
    tracker = Tracker(space.tracking, folder=folder)
    try:
        yield tracker
    finally:
        tracker.close()


class View:
    """The MLflow run of one study; opens it, or finds it again."""

    def __init__(self, study: Study, tracker: Tracker) -> None:
        self._study = study
        self._tracker = tracker
        self._front = study.growing_front()
        """Of the trials seen so far."""
        space = study.space
        tracker.start(
            study=study.name,
            study_id=study.uid,
            params={
                "model": space.model.name,
                "data": space.data.source,
                "formats": ", ".join(space.formats),
                "objectives": ", ".join(space.objectives),
                "strategy": space.strategy.name,
                "sampler": space.strategy.sampler or DEFAULT_SAMPLERS.get(space.strategy.name, "none"),
                "trials": space.budget.trials,
                "fine_tune_steps": space.evaluation.fine_tune.steps,
                "engine": space.resources.engine,
                "seed": space.seed,
                "searched_layers": len(study.setting.table.layers),
            },
            tags={
                **{f"version.{name}": version for name, version in study.setting.versions.items()},
                "strategy": space.strategy.name,
                NOTE: about(study),
            },
            inputs=inputs(study),
            view=view_tag(study.name),
            documents={
                "space.json": _shown(space),
                "price_table.json": study.setting.table.to_json(),
                "versions.json": dict(study.setting.versions),
            },
        )

    def sync(self, trials: Iterable[Trial]) -> None:
        """Write the ended trials that MLflow does not have yet and that are to have a run."""
        ended = sorted(trials, key=lambda trial: (trial.end_ms, trial.number))
        self._tracker.sync([self._record(trial) for trial in ended if self._has_run(trial)])

    def trial(self, trial: Trial) -> None:
        """Write an ended trial, in the background, if it is to have a run."""
        if self._has_run(trial):
            self._tracker.trial(self._record(trial))

    def _has_run(self, trial: Trial) -> bool:
        """Whether a trial is among the first, or on the front as it ends; those of the last front all once were."""
        return self._front.take(trial) or trial.number < self._study.space.tracking.max_runs

    def hypervolume(self, trials: int, value: float, at_ms: int) -> None:
        """Write the hypervolume after so many trials, which had ended at ``at_ms``, in the background."""
        self._tracker.hypervolume(trials, value, at_ms)

    def finish(self, status: Literal["FINISHED", "KILLED", "FAILED"]) -> None:
        """Write what is waiting, then the front with its pictures and the knee's rank map, and end the run."""
        study, trials = self._study, self._study.trials()
        front = study.front_trials(trials)
        files: dict[str, Path | str | bytes] = {}
        if front:
            try:
                files |= _pictures(study, trials, front)
            except Exception as error:  # whatever drawing raises: the run is ended as it is, and what ends it goes on
                _logger.warning("The pictures of %s cannot be drawn, MLflow is left without: %s", study.name, error)
            files["rank_map.json"] = rank_map_of(study, choose(study, knee_point=True)).model_dump_json(indent=2)
        self._tracker.finish(
            status=status,
            metrics={
                "hypervolume_final": study.hypervolume(trials),
                "front_points": float(len(front)),
                **{f"dense_{name}": float(value) for name, value in study.setting.dense.items()},
            },
            front=study.front(),
            trials=study.trials_frame(),
            dense=study.setting.dense,
            files=files,
            note=partial(about, study),
            budget=study.space.budget,
        )

    def _record(self, trial: Trial) -> TrialRecord:
        study, outcome = self._study, trial.outcome
        metrics: dict[str, Any] = {}
        if outcome is not None:
            measured = ("accuracy", "accuracy_search", "loss", "macs", "params", "latency_ms", "bit_operations",
                        "weight_bytes", "seconds")  # fmt: skip
            metrics = {name: getattr(outcome, name) for name in measured if getattr(outcome, name) is not None}
            if seen := outcome.details.get("sensitivity"):  # over the steps of fine-tuning
                metrics |= {"sensitivity_start": seen[0][1], "sensitivity": seen[-1][1]}
            metrics |= {"gmacs": outcome.macs / 1e9, "macs_ratio": outcome.macs / study.setting.dense["macs"]}
        return TrialRecord(
            number=trial.number,
            name=f"trial-{trial.number}",
            params=_params(trial, study.setting.table),
            metrics=metrics,
            series=_series(outcome.details.get("history", ())) if outcome is not None else {},
            tags={
                "state": trial.state,
                "origin": trial.proposal.origin,
                "strategy": study.space.strategy.name,
                "fidelity": _fidelity(trial),
                "on_front": str(trial in self._front).lower(),
                NOTE: about_trial(study, trial),
                "attempt": str(trial.attempt),
                **({"reason": trial.reason} if trial.reason else {}),
            },
            rank_map=rank_map_of(study, trial).model_dump(mode="json") if trial.state == "COMPLETE" else None,
            status="FINISHED" if trial.state == "COMPLETE" else "FAILED",
            start_ms=trial.start_ms,
            end_ms=trial.end_ms,
        )


def _fidelity(trial: Trial) -> str:
    """How much of the space's training a trial had."""
    share = trial.proposal.fidelity
    return "funnel run" if trial.proposal.funnel else "full" if share == 1 else f"{100 * share:g} % of the training"


def _gated(trial: Trial) -> bool:
    return trial.outcome is not None and any("alive" in entry for entry in trial.outcome.details.get("history", ()))


def _pictures(study: Study, trials: list[Trial], front: list[Trial]) -> dict[str, bytes | str]:
    """Pictures of the search, each as a PNG, and all on one page."""
    drawn = {
        "hypervolume": hypervolume_picture({study.name: study.course(trials)}),
        "hypervolume_over_time": hypervolume_picture({study.name: study.course(trials)}, "time"),
        "ranks": ranks_picture(study.setting, front),
        "macs": macs_picture(study.setting, [choose(study, knee_point=True, trials=front)]),
        "sensitivity": sensitivity_picture(study.setting.table),
    }
    if importance := study.importance(str(study.space.objectives[0])):
        drawn["importance"] = importance_picture(importance, str(study.space.objectives[0]))
    if runs := [t for t in front if _gated(t)]:
        drawn["gates"] = gates_picture(runs[0])
    files: dict[str, bytes | str] = {f"pictures/{name}.png": png(picture) for name, picture in drawn.items()}
    return files | {"pictures.html": page(*drawn.values())}


def _params(trial: Trial, table: PriceTable) -> dict[str, str]:
    """Layer to its choice; of a funnel run its settings, and the choices that it ended in, if it did."""
    if not trial.proposal.funnel:
        picked = table.picked(trial.proposal.choices).items()
        return {name: f"{c.format}{c.ranks or ''}" + _width(c) for name, c in picked}
    settings = {f"funnel.{name}": str(value) for name, value in trial.proposal.settings.items()}
    if trial.outcome is None:
        return settings
    found = trial.outcome.layers or {}
    ranks = {name: f"{layer['format']}{tuple(layer['ranks'])}" for name, layer in found.items()}
    return settings | dict.fromkeys(table.convs, DENSE) | ranks


def _width(candidate: Candidate) -> str:
    return f" at {candidate.bits} bits" if candidate.bits < FLOAT_BITS else ""


def _series(history: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """A funnel run's history as series over its steps: the loss, and while there are gates also what closes them."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        values = {name: entry[name] for name in ("loss", "c", "strength", "macs_ratio") if entry.get(name) is not None}
        if "alive" in entry:
            values["gates"] = sum(map(sum, entry["alive"].values()))
        for name, value in values.items():
            series.setdefault(f"funnel.{name}", []).append((entry["step"], float(value)))
    return series


def _shown(space: Space) -> dict[str, Any]:
    """The space as others may see it: without the password of the tracking server."""
    document = space.model_dump(mode="json")
    if space.tracking.uri is not None:
        document["tracking"]["uri"] = shown(space.tracking.uri)
    return document
