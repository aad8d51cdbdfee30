"""What a comparison found, as frozen data and as tables; no searches are run here.

Over seeds, a figure is given as its mean and half its range. MACs are per image; accuracies are those of the report
images, 0 to 1, unless they are called search accuracies.

Seeds say nothing of chance in the report images, which are the same for all. So every row is also compared with the
best one image by image (paired, as in Q. McNemar, "Note on the sampling error of the difference between correlated
proportions or percentages", 1947): what it is behind, and the standard error of that.
"""

from __future__ import annotations

import base64
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan, nan, sqrt
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ranksearch.errors import BudgetError
from ranksearch.export import choose, rank_map_of
from ranksearch.study import INTERRUPTED, Study
from ranksearch.trial import Outcome, Trial

if TYPE_CHECKING:
    import pandas as pd

_WHEN = ("before", "after")
Choice = frozenset[tuple[str, str, tuple[int, ...], int]]
"""A rank map by what it makes of every layer: name, format, ranks. Dense layers are left out."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """How far a search was after some of its trials."""

    trials: int
    """Proposals that had ended, failed ones too."""
    seconds: float
    """Wall time until then: of measuring the prices that the strategy reads, and in which at least one trial ran. What
    an interruption took does not count."""
    hypervolume: float
    """Share of the objectives' box that was dominated then; see :meth:`ranksearch.study.Study.hypervolume`."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one search has within a target; all but the target are None where it has nothing."""

    target: float
    """Share of the dense network's MACs."""
    trial: int | None = None
    """Number of the trial that is the most accurate on the search images within the target."""
    macs: int | None = None
    macs_ratio: float | None = None
    accuracy_search: float | None = None
    before: float | None = None
    """Its accuracy as the search scored it."""
    after: float | None = None
    """Its accuracy after the comparison's fine-tuning."""
    before_right: bytes | None = None
    """Which report images it classified rightly, one byte an image; None of studies that did not keep it."""
    after_right: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One search of a comparison: a strategy and a seed."""

    strategy: str
    seed: int
    study: str
    done: int
    """Proposals that were scored."""
    failed: int
    hypervolume: float
    seconds: float
    """Sum over the scored trials."""
    wall_seconds: float
    """Of the last point of the curve."""
    dense_accuracy: float
    curve: tuple[Point, ...]
    cells: tuple[Cell, ...]
    """One a target."""
    reason: str | None = None
    """Of the first failed trial, where none was scored."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Strategies side by side."""

    name: str
    strategies: tuple[str, ...]
    """Names of the rows, in the order asked for; the user's rank maps among them."""
    seeds: tuple[int, ...]
    targets: tuple[float, ...]
    fine_tune_steps: int
    runs: tuple[Run, ...]
    failures: Mapping[str, str]
    """Strategy to the reason why it could not search."""

    def frame(self) -> pd.DataFrame:
        """One row for each strategy, seed and target."""
        import pandas as pd

        whole = [*(field for field in Run.__dataclass_fields__ if field not in ("curve", "cells", "reason"))]
        rows = [{name: getattr(run, name) for name in whole} | _shown(cell) for run in self.runs for cell in run.cells]
        frame = pd.DataFrame(rows, columns=[*whole, *_shown(Cell(target=0.0))])
        numbers = ["macs_ratio", "accuracy_search", "before", "after"]
        frame = frame.astype({"trial": "Int64", "macs": "Int64", **dict.fromkeys(numbers, float)})
        first = ["strategy", "seed", "target", "study"]
        return frame[[*first, *(name for name in frame.columns if name not in first)]]

    def curves(self) -> pd.DataFrame:
        """One row for each strategy, seed and ended trial: hypervolume over trials and over seconds."""
        import pandas as pd

        rows = [
            {"strategy": run.strategy, "seed": run.seed, **asdict(point)} for run in self.runs for point in run.curve
        ]
        return pd.DataFrame(rows, columns=["strategy", "seed", *Point.__dataclass_fields__])

    def summary(self) -> pd.DataFrame:
        """One row for each strategy: means over the seeds, half ranges, and the reason of one that could not search.

        Columns of a target end in it, as in ``before_0.5``; ``found_0.5`` counts the seeds that have something there.
        ``before_behind_0.5`` is by how much the row is behind the best one there, ``before_behind_error_0.5`` the
        standard error of that, as the report images are a sample.
        """
        import pandas as pd

        behind = {(when, i): self._behind(when, i) for when in _WHEN for i in range(len(self.targets))}
        return pd.DataFrame([self._row(strategy, behind) for strategy in self.strategies])

    def _row(
        self, strategy: str, behind: Mapping[tuple[str, int], Mapping[str, tuple[float, float]]]
    ) -> dict[str, Any]:
        runs = [run for run in self.runs if run.strategy == strategy]
        row: dict[str, Any] = {
            "strategy": strategy,
            "seeds": len(runs),
            "done": sum(run.done for run in runs),
            "failed": sum(run.failed for run in runs),
        }
        row["hypervolume"] = _mean(run.hypervolume for run in runs)
        row["hypervolume_half_range"] = _half_range(run.hypervolume for run in runs)
        row["minutes"] = _mean(run.seconds / 60 for run in runs)
        row["wall_minutes"] = _mean(run.wall_seconds / 60 for run in runs)
        for i, target in enumerate(self.targets):
            cells = [run.cells[i] for run in runs if run.cells[i].trial is not None]
            row[f"found_{target:g}"] = len(cells)
            row[f"macs_ratio_{target:g}"] = _mean(cell.macs_ratio for cell in cells)
            for name in _WHEN:
                values = [getattr(cell, name) for cell in cells]
                less, error = behind[name, i].get(strategy, (nan, nan))
                row |= {
                    f"{name}_{target:g}": _mean(values),
                    f"{name}_half_range_{target:g}": _half_range(values),
                    f"{name}_behind_{target:g}": less,
                    f"{name}_behind_error_{target:g}": error,
                }
        reasons = (self.failures.get(strategy), *(run.reason for run in runs))
        return row | {"reason": next((reason for reason in reasons if reason), None)}

    def _behind(self, when: str, place: int) -> dict[str, tuple[float, float]]:
        """How far each strategy is behind the best at one target, over the seeds that both have; and its error.

        The best is the most accurate in the mean, of those that have something with the most seeds. Where its study did
        not keep which images were right, nothing is said.
        """
        right: dict[str, dict[int, np.ndarray]] = {}
        accuracies: dict[str, list[float]] = {}
        for run in self.runs:
            cell = run.cells[place]
            value, bits = getattr(cell, when), getattr(cell, f"{when}_right")
            if value is not None:
                accuracies.setdefault(run.strategy, []).append(value)
            if bits is not None:
                right.setdefault(run.strategy, {})[run.seed] = np.frombuffer(bits, np.uint8)
        best = max(accuracies, key=lambda name: (len(accuracies[name]), _mean(accuracies[name])), default="")
        return {name: _apart(right[best], own) for name, own in right.items()} if best in right else {}

    def metrics(self) -> dict[str, float]:
        """The summary as single figures, such as ``accuracy/knapsack/0.50/after``; missing ones are left out."""
        found: dict[str, float] = {}
        for row in self.summary().to_dict("records"):
            slug = slug_of(row["strategy"])
            found |= {f"{name}/{slug}": row[name] for name in ("hypervolume", "minutes", "done", "failed")}
            for target in self.targets:
                place = f"{slug}/{target:.2f}" if round(target, 2) == target else f"{slug}/{target:g}"
                found[f"macs_ratio/{place}"] = row[f"macs_ratio_{target:g}"]
                found |= {f"accuracy/{place}/{when}": row[f"{when}_{target:g}"] for when in ("before", "after")}
        return {name: float(value) for name, value in found.items() if not isnan(value)}

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types: the summary, and every search with its cells and its curve."""
        summary = [{str(key): _plain(value) for key, value in row.items()} for row in self.summary().to_dict("records")]
        return {
            "name": self.name,
            "seeds": list(self.seeds),
            "targets": list(self.targets),
            "fine_tune_steps": self.fine_tune_steps,
            "summary": summary,
            "runs": [asdict(run) | {"cells": [_shown(cell) for cell in run.cells]} for run in self.runs],
            "failures": dict(self.failures),
        }


def slug_of(label: str) -> str:
    """A row's name as a part of other names: ``optuna:tpe`` is ``optuna-tpe``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label)


def run_of(strategy: str, seed: int, study: Study, targets: Sequence[float], after: Mapping[Choice, Outcome]) -> Run:
    """What a study found; ``after`` has the outcomes of the rank maps that were fine-tuned."""
    trials = study.trials()
    last = {trial.index: trial for trial in trials}.values()
    failed = [trial for trial in last if trial.state == "FAIL"]
    done = [trial for trial in last if trial.state == "COMPLETE"]
    curve = _curve(study, [*done, *failed])
    return Run(
        strategy=strategy,
        seed=seed,
        study=study.name,
        done=len(done),
        failed=len(failed),
        hypervolume=study.hypervolume(done),
        seconds=sum(cast(Outcome, trial.outcome).seconds for trial in done),
        wall_seconds=curve[-1].seconds if curve else 0.0,
        dense_accuracy=study.setting.dense["accuracy"],
        curve=curve,
        cells=tuple(_cell(study, target, after) for target in targets),
        reason=failed[0].reason if failed and not done else None,
    )


def chosen(study: Study, target: float) -> Trial | None:
    """The most accurate trial within a share of the dense MACs, if there is one."""
    try:
        return choose(study, max_macs_ratio=target)
    except BudgetError:
        return None


def choice_of(study: Study, trial: Trial) -> Choice:
    """What a trial made of every layer."""
    layers = rank_map_of(study, trial).layers
    return frozenset((name, layer.format, layer.ranks, layer.bits) for name, layer in layers.items())


def _cell(study: Study, target: float, after: Mapping[Choice, Outcome]) -> Cell:
    trial = chosen(study, target)
    if trial is None:
        return Cell(target=target)
    outcome = cast(Outcome, trial.outcome)
    trained = after.get(choice_of(study, trial))
    return Cell(
        target=target,
        trial=trial.number,
        macs=outcome.macs,
        macs_ratio=outcome.macs / study.setting.dense["macs"],
        accuracy_search=outcome.accuracy_search,
        before=outcome.accuracy,
        after=None if trained is None else trained.accuracy,
        before_right=_right(outcome),
        after_right=None if trained is None else _right(trained),
    )


def _right(outcome: Outcome) -> bytes | None:
    if outcome.report_right is None:
        return None
    packed = np.frombuffer(base64.b64decode(outcome.report_right), np.uint8)
    return np.unpackbits(packed, count=outcome.report_images).tobytes()


def _shown(cell: Cell) -> dict[str, Any]:
    """A cell without the answers to single images."""
    return {name: value for name, value in asdict(cell).items() if not name.endswith("_right")}


def _apart(best: Mapping[int, np.ndarray], own: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Mean difference of two rows' accuracies over the seeds that both have, and its standard error over the images."""
    seeds = sorted(best.keys() & own.keys())
    if not seeds:
        return nan, nan
    each = np.mean([best[seed].astype(float) - own[seed] for seed in seeds], axis=0)
    return float(each.mean()), float(each.std(ddof=1)) / sqrt(len(each)) if len(each) > 1 else nan


def _curve(study: Study, ended: Sequence[Trial]) -> tuple[Point, ...]:
    """The hypervolume after every trial, in the order in which they ended."""
    ordered = sorted(ended, key=lambda one: (one.end_ms, one.number))
    # Of a trial that a killed driver left, the end was written only when the search was continued.
    busy = _Busy((trial.start_ms, trial.end_ms) for trial in ordered if trial.reason != INTERRUPTED)
    points: list[Point] = []
    front = study.growing_front()
    for trial in ordered:
        before = points[-1].hypervolume if points else 0.0
        value = study.hypervolume(list(front)) if front.take(trial) else before
        seconds = study.setting.priced_seconds + busy.until(trial.end_ms) / 1000
        points.append(Point(trials=len(points) + 1, seconds=seconds, hypervolume=value))
    return tuple(points)


class _Busy:
    """The time in which at least one of some spans runs, in milliseconds."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.parts: list[tuple[int, int, int]] = []
        """Disjoint, by their starts: start, end, and the time in all parts before."""
        for start, stop in sorted(spans):
            first, end, before = self.parts[-1] if self.parts else (0, 0, 0)
            if self.parts and start <= end:
                self.parts[-1] = (first, max(end, stop), before)
            else:
                self.parts.append((start, stop, before + end - first))

    def until(self, moment: int) -> int:
        """How much of it lies before a moment."""
        place = bisect_right(self.parts, moment, key=itemgetter(0))
        if not place:
            return 0
        start, end, before = self.parts[place - 1]
        return before + min(end, moment) - start


def _mean(values: Iterable[float | None]) -> float:
    """Of the values that are there; NaN without any."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else nan


def _half_range(values: Iterable[float | None]) -> float:
    found = [value for value in values if value is not None]
    return (max(found) - min(found)) / 2 if found else nan


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and isnan(value) else value
