"""The penalty on the gates of a network, its strength steered to a MAC target (ours; the paper has no target).

The MACs of the chains should fall along a line, from those at full rank to the target well before the steps under the
penalty end. An integral controller of the strength's logarithm holds them to it. No step goes below the target, so
the threshold that is chosen in the end has few gates left to close.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ranksearch.decompositions import Ranks
from ranksearch.funnel.gates import GatedNetwork
from ranksearch.funnel.penalty import decayed, implicit_step
from ranksearch.funnel.spec import FunnelSpec

_ARRIVAL = 0.7
"""Share of the steps under the penalty after which the MACs should be those of the target."""
_LEAD = 0.1
"""Share of these steps by which the controller looks ahead."""
_SMOOTHING = 0.8
"""Of the gates' speed, from one step to the next."""
_RELENT = 0.9
"""What is left of the strength after a step that went too far."""


class Steering:
    """The steps of the penalty, one after each step of the training."""

    def __init__(self, network: GatedNetwork, spec: FunnelSpec) -> None:
        self.network, self.spec = network, spec
        self.strength = spec.strength
        self._costs = network.costs() if spec.mac_weighted else torch.ones_like(network.costs())
        self._start = self._last = self.sizes()
        self._speed = torch.zeros_like(self._start)

    def sizes(self) -> Tensor:
        """What the penalty and the threshold see of each gate, ``(G,)`` float64."""
        return self.network.magnitudes().abs() * self._norms()

    def ranks(self, sizes: Tensor) -> list[Ranks]:
        """Gates over the spec's threshold, of every layer and stage."""
        return self.network.ranks(sizes.abs(), self.spec.threshold)

    def step(self, number: int) -> float:
        """The implicit step ``number``, from 1, of the penalty; returns its c."""
        spec, progress = self.spec, number / self.spec.penalty_steps
        gates, norms = self.network.magnitudes(), self._norms()
        sizes = gates.abs() * norms
        if number == 1:
            self._start = self._last = sizes
        self._steer(sizes, progress)
        c = decayed(spec.c_start, spec.c_end, progress, spec.decay)
        each = c * self._start.clamp_min(1e-12) if spec.decay == "per-gate" else torch.full_like(sizes, c)
        # A constant force moves a gate under momentum by so much a step; on the gate alone, not on its column.
        reach = spec.gate_rate / (1 - spec.fine_tune.momentum) * self._costs * norms.square()
        moved = implicit_step(gates * norms, self.strength * reach, each, spec.penalty) / norms
        self.network.set_magnitudes(moved if spec.target is None else self._within(spec.target, gates, moved, norms))
        return c

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on."""
        return {"strength": self.strength, "start": self._start, "last": self._last, "speed": self._speed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.strength = state["strength"]
        self._start, self._last, self._speed = (state[name].to(self._start) for name in ("start", "last", "speed"))

    def _norms(self) -> Tensor:
        norms = self.network.column_norms()
        return norms.clamp_min(1e-12) if self.spec.scale_free else torch.ones_like(norms)

    def _steer(self, sizes: Tensor, progress: float) -> None:
        """Raise or lower the strength by how far the chains' MACs will be above the line.

        Gates shrink long before they close: what counts is where they are soon, at the speed they have now.
        """
        spec, network = self.spec, self.network
        self._speed = _SMOOTHING * self._speed + (1 - _SMOOTHING) * (sizes - self._last)
        self._last = sizes
        if spec.target is None:
            return
        soon = (sizes + _LEAD * spec.penalty_steps * self._speed).clamp_min(0.0)
        whole = network.ratio([layer.bounds for layer in network.layers], revert=False)
        wanted = whole + (spec.target - whole) * min(1.0, (progress + _LEAD) / _ARRIVAL)
        excess = network.ratio(self.ranks(soon), revert=False) - wanted
        self.strength *= math.exp(spec.gain / spec.penalty_steps * excess)

    def _within(self, target: float, gates: Tensor, moved: Tensor, norms: Tensor) -> Tensor:
        """The step to ``moved``, but for the largest of the gates that it would close below the target."""
        before, after = gates.abs() * norms, moved.abs() * norms
        if self.network.ratio(self.ranks(after)) >= target:
            return moved
        self.strength *= _RELENT
        closing = (after <= self.spec.threshold) & (before > self.spec.threshold)
        order = torch.argsort(before * closing, descending=True)
        low, high = 0, int(closing.sum())
        while low < high:
            middle = (low + high) // 2
            spared = after.index_fill(0, order[:middle], math.inf)
            low, high = (low, middle) if self.network.ratio(self.ranks(spared)) >= target else (middle + 1, high)
        return moved.index_copy(0, order[:low], gates[order[:low]])


def threshold_for(network: GatedNetwork, sizes: Tensor, target: float) -> float:
    """The lowest threshold on the gates' sizes at which the MAC ratio is at most ``target``, which must be reachable.

    At most, not nearest: who asks for a share of the MACs may have no more to spend.
    """

    def ratio(threshold: float) -> float:
        return network.ratio(network.ranks(sizes, threshold))

    # The ratio falls with the threshold.
    thresholds: list[float] = [-1.0, *sorted(sizes.tolist())]
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(thresholds[middle]) <= target else (middle + 1, high)
    return thresholds[low]
