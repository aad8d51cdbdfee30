"""Every test runs alone: its own storage folder, one thread, no token file or study outside the test's folder."""

from __future__ import annotations

import os
import secrets
import signal
from pathlib import Path

# Before torch or Ray is imported, and for every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# Ray would kill workers where others have taken the machine's memory.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"

import pytest
from hypothesis import settings

# How long an example takes is the machine's business.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# A shell starts background jobs deaf to Ctrl-C, and the processes that tests start would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where this test's studies live."""
    folder = tmp_path / "ranksearch-data"
    monkeypatch.setenv("RANKSEARCH_STORAGE", str(folder))
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with CIFAR-10 and the pretrained ResNets; the test skips where there is none."""
    folder = Path(os.environ.get("RANKSEARCH_DATA", ""))
    if not (folder / "cifar10-val.npz").is_file():
        pytest.skip("needs CIFAR-10 and pretrained ResNets: set RANKSEARCH_DATA to their folder")
    return folder
