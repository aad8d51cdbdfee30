"""A retraining by several processes: what travels to them, and what comes back.

The caller holds the same retraining as they do, makes no step of it, and takes over the leader's state after each
epoch: the checkpoint is written where the caller is, and no folder need be shared.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from ranksearch.retraining import Epoch, Retraining, Start
from ranksearch.scoring import reproducible
from ranksearch.team import Team

_PROGRESS_SECONDS = 0.5
"""How often the leader tells how many steps are made."""


class Member(Protocol):
    """One of the processes, as it is seen from within."""

    place: int
    """From 0."""
    size: int
    """Of them all."""
    device: torch.device
    kept: bytes | None
    """What was kept last, before a process died and all were started anew."""

    def tell(self, message: Any) -> None:
        """Let the caller hear a message."""
        ...

    def keep(self, content: bytes) -> None:
        """Let the caller hear it, and those that may be started anew find it."""
        ...


Work = Callable[[Member], None]
Crew = Callable[[Work, Callable[[Any], None]], None]
"""Runs picklable work on all processes at once, and lets the caller hear what they tell and keep."""


def run_together(
    crew: Crew,
    start: Start,
    training: Retraining,
    *,
    progress: Callable[[int, int], None],
    watch: Callable[[list[Epoch]], None],
) -> nn.Module:
    """As :meth:`Retraining.run <ranksearch.retraining.Retraining.run>`, by the processes of ``crew``.

    Args:
        crew: runs work on them.
        start: what they begin with.
        training: built from it, here; it becomes what the leader's is.
        progress: called now and then with the steps done and their total.
        watch: called with the curve so far, first with what a checkpoint had of it, then after each epoch.
    """

    def hear(message: Any) -> None:
        if isinstance(message, bytes):
            training.load_state_dict(_unpacked(message))
            training.save()
            watch(training.curve)
        else:
            progress(*message)

    watch(training.curve)
    if not training.done:
        state = _packed(training) if training.curve else None
        # Nobody there sees the report images.
        data = replace(start.data, report=start.data.search)
        crew(_Job(start=replace(start, data=data), state=state), hear)
    return training.better()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """The training as each process makes it."""

    start: Start
    state: bytes | None
    """What it goes on from."""

    def __call__(self, member: Member) -> None:
        team = Team(place=member.place, size=member.size)
        told = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal told
            if team.leads and (done == total or time.monotonic() - told > _PROGRESS_SECONDS):
                told = time.monotonic()
                member.tell((done, total))

        with reproducible(self.start.schedule.threads):
            training = self.start.build(member.device, checkpoint=None, team=team)
            state = member.kept or self.state
            if state is not None:
                training.load_state_dict(_unpacked(state))
            known = len(training.curve)

            def watch(curve: list[Epoch]) -> None:
                if len(curve) > known:
                    member.keep(_packed(training))

            training.run(progress=progress, watch=watch)


def _packed(training: Retraining) -> bytes:
    content = io.BytesIO()
    torch.save(training.state_dict(), content)
    return content.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
