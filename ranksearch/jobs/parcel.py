"""What a job takes along: the space, the files that it names, variables, secrets, requirements, and ranksearch itself.

Nothing travels that the space does not name. Files keep their place relative to one folder, which none may leave;
absolute paths are the cluster's. Secrets travel apart from the job's description, which everybody on the cluster sees.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ranksearch
from ranksearch.config import Check, load_space, read_document
from ranksearch.errors import JobError
from ranksearch.secrecy import SHORTEST, VARIABLE, bundle, has_password, looks_secret
from ranksearch.space import Space

MOST_MIB = 100
"""What a job's files may weigh: Ray keeps them in the memory of the head."""

_PINNED = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,.-]+\])?==[\w.!+-]+(\s*;.*)?")
_STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
"""A job is stopped as by Ctrl-C, and has time to leave its study in good order."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One job, ready to be sent."""

    id: str
    study: str
    folder: Path
    """That the files lie in."""
    files: tuple[Path, ...]
    """Files that travel, relative to ``folder``; the space file is among them."""
    elsewhere: tuple[str, ...]
    """Paths that the space names and that do not travel: they must be there on the cluster."""
    entrypoint: str
    environment: Mapping[str, str]
    secrets: Mapping[str, str] = field(repr=False)
    requirements: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """What the files weigh."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster shows of the job."""
        return {"ranksearch.study": self.study, "ranksearch.version": version("ranksearch")}

    def to_json(self) -> dict[str, Any]:
        """What would be sent, secrets by their names only."""
        return {
            "submission_id": self.id,
            "entrypoint": self.entrypoint,
            "metadata": self.metadata,
            "files": {str(file): (self.folder / file).stat().st_size for file in self.files},
            "expected_on_the_cluster": list(self.elsewhere),
            "environment": dict(self.environment),
            "secrets": sorted(self.secrets),
            "requirements": list(self.requirements),
        }

    def pack(self, folder: Path) -> dict[str, Any]:
        """Ray's runtime environment, made of copies in the empty ``folder``.

        Each part holds the job's id: Ray names what it uploads by its content, and deletes it with the last job that
        uses it, even where a job of the same content has just been sent and found it there
        (https://github.com/ray-project/ray/issues/46625); machines that had no copy yet then cannot start a worker.
        """
        work = folder / "work"
        for file in self.files:
            target = work / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, target)
        module = folder / "modules" / "ranksearch"
        shutil.copytree(Path(ranksearch.__file__).parent, module, ignore=shutil.ignore_patterns("__pycache__"))
        modules = [module]
        if self.secrets:
            modules.append(bundle(self.secrets, folder))
        for part in (work, *modules):
            (part / f".{self.id}").write_text(self.id, encoding="utf-8")
        packed: dict[str, Any] = {
            "working_dir": str(work),
            "py_modules": [str(module) for module in modules],
            "env_vars": dict(self.environment),
            "excludes": ["**/__pycache__"],
        }
        if self.requirements:
            packed["pip"] = {"packages": list(self.requirements), "pip_check": False}
        return packed


def wrap(
    path: Path,
    settings: Sequence[str] = (),
    *,
    study: str | None = None,
    storage: str | None = None,
    resume: bool = False,
    check: Check | None = None,
) -> Parcel:
    """The parcel of a search.

    Args:
        path: the space file.
        settings: changes, as ``--set`` takes them.
        study: its name; that of the space by default.
        storage: where studies live, seen from the cluster.
        resume: whether a study of that name is continued.
        check: finds what is wrong with the space beyond types and ranges.

    Raises:
        SpaceError: a mistake in the space.
        JobError: a file that would leave the folder, is missing or too large; a requirement that is not pinned.
    """
    document = read_document(path, settings)
    given = document.get("job")
    environment = given.get("environment") if isinstance(given, dict) else None
    own = {str(k): str(v) for k, v in environment.items()} if isinstance(environment, dict) else {}
    variables = {**os.environ, **{name: _expanded(value) for name, value in own.items()}}
    checks = (check,) if check else ()
    space = load_space(path, settings, *checks, variables=variables)
    folder = _folder(space, path)
    files, elsewhere = _files(space, path, folder)
    named = set(VARIABLE.findall(str(document))) | set(own) | set(space.job.secrets)
    if storage is not None:
        named, variables = named | {"RANKSEARCH_STORAGE"}, {**variables, "RANKSEARCH_STORAGE": storage}
    public, hidden = _variables(named, space, variables, own)
    name = study or space.name or "search"
    arguments = [space.job.python, "-m", "ranksearch.jobs.entry", files[0].as_posix(), "--study", name]
    arguments += ["--resume"] if resume else []
    arguments += [part for setting in (*_cluster(space), *settings) for part in ("--set", setting)]
    parcel = Parcel(
        id=f"ranksearch-{name}-{secrets.token_hex(3)}",
        study=name,
        folder=folder,
        files=tuple(files),
        elsewhere=tuple(elsewhere),
        entrypoint=shlex.join(arguments),
        environment={**_STOPPING, "PYTHONUNBUFFERED": "1", **public},
        secrets=hidden,
        requirements=_requirements(space, folder),
    )
    _check_size(parcel)
    return parcel


def _expanded(value: str) -> str:
    return VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value)


def _cluster(space: Space) -> list[str]:
    """Settings that take the search to the cluster's workers, unless the space names one."""
    return ["resources.engine=ray"] + (["resources.address=auto"] if space.resources.address == "local" else [])


def _variables(
    named: Iterable[str], space: Space, values: Mapping[str, str], own: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The variables that travel: those that everybody may see, and the secret ones.

    A variable of ``own``, ``job.environment`` as it is written, is secret too if it is made of a secret one; so is any
    that holds the value of one.
    """
    uri = set(VARIABLE.findall(space.tracking.uri or ""))
    public: dict[str, str] = {}
    hidden: dict[str, str] = {}
    for name in sorted(named):
        if name not in values:
            raise JobError(
                f"a variable that a job takes along must be set, found none named {name}. "
                "Set it here, or remove it from job.secrets."
            )
        secret = name in uri or name in space.job.secrets or looks_secret(name) or has_password(values[name])
        (hidden if secret else public)[name] = values[name]
    telling = [value for value in hidden.values() if len(value) >= SHORTEST]
    for name, value in list(public.items()):
        made_of = set(VARIABLE.findall(own.get(name, "")))
        if made_of & hidden.keys() or any(part in value for part in telling):
            hidden[name] = public.pop(name)
    return public, hidden


def _folder(space: Space, path: Path) -> Path:
    """The folder whose files travel."""
    base = path.resolve().parent
    if space.job.folder is not None:
        folder = Path(space.job.folder).expanduser().resolve()
        if not base.is_relative_to(folder):
            raise JobError(
                f"the space file must lie in job.folder, found {path.resolve()} outside of {folder}. Move it, or name "
                "a folder above it."
            )
        return folder
    return Path.cwd().resolve() if base.is_relative_to(Path.cwd().resolve()) else base


def _files(space: Space, path: Path, folder: Path) -> tuple[list[Path], list[str]]:
    """Files that travel, relative to ``folder``, the space file first; and paths that must be on the cluster."""
    found, elsewhere = {path.resolve().relative_to(folder): None}, []
    for named in _named_paths(space):
        place = Path(named)
        options = [base / place for base in (path.resolve().parent, Path.cwd(), folder)]
        there = next((option for option in options if option.is_file()), None)
        if place.is_absolute() or named.startswith("~") or there is None:
            elsewhere.append(named)
        else:
            found[_inside(there, folder)] = None
    factories = [name for name in (space.model.name, space.data.source, space.strategy.sampler or "") if ":" in name]
    if any(_is_here(factory, folder) for factory in factories):
        found |= {_inside(file, folder): None for file in _modules(folder)}
    for pattern in space.job.include:
        matching = _matching(folder, pattern)
        if not matching:
            raise JobError(f"a pattern of job.include must match files in {folder}, found none for {pattern!r}.")
        found |= {_inside(file, folder): None for file in matching}
    return list(found), elsewhere


def _is_here(factory: str, folder: Path) -> bool:
    """Whether ``package.module:function`` is in the folder, rather than installed."""
    top = factory.partition(":")[0].partition(".")[0]
    return (folder / f"{top}.py").is_file() or (folder / top).is_dir()


def _named_paths(space: Space) -> Iterator[str]:
    """Files that the space names."""
    if space.model.weights:
        yield space.model.weights
    yield from space.strategy.seed_maps
    if space.latency is not None and space.latency.table is not None:
        yield space.latency.table
    if space.data.source == "npz":
        root = space.data.root or "."
        yield from (f"{root}/{file}" for file in (*space.data.train, *space.data.validation))
    elif space.data.root:
        yield space.data.root


def _inside(file: Path, folder: Path) -> Path:
    """The file relative to ``folder``, which neither ``..`` nor a link may leave."""
    place = file.resolve()
    if not place.is_relative_to(folder.resolve()):
        raise JobError(
            f"a file that a job takes along must lie in {folder}, found {place}. Name it by an absolute path of the "
            "cluster, or name a folder above it as job.folder."
        )
    return Path(os.path.normpath(file.absolute())).relative_to(folder)


def _matching(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(file for file in folder.glob(pattern) if file.is_file())
    except (ValueError, NotImplementedError, IndexError) as error:
        raise JobError(
            f"a pattern of job.include must be relative, such as classes/*.txt, found {pattern!r}. Correct it."
        ) from error


def _modules(folder: Path) -> Iterator[Path]:
    """Python files, but those of hidden folders and of virtual environments."""
    for root, folders, files in os.walk(folder):
        if "pyvenv.cfg" in files:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(root) / name for name in sorted(files) if name.endswith(".py") and not name.startswith("."))


def _requirements(space: Space, folder: Path) -> tuple[str, ...]:
    """The lines of the requirements file, every one pinned."""
    if space.job.requirements is None:
        return ()
    file = folder / space.job.requirements
    if not file.is_file():
        raise JobError(f"job.requirements must be a file in {folder}, found no {space.job.requirements}. Correct it.")
    text = (folder / _inside(file, folder)).read_text(encoding="utf-8")
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    loose = [line for line in lines if not _PINNED.fullmatch(line)]
    if loose:
        raise JobError(
            f"requirements of a job must be pinned as name==version, found {loose[0]!r} in {file}. "
            "Write the versions that you tested, as `pip freeze` shows them."
        )
    return tuple(lines)


def _check_size(parcel: Parcel) -> None:
    if parcel.bytes <= MOST_MIB * 2**20:
        return
    sizes = {file: (parcel.folder / file).stat().st_size for file in parcel.files}
    largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
    shown = ", ".join(f"{file} ({sizes[file] / 2**20:.0f} MiB)" for file in largest)
    raise JobError(
        f"the files of a job must weigh at most {MOST_MIB} MiB, found {parcel.bytes / 2**20:.0f} MiB, the largest: "
        f"{shown}. Put large files into a folder that all machines share, and name them by absolute paths."
    )
