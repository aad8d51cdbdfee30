"""A longer fuzzing of everything that is read from files, by coverage.

With ``pip install atheris``, which no other part needs::

    python -m benchmarks.fuzz_documents space|rankmap|study [-max_total_time=600]

Whatever bytes come, reading gives an object or an error of ours; anything else stops the run and is kept as a file
``crash-*``. The tests in ``tests/properties`` do the same with Hypothesis, in seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found, unused-ignore]

with atheris.instrument_imports(include=["ranksearch", "yaml"]):
    from ranksearch.config import load_space
    from ranksearch.errors import RankMapError, RanksearchError, SpaceError
    from ranksearch.rankmap import RankMap
    from ranksearch.storage import Store
    from ranksearch.trial import Proposal
    from tests.properties.test_documents import DOCUMENT
    from tests.studies import setting_of, space_of
    from tests.tables import table_outcome


Reader = tuple[Callable[[bytes], None], bytes]
"""Reads bytes; and valid ones to begin from."""


def read_space(folder: Path) -> Reader:
    """Reads bytes as a space file."""
    path = folder / "space.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            load_space(path)
        except SpaceError:
            return

    return read, (Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml").read_bytes()


def read_rank_map(folder: Path) -> Reader:
    """Reads bytes as a rank map."""
    path = folder / "map.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            _ = RankMap.load(path).macs_ratio
        except RankMapError:
            return

    return read, json.dumps(DOCUMENT).encode()


def read_study(folder: Path) -> Reader:
    """Reads a study whose journal has the bytes, but the first, behind as many lines as the first one says."""
    setting = setting_of(space_of())
    study = Store(folder).create("one", setting)
    trial = study.begin(Proposal(choices=tuple(0 for _ in setting.table.layers), origin="fuzz"), index=0)
    study.finish(trial, table_outcome(setting.table, trial.proposal.choices))
    journal = folder / "studies" / "one" / "journal.log"
    intact = journal.read_bytes().splitlines(keepends=True)

    def read(content: bytes) -> None:
        at = content[0] % len(intact) if content else 0
        journal.write_bytes(b"".join([*intact[:at], content[1:], *intact[at:]]))
        try:
            Store(folder).open("one").front_trials()
        except RanksearchError:
            return

    return read, b"\x01" + intact[-1]


READERS = {"space": read_space, "rankmap": read_rank_map, "study": read_study}


def main() -> None:
    """Fuzz until the time given is over."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        raise SystemExit(f"name what is read: {', '.join(READERS)}")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as corpus:
        read, seed = READERS[sys.argv[1]](Path(folder))
        (Path(corpus) / "seed").write_bytes(seed)
        atheris.Setup([sys.argv[0], *sys.argv[2:], corpus], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
