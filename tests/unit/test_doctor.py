"""doctor names what is wrong and what to do; where nothing is, it says so and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ranksearch.doctor import Finding, examine
from tests.services import free_port


def found(**arguments: object) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(**arguments)}  # type: ignore[arg-type]


def test_all_is_well_and_nothing_is_left_behind(tmp_path: Path) -> None:
    findings = found(storage=str(tmp_path / "new" / "studies"))
    assert {check: finding.state for check, finding in findings.items() if finding.state == "failure"} == {}
    assert list(findings) == ["python", "packages", "torch", "memory", "storage", "disk", "mlflow", "ray"]
    assert all(finding.remedy for finding in findings.values() if finding.state != "ok")
    assert os.listdir(tmp_path) == []


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = found(storage=str(tmp_path / "file" / "studies"))["storage"]
    assert finding.state == "failure"
    assert "Give another folder with --storage" in finding.found


def test_a_database_that_is_away_is_told_without_its_password() -> None:
    finding = found(storage=f"postgresql://me:x/hunter2@127.0.0.1:{free_port()}/studies")["storage"]
    assert finding.state == "failure"
    assert "cannot reach the storage" in finding.found
    assert "hunter2" not in finding.found + finding.remedy


def test_an_mlflow_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGIN", "hunter2")
    space = tmp_path / "space.yaml"
    uri = f"http://me:${{LOGIN}}@127.0.0.1:{free_port()}"
    space.write_text(f"model: {{name: digits-cnn}}\ntracking: {{uri: '{uri}'}}\n", encoding="utf-8")
    finding = found(space=space)["mlflow"]
    assert finding.state == "failure"
    assert "Check tracking.uri" in finding.found
    assert "hunter2" not in finding.found


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free, state in ((10**8, "failure"), (10**9, "warning"), (10**11, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        finding = found(storage=str(tmp_path))["disk"]
        assert finding.state == state
        assert ("Free some space" in finding.remedy) == (state != "ok")


def test_a_space_with_mistakes(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("model: {name: resnet20}\nformats: [tuckr]\n", encoding="utf-8")
    finding = found(space=space)["space"]
    assert finding.state == "failure"
    assert "$.formats[0]" in finding.found
    space.write_text("model: {name: resnet20, weights: none.safetensors}\n", encoding="utf-8")
    assert "none.safetensors must exist" in found(space=space)["space"].found


def test_gpus_that_are_not_here(tmp_path: Path) -> None:
    import torch

    space = tmp_path / "space.yaml"
    space.write_text("model: {name: digits-cnn}\nresources: {gpus_per_trial: 1}\n", encoding="utf-8")
    finding = found(space=space)["torch"]
    if torch.cuda.is_available():
        assert finding.state == "ok"
    else:
        assert finding.state == "failure"
        assert "resources.gpus_per_trial=0" in finding.remedy


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("0" * 64)
    file.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert found()["ray"].remedy == f"chmod 600 {file}"
    file.chmod(0o600)
    assert found()["ray"].state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "Unset RAY_AUTH_MODE" in found()["ray"].remedy


def test_a_job_server_that_is_away() -> None:
    finding = found(address=f"http://127.0.0.1:{free_port()}")["jobs"]
    assert finding.state == "failure"
    assert "Check --address" in finding.found
