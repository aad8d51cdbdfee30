"""Funnel regularisation: ranks found by training under a penalty that closes gates (arXiv 2112.03690).

``spec.py`` says what a run does and ``run.py`` does it; ``gates.py`` has the gated chains and their folding,
``penalty.py`` the penalty, ``steering.py`` its strength.
"""

from __future__ import annotations

from ranksearch.funnel.run import Funnel, Funnelled
from ranksearch.funnel.spec import FunnelSpec

__all__ = ["Funnel", "FunnelSpec", "Funnelled"]
