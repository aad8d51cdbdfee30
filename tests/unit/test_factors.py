"""The cache of fits: made once however many ask, the same whoever makes it, made again where it is broken."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions import Prepared
from ranksearch.errors import DecompositionError, RankError
from ranksearch.factors import Fit, factors_at, prepared_factors
from ranksearch.space import StabiliseSpec
from tests import oracles
from tests.cases import conv_like

CONV = Conv(in_channels=10, out_channels=12, kernel=(3, 3), padding=(1, 1), size=(6, 6))
RANKS = {"cp": (14,), "cp4": (14,), "tkd-cp": (5, 6, 9), "tensor-chain": (2, 4, 4), "tensor-train": (5, 8, 6)}
EPC = StabiliseSpec()


def weight() -> Tensor:
    return conv_like(9, 10, 12).permute(2, 1, 0).reshape(12, 10, 3, 3).float().contiguous()


def prepared(form: str, cache: Path | None = None) -> Prepared:
    return prepared_factors(form, CONV, weight(), None, cache)


def fits(cache: Path) -> list[Path]:
    return sorted((cache / "fits").rglob("*.safetensors"))


def same(one: Fit, other: Fit) -> bool:
    return one.report == other.report and all(
        torch.equal(a, b) for a, b in zip(one.kernels, other.kernels, strict=True)
    )


@pytest.mark.parametrize("form", RANKS)
def test_a_fit_is_the_same_from_the_cache_afresh_and_beside_others(form: str, tmp_path: Path) -> None:
    known = prepared(form, tmp_path)
    first = factors_at(form, CONV, known, RANKS[form], EPC, tmp_path)
    (entry,) = fits(tmp_path)
    stamp = entry.stat().st_mtime_ns
    again = factors_at(form, CONV, known, RANKS[form], EPC, tmp_path)
    assert entry.stat().st_mtime_ns == stamp
    smaller = tuple(rank - 1 for rank in RANKS[form])
    factors_at(form, CONV, known, smaller, EPC, tmp_path / "other")
    afresh = factors_at(form, CONV, prepared(form), RANKS[form], EPC, tmp_path / "other")
    assert same(first, again)
    assert same(first, afresh)
    assert same(first, factors_at(form, CONV, known, RANKS[form], EPC, None))
    kernel = oracles.kernel(form, [stage.double().numpy() for stage in first.kernels])
    dense = weight().double().numpy()
    assert first.report is not None
    assert first.report.relative_error == pytest.approx(((kernel - dense) ** 2).sum() / (dense**2).sum(), rel=1e-4)


@pytest.mark.parametrize("damage", ["a bit of a value", "a value that is left out", "no hash"])
def test_an_entry_that_was_damaged_is_computed_again(damage: str, tmp_path: Path) -> None:
    known = prepared("cp", tmp_path)
    first = factors_at("cp", CONV, known, (14,), EPC, tmp_path)
    (entry,) = fits(tmp_path)
    whole = entry.read_bytes()
    if damage == "a bit of a value":
        entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        tensors = load_file(entry)
        if damage == "a value that is left out":
            del tensors["stage0"]
        with safe_open(entry, framework="pt") as file:
            told = None if damage == "no hash" else file.metadata()
        save_file(tensors, entry, metadata=told)
    damaged = entry.read_bytes()
    assert damaged != whole
    assert load_file(entry), "as a file it is in order"
    assert same(factors_at("cp", CONV, known, (14,), EPC, tmp_path), first)
    assert entry.read_bytes() == whole, "the entry is mended"


def test_threads_and_stabilisers_and_weights_are_told_apart(tmp_path: Path) -> None:
    known = prepared("cp")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        one = factors_at("cp", CONV, known, (14,), EPC, tmp_path)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert same(one, factors_at("cp", CONV, known, (14,), EPC, None)), "the number of threads is no matter"
    plain = factors_at("cp", CONV, known, (14,), StabiliseSpec(method="none"), tmp_path)
    assert plain.report is not None
    assert one.report is not None
    assert one.report.sensitivity < plain.report.sensitivity
    other = prepared_factors("cp", CONV, 2 * weight(), None, None)
    factors_at("cp", CONV, other, (14,), EPC, tmp_path)
    assert len(fits(tmp_path)) == 3


@pytest.mark.parametrize("method", ["epc", "norms", "bounded"])
@pytest.mark.parametrize("form", ["cp", "cp4", "tkd-cp", "tensor-chain"])
def test_a_stabiliser_lowers_the_sensitivity_within_its_bound(form: str, method: str) -> None:
    known = prepared(form)
    ranks = {"cp": (24,), "cp4": (24,), "tkd-cp": (8, 9, 20), "tensor-chain": (3, 5, 5)}[form]
    plain, stable = (
        factors_at(form, CONV, known, ranks, StabiliseSpec(method=m, slack=1.1), None).report for m in ("none", method)
    )
    assert plain is not None
    assert stable is not None
    assert stable.sensitivity < plain.sensitivity
    if method in ("epc", "norms") and form in ("cp", "cp4"):
        assert stable.relative_error <= 1.1**2 * plain.relative_error * (1 + 1e-6)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_broken_entry_is_made_again(content: bytes | None, tmp_path: Path) -> None:
    known = prepared("cp")
    first = factors_at("cp", CONV, known, (6,), EPC, tmp_path)
    (entry,) = fits(tmp_path)
    entry.write_bytes(entry.read_bytes()[:-5] if content is None else content)
    assert same(first, factors_at("cp", CONV, known, (6,), EPC, tmp_path))
    assert fits(tmp_path) == [entry]
    assert not list(tmp_path.rglob("*.lock"))
    assert not list(tmp_path.rglob("*.part"))


def _ask(cache: Path, asked: Any, answers: Any) -> None:
    known = prepared("cp", cache)
    asked.wait()
    fit = factors_at("cp", CONV, known, (40,), EPC, cache)
    (entry,) = fits(cache)
    answers.put((entry.stat().st_ino, fit.report, [kernel.tolist() for kernel in fit.kernels]))


def test_processes_that_ask_at_the_same_time_have_it_made_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    asked, answers = context.Barrier(4), context.Queue()
    prepared("cp", tmp_path)
    asking = [context.Process(target=_ask, args=(tmp_path, asked, answers)) for _ in range(4)]
    for process in asking:
        process.start()
    found = [answers.get(timeout=60) for _ in asking]
    for process in asking:
        process.join(timeout=60)
    # Each writing puts a new file in place of the old one: all saw the same file, so it was written once.
    assert all(answer == found[0] for answer in found)
    assert len(fits(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.lock"))


def _hold(lock: Path, held: Any) -> None:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held.wait()
        time.sleep(600)


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    first = factors_at("cp", CONV, prepared("cp", tmp_path), (9,), EPC, tmp_path)
    (entry,) = fits(tmp_path)
    entry.unlink()
    held = context.Barrier(2)
    holder = context.Process(target=_hold, args=(entry.with_suffix(".lock"), held))
    holder.start()
    held.wait(timeout=60)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(factors_at, "cp", CONV, prepared("cp", tmp_path), (9,), EPC, tmp_path)
        with pytest.raises(TimeoutError):
            asking.result(timeout=1.5)
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        assert same(first, asking.result(timeout=60))
    holder.join(timeout=60)
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize(("form", "ranks"), [("tensor-train", (5, 8, 6)), ("spatial-svd", (7,))])
def test_factors_that_fail_are_an_error_that_leaves_no_entry(
    form: str, ranks: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = prepared(form)

    def fails(*args: object, **options: object) -> None:
        raise torch.linalg.LinAlgError("linalg.svd: failed to converge")  # type: ignore[attr-defined]

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "svd", fails)
        with pytest.raises(DecompositionError, match=rf"{form} at ranks {re.escape(str(ranks))} did not .*svd"):
            factors_at(form, CONV, known, ranks, EPC, tmp_path)
    assert not fits(tmp_path)
    assert factors_at(form, CONV, known, ranks, EPC, tmp_path).kernels
    with pytest.raises(RankError, match=form):
        factors_at(form, CONV, known, tuple(99 for _ in ranks), EPC, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_prepared_stays_on_the_device_of_the_kernel(tmp_path: Path) -> None:
    prepared("tucker2", tmp_path)
    for _ in range(2):  # computed, then from the cache
        found = prepared_factors("tucker2", CONV, weight().cuda(), None, tmp_path)
        assert {tensor.device.type for tensor in found.values()} == {"cuda"}
    assert len(list((tmp_path / "factors").glob("*.safetensors"))) == 2, "what another device computed is not read"


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("form", RANKS)
def test_the_size_of_a_kernel_does_not_matter(form: str, size: float) -> None:
    plain, scaled = (
        factors_at(form, CONV, prepared_factors(form, CONV, factor * weight(), None, None), RANKS[form], EPC, None)
        for factor in (1.0, size)
    )
    assert plain.report is not None
    assert scaled.report is not None
    assert scaled.report.relative_error == pytest.approx(plain.report.relative_error, rel=1e-2)
