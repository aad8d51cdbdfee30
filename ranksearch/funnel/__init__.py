"""Funnel regularisation: ranks found by training under a penalty that closes gates (arXiv 2112.03690).

``run.py`` has the schedule, ``gates.py`` the gated chains and their folding, ``penalty.py`` the penalty.
"""

from __future__ import annotations

from ranksearch.funnel.run import Funnel, Funnelled, FunnelSpec

__all__ = ["Funnel", "FunnelSpec", "Funnelled"]
