"""The MLflow run of a comparison: one a comparison, however often it is continued, beside the runs of its searches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag

from ranksearch.space import TrackingSpec
from ranksearch.tracking.store import connect, explained, store_uri

_NAME, _STUDIES = "ranksearch.comparison", "ranksearch.studies"
_LONGEST_TAG = 5000
"""MLflow's limit, in characters."""
_PER_BATCH = 900
"""Metrics that one call may log: MLflow takes a thousand entries."""


def record_comparison(
    spec: TrackingSpec,
    folder: Path,
    *,
    name: str,
    studies: Sequence[str],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    documents: Mapping[str, str | bytes],
) -> None:
    """Write a comparison's result over that of its run; make the run where there is none.

    Args:
        spec: where to write, and the experiment's name.
        folder: of the default store, and of the artifacts of any database.
        name: of the comparison and of the run.
        studies: ids of its studies, which tell comparisons of one name apart.
        metrics: of the run; what is not finite is left out.
        tags: of the run.
        documents: artifact to its text or bytes.

    Raises:
        TrackingError: the store cannot be reached or written.
    """
    uri = store_uri(spec, folder)
    with explained(uri):
        client, experiment = connect(uri, spec.experiment, folder)
        own = {_NAME: name, _STUDIES: " ".join(studies)[:_LONGEST_TAG], "ranksearch.kind": "comparison"}
        run = _run_of(client, experiment, name, studies)
        if run is None:
            run = client.create_run(experiment, tags=own, run_name=name)
        run_id, now, known = run.info.run_id, int(time.time() * 1000), run.data.metrics
        points = [Metric(k, v, now, 0) for k, v in metrics.items() if isfinite(v) and known.get(k) != v]
        labels = [RunTag(key, value[:_LONGEST_TAG]) for key, value in {**tags, **own}.items()]
        client.log_batch(run_id, metrics=points[:_PER_BATCH], tags=labels)
        for start in range(_PER_BATCH, len(points), _PER_BATCH):
            client.log_batch(run_id, metrics=points[start : start + _PER_BATCH])
        with tempfile.TemporaryDirectory() as written:
            for file, document in documents.items():
                Path(written, file).write_bytes(document.encode() if isinstance(document, str) else document)
            client.log_artifacts(run_id, written)
        client.set_terminated(run_id, "FINISHED")


def _run_of(client: MlflowClient, experiment: str, name: str, studies: Sequence[str]) -> Run | None:
    """The run of the comparison of this name that has one of these studies."""
    for run in client.search_runs([experiment], f"tags.`{_NAME}` = '{name}'", max_results=1000):
        if set(run.data.tags.get(_STUDIES, "").split()) & set(studies):
            return run
    return None
