"""What a strategy reads off the trials so far."""

from __future__ import annotations

from collections.abc import Sequence

from ranksearch.trial import Trial


def tried(trials: Sequence[Trial]) -> set[tuple[int, ...]]:
    """The choices of every trial, whatever became of it: none of them is proposed again."""
    return {trial.proposal.choices for trial in trials}


def proposals_made(trials: Sequence[Trial], origin: str | None = None) -> int:
    """How many proposals the trials come from, those of ``origin`` only if given; a retry is not a new proposal."""
    return len({trial.index for trial in trials if origin is None or trial.proposal.origin == origin})
