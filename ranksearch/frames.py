"""Trials and fronts as tables of pandas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ranksearch.trial import Outcome, Trial, interval

if TYPE_CHECKING:
    import pandas as pd


def trials_frame(trials: Sequence[Trial], front: Sequence[Trial], dense_macs: float) -> pd.DataFrame:
    """A row a trial; see :meth:`ranksearch.study.Study.trials_frame`."""
    import pandas as pd

    members = {trial.number for trial in front}
    rows = [
        {
            "number": t.number,
            "index": t.index,
            "attempt": t.attempt,
            "state": t.state,
            "reason": t.reason,
            "origin": t.proposal.origin,
            "fidelity": t.proposal.fidelity,
            "feasible": t.feasible,
            "on_front": t.number in members,
            **_measured(t.outcome, dense_macs),
        }
        for t in trials
    ]
    columns = ["number", "index", "attempt", "state", "reason", "origin", "fidelity", "feasible", "on_front"]
    return pd.DataFrame(rows, columns=[*columns, *_measured(None, dense_macs)])


def front_frame(front: Sequence[Trial], dense_macs: float) -> pd.DataFrame:
    """A row a trial of a front; see :meth:`ranksearch.study.Study.front`."""
    import pandas as pd

    rows = []
    for trial in front:
        measured = _measured(trial.outcome, dense_macs)
        low, high = interval(measured["accuracy"], cast(Outcome, trial.outcome).report_images)
        rows.append(
            {
                "trial": trial.number,
                "accuracy": measured.pop("accuracy"),
                "accuracy_low": low,
                "accuracy_high": high,
                **measured,
                "origin": trial.proposal.origin,
            }
        )
    columns = ["trial", "accuracy", "accuracy_low", "accuracy_high", *list(_measured(None, 1))[1:], "origin"]
    return pd.DataFrame(rows, columns=columns)


def _measured(outcome: Outcome | None, dense_macs: float) -> dict[str, Any]:
    """The columns of an outcome; NaN without one."""
    if outcome is None:
        names = ["accuracy", "accuracy_search", "loss", "macs", "macs_ratio", "gmacs", "params"]
        return dict.fromkeys([*names, "latency_ms", "bit_operations", "weight_bytes", "seconds"], math.nan)
    return {
        "accuracy": math.nan if outcome.accuracy is None else outcome.accuracy,
        "accuracy_search": outcome.accuracy_search,
        "loss": outcome.loss,
        "macs": outcome.macs,
        "macs_ratio": outcome.macs / dense_macs,
        "gmacs": outcome.macs / 1e9,
        "params": outcome.params,
        "latency_ms": math.nan if outcome.latency_ms is None else outcome.latency_ms,
        "bit_operations": math.nan if outcome.bit_operations is None else outcome.bit_operations,
        "weight_bytes": math.nan if outcome.weight_bytes is None else outcome.weight_bytes,
        "seconds": outcome.seconds,
    }
