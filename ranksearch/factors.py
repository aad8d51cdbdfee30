"""The cache of decompositions: what is prepared once a layer, and factors that are fitted at the ranks asked for.

Every entry is a safetensors file under a hash of all that it depends on, written whole or not at all, with a hash of
what it holds: one that a disk or a copy has damaged is computed again. Processes that
want the same entry at the same time wait for the one that computes it, under a lock that the system takes back when its
holder dies. A fit starts from nothing that another one left, on one thread, so all compute the same.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions import (
    FORMATS,
    Prepared,
    Ranks,
    Report,
    Statistics,
    check_ranks,
    kernels,
    prepare,
    report,
)
from ranksearch.mirror import fetch, offer
from ranksearch.space import StabiliseSpec

_CACHE_VERSION = "2"
"""Part of every cache key: raised when a format's tensors change their meaning, or a fit its result."""

_HASH = "ranksearch.content"
"""Where a file of the cache has the hash of its tensors."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """The factors of one layer at some ranks."""

    kernels: list[Tensor]
    """Of the stages."""
    report: Report | None
    """How good and how stable they are; None for slices, which are not measured."""


def prepared_factors(
    form: str, conv: Conv, weight: Tensor, statistics: Statistics | None, cache: Path | None
) -> dict[str, Tensor]:
    """Prepared tensors of one layer, on its device, from the cache (if there is one) or computed and stored.

    Raises:
        UnsupportedLayer, DecompositionError: as :func:`ranksearch.decompositions.prepare` does.
    """

    def compute() -> dict[str, Tensor]:
        # Short fits are thousands of small products, which more threads only slow down.
        with nullcontext() if FORMATS[form].nested else threads(1):
            return prepare(FORMATS[form], conv, weight, statistics)

    if cache is None:
        return compute()
    tensors = [weight, *(vars(statistics).values() if statistics is not None else ())]
    key = content_hash(tensors, f"{_CACHE_VERSION} {form} {conv} {weight.device.type}")
    found = _entry(cache / "factors" / f"{key}.safetensors", cache, compute)
    return {name: tensor.to(weight.device) for name, tensor in found.items()}


def factors_at(
    form: str, conv: Conv, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec, cache: Path | None
) -> Fit:
    """Factors of one layer at some ranks: slices, or a fit from the cache, or computed and stored.

    Args:
        form: name of the format.
        conv: geometry of the dense layer.
        prepared: as :func:`prepared_factors` gives it.
        ranks: within the bounds.
        stabiliser: what is done to a fit.
        cache: folder of the cache; nothing is read or stored without.

    Raises:
        RankError: ranks out of bounds.
        DecompositionError: the fit failed.
    """
    if FORMATS[form].nested:
        return Fit(kernels=kernels(FORMATS[form], conv, prepared, ranks), report=None)
    check_ranks(FORMATS[form], conv, ranks)
    device = prepared["weight"].device

    def compute() -> dict[str, Tensor]:
        with threads(1):
            return _packed(_fitted(form, conv, prepared, ranks, stabiliser))

    if cache is None:
        return _unpacked(compute(), device)
    text = f"{_CACHE_VERSION} {form} {conv} {ranks} {stabiliser.model_dump_json()} {device.type}"
    key = content_hash((prepared[name] for name in sorted(prepared)), text)
    return _unpacked(_entry(cache / "fits" / key[:2] / f"{key}.safetensors", cache, compute), device)


def _fitted(form: str, conv: Conv, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec) -> Fit:
    found = kernels(FORMATS[form], conv, prepared, ranks, stabiliser)
    measured = report(FORMATS[form], conv, ranks, prepared["weight"], found, prepared.get("root"))
    return Fit(kernels=found, report=measured)


def _packed(fit: Fit) -> dict[str, Tensor]:
    """A fit as named tensors; what is not known of it is left out."""
    measured = {} if fit.report is None else {k: v for k, v in asdict(fit.report).items() if v is not None}
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in measured.items()}
    return numbers | {f"stage{i}": kernel for i, kernel in enumerate(fit.kernels)}


def _unpacked(tensors: Mapping[str, Tensor], device: torch.device) -> Fit:
    stages = sorted((name for name in tensors if name.startswith("stage")), key=lambda name: int(name[5:]))
    measured = {name: float(tensors[name]) if name in tensors else None for name in Report.__dataclass_fields__}
    return Fit(kernels=[tensors[name].to(device) for name in stages], report=Report(**measured))  # type: ignore[arg-type]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch limited to ``count`` CPU threads: the last bits of a result depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _entry(path: Path, cache: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in the file ``path`` of the cache.

    Where it is missing or damaged they come from the shared cache, if there is one, or are computed, and are stored in
    both.
    """
    if (found := cached(path)) is not None:
        return found
    with _alone(path):
        found = cached(path)  # another process may have stored it meanwhile
        fetched = found is None and fetch(path, cache)
        if fetched:
            found = cached(path)
        if found is None:
            found = compute()
            store_cached(found, path)
            offer(path, cache, anew=fetched)
    return found


def store_cached(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write an entry of the cache with the hash of what it holds; raises OSError where that cannot be done."""
    store(tensors, path, {_HASH: _hash_of(tensors)})


def cached(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an entry of the cache, on the CPU; None where it is missing or is not what was stored."""
    try:
        with safe_open(path, framework="pt") as file:
            # Copied: the last bits of a result depend on how its operands are aligned, which in a file is at odds.
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            told = (file.metadata() or {}).get(_HASH)
    except (SafetensorError, OSError):
        return None
    return found if told == _hash_of(found) else None


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return content_hash((tensors[name] for name in names), " ".join(names))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process, nor another thread, in the block for the same entry; where files can be locked at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
            # Its last holder may have removed the file between its opening and its locking.
            if _is_at(file.fileno(), lock):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def store(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; raises OSError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(_apart(tensors), name, metadata=metadata)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another: a module may be registered under two names."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        apart[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return apart


def content_hash(tensors: Iterable[Tensor], text: str = "") -> str:
    """Hash of a text and of tensors: dtype, shape and values."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
