"""What a job takes along: the files that the space names and no others, none from outside, and no secret in sight."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory

from ranksearch.errors import JobError, SpaceError
from ranksearch.jobs import Parcel, wrap
from ranksearch.jobs.entry import kept
from ranksearch.launch import further_problems

SECRET = "Pa55word-of-mine"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, in which the tests work."""
    folder = tmp_path / "project"
    write(
        folder,
        spaces__mine_DOT_yaml="model: {name: 'own:net', weights: dense.safetensors}\n"
        "data: {source: npz, root: ../images, train: [a.npz], validation: [b.npz]}\n",
        spaces__dense_DOT_safetensors="weights",
        images__a_DOT_npz="a",
        images__b_DOT_npz="b",
        own_DOT_py="",
        package__more_DOT_py="",
        _DOT_hidden__secret_DOT_py="",
        venv__pyvenv_DOT_cfg="",
        venv__lib_DOT_py="",
        notes_DOT_txt="private",
        classes__names_DOT_txt="cat",
    )
    monkeypatch.chdir(folder)
    return folder


def names(parcel: Parcel) -> set[str]:
    return {file.as_posix() for file in parcel.files}


def test_what_the_space_names_travels_and_nothing_else(project: Path) -> None:
    parcel = wrap(Path("spaces/mine.yaml"), ["job.include=[classes/*.txt]"])
    assert names(parcel) == {
        "spaces/mine.yaml",
        "spaces/dense.safetensors",
        "images/a.npz",
        "images/b.npz",
        "own.py",
        "package/more.py",
        "classes/names.txt",
    }
    assert parcel.elsewhere == ()
    assert parcel.study == "mine"


def test_a_space_without_factories_takes_no_code(project: Path) -> None:
    write(project, plain_DOT_yaml="model: {name: resnet20, weights: /shared/dense.safetensors}\n")
    parcel = wrap(Path("plain.yaml"))
    assert names(parcel) == {"plain.yaml"}
    assert parcel.elsewhere == ("/shared/dense.safetensors",)


def test_no_file_leaves_the_folder(project: Path, tmp_path: Path) -> None:
    write(tmp_path, outside_DOT_txt="private")
    (project / "spaces/link.safetensors").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(JobError, match=r"must lie in .*/project, found .*/outside\.txt"):
        wrap(Path("spaces/mine.yaml"), ["model.weights=link.safetensors"])
    with pytest.raises(JobError, match=r"must lie in .*/spaces, found .*/images/a\.npz.*job\.folder"):
        wrap(Path("spaces/mine.yaml"), ["job.folder=spaces"])
    for pattern in ("../*.txt", "spaces/link*"):
        with pytest.raises(JobError, match=r"must lie in"):
            wrap(Path("spaces/mine.yaml"), [f"job.include=['{pattern}']"])
    for pattern in ("/etc/*", ""):
        with pytest.raises(JobError, match=r"job\.include must be relative"):
            wrap(Path("spaces/mine.yaml"), [f"job.include=['{pattern}']"])
    with pytest.raises(JobError, match=r"job\.include must match files"):
        wrap(Path("spaces/mine.yaml"), ["job.include=[nothing/*]"])
    with pytest.raises(JobError, match=r"the space file must lie in job\.folder"):
        wrap(Path("spaces/mine.yaml"), ["job.folder=images"])


def test_files_that_weigh_too_much(project: Path) -> None:
    with (project / "images/a.npz").open("wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(JobError, match=r"at most 100 MiB, found 101 MiB, the largest: images/a\.npz \(101 MiB\)"):
        wrap(Path("spaces/mine.yaml"))


def test_variables_travel_and_secrets_apart(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGES", "/local/images")
    monkeypatch.setenv("STORE_LOGIN", SECRET)
    monkeypatch.setenv("AWS_KEY", SECRET)
    write(
        project,
        cloud_DOT_yaml="model: {name: resnet20, weights: /shared/dense.safetensors}\n"
        "data: {source: npz, root: '${IMAGES}', train: [a.npz], validation: [b.npz]}\n"
        "tracking: {uri: 'postgresql://me:${STORE_LOGIN}@db/mlflow'}\n"
        "job: {environment: {IMAGES: /shared/images, MODE: fast}, secrets: [AWS_KEY]}\n",
    )
    parcel = wrap(Path("cloud.yaml"), storage=f"postgresql://me:{SECRET}@db/studies", check=further_problems)
    assert parcel.environment["IMAGES"] == "/shared/images"
    assert parcel.environment["MODE"] == "fast"
    assert parcel.environment["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert set(parcel.secrets) == {"STORE_LOGIN", "AWS_KEY", "RANKSEARCH_STORAGE"}
    assert SECRET not in json.dumps(parcel.to_json()) + repr(parcel)
    packed = parcel.pack(tmp_path)
    assert SECRET not in json.dumps(packed)
    carrying = [Path(module) for module in packed["py_modules"] if SECRET in _text(Path(module) / "secrets.json")]
    assert len(carrying) == 1
    files = sorted(path.name for path in Path(packed["working_dir"]).rglob("*"))
    assert files == [f".{parcel.id}", "cloud.yaml"]


def test_no_two_jobs_share_a_part_that_the_first_to_end_would_delete(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NET_TOKEN", SECRET)
    document = "model: {name: resnet20, weights: /shared/dense.safetensors}\njob: {secrets: [NET_TOKEN]}\n"
    write(project, cloud_DOT_yaml=document)
    uris = []
    for place in (tmp_path / "first", tmp_path / "second"):
        place.mkdir()
        packed = wrap(Path("cloud.yaml")).pack(place)
        parts = [packed["working_dir"], *packed["py_modules"]]
        uris += [get_uri_for_directory(part, True, packed["excludes"]) for part in parts]
    assert len(set(uris)) == 6


def test_a_secret_under_another_name_is_one_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("COPIED", f"x-{SECRET}")
    write(
        project,
        cloud_DOT_yaml="model: {name: resnet20, weights: /shared/dense.safetensors}\n"
        "data: {root: '${COPIED}'}\n"
        "job: {environment: {HUB_AUTH: '${HF_TOKEN}', SHORT: 'is ${SHORT_TOKEN}', MODE: 'abc'}}\n",
    )
    parcel = wrap(Path("cloud.yaml"), storage=f"/studies/{SECRET}")
    assert set(parcel.secrets) == {"HF_TOKEN", "HUB_AUTH", "SHORT_TOKEN", "SHORT", "COPIED", "RANKSEARCH_STORAGE"}
    assert parcel.secrets["HUB_AUTH"] == SECRET
    assert parcel.environment["MODE"] == "abc"
    assert SECRET not in json.dumps(parcel.to_json()["environment"])


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def test_a_secret_that_is_not_set(project: Path) -> None:
    with pytest.raises(JobError, match=r"must be set, found none named NO_SUCH_KEY"):
        wrap(Path("spaces/mine.yaml"), ["job.secrets=[NO_SUCH_KEY]"])


def test_mistakes_of_the_space_are_told_before_anything_is_sent(project: Path) -> None:
    with pytest.raises(SpaceError, match=r"1 problem\n.*\$\.formats\[0\]"):
        wrap(Path("spaces/mine.yaml"), ["formats=[tuckr]"], check=further_problems)


def test_requirements_are_pinned(project: Path) -> None:
    write(project, req_DOT_txt="# ours\ntimm==1.0.15\nown[extra]==2.0+cpu  # why\n\n")
    parcel = wrap(Path("spaces/mine.yaml"), ["job.requirements=req.txt"])
    assert parcel.requirements == ("timm==1.0.15", "own[extra]==2.0+cpu")
    for line in ("timm", "timm>=1", "-r other.txt", "git+https://example.org/x", "--index-url https://example.org"):
        write(project, req_DOT_txt=line)
        with pytest.raises(JobError, match=r"must be pinned as name==version, found"):
            wrap(Path("spaces/mine.yaml"), ["job.requirements=req.txt"])


def test_what_the_cluster_runs(project: Path) -> None:
    parcel = wrap(Path("spaces/mine.yaml"), ["budget.trials=4", "name=a b; c"], study="two", resume=True)
    assert parcel.entrypoint == (
        "python -m ranksearch.jobs.entry spaces/mine.yaml --study two --resume --set resources.engine=ray "
        "--set resources.address=auto --set budget.trials=4 --set 'name=a b; c'"
    )
    own = wrap(Path("spaces/mine.yaml"), ["resources.address=10.0.0.1:6379"])
    assert "address=auto" not in own.entrypoint


def test_a_job_keeps_its_files_once(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "kept"
    write(source, a_DOT_txt="a", deep__b_DOT_txt="b", __pycache____x_DOT_pyc="")
    first = kept(source, folder)
    assert sorted(file.relative_to(first).as_posix() for file in first.rglob("*.txt")) == ["a.txt", "deep/b.txt"]
    assert kept(source, folder) == first
    write(source, a_DOT_txt="changed")
    assert kept(source, folder) != first
    assert (first / "a.txt").read_text() == "a"
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]
    assert os.listdir(folder)
