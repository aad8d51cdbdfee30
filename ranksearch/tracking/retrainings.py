"""The MLflow run of a fine-tuning: found again after a kill, so that one fine-tuning is one run with one curve."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from ranksearch.errors import TrackingError
from ranksearch.space import TrackingSpec
from ranksearch.tracking.store import connect, explained, store_uri

_UID = "ranksearch.finetune"
_LONGEST = 5000
"""MLflow's limit of a tag and, nearly, of a parameter, in characters."""

_logger = logging.getLogger("ranksearch")


class RetrainingRun:
    """The run of one fine-tuning. Only making it raises; what cannot be written later is warned of once.

    Args:
        spec: where to write, and the experiment's name.
        folder: of the default store, and of the artifacts of any database.
        name: of the run.
        uid: of the fine-tuning; the unfinished run that has it is gone on with.
        params: of the run.

    Raises:
        TrackingError: the store cannot be reached or written.
    """

    def __init__(self, spec: TrackingSpec, folder: Path, *, name: str, uid: str, params: Mapping[str, Any]) -> None:
        self._uri, self._warned = store_uri(spec, folder), False
        with explained(self._uri):
            self._client, experiment = connect(self._uri, spec.experiment, folder)
            mine = f"tags.`{_UID}` = '{uid}' and attributes.status = 'RUNNING'"
            found = self._client.search_runs([experiment], mine, max_results=1)
            if found:
                self._run = found[0].info.run_id
            else:
                tags = {_UID: uid, "ranksearch.kind": "finetune"}
                self._run = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
                known = [Param(key, str(value)[:_LONGEST]) for key, value in params.items()]
                self._client.log_batch(self._run, params=known)
            self._logged = {
                (metric.key, metric.step)
                for key in (found[0].data.metrics if found else ())
                for metric in self._client.get_metric_history(self._run, key)
            }

    def log(self, prefix: str, curve: Sequence[Mapping[str, Any]]) -> None:
        """Write the points of a curve that are not there yet; ``epoch`` is the step, ``prefix`` begins the names."""
        now = int(time.time() * 1000)
        points = [
            Metric(f"{prefix}{key}", float(value), now, epoch["epoch"])
            for epoch in curve
            for key, value in epoch.items()
            if key != "epoch" and value is not None and isfinite(value)
        ]
        fresh = [point for point in points if (point.key, point.step) not in self._logged]
        if fresh and self._attempt(lambda: self._client.log_batch(self._run, metrics=fresh[:1000])):
            self._logged |= {(point.key, point.step) for point in fresh[:1000]}

    def finish(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Write the outcome and end the run."""
        now = int(time.time() * 1000)
        points = [Metric(key, value, now, 0) for key, value in metrics.items() if isfinite(value)]
        labels = [RunTag(key, value[:_LONGEST]) for key, value in tags.items()]
        if self._attempt(lambda: self._client.log_batch(self._run, metrics=points, tags=labels)):
            self._attempt(lambda: self._client.set_terminated(self._run, "FINISHED"))

    def _attempt(self, write: Any) -> bool:
        """Whether it could be written: a store that is down does not end a training."""
        try:
            with explained(self._uri):
                write()
        except TrackingError as error:
            if not self._warned:
                _logger.warning("%s The fine-tuning goes on; what is missing is tried again after each epoch.", error)
            self._warned = True
            return False
        return True
