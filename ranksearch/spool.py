"""Results that a storage could not take, in a file beside the study until it can: one line of JSON a trial."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ranksearch.trial import Failure, Outcome, Trial


class Spool:
    """The file ``path``; there is none while every result is recorded.

    Args:
        path: of the file.
        uid: of the study; the results of another one that had this folder before are not read.
    """

    def __init__(self, path: Path, uid: str) -> None:
        self._path = path
        self._uid = uid

    def put(self, trial: Trial, result: Outcome | Failure) -> bool:
        """Keep a result on disk; whether that could be done, as where the disk is full it cannot."""
        document = {"study": self._uid, "number": trial.number, type(result).__name__.lower(): asdict(result)}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(document) + "\n")  # on a line of its own, whatever a kill left before
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return False
        return True

    def drop(self, trial: Trial) -> None:
        """Forget the result of a trial, which is recorded now."""
        left = {number: line for number, line in self._lines().items() if number != trial.number}
        if not left:
            self.clear()
            return
        part = self._path.with_suffix(".part")
        with suppress(OSError):  # a result that is recorded and kept as well does no harm
            part.write_text("".join(f"{line}\n" for line in left.values()), encoding="utf-8")
            part.replace(self._path)

    def read(self) -> dict[int, Outcome | Failure]:
        """The results by the numbers of their trials; what a kill left half-written is left out."""
        found: dict[int, Outcome | Failure] = {}
        for number, line in self._lines().items():
            with suppress(ValueError, TypeError, KeyError):
                document = json.loads(line)
                if "outcome" in document:
                    found[number] = Outcome.from_json(document["outcome"])
                else:
                    found[number] = Failure(**document["failure"])
        return found

    def clear(self) -> None:
        """Forget everything."""
        self._path.unlink(missing_ok=True)

    def _lines(self) -> dict[int, str]:
        lines: dict[int, str] = {}
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return {}
        for line in filter(None, text.splitlines()):
            with suppress(ValueError, TypeError, KeyError):
                document = json.loads(line)
                if document["study"] == self._uid:
                    lines[int(document["number"])] = line
        return lines
