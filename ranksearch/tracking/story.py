"""What MLflow's own pages tell of a search: descriptions in Markdown, the columns in place, the data as inputs."""

from __future__ import annotations

import hashlib
import json
from math import isnan
from pathlib import Path

import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag

from ranksearch.space import TrackingSpec
from ranksearch.study import Study
from ranksearch.tracking.store import connect, explained, store_uri
from ranksearch.trial import Trial

COLUMNS = (
    "tags.`on_front`",
    "metrics.`accuracy`",
    "metrics.`accuracy_search`",
    "metrics.`macs_ratio`",
    "metrics.`gmacs`",
    "metrics.`params`",
    "tags.`strategy`",
    "tags.`fidelity`",
    "tags.`reason`",
)
"""Of the experiment's page, in this order."""
_SHARED = "mlflow.sharedViewState."
"""What the experiment's tags with states of its page begin with."""
_ROWS = 12
"""Points of the front in a description: it holds 5,000 characters."""


def view_key(study: str) -> str:
    """What the address of the experiment's page names, so that it opens with :func:`view_state`."""
    return "front-" + hashlib.sha256(study.encode()).hexdigest()[:16]


def view_tag(study: str) -> tuple[str, str]:
    """The experiment's tag that holds :func:`view_state`."""
    return _SHARED + view_key(study), view_state(study)


def front_page(spec: TrackingSpec, folder: Path, study: str) -> str:
    """The address below MLflow's own at which the experiment's page opens on this study's front; empty without one.

    Raises:
        TrackingError: the store cannot be reached.
    """
    uri = store_uri(spec, folder)
    with explained(uri):
        client, experiment = connect(uri, spec.experiment, folder)
        tags = client.get_experiment(experiment).tags
    key = view_key(study)
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={key}" if _SHARED + key in tags else ""


def view_state(study: str) -> str:
    """A state of the experiment's page as MLflow shares it: this search's trials, the front first, by rising MACs."""
    return json.dumps(
        {
            "searchFilter": f"tags.`ranksearch.study` = '{study}' and tags.`on_front` = 'true'",
            "orderByKey": "metrics.`macs_ratio`",
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "modelVersionFilter": "All Runs",
            "datasetsFilter": [],
            "selectedColumns": list(COLUMNS),
            "viewMaximized": True,
        }
    )


def about(study: Study, run_id: str = "") -> str:
    """A search in Markdown: what it is and what to do next; with ``run_id``, its front's picture and table too."""
    setting, name = study.setting, study.name
    dense = setting.dense
    lines = [
        f"**{setting.model.name}** searched by **{study.space.strategy.name}** with formats "
        f"{', '.join(study.space.formats)}. Dense: {100 * dense['accuracy']:.2f} % on the report images at "
        f"{dense['macs'] / 1e9:.4g} GMACs.",
        "",
    ]
    if not run_id:
        return "\n".join([*lines, f"It is running: `ranksearch dashboard {name}` follows it.", ""])
    # MLflow folds all but the first lines, so what to do comes first.
    lines += [
        "Go on with:",
        "",
        "```",
        f"ranksearch dashboard {name}",
        f"ranksearch export {name} --knee -o rank_map.json --save-weights compressed.safetensors",
        f"ranksearch publish {name} --knee --alias champion",
        "```",
        "",
        *_table(study),
        f"![front](get-artifact?path=front.png&run_uuid={run_id})",
        "",
    ]
    return "\n".join(lines)


def _table(study: Study) -> list[str]:
    front = study.front()
    if front.empty:
        return ["No trial is on the front.", ""]
    shown = np.linspace(0, len(front) - 1, min(len(front), _ROWS)).round().astype(int)
    lines = ["| trial | accuracy % (report) | search % | MACs % | parameters |", "|---|---|---|---|---|"]
    for row in front.iloc[::-1].iloc[shown].to_dict("records"):
        report = "" if isnan(row["accuracy"]) else f"{100 * row['accuracy']:.2f}"
        cells = (row["trial"], report, f"{100 * row['accuracy_search']:.2f}", f"{100 * row['macs_ratio']:.1f}")
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['params']:,} |")
    return [*lines, ""]


def about_trial(study: Study, trial: Trial) -> str:
    """One trial in Markdown: why it failed, or what it reached and how it is exported."""
    if trial.outcome is None:
        return f"**Failed:** {trial.reason}\n"
    share = trial.outcome.macs / study.setting.dense["macs"]
    return (
        f"{100 * trial.outcome.accuracy_search:.2f} % on the search images, {100 * share:.1f} % of the dense MACs.\n\n"
        f"```\nranksearch export {study.name} --trial {trial.number} -o rank_map.json\n```\n"
    )


def inputs(study: Study) -> list[DatasetInput]:
    """The three splits as MLflow's inputs, told apart by their context."""
    data, found = study.space.data, []
    source = json.dumps(data.model_dump(mode="json"))
    for context, of in (("training", "training"), ("validation", "search"), ("testing", "report")):
        digest = hashlib.sha256(f"{study.setting.data_digest} {of}".encode()).hexdigest()[:8]
        dataset = Dataset(name=f"{data.source}, {of} images", digest=digest, source_type="local", source=source)
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return found
