"""A trial's compressed network into MLflow's Model Registry, from where it is served without ranksearch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ranksearch.errors import TrackingError
from ranksearch.export import load_compressed
from ranksearch.handover import export_trial
from ranksearch.models import build_model
from ranksearch.preparation import Notify, silent
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.tracking.registry import Registered, register
from ranksearch.trial import Trial


def publish(
    study: Study, trial: Trial, store: Store, *, alias: str, model: str | None = None, notify: Notify = silent
) -> Registered:
    """Register the network of a complete trial, with its rank map, as a new version that the alias then names.

    A trial on the front has its weights in the study; any other is built again from its seed.

    Args:
        study: the search.
        trial: one of its complete trials.
        store: where the study lives.
        alias: such as ``champion``; a version that had it before loses it.
        model: name in the registry; that of the architecture by default.
        notify: told what is being done.

    Raises:
        RebuildError: the network built again does not score as the trial did.
        TrackingError: the study is not tracked, or MLflow refuses or cannot be reached.
    """
    space = study.space
    if not space.tracking.enabled:
        raise TrackingError(
            f"a study must be tracked to be published, {study.name} was not (tracking.enabled: false). Search with "
            "tracking, or `ranksearch export --save-weights`."
        )
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "compressed.safetensors")
        rank_map = export_trial(study, trial, store, Path(folder, "rank_map.json"), weights=weights, notify=notify)
        network = load_compressed(rank_map, build_model(space.model, weights=None), weights)
    notify("registering the network", 0, 1)
    return register(
        space.tracking,
        store.folder,
        network=network,
        rank_map=rank_map.model_copy(update={"weights": None}),
        model=model or space.model.name.replace(":", "-").replace("/", "-"),
        alias=alias,
        study_id=study.uid,
        mean=space.data.mean,
        std=space.data.std,
    )
