"""What a strategy reads off the trials so far."""

from __future__ import annotations

from collections.abc import Sequence

from ranksearch.trial import Proposal, Trial

Run = tuple[tuple[int, ...], tuple[tuple[str, float | int | str | None], ...]]
"""A funnel run: its choices and its settings, sorted by name."""


def tried(trials: Sequence[Trial]) -> set[tuple[int, ...]]:
    """The rank maps of every trial, whatever became of it: none of them is proposed again.

    A funnel run's choices are no rank map that was tried: see :func:`runs`.
    """
    return {trial.proposal.choices for trial in trials if not trial.proposal.funnel}


def runs(trials: Sequence[Trial]) -> set[Run]:
    """The funnel runs among the trials, whatever became of them: none of them is proposed again."""
    return {run(trial.proposal) for trial in trials if trial.proposal.funnel}


def run(proposal: Proposal) -> Run:
    """What makes a funnel run the same as another."""
    return proposal.choices, tuple(sorted(proposal.settings.items()))


def proposals_made(trials: Sequence[Trial], origin: str | None = None) -> int:
    """How many proposals the trials come from, those of ``origin`` only if given; a retry is not a new proposal."""
    return len({trial.index for trial in trials if origin is None or trial.proposal.origin == origin})
