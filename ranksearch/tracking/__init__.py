"""The MLflow view of a search; the only importer of mlflow, so import it only where tracking is asked for."""

from ranksearch.tracking.comparisons import record_comparison
from ranksearch.tracking.retrainings import RetrainingRun
from ranksearch.tracking.store import ui_command
from ranksearch.tracking.tracker import Tracker, TrialRecord
from ranksearch.tracking.view import View, connected

__all__ = ["RetrainingRun", "Tracker", "TrialRecord", "View", "connected", "record_comparison", "ui_command"]
