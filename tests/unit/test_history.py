"""What is read off the trials as they come is what is read off all of them at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ranksearch.strategies.history import Past, maps, memory, newest_and_best, proposals_made, runs, tried
from ranksearch.trial import Proposal, Trial

OBJECTIVES = ("accuracy", "macs")


def proposal(rng: np.random.Generator, index: int, funnels: bool) -> Proposal:
    note = {"study": {f"key{rng.integers(4)}": index}} if rng.random() < 0.6 else {}
    if rng.random() < 0.2:
        note["given"] = True
    settings = {"strength": float(rng.integers(3))} if funnels and rng.random() < 0.3 else {}
    choices = tuple(int(c) for c in rng.integers(6, size=2))
    return Proposal(choices=choices, origin=str(rng.choice(["optuna", "uniform"])), note=note, settings=settings)


@pytest.mark.parametrize("funnels", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_at_any_moment_and_in_any_order_of_ends(seed: int, funnels: bool) -> None:
    rng = np.random.default_rng(seed)
    past, latest, number = Past(OBJECTIVES), dict[int, Trial](), 0

    def put(trial: Trial) -> None:
        latest[trial.index] = trial
        past.put(trial)

    for _ in range(150):
        open_ = [t for t in latest.values() if t.state == "RUNNING" or t.retry]
        if open_ and rng.random() < 0.5:
            trial = open_[rng.integers(len(open_))]
            if trial.retry:
                put(replace(trial, number=number, state="RUNNING", attempt=1, retry=False))
                number += 1
            elif rng.random() < 0.3:
                put(replace(trial, state="FAIL", retry=trial.attempt == 0))
            else:  # few values, so that many points are equal
                put(replace(trial, state="COMPLETE", values=(rng.integers(6) / 5, float(rng.integers(6)))))
        else:
            made = proposal(rng, len(latest), funnels)
            put(Trial(number=number, index=len(latest), proposal=made, state="RUNNING"))
            number += 1
        expected = [replace(latest[i], number=i, attempt=0) for i in range(len(latest))]
        assert [replace(trial, attempt=0) for trial in past] == expected
        assert tried(past) == tried(expected)
        assert runs(past) == runs(expected)
        for origin in (None, "optuna", "uniform", "nobody"):
            assert proposals_made(past, origin) == proposals_made(expected, origin)
        for origin in ("optuna", "uniform", "nobody"):
            assert memory(past, origin) == memory(expected, origin)
        for limit in (3, 20, 1000):
            shown = [trial.number for trial in newest_and_best(maps(past), OBJECTIVES, limit)]
            assert shown == [trial.number for trial in newest_and_best(maps(expected), OBJECTIVES, limit)]
            assert len(shown) == min(limit, len(maps(expected)))
    if not funnels:
        front = {past[i].values for i in past.front}
        ended = {t.values for t in past if t.values}
        beaten = {v for v in ended if any(w != v and w[0] >= v[0] and w[1] <= v[1] for w in ended)}
        assert front == ended - beaten


def test_what_a_sampler_remembers_may_be_changed() -> None:
    past = Past(OBJECTIVES)
    past.put(Trial(number=0, index=0, proposal=Proposal(choices=(1,), origin="optuna"), state="RUNNING"))
    memory(past, "optuna")["key"] = 1
    assert memory(past, "optuna") == {}
