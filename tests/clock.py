"""A driver whose clock jumps: ``python -m tests.clock OFFSET PLAN`` runs the plan's search as ``tests.driving`` does.

The time of day, as the code of ranksearch, Optuna and MLflow asks for it, is off by as many seconds as the file
``OFFSET`` says at that moment; pauses and clocks that only run forward are right, as where a real clock is set.
"""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow  # noqa: F401  (so that its modules are there to be misled)

from tests.driving import main


def mislead(offset: Path) -> None:
    """Shift the clock of the modules that are imported."""
    true_time = time.time

    def shifted() -> float:
        return true_time() + float(offset.read_text())

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime.fromtimestamp(shifted(), tz)

    time.time = shifted
    time.time_ns = lambda: int(1e9 * shifted())
    instead = {datetime: SimpleNamespace(**vars(datetime) | {"datetime": Shifted}), datetime.datetime: Shifted}
    for name, module in list(sys.modules.items()):
        held = vars(module).get("datetime")  # the class or its module, however it was imported
        if name.partition(".")[0] in ("ranksearch", "optuna", "mlflow") and held in instead:
            module.datetime = instead[held]  # type: ignore[attr-defined]


if __name__ == "__main__":
    mislead(Path(sys.argv.pop(1)))
    main()
