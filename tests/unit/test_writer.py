"""The thread that writes to MLflow, with jobs that succeed only while their store is there."""

from __future__ import annotations

import threading
from functools import partial

from ranksearch.tracking.writer import Writer


def test_a_store_that_stays_away_holds_up_nobody_and_fills_no_memory() -> None:
    written: list[int] = []
    up = False

    def write(number: int, _again: bool) -> None:
        if not up:
            raise ConnectionError("no answer")
        written.append(number)

    writer = Writer("the store", capacity=3, pauses_s=())
    try:
        for number in range(10):
            writer.submit(partial(write, number))
        assert writer.flush() == 10
        up = True
        assert writer.flush() == 7, "what was left out is told"
        assert written == [0, 1, 2]
        writer.submit(partial(write, 10))
        assert writer.flush() == 7
        assert written == [0, 1, 2, 10]
    finally:
        writer.close()


def test_what_is_dropped_is_not_written_and_holds_up_nobody() -> None:
    written: list[str] = []
    at_work, go_on = threading.Event(), threading.Event()

    def long(_again: bool) -> None:
        at_work.set()
        go_on.wait(60)
        written.append("at work")

    writer = Writer("the store", pauses_s=())
    writer.submit(long)
    writer.submit(lambda again: written.append("waiting"))
    assert at_work.wait(60)
    writer.drop()
    writer.submit(lambda again: written.append("later"))
    go_on.set()
    writer.close()
    assert written == ["at work"]
