"""The live view of a search on a terminal, and its lines of JSON elsewhere."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ranksearch.cli.board import Board, drawn, duration
from ranksearch.cli.progress import Reporter
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.study import Study
from ranksearch.trial import Failure, Proposal, Trial
from tests.studies import TABLE, setting_of, space_of
from tests.tables import proposal_outcome


def trials_of(study: Study, count: int) -> list[Trial]:
    strategy = build_strategy(
        space_of(strategy={"name": "random"}).strategy, Terms(seed=5, objectives=("accuracy", "macs"))
    )
    ended = []
    for index in range(count):
        proposal = strategy.propose(TABLE, study.trials())
        assert isinstance(proposal, Proposal)
        trial = study.begin(proposal, index=index)
        ended.append(study.finish(trial, Failure(reason="spoilt") if index == 2 else proposal_outcome(TABLE, proposal)))
    return ended


def test_the_board_has_the_progress_the_best_at_the_targets_and_the_reason_of_failures(storage: Path) -> None:
    study = Store().create("seen", setting_of(space_of(budget={"trials": 20, "targets": [0.9, 0.6, 0.01]})))
    board = Board(study)
    ended = trials_of(study, 12)
    for i, trial in enumerate(ended):
        board.take(replace(trial, end_ms=1_000_000 + 500 * i))
    assert board.per_second == pytest.approx(2.0)
    assert [share for share, *_ in board.best()] == [0.9, 0.6, 0.01]
    for share, accuracy, number in board.best():
        if share == 0.01:
            assert (accuracy, number) == (None, None)
        else:
            picked = study.rank_map(max_macs_ratio=share)
            assert (accuracy, number) == (picked.metrics["accuracy_search"], picked.provenance["trial"])
    console = Console(file=io.StringIO(), width=160)
    console.print(board.render())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "seen: 12/20" in shown
    assert "1 failed, 1 of them: spoilt" in shown
    picture = "".join(line.partition("|")[2] for line in shown.splitlines())
    assert 1 < picture.count("o") <= len(study.front_trials())
    assert picture.count("D") == 1
    resumed = Board(study)
    assert resumed.best() == board.best(), "a resume begins where the study is"
    assert resumed.per_second == 0.0


def test_a_front_is_drawn_at_its_places() -> None:
    lines = drawn([(0.2, 0.5), (0.6, 0.75)], (1.0, 1.0))
    rows = [line.split("|", 1)[1] for line in lines[:-2]]
    assert (rows[0][-1], rows[-1][0]) == ("D", "o")
    assert rows[len(rows) // 2].rstrip()[-1] == "o"
    assert (lines[0][:6], lines[8][:6]) == ("100.00", " 50.00")
    assert lines[-1].split() == ["20", "%", "100", "%", "of", "the", "MACs"]
    assert drawn([], (1.0, 1.0)) == []


def test_durations_are_short() -> None:
    assert [duration(s) for s in (12.3, 600, 7200)] == ["12 s", "10 min", "2.0 h"]


def test_json_is_a_line_a_trial(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Store().create("told", setting_of(space_of()))
    with Reporter(as_json=True) as reporter:
        reporter.notify("reading", 0, 1)
        for trial in trials_of(study, 4):
            reporter.watch(study, trial)
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    assert [line["trial"] for line in lines] == [0, 1, 2, 3]
    assert lines[2]["reason"] == "spoilt"
    assert lines[0]["macs_ratio"] == pytest.approx(lines[0]["macs"] / TABLE.dense_macs)
