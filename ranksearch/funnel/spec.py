"""What a funnel run does, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

from ranksearch.funnel.penalty import Decay, Penalty
from ranksearch.space import FineTuneSpec


@dataclass(frozen=True, kw_only=True)
class FunnelSpec:
    """What a funnel run does; rates and strength by default as published."""

    target: float | None = 0.5
    """MACs of the result, at most, as a share of the dense network's; None: what strength and threshold leave."""
    penalty: Penalty = "funnel"
    strength: float = 0.005
    """Of the penalty on the mean gate; where there is a target, the strength that the controller starts at."""
    c_start: float = 1.0
    c_end: float = 1e-4
    """c of the funnel falls from one to the other; published too: linearly from 10 to 1e-3."""
    decay: Decay = "exponential"
    """How c falls; ``per-gate``: exponentially, in units of each gate's size at the start of the penalty (ours)."""
    threshold: float = 1e-2
    """Gates at or below it are closed; where there is a target, the last threshold is the one that meets it."""
    mac_weighted: bool = True
    """Whether a gate's strength is in proportion to the MACs of its rank."""
    scale_free: bool = False
    """Whether the size of a gate before the last stage counts with the norm of its column there."""
    gain: float = 40.0
    """Growth of the logarithm of the strength over the whole penalty, per excess of the MAC ratio."""
    settle_steps: int = 50
    """Steps at full rank, without the penalty."""
    penalty_steps: int = 400
    weight_rate: float = 1e-3
    """Learning rate of everything but the gates until the gates are folded."""
    gate_rate: float = 1e-2
    temperature: float = 2.0
    """Softening of the outputs in distillation until the gates are folded."""
    fine_tune: FineTuneSpec = field(default_factory=lambda: FineTuneSpec(steps=400, weight_decay=0.0))
    """The training of the folded network; its batches, momentum and share of distillation hold for the whole run."""
    record_steps: int = 10
    """The history has an entry every so many steps."""

    def __post_init__(self) -> None:
        rates = (self.weight_rate, self.gate_rate, self.temperature)
        positive = (self.strength, self.c_start, self.c_end, self.gain, *rates)
        if min(positive) <= 0 or self.threshold < 0:
            raise ValueError(
                f"strength, c, rates, gain and temperature are above 0 and the threshold is not below 0, found {self}"
            )
        if self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"the target is a share of the dense MACs, above 0 and at most 1, found {self.target}")
        if self.c_end > self.c_start:
            raise ValueError(f"c falls from c_start to c_end, found {self.c_start} and {self.c_end}")
        if self.settle_steps < 0 or self.penalty_steps < 1 or self.record_steps < 1:
            raise ValueError(f"a funnel run needs steps under the penalty, and records, found {self}")
