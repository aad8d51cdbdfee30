"""Whether this machine, and a cluster, have what a search needs, and what to do about what is missing.

Every check is one function that gives a finding or raises; what it raises is a finding too. Nothing is left behind.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from ranksearch.errors import RanksearchError
from ranksearch.jobs import JobServer, token
from ranksearch.launch import read_space
from ranksearch.location import located
from ranksearch.preparation import Notify, silent
from ranksearch.secrecy import redacted
from ranksearch.space import ResourcesSpec, Space, TrackingSpec
from ranksearch.storage import Store

_GIB = 2**30
_LEAST_DISK, _SCARCE_DISK = 0.2 * _GIB, 2 * _GIB
_LEAST_MEMORY = 1.5 * _GIB
"""A worker with torch takes about half a GiB, the driver one."""

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    state: State
    found: str
    remedy: str = ""
    """What to do; empty where all is well."""


Check = Callable[[], Finding]


def examine(
    space: Path | None = None,
    *,
    storage: str | None = None,
    address: str | None = None,
    notify: Notify = silent,
) -> Iterator[Finding]:
    """Findings, one after the other.

    Args:
        space: a space file, whose network, data, tracking and cluster are looked at too.
        storage: where studies live.
        address: of a cluster: ``auto`` or ``HEAD:6379`` looks at every machine of it, ``http://HEAD:8265`` asks its
            job server alone.
        notify: told which check runs.
    """
    read = _read(space)
    store, tracking = Store(storage), read.tracking if isinstance(read, Space) else TrackingSpec()
    resources = read.resources if isinstance(read, Space) else ResourcesSpec()
    checks: dict[str, Check] = {"python": _python, "packages": _packages, "torch": partial(_torch, resources)}
    checks |= {"memory": _memory, "storage": partial(_storage, store), "disk": partial(_disk, store)}
    checks["mlflow"] = partial(_mlflow, tracking, store.folder)
    if space is not None:
        checks["space"] = partial(_space, read, space)
    checks["ray"] = _ray
    place = address or (resources.address if resources.engine == "ray" else "local")
    if place.startswith(("http://", "https://")):
        checks["jobs"] = partial(_jobs, place)
    elif place != "local":
        checks["cluster"] = partial(_cluster, ResourcesSpec(engine="ray", address=place), store)
    for i, (name, check) in enumerate(checks.items()):
        notify(f"checking {name}", i, len(checks))
        try:
            yield check()
        except Exception as error:  # a check that fails in an unforeseen way is a finding too
            told = redacted(str(error)).strip() or type(error).__name__
            # Errors of ours end in their remedy.
            remedy = "" if isinstance(error, RanksearchError) else "See the message; correct what it names."
            yield Finding(check=name, state="failure", found=told, remedy=remedy)


def _read(space: Path | None) -> Space | RanksearchError | None:
    try:
        return read_space(space)[0] if space is not None else None
    except RanksearchError as error:
        return error


def _python() -> Finding:
    found = f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs"
    return Finding(check="python", state="ok", found=f"{found}, {sys.executable}")


def _packages() -> Finding:
    """Whether the packages that ranksearch requires are there, in versions it was made for."""
    wrong, count = [], 0
    for line in importlib.metadata.requires("ranksearch") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        remedy = "Install them: pip install ranksearch -c constraints.txt"
        return Finding(check="packages", state="failure", found="; ".join(wrong), remedy=remedy)
    return Finding(check="packages", state="ok", found=f"{count} required packages, all in fitting versions")


def _torch(resources: ResourcesSpec) -> Finding:
    import torch

    found = f"PyTorch {torch.__version__}"
    if torch.cuda.is_available():
        names = []
        for i in range(torch.cuda.device_count()):
            x = torch.ones(64, 64, device=f"cuda:{i}")
            if float((x @ x).sum()) != 64.0**3:
                raise RuntimeError(f"GPU {i} multiplies wrongly")
            free, total = torch.cuda.mem_get_info(i)
            names.append(f"{torch.cuda.get_device_name(i)} ({free / _GIB:.0f} of {total / _GIB:.0f} GiB free)")
        return Finding(check="torch", state="ok", found=f"{found}, CUDA {torch.version.cuda}: {', '.join(names)}")
    if resources.gpus_per_trial or Path("/dev/nvidia0").exists():
        why = "the space asks for GPUs" if resources.gpus_per_trial else "this machine has a GPU"
        remedy = "Install PyTorch for your CUDA driver (pytorch.org/get-started), or set resources.gpus_per_trial=0."
        state: State = "failure" if resources.gpus_per_trial else "warning"
        return Finding(check="torch", state=state, found=f"{found} without CUDA, though {why}", remedy=remedy)
    return Finding(check="torch", state="ok", found=f"{found}, CPU only")


def _memory() -> Finding:
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # what the file cache holds is free too, where the system tells
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), free)
    found = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if free < _LEAST_MEMORY:
        return Finding(check="memory", state="warning", found=found, remedy="End other programs, or set few workers.")
    return Finding(check="memory", state="ok", found=found)


def _storage(store: Store) -> Finding:
    """Whether files can be written, renamed and locked in the folder, and the database answers."""
    _try_folder(store.folder)
    studies = len(store.names())
    place = f"{redacted(store.url)}, files in {store.folder}" if store.url else str(store.folder)
    return Finding(check="storage", state="ok", found=f"{place}: {studies} studies")


def _try_folder(folder: Path) -> None:
    made = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f".doctor-{uuid.uuid4().hex}"
        try:
            with file.open("w") as opened:
                opened.write("written")
                opened.flush()
                os.fsync(opened.fileno())
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            renamed = file.rename(file.with_suffix(".renamed"))
            file = renamed
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"files cannot be written, renamed and locked in {folder}: {error}. Give another folder with --storage; "
            "on a network file system, mount it with locking (NFS: version 4, without nolock)."
        ) from error
    finally:
        for empty in (folder, *folder.parents):
            if empty == made or not empty.exists():
                break
            with suppress(OSError):
                empty.rmdir()


def _disk(store: Store) -> Finding:
    place = next(parent for parent in (store.folder, *store.folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / _GIB:.1f} GiB free in {place}"
    if free < _SCARCE_DISK:
        state: State = "failure" if free < _LEAST_DISK else "warning"
        remedy = f"Free some space, remove {store.cache} (it is computed again), or give another --storage."
        return Finding(check="disk", state=state, found=found, remedy=remedy)
    return Finding(check="disk", state="ok", found=found)


def _mlflow(spec: TrackingSpec, folder: Path) -> Finding:
    if not spec.enabled:
        return Finding(check="mlflow", state="ok", found="off (tracking.enabled: false)")
    from ranksearch.tracking.store import answers, shown, store_uri

    uri = store_uri(spec, folder)
    answers(uri)
    found = shown(uri)
    if found.startswith("http://") and _is_remote(found):
        remedy = "Put the server behind https, or reach it through a tunnel to this machine."
        return Finding(check="mlflow", state="warning", found=f"{found} answers, without encryption", remedy=remedy)
    return Finding(check="mlflow", state="ok", found=found)


def _space(read: Space | RanksearchError | None, path: Path) -> Finding:
    if not isinstance(read, Space):
        raise read or RuntimeError("no space was read")
    space = located(read, path.resolve().parent)
    root = space.data.root
    if root is not None and not Path(root).is_dir():
        remedy = "Correct data.root, or mount the folder."
        return Finding(check="space", state="failure", found=f"no data folder {root}", remedy=remedy)
    return Finding(check="space", state="ok", found=f"{path}: {space.model.name} on {root or space.data.source}")


def _ray() -> Finding:
    version, found = importlib.metadata.version("ray"), token()
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        remedy = "Unset RAY_AUTH_MODE: whoever reaches a cluster without tokens runs code on it."
        return Finding(check="ray", state="warning", found=f"Ray {version}, tokens switched off", remedy=remedy)
    if found is None:
        told = f"Ray {version}, no token: enough for this machine"
        return Finding(check="ray", state="ok", found=told)
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not os.environ.get("RAY_AUTH_TOKEN") and file.stat().st_mode & 0o077:
        remedy = f"chmod 600 {file}"
        return Finding(check="ray", state="warning", found=f"Ray {version}, others may read {file}", remedy=remedy)
    return Finding(check="ray", state="ok", found=f"Ray {version}, with a token")


def _jobs(address: str) -> Finding:
    jobs = JobServer(address).jobs()
    found = f"{address} answers, {len(jobs)} jobs; with --address auto on one of its machines all of them are checked"
    if address.startswith("http://") and _is_remote(address) and token() is not None:
        remedy = "The token travels in the clear: use https, or a tunnel (ssh -L 8265:127.0.0.1:8265 HEAD)."
        return Finding(check="jobs", state="warning", found=f"{found}, without encryption", remedy=remedy)
    return Finding(check="jobs", state="ok", found=found)


def _is_remote(url: str) -> bool:
    return urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")


def _cluster(spec: ResourcesSpec, store: Store) -> Finding:
    """Whether every machine has the same versions, sees the same folder, and has some disk of its own."""
    from ranksearch.engine.probe import on_every_machine

    mark = store.folder / f".doctor-{uuid.uuid4().hex}"
    made = next((parent for parent in (store.folder, *store.folder.parents) if parent.exists()), store.folder)
    store.folder.mkdir(parents=True, exist_ok=True)
    try:
        mark.write_text("seen")
        answers = on_every_machine(spec, partial(_look, str(mark)))
        problems, scarce = [], []
        for name, answer in answers.items():
            if isinstance(answer, Exception):
                problems.append(f"{name} does not work: {answer}")
            elif answer["versions"] != _versions():
                problems.append(f"{name} has {_differing(answer['versions'])}")
            elif not answer["seen"] or not mark.with_name(f"{mark.name}-{answer['id']}").exists():
                problems.append(f"{name} does not share {store.folder}")
            elif answer["free"] < _SCARCE_DISK:
                scarce.append(f"{name} has {answer['free'] / _GIB:.1f} GiB free in {answer['temporary']}")
    finally:
        for file in store.folder.glob(f"{mark.name}*"):
            file.unlink(missing_ok=True)
        if store.folder != made:
            with suppress(OSError):
                store.folder.rmdir()
    if problems:
        remedy = (
            "Start every machine from one image (docs/cluster/Dockerfile), and give a folder that all of them mount "
            "with --storage."
        )
        return Finding(check="cluster", state="failure", found="; ".join(problems + scarce), remedy=remedy)
    if scarce:
        remedy = "Free some space there: workers and Ray keep their temporary files in it."
        return Finding(check="cluster", state="warning", found="; ".join(scarce), remedy=remedy)
    found = f"{len(answers)} machines, all with the versions of this one, all share {store.folder}, all have disk"
    return Finding(check="cluster", state="ok", found=found)


def _look(mark: str) -> dict[str, Any]:
    """What one machine sees; it leaves a mark of its own."""
    seen, own = Path(mark).exists(), uuid.uuid4().hex
    if seen:
        Path(f"{mark}-{own}").touch()
    temporary = tempfile.gettempdir()
    free = shutil.disk_usage(temporary).free
    return {"versions": _versions(), "seen": seen, "id": own, "temporary": temporary, "free": free}


def _versions() -> dict[str, str]:
    packages = ("ranksearch", "torch", "numpy", "optuna", "ray")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _differing(theirs: dict[str, str]) -> str:
    own = _versions()
    return ", ".join(f"{name} {theirs.get(name)} for {own[name]} here" for name in own if theirs.get(name) != own[name])
