"""The funnel penalty and its implicit step (Chu, Lee, arXiv 2112.03690).

``F_c(x) = |x| / (|x| + c)``: where c is much larger than |x| it is the L1 norm at a strength of 1/c, where c is much
smaller it exerts no force, so that gates which survive are not shrunk.

A step against its gradient is unstable: at zero the slope is 1/c, and with c at 1e-4 a dead gate would be thrown about
by steps far larger than the gates that live. Ours is implicit instead: the gate moves to the point x where
``x + t F_c'(x)`` is the gate it was. That is stable for every c and t, kills exactly, and kills by the paper's
law: of the descent from a gate along the penalty it takes the first point of rest.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Penalty = Literal["funnel", "l1", "l2"]
Decay = Literal["exponential", "linear", "per-gate"]


def penalty(x: Tensor, c: Tensor | float, kind: Penalty = "funnel") -> Tensor:
    """The penalty of each gate: F_c(x), |x| or x²; ``c`` above zero, of the funnel only."""
    if kind == "funnel":
        return x.abs() / (x.abs() + c)
    return x.abs() if kind == "l1" else x.square()


def implicit_step(x: Tensor, size: Tensor | float, c: Tensor | float, kind: Penalty = "funnel") -> Tensor:
    """Where gates ``x`` get by one implicit step of ``size`` along the penalty; exactly zero where nothing holds them.

    With v = |x|, the funnel's is the largest root r of ``(v - r)(r + c)² = size c`` from 0 to v, or 0: of a cubic in
    r + c, by its trigonometric solution.
    """
    v = x.abs()
    if kind == "l1":
        rest = v - size
    elif kind == "l2":
        rest = v / (1 + 2 * torch.as_tensor(size))
    else:
        top = v + c
        cosine = 1 - 13.5 * size * c / top**3
        rest = top / 3 * (1 + 2 * torch.cos(torch.acos(cosine.clamp(-1, 1)) / 3)) - c
        rest = torch.where(cosine < -1, 0.0, rest)
    return x.sign() * torch.minimum(rest.clamp_min(0.0), v)


def decayed(start: float, end: float, progress: float, decay: Decay) -> float:
    """The value of c at a progress from 0 to 1; ``per-gate`` decays exponentially."""
    if decay == "linear":
        return start + (end - start) * progress
    return math.exp(math.log(start) + (math.log(end) - math.log(start)) * progress)
