"""The files that surround the code say what is true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from ranksearch.config import load_space
from tests.conftest import REPOSITORY

SPACES = sorted((REPOSITORY / "search_spaces").glob("*.yaml"))


def test_the_shipped_spaces_are_all_there() -> None:
    assert {path.stem for path in SPACES} >= {
        "quickstart",
        "resnet20-cifar10",
        "resnet56-cifar10",
        "resnet18-imagenet",
        "resnet50-imagenet",
        "vgg16-imagenet",
    }


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_shipped_space_loads_and_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text(encoding="utf-8")
    for variable in re.findall(r"\$\{(\w+)\}", text):
        monkeypatch.setenv(variable, "/a/folder")
    assert load_space(path).name
    header = "\n".join(line for line in text.splitlines() if line.startswith("#")).lower()
    assert "ranksearch search" in header, "the header must give the command"
    assert re.search(r"wall time:\s*\w", header), "the header must give the wall time, or say that it is not measured"
    assert re.search(r"expected:\s*\w", header), "the header must give the expected result"


def test_help_imports_no_heavy_library() -> None:
    script = (
        "import sys, json\n"
        "sys.argv = ['ranksearch', '--help']\n"
        "from ranksearch.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('\\n' + json.dumps(sorted({'torch', 'ray', 'mlflow', 'optuna', 'pandas'} & set(sys.modules))))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "search" in run.stdout
    assert json.loads(run.stdout.splitlines()[-1]) == []


def test_the_readme_names_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", _blocks_and_spans(REPOSITORY / "README.md")))
    assert {"demo", "test"} <= named <= targets


def test_the_readme_shows_only_commands_that_exist() -> None:
    named = set(re.findall(r"\branksearch ([a-z-]+)\b", _blocks_and_spans(REPOSITORY / "README.md")))
    for command in sorted(named):
        run = subprocess.run(
            [sys.executable, "-c", "from ranksearch.cli import main; main()", command, "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, f"`ranksearch {command} --help`: {run.stderr}"


def test_links_in_the_readme_lead_to_files() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("https://"):
            assert (REPOSITORY / target).exists(), target


def test_the_constraints_satisfy_every_dependency() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} has no tested version"
        assert Version(pins[name]) in requirement.specifier, f"{name}: {pins[name]} breaks {requirement.specifier}"


def test_versions_agree() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == version


def test_files_stay_small_enough_to_read() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): count
        for path in (REPOSITORY / "ranksearch").rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long, f"split these files by idea: {long}"


def _blocks_and_spans(path: Path) -> str:
    """The code of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    without = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join((*blocks, *re.findall(r"`([^`\n]+)`", without)))
