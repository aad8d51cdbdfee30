"""MLflow's Model Registry: a compressed network that is served from there needs torch, and not ranksearch."""

from __future__ import annotations

import inspect
import io
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient, MlflowException
from mlflow.models import infer_signature
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from ranksearch.rankmap import RankMap
from ranksearch.space import TrackingSpec
from ranksearch.tracking.store import connect, explained, store_uri

_IMAGES = 2
"""Of the input example: with one, the exported network would take single images only."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version in the registry."""

    uri: str
    """Of the tracking store."""
    model: str
    version: str


def register(
    spec: TrackingSpec,
    folder: Path,
    *,
    network: Any,
    rank_map: RankMap,
    model: str,
    alias: str,
    study_id: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Registered:
    """Log the network as a model of a run beside the search's, and register it.

    Args:
        spec: where to write, and the experiment's name.
        folder: of the default store, and of the artifacts of any database.
        network: a ``torch.nn.Module`` in evaluation mode, on the CPU.
        rank_map: its rank map.
        model: name in the registry.
        alias: of the new version.
        study_id: of the search.
        mean: that images are to be standardised by, a channel each; metadata of the model, as ``std``.
        std: likewise.

    Raises:
        TrackingError: the store cannot be reached or written.
    """
    uri = store_uri(spec, folder)
    with explained(uri), tempfile.TemporaryDirectory() as place:
        client, experiment = connect(uri, spec.experiment, folder)
        document = rank_map.model_dump(mode="json")
        _save(network, Path(place, "model"), rank_map, {"mean": list(mean), "std": list(std), "rank_map": document})
        searches = f"tags.`ranksearch.study_id` = '{study_id}' and tags.`ranksearch.kind` = 'search'"
        parents = client.search_runs([experiment], searches, max_results=1)
        study, trial = rank_map.provenance["study"], rank_map.provenance["trial"]
        tags = {"ranksearch.kind": "published", "ranksearch.study": study, "published_trial": str(trial)}
        run = client.create_run(experiment, tags=tags, run_name=f"{model}, trial {trial} of {study}")
        run_id = run.info.run_id
        if parents:
            client.log_param(run_id, "search_run", parents[0].info.run_id)
        for name, value in rank_map.metrics.items():
            if value is not None:
                client.log_metric(run_id, name, float(value))
        client.log_dict(run_id, document, "rank_map.json")
        client.log_artifacts(run_id, str(Path(place, "model")), "model")
        client.set_terminated(run_id, "FINISHED")
        _name(client, model)
        source = f"{run.info.artifact_uri}/model"
        made = client.create_model_version(model, source, run_id, tags={"study": study, "trial": str(trial)})
        client.set_registered_model_alias(model, alias, made.version)
        return Registered(uri=uri, model=model, version=str(made.version))


def _name(client: MlflowClient, model: str) -> None:
    """Have a model of this name in the registry."""
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def _save(network: Any, path: Path, rank_map: RankMap, metadata: dict[str, Any]) -> None:
    """Write the network as an exported program, whose loading needs no code of ours."""
    import mlflow.pytorch
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, *rank_map.model.input_shape, generator=generator)
    with torch.no_grad():
        signature = infer_signature(images.numpy(), network(images).numpy())
    # A pickle, which versions of MLflow write by default, could be read beside ranksearch only.
    stated = "serialization_format" in inspect.signature(mlflow.pytorch.save_model).parameters
    form: dict[str, Any] = {"serialization_format": "pt2"} if stated else {"export_model": True}
    # The export warns of its own deprecations, and draws a bar.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            network,
            str(path),
            signature=signature,
            input_example=images.numpy(),
            pip_requirements=[f"torch=={version('torch').split('+')[0]}", f"mlflow=={version('mlflow')}", "numpy"],
            metadata=metadata,
            **form,
        )
