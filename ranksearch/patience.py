"""Waiting for a storage that is away: what it refuses is tried again after growing pauses, for a limited time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ranksearch.errors import reason_of

T = TypeVar("T")
Away = Callable[[Exception], bool]
"""Whether an error says that the storage is away (a lost connection, a full disk) rather than that it refused."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0

_logger = logging.getLogger("ranksearch")


class Patience:
    """Repeats what fails because a storage is away.

    Args:
        what: the storage, as the user knows it, without a password.
        seconds: how long to go on trying. Once that was in vain everything is tried once, until something succeeds.
        away: which errors are worth waiting.
    """

    def __init__(self, what: str, *, seconds: float, away: Away) -> None:
        self._what = what
        self._seconds = seconds
        self._away = away
        self._spent = False

    def __call__(
        self,
        act: Callable[[bool], T],
        *,
        lost: Callable[[], None] = lambda: None,
    ) -> T:
        """What ``act`` returns.

        Args:
            act: told whether it was tried before, and so may be half done.
            lost: called once, as soon as the storage is away.

        Raises:
            Exception: the last error, when the patience is used up; any other at once.
        """
        began, pause_s, again = time.monotonic(), _FIRST_PAUSE_S, False
        while True:
            try:
                result = act(again)
            except Exception as error:
                if not self._away(error):
                    raise
                if not again:
                    lost()
                waited = time.monotonic() - began
                if self._spent or waited >= self._seconds:
                    self._spent = True
                    raise
                if not again:
                    _logger.warning(
                        "%s does not answer (%s); trying again for up to %.0f seconds",
                        self._what, _line(error), self._seconds,
                    )  # fmt: skip
                time.sleep(min(pause_s, max(0.0, self._seconds - waited)))
                pause_s, again = min(2 * pause_s, _LONGEST_PAUSE_S), True
            else:
                if again:
                    _logger.warning("%s answers again after %.0f seconds", self._what, time.monotonic() - began)
                self._spent = False
                return result


def _line(error: Exception) -> str:
    """The first line of what is behind an error."""
    return reason_of(error.__cause__ or error)
