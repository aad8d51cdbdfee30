"""A search for fast networks: from measured candidates to a rank map picked by its predicted latency."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranksearch.cli import main
from ranksearch.latency import LatencyTable
from ranksearch.storage import Store

SPACE = """
model: {name: digits-cnn}
data: {source: digits}
formats: [tucker2, svd]
ranks: {ratios: [0.25, 0.5]}
tracking: {enabled: false}
"""


def run(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code


@pytest.mark.slow
def test_a_search_by_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANKSEARCH_STORAGE", str(tmp_path / "storage"))
    monkeypatch.chdir(tmp_path)
    Path("fast.yaml").write_text(SPACE)
    run("latency", "fast.yaml", "-o", "latencies.json", "--networks", "2", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["dense_ms"] > 0
    assert len(told["networks"]) == 2

    # A board on which a layer takes as long as it has ranks: nothing is measured where the search runs.
    measured = json.loads(Path("latencies.json").read_text())
    dense = {json.dumps(conv): ms for conv, form, _, ms in measured["layers_ms"] if form == "dense"}
    measured["layers_ms"] = [
        [conv, form, ranks, ms if form == "dense" else dense[json.dumps(conv)] * sum(ranks) / 1000]
        for conv, form, ranks, ms in measured["layers_ms"]
    ]
    measured |= {"device": "a board", "dense_ms": 10 * sum(dense.values()), "scale": 1.0}
    Path("board.json").write_text(json.dumps(measured))
    board = LatencyTable.load(Path("board.json"))
    assert {measured["rank_multiple"]} <= {1, 2, 4, 8, 16, 32}

    settings = ["objectives=[accuracy,latency]", "latency.table=board.json", "budget.trials=8"]
    run("search", "fast.yaml", "--study", "fast", *[part for s in settings for part in ("--set", s)])
    study = Store(None).open("fast")
    timing = study.setting.table.timing
    assert timing is not None
    assert (timing.device, timing.dense_ms) == ("a board", board.dense_ms)
    assert study.space.ranks.rank_multiple == board.rank_multiple
    front = study.front()
    assert front["latency_ms"].notna().all()
    assert (front.sort_values("latency_ms")["accuracy_search"].diff().dropna() > 0).all(), "slower only where better"
    for trial in study.trials():
        assert trial.outcome is not None
        assert trial.values == (trial.outcome.accuracy_search, trial.outcome.latency_ms)
        assert trial.outcome.latency_ms == study.setting.table.latency_ms(trial.proposal.choices)
    assert 0 < study.hypervolume(study.trials()) < 1

    capsys.readouterr()
    run("front", "fast")
    assert " ms " in capsys.readouterr().out
    limit = float(front["latency_ms"].median()) / timing.dense_ms
    run("export", "fast", "--max-latency-ratio", str(limit), "-o", "map.json")
    assert "ms predicted" in capsys.readouterr().out
    metrics = json.loads(Path("map.json").read_text())["metrics"]
    assert metrics["latency_ms"] <= limit * timing.dense_ms * (1 + 1e-9)
    assert metrics["dense_latency_ms"] == timing.dense_ms
    run("export", "fast", "--max-latency-ratio", "0.0001", "-o", "none.json", code=1)
    assert "the fastest of the" in capsys.readouterr().err

    run("search", "fast.yaml", "--study", "limited", "--set", "budget.trials=3", "--set", "latency.table=board.json",
        "--set", f"budget.max_latency_ratio={limit}", "--set", "strategy.name=uniform")  # fmt: skip
    limited = Store(None).open("limited")
    for trial in limited.trials():
        assert trial.outcome is not None
        assert trial.outcome.latency_ms is not None
        assert trial.feasible == (trial.outcome.latency_ms <= limit * timing.dense_ms)
    run("search", "fast.yaml", "--study", "none", "--set", "latency.table=board.json",
        "--set", "budget.max_latency_ratio=0.0001", code=1)  # fmt: skip
    assert "$.budget.max_latency_ratio must be reachable: it is 0.0001" in capsys.readouterr().err
    assert "none" not in Store(None).names()

    # A board on which only one layer becomes faster by what replaces it: no rank map that changes all of them keeps it.
    one = next(iter(dense))
    shares = {key: 0.1 if key == one else 9 for key in dense}
    measured["layers_ms"] = [
        [conv, form, ranks, ms if form == "dense" else dense[json.dumps(conv)] * shares[json.dumps(conv)]]
        for conv, form, ranks, ms in measured["layers_ms"]
    ]
    Path("odd.json").write_text(json.dumps(measured | {"dense_ms": sum(dense.values())}))
    limit = 1 - 0.5 * dense[one] / sum(dense.values())
    run("search", "fast.yaml", "--study", "odd", "--set", "latency.table=odd.json",
        "--set", f"budget.max_latency_ratio={limit}", "--set", "strategy.name=uniform", code=1)  # fmt: skip
    told_at_end = " ".join(capsys.readouterr().err.split())
    assert "uniform has none within the budget's limits {'max_latency_ratio': " in told_at_end
    assert Store(None).open("odd").trials() == []

    run("search", "fast.yaml", "--set", "latency.table=nowhere.json", code=2)
    assert "must be a file that `ranksearch latency` wrote" in capsys.readouterr().err
