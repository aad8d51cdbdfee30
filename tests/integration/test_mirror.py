"""A cache shared by machines: what one computes another fetches, from a folder or from S3, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import requests
import torch

from ranksearch.conv import Conv
from ranksearch.factors import factors_at, prepared_factors
from ranksearch.mirror import VARIABLE, fetch, offer
from ranksearch.space import StabiliseSpec
from tests.services import free_port

CONV = Conv(in_channels=4, out_channels=6, kernel=(3, 3), padding=(1, 1), size=(8, 8))
WEIGHT = torch.randn(6, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on a local S3 server."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    own = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(requests.RequestException):
                requests.get(own["AWS_ENDPOINT_URL"], timeout=5)
                break
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        fsspec.filesystem("s3").mkdir("caches")
        yield "s3://caches/ranksearch"
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.fixture(params=["folder", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The place of a shared cache, which the environment names."""
    place = (
        str(tmp_path / "shared") if request.param == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    )
    monkeypatch.setenv(VARIABLE, place)
    return place


def listed(place: str) -> list[str]:
    system, root = fsspec.core.url_to_fs(place)
    system.invalidate_cache()
    return sorted(str(file).removeprefix(f"{root}/") for file in system.find(root))


def test_what_one_machine_computes_another_fetches(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prepared = prepared_factors("cp", CONV, WEIGHT, None, one)
    fit = factors_at("cp", CONV, prepared, (2,), StabiliseSpec(), one)
    assert len(listed(shared)) == 2
    assert not [name for name in listed(shared) if name.endswith(".part")]

    monkeypatch.setattr("ranksearch.factors.prepare", _refuse)
    monkeypatch.setattr("ranksearch.factors.kernels", _refuse)
    again = prepared_factors("cp", CONV, WEIGHT, None, two)
    other = factors_at("cp", CONV, again, (2,), StabiliseSpec(), two)
    assert all(torch.equal(a, b) for a, b in zip(fit.kernels, other.kernels, strict=True))
    assert sorted(path.relative_to(two) for path in two.rglob("*.safetensors")) == sorted(
        path.relative_to(one) for path in one.rglob("*.safetensors")
    )


def _refuse(*arguments: object) -> None:
    raise AssertionError("it is computed, and should have been fetched")


def test_a_damaged_entry_is_computed_and_replaced(shared: str, tmp_path: Path) -> None:
    prepared_factors("tucker2", CONV, WEIGHT, None, tmp_path / "one")
    (name,) = listed(shared)
    system, root = fsspec.core.url_to_fs(shared)
    whole = system.cat_file(f"{root}/{name}")
    system.pipe_file(f"{root}/{name}", whole[:100])
    found = prepared_factors("tucker2", CONV, WEIGHT, None, tmp_path / "two")
    assert found.keys() == prepared_factors("tucker2", CONV, WEIGHT, None, None).keys()
    system.invalidate_cache()
    assert system.cat_file(f"{root}/{name}") == whole


def test_readers_never_see_half_an_entry(shared: str, tmp_path: Path) -> None:
    """Two writers replace an entry again and again; a reader finds one of the two, always whole."""
    contents = [bytes([i]) * 3_000_000 for i in (1, 2)]
    writers = []
    for i, content in enumerate(contents):
        entry = tmp_path / str(i) / "factors" / "a.safetensors"
        entry.parent.mkdir(parents=True)
        entry.write_bytes(content)
        writers.append(threading.Thread(target=_write, args=(entry, tmp_path / str(i))))
    offer(tmp_path / "0" / "factors" / "a.safetensors", tmp_path / "0")
    for writer in writers:
        writer.start()
    seen = 0
    entry = tmp_path / "reader" / "factors" / "a.safetensors"
    while any(writer.is_alive() for writer in writers):
        assert fetch(entry, tmp_path / "reader")
        assert entry.read_bytes() in contents
        seen += 1
    for writer in writers:
        writer.join()
    assert seen
    assert listed(shared) == ["factors/a.safetensors"]


def _write(entry: Path, folder: Path) -> None:
    for _ in range(5):
        offer(entry, folder, anew=True)


def test_without_the_shared_cache_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING, "ranksearch"):
        assert prepared_factors("tucker2", CONV, WEIGHT, None, tmp_path / "one")
    assert "the shared cache" in caplog.text
    assert "work goes on without it" in caplog.text
    assert not list((tmp_path / "one").rglob("*.part"))
