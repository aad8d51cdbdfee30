"""Every error a user can meet, each stating the rule, the value, the place and the remedy.

The command line prints these without a traceback; the Python API raises them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class RanksearchError(Exception):
    """A mistake or a limit that the user can act on; the message says how."""


class UnsupportedLayer(RanksearchError):
    """A format cannot factorise this layer; the message is the reason."""


class DecompositionError(RanksearchError):
    """A kernel could not be factorised (NaN, infinite, or a decomposition that did not converge)."""


class RankError(RanksearchError, ValueError):
    """Ranks outside the bounds of a format for a layer; the message names the bounds."""


class ModelError(RanksearchError):
    """A model that cannot be built, or weights that do not fit it."""


class DataError(RanksearchError):
    """Data that cannot be read, is empty, or breaks a rule (labels, splits)."""


class StudyError(RanksearchError):
    """A study that does not exist, exists already, or cannot be read."""


class TakenOver(StudyError):
    """Another driver has the study now: its trials, its files and its run of MLflow are that one's."""


class RankMapError(RanksearchError):
    """A rank map that cannot be read, or that is for another model."""


class BudgetError(RanksearchError):
    """No candidate or trial meets the asked budget; the message names the nearest."""


class PriceError(RanksearchError):
    """A price or a spectrum that a strategy reads and the price table lacks."""


class LatencyError(RanksearchError):
    """Latencies that cannot be measured or read, or that are of another space."""


class ExportError(RanksearchError):
    """A network that cannot be written in a format, or does not compute the same when it is read back."""


class RebuildError(RanksearchError):
    """A trial that was built again and does not score as recorded."""


class TrackingError(RanksearchError):
    """The MLflow store cannot be reached or written."""


class EngineError(RanksearchError):
    """Workers that cannot be started or reached."""


class JobError(RanksearchError):
    """A job that cannot be sent, found or read."""


def reason_of(error: BaseException) -> str:
    """The first line of what an error says that is not empty; its kind where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def first_line(error: BaseException, most: int = 240) -> str:
    """The kind of an error and the first line of what it says, at most so many characters."""
    kind, reason = type(error).__name__, reason_of(error)
    return kind if reason == kind else f"{kind}: {reason}"[:most]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake in a space file."""

    address: str
    """Where: a JSON path such as ``$.layers.include[0]``."""
    rule: str
    """What must hold."""
    value: str
    """What was found."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        found = f", found {self.value}" if self.value else ""
        return f"{self.address}: {self.rule}{found}. {self.remedy}"


class SpaceError(RanksearchError):
    """All the problems of a space file at once."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{source}: {count} problem{'s' if count != 1 else ''}\n{lines}")
