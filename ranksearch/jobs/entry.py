"""What a job runs on the cluster: keeps its files for good, then becomes the search.

Ray removes the folder that a job came with. A study refers to its network, data and rank maps by absolute paths, and a
later job goes on with it; so the files are copied beside the studies, under a hash of their content, and the search
works from there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ranksearch.secrecy import adopt
from ranksearch.storage import Store


def main(arguments: Sequence[str]) -> None:
    """Become ``ranksearch search`` with these arguments, in the kept folder; does not return."""
    adopt()
    os.chdir(kept(Path.cwd(), Store().folder / "jobs"))
    # A shell may have started the job deaf to Ctrl-C, which is how it is stopped.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-m", "ranksearch", "search", *arguments])


def kept(source: Path, folder: Path) -> Path:
    """A copy of ``source`` in ``folder``, named by its content, made whole or not at all."""
    files = sorted(file for file in source.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(source)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    target = folder / digest.hexdigest()[:20]
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder, suffix=".part"))
        try:
            for file in files:
                copy = part / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            try:
                part.rename(target)
            except OSError:
                if not target.is_dir():  # else another job was quicker
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


if __name__ == "__main__":
    main(sys.argv[1:])
