"""MLflow: a view of the search, written by the driver alone; the study stays the record of trials.

One run per search, with a nested run per trial. A background thread writes, so that the search does not wait for the
store, unless it is far ahead of it; what cannot be written is kept and tried again, and at the next resume ``sync``
fills what is still missing. Runs are found again by their tags ``ranksearch.study`` and ``ranksearch.trial``, so
nothing is written twice.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from ranksearch.errors import TrackingError
from ranksearch.plots import front_html, front_png
from ranksearch.space import BudgetSpec, TrackingSpec
from ranksearch.tracking.store import connect, explained, is_rejection, shown, store_uri, use_write_ahead_log
from ranksearch.tracking.writer import Writer

if TYPE_CHECKING:
    import pandas as pd

_CLOSED = ("FINISHED", "FAILED")
_LONGEST_PARAM, _LONGEST_TAG, _PARAMS_PER_BATCH, _METRICS_PER_BATCH = 6000, 5000, 100, 1000
"""MLflow's limits, in characters, parameters and metrics."""

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's description."""

_logger = logging.getLogger("ranksearch")


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What MLflow shows of one finished trial."""

    number: int
    """Number in the study."""
    name: str
    """Name of the run."""
    params: Mapping[str, str]
    """Layer to its choice, such as ``tucker2(8, 8)`` or ``dense``."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Accuracies, loss, MACs, params, seconds; what is not finite is left out."""
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Values over the steps of a training: name to pairs of a step and its value, likewise."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """State, reason, origin, ...; ``on_front`` (``true`` or ``false``) is brought up to date at the end."""
    rank_map: Mapping[str, Any] | None = None
    """The rank map in JSON types."""
    status: Literal["FINISHED", "FAILED"] = "FINISHED"
    start_ms: int
    """When the trial began, milliseconds since 1970. As the study knows it: a rebuilt view shows the same times."""
    end_ms: int
    """When the trial ended, likewise."""


class Tracker:
    """The MLflow view of one search. Only ``__init__`` and ``start`` raise; later failures are logged once.

    Args:
        spec: where to write, and the experiment's name.
        folder: of the default store (``mlflow.db``) and of the artifacts of any database (``mlartifacts``).
        pauses_s: waits before a failed write is tried again.

    Raises:
        TrackingError: the store cannot be reached, or its URI is malformed.
    """

    def __init__(self, spec: TrackingSpec, *, folder: Path, pauses_s: Sequence[float] = (0.5, 2.0)) -> None:
        self.uri = store_uri(spec, folder)
        self._monitor: Any = None
        """Logs processors, memory and GPUs of this machine, every ten seconds."""
        self._parent = ""
        self._resumed = False
        """Whether another driver had the run before this one."""
        self._study = ""
        self._children: dict[int, str] = {}
        """Trial to its run."""
        self._handed_over: set[int] = set()
        """Trials whose run is complete, or in the writer's hands."""
        self._left_running: dict[int, str] = {}
        """Trial to its run, of those that an earlier driver began and did not end."""
        self._on_front: set[int] = set()
        """Trials whose run says that they are on the front."""
        self._steps: set[int] = set()
        """Trials at which the hypervolume is recorded."""
        self._points: list[Metric] = []
        """Hypervolumes that are not written yet: appended here, taken away by the writer."""
        self._release = use_write_ahead_log(folder / "mlflow.db") if spec.uri is None else None
        try:
            with explained(self.uri):
                self._client, self._experiment = connect(self.uri, spec.experiment, folder)
        except TrackingError:
            self._release_database()
            raise
        self._writer = Writer(f"MLflow at {shown(self.uri)}", pauses_s=pauses_s, rejected=is_rejection)

    def start(
        self,
        *,
        study: str,
        params: Mapping[str, str | int | float],
        tags: Mapping[str, str],
        documents: Mapping[str, Any],
        study_id: str | None = None,
        inputs: Sequence[DatasetInput] = (),
        view: tuple[str, str] | None = None,
    ) -> None:
        """Find the run of this study, or create it.

        Args:
            study: name of the study and of the run.
            params: of the search. On a resume, one that has changed becomes a tag ``resumed.<name>``.
            tags: of the run.
            documents: file name to text, or to JSON types: artifacts of the run.
            study_id: tells studies of the same name on one server apart; the name itself by default.
            inputs: data sets of the run.
            view: tag of the experiment and its value.

        Raises:
            TrackingError: the store cannot be read or written.
        """
        study_id = study_id or study
        own = {"ranksearch.study": study, "ranksearch.study_id": study_id, "ranksearch.kind": "search"}
        self._study = study
        with explained(self.uri):
            found = self._search(
                f"tags.`ranksearch.study_id` = {_quoted(study_id)} and tags.`ranksearch.kind` = 'search'"
            )
            parent = next(found, None)
            if parent is None:
                parent = self._client.create_run(self._experiment, tags={**own, **_short(tags)}, run_name=study)
                self._parent = parent.info.run_id
                if inputs:
                    self._client.log_inputs(self._parent, list(inputs))
            else:
                self._parent, self._resumed = parent.info.run_id, True
                self._client.update_run(self._parent, status="RUNNING")
                self._read_what_is_there(parent)
            known = parent.data.params
            given = {key: str(value)[:_LONGEST_PARAM] for key, value in params.items()}
            changed = {f"resumed.{key}": value for key, value in given.items() if known.get(key, value) != value}
            fresh = {key: value for key, value in given.items() if key not in known}
            self._log(self._parent, params=fresh, tags={**tags, **changed})
            self._upload(documents)
            if view is not None:
                self._client.set_experiment_tag(self._experiment, *view)
        self._end_monitor()
        self._monitor = _monitor(self._parent, self.uri, resumed=bool(known))

    def sync(self, trials: Iterable[TrialRecord]) -> None:
        """Write the finished trials that have no complete run, and end the runs that a killed driver left open."""
        numbers = set()
        for record in trials:
            numbers.add(record.number)
            self.trial(record)
        for number in self._left_running.keys() - numbers:
            # The study has never heard of the end of this trial.
            self._writer.submit(partial(self._end_orphan, self._left_running[number]))
        self._left_running = {}

    def trial(self, record: TrialRecord) -> None:
        """Hand a finished trial to the background thread; returns at once. A trial handed over before is ignored."""
        if record.number not in self._handed_over:
            self._handed_over.add(record.number)
            self._writer.submit(partial(self._write_trial, record))

    def hypervolume(self, step: int, value: float, at_ms: int) -> None:
        """Record the front's hypervolume after ``step`` trials, through the background thread; once for each step.

        To MLflow a point of the same step and value is another one where its time is: ``at_ms``, when the trials had
        ended, is the study's, so that what two drivers write, one of them ousted, is the same.
        """
        if step not in self._steps and isfinite(value):
            self._steps.add(step)
            self._points.append(Metric("hypervolume", value, at_ms, step))
            if len(self._points) == 1:  # else a job that will write it is waiting, or at work
                self._writer.submit(self._log_points)

    def finish(
        self,
        *,
        status: Literal["FINISHED", "KILLED", "FAILED"],
        metrics: Mapping[str, float],
        front: pd.DataFrame,
        trials: pd.DataFrame,
        dense: Mapping[str, float],
        files: Mapping[str, Path | str | bytes],
        note: Callable[[str], str] = lambda run_id: "",
        budget: BudgetSpec | None = None,
    ) -> None:
        """Write what is waiting, then the result, and end the run of the search.

        Args:
            status: of the run.
            metrics: of the run, with the number of trials as their step.
            front: as :func:`ranksearch.plots.front_figure` takes it; logged as a table, CSV, Plotly page and PNG.
            trials: likewise; logged as CSV, and its ``on_front`` as tags of the trials' runs.
            dense: likewise.
            files: name of an artifact to the file, text or bytes it holds.
            note: the run's description, given its id.
            budget: drawn into the front's picture.
        """
        self._end_monitor()
        self._writer.flush()
        if self._resumed:
            self._writer.now(self._remove_doubles)
        at = _now_ms()

        def write(again: bool) -> None:
            with tempfile.TemporaryDirectory() as folder:
                front_png(trials, front, Path(folder, "front.png"), dense=dense, title=self._study, budget=budget)
                page = front_html(trials, front, dense=dense, title=self._study, budget=budget)
                tables = {"front.csv": front.to_csv(index=False), "trials.csv": trials.to_csv(index=False)}
                self._upload({**tables, "front.html": page, "front.png": Path(folder, "front.png"), **files})
            self._log_table(front)
            told = {NOTE: text} if (text := note(self._parent)) else {}
            self._log(self._parent, metrics=metrics, at_ms=at, step=len(trials), tags=told)
            self._client.set_terminated(self._parent, status)

        done = self._writer.now(write)
        self._mark_front({int(number) for number in trials.loc[trials["on_front"].astype(bool), "number"]})
        if self._writer.flush() or not done:
            _logger.warning(
                "MLflow at %s lacks the result or some of the trials; resume the study to add them.", shown(self.uri)
            )

    def flush(self) -> None:
        """Wait until what was handed over is written, or has failed."""
        self._writer.flush()

    def drop(self) -> None:
        """Write nothing more, not even what is waiting: the run is another driver's."""
        self._end_monitor()
        self._writer.drop()

    def close(self) -> None:
        """Finish the queue and end the background threads."""
        self._end_monitor()
        self._writer.close()
        self._release_database()

    def _end_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def _release_database(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None

    def _search(self, condition: str) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs([self._experiment], condition, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _read_what_is_there(self, parent: Run) -> None:
        """Which trials and hypervolumes an earlier driver has written."""
        for run in self._search(f"tags.`mlflow.parentRunId` = '{self._parent}'"):
            number = int(run.data.tags["ranksearch.trial"])
            self._children.setdefault(number, run.info.run_id)
            if run.info.status in _CLOSED:
                self._children[number] = run.info.run_id
                self._handed_over.add(number)
            if run.info.status == "RUNNING":
                self._left_running[number] = run.info.run_id
            if run.data.tags.get("on_front") == "true":
                self._on_front.add(number)
        if "hypervolume" in parent.data.metrics:
            self._steps |= {point.step for point in self._client.get_metric_history(self._parent, "hypervolume")}

    def _write_trial(self, record: TrialRecord, again: bool) -> None:
        """Write one trial's run, going on with one that an earlier try began."""
        run_id = self._children.get(record.number)
        if run_id is None and again:
            begun = f"tags.`mlflow.parentRunId` = '{self._parent}' and tags.`ranksearch.trial` = '{record.number}'"
            run_id = next((run.info.run_id for run in self._search(begun)), None)
        if run_id is None:
            own = {
                "mlflow.parentRunId": self._parent,
                "ranksearch.study": self._study,
                "ranksearch.trial": str(record.number),
                "ranksearch.kind": "trial",
            }
            tags = {**own, **_short(record.tags)}
            run = self._client.create_run(self._experiment, record.start_ms, tags, record.name)
            run_id = run.info.run_id
            self._log(run_id, params=record.params, metrics=record.metrics, at_ms=record.end_ms)
        else:
            self._log(run_id, params=record.params, metrics=record.metrics, at_ms=record.end_ms, tags=record.tags)
        self._children[record.number] = run_id
        if record.series:
            self._log_series(run_id, record)
        if record.rank_map is not None:
            self._client.log_dict(run_id, dict(record.rank_map), "rank_map.json")
        if record.tags.get("on_front") == "true":
            self._on_front.add(record.number)
        self._client.set_terminated(run_id, record.status, record.end_ms)

    def _log_points(self, _again: bool) -> None:
        """Write the hypervolumes that are waiting, many in one call. Those of a call that failed stay."""
        while points := self._points[:_METRICS_PER_BATCH]:
            self._client.log_batch(self._parent, metrics=points)
            del self._points[: len(points)]

    def _remove_doubles(self, _again: bool) -> None:
        """Remove the runs of trials that have one: a driver that was ousted wrote them before it knew that it was."""
        for run in self._search(f"tags.`mlflow.parentRunId` = '{self._parent}'"):
            own = self._children.setdefault(int(run.data.tags["ranksearch.trial"]), run.info.run_id)
            if own != run.info.run_id:
                self._client.delete_run(run.info.run_id)

    def _end_orphan(self, run_id: str, _again: bool) -> None:
        self._client.set_terminated(run_id, "KILLED")

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        at_ms: int = 0,
        step: int = 0,
    ) -> None:
        """Log everything in one call, or in one for each hundred parameters. A repetition changes nothing."""
        points = [Metric(key, float(value), at_ms, step) for key, value in (metrics or {}).items() if isfinite(value)]
        labels = [RunTag(key, value) for key, value in _short(tags or {}).items()]
        pairs = [Param(key, value[:_LONGEST_PARAM]) for key, value in (params or {}).items()]
        self._client.log_batch(run_id, metrics=points, params=pairs[:_PARAMS_PER_BATCH], tags=labels)
        for start in range(_PARAMS_PER_BATCH, len(pairs), _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=pairs[start : start + _PARAMS_PER_BATCH])

    def _log_series(self, run_id: str, record: TrialRecord) -> None:
        points = [
            Metric(name, value, record.end_ms, step)
            for name, pairs in record.series.items()
            for step, value in pairs
            if isfinite(value)
        ]
        for start in range(0, len(points), _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=points[start : start + _METRICS_PER_BATCH])

    def _upload(self, documents: Mapping[str, Any]) -> None:
        """Artifacts of the search's run: files, texts, bytes or JSON types, by their names."""
        with tempfile.TemporaryDirectory() as folder:
            for name, document in documents.items():
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(document, Path):
                    shutil.copyfile(document, target)
                elif isinstance(document, bytes):
                    target.write_bytes(document)
                else:
                    text = document if isinstance(document, str) else json.dumps(document, indent=2)
                    target.write_text(text, encoding="utf-8")
            self._client.log_artifacts(self._parent, folder)

    def _log_table(self, front: pd.DataFrame) -> None:
        """The front as an MLflow table. ``log_table`` appends to a table it finds: a later one is written over it."""
        if any(artifact.path == "front.json" for artifact in self._client.list_artifacts(self._parent)):
            self._upload({"front.json": front.to_json(orient="split", index=False)})
        else:
            self._client.log_table(self._parent, front, "front.json")

    def _mark_front(self, numbers: set[int]) -> None:
        """Correct ``on_front`` where the front has moved on since the trial was written."""
        for number in sorted((numbers ^ self._on_front) & self._children.keys()):
            self._writer.submit(partial(self._tag, self._children[number], "on_front", str(number in numbers).lower()))
        self._on_front = numbers

    def _tag(self, run_id: str, key: str, value: str, _again: bool) -> None:
        self._client.set_tag(run_id, key, value)


def _monitor(run_id: str, uri: str, *, resumed: bool) -> Any:
    """MLflow's own monitor of this machine, running."""
    monitor: Any = SystemMetricsMonitor(run_id, resume_logging=resumed, tracking_uri=uri)  # type: ignore[no-untyped-call]
    monitor.start()
    return monitor


def _short(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:_LONGEST_TAG] for key, value in tags.items()}


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def _now_ms() -> int:
    return int(time.time() * 1000)
