"""A longer fuzzing of everything that is read from files, by coverage.

With ``pip install atheris``, which no other part needs::

    python -m benchmarks.fuzz_documents space|rankmap|study [-max_total_time=600]

Whatever bytes come, reading gives an object or an error of ours; anything else stops the run and is kept as a file
``crash-*``. The tests in ``tests/properties`` do the same with Hypothesis, in seconds.
"""

from __future__ import annotations

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
    from tests.studies import setting_of, space_of
    from tests.tables import table_outcome


def read_space(folder: Path) -> Callable[[bytes], None]:
    """Reads bytes as a space file."""
    path = folder / "space.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            load_space(path)
        except SpaceError:
            return

    return read


def read_rank_map(folder: Path) -> Callable[[bytes], None]:
    """Reads bytes as a rank map."""
    path = folder / "map.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            _ = RankMap.load(path).macs_ratio
        except RankMapError:
            return

    return read


def read_study(folder: Path) -> Callable[[bytes], None]:
    """Reads a study whose journal ends in the bytes, or has them in its middle."""
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

    return read


READERS = {"space": read_space, "rankmap": read_rank_map, "study": read_study}


def main() -> None:
    """Fuzz until the time given is over."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        raise SystemExit(f"name what is read: {', '.join(READERS)}")
    with tempfile.TemporaryDirectory() as folder:
        atheris.Setup([sys.argv[0], *sys.argv[2:]], READERS[sys.argv[1]](Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
