"""The files for clusters are what Ray reads: its own schema, its own reading of KubeRay's manifests."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "docs" / "cluster"
JOB_KEYS = {
    *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "runtimeEnvYAML"),
    "rayClusterSpec",
}
"""Of those that KubeRay's RayJob knows, the ones in use."""


def document(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))


def test_the_autoscaler_example_keeps_rays_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = document("autoscaler.yaml")
    validate_config(prepare_config(config))
    with pytest.raises(ValidationError, match="Additional properties are not allowed"):
        validate_config(prepare_config({**config, "headnode_type": "head"}))


def test_the_ray_job_is_a_cluster_that_rays_autoscaler_reads() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.runtime_env import RuntimeEnv

    job = document("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) == JOB_KEYS
    cluster = {"metadata": job["metadata"], "spec": job["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    nodes = config["available_node_types"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    assert nodes["gpu"]["resources"]["GPU"] == 1
    assert (nodes["gpu"]["min_workers"], nodes["gpu"]["max_workers"]) == (2, 8)
    assert RuntimeEnv(**yaml.safe_load(job["spec"]["runtimeEnvYAML"])).env_vars()["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


def test_the_ray_job_runs_a_command_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from ranksearch.cli import app

    words = shlex.split(document("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "ranksearch"]
    with pytest.raises(SystemExit) as ended:
        app([*words[3:], "--help"], prog_name="ranksearch")
    assert ended.value.code == 0
    known = capsys.readouterr().out
    assert all(option in known for option in words if option.startswith("--"))


def test_pods_get_secrets_from_kubernetes_alone() -> None:
    text = (FOLDER / "rayjob.yaml").read_text(encoding="utf-8")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert "secretKeyRef" in body
    assert not re.search(r"PASSWORD|://[^/\s]*:[^/\s]*@", body)


def test_versions_in_the_image_are_those_tested() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert f"rayproject/ray:{pins()['ray']}-" in dockerfile
    assert f"torch=={pins()['torch']}" in dockerfile
    assert f"ranksearch:{version}" in dockerfile
    assert document("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == pins()["ray"]
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"'\.\[([\w,]+)\]'", dockerfile)[0].split(","):
        assert name in extras
    sources = re.findall(r"^COPY .*ray:users (.+) \S+$", dockerfile, re.MULTILINE)
    assert sources
    for source in sources:
        assert all((REPOSITORY / Path(part)).exists() for part in source.split())
