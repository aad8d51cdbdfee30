"""A funnel run: gated layers are trained until the gates that are left cost what was asked for.

Chu, Lee, "Low-rank Tensor Decomposition for Compression of CNNs Using Funnel Regularization" (arXiv 2112.03690): train
at full rank, train under the penalty ``strength * sum of F_c(gate)`` while c falls, drop the gates under a threshold,
put layers back that are no cheaper, fold, fine-tune. Ours: the implicit step of the penalty (``penalty.py``); each
gate's strength in proportion to the MACs of its rank; the strength steered, as an integral controller of its
logarithm, along a line down to a MAC target, which no step may undercut; the threshold that meets the target.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.data import Data, Split, to_input
from ranksearch.decompositions import Prepared, Ranks
from ranksearch.errors import BudgetError, ModelError
from ranksearch.funnel.gates import GatedNetwork
from ranksearch.funnel.penalty import Decay, Penalty, decayed, implicit_step
from ranksearch.rankmap import LayerRanks
from ranksearch.space import FineTuneSpec
from ranksearch.training import Training, steps_of

_ARRIVAL = 0.7
"""Share of the steps under the penalty after which the MACs should be those of the target."""
_LEAD = 0.1
"""Share of these steps by which the controller looks ahead."""
_RELENT = 0.9
"""What is left of the strength after a step that went too far."""


@dataclass(frozen=True, kw_only=True)
class FunnelSpec:
    """What a funnel run does; rates and strength by default as published."""

    target: float | None = 0.5
    """MACs of the result as a share of the dense network's; None: what strength and threshold leave."""
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
    fine_tune: FineTuneSpec = field(default_factory=lambda: FineTuneSpec(steps=400, weight_decay=0.0))
    """The training of the folded network; its batches, momentum and distillation hold for the whole run."""
    record_steps: int = 10
    """The history has an entry every so many steps."""

    def __post_init__(self) -> None:
        positive = (self.strength, self.c_start, self.c_end, self.weight_rate, self.gate_rate, self.gain)
        if min(positive) <= 0 or self.threshold < 0:
            raise ValueError(f"strength, c, rates and gain are above 0 and the threshold is not below 0, found {self}")
        if self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"the target is a share of the dense MACs, above 0 and at most 1, found {self.target}")
        if self.c_end > self.c_start:
            raise ValueError(f"c falls from c_start to c_end, found {self.c_start} and {self.c_end}")
        if self.settle_steps < 0 or self.penalty_steps < 1 or self.record_steps < 1:
            raise ValueError(f"a funnel run needs steps under the penalty, and records, found {self}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Funnelled:
    """What a funnel run ends in."""

    model: nn.Module
    """The folded, fine-tuned network, in evaluation mode."""
    layers: dict[str, LayerRanks]
    """The layers of its rank map; gated layers that are not here are dense again."""
    macs_ratio: float
    """MACs as a share of the dense network's."""
    threshold: float
    """Gates at or below it were closed."""
    history: tuple[dict[str, Any], ...]
    """JSON types: step, phase, loss; while there are gates also c, strength, macs_ratio and the gates alive a layer."""


class Funnel:
    """A funnel run, one step at a time, which can stop and go on bit for bit.

    Args:
        dense: the pretrained network in evaluation mode, which teaches, and stays as it is.
        formats: layer to the name of its format: one whose ranks are the channels between stages.
        prepared: layer to its prepared tensors, of either kind.
        data: of which training sees the training images.
        spec: the schedule.
        seed: of batches and their changes.
        dtype: arithmetic of the networks; gates are float32 always.

    Raises:
        BudgetError: ranks of 1 everywhere cost more than the target.
        ModelError: no such layer.
        UnsupportedLayer: a layer cannot be gated.
    """

    def __init__(
        self,
        dense: nn.Module,
        formats: Mapping[str, str],
        prepared: Mapping[str, Prepared],
        data: Data,
        spec: FunnelSpec,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dense, self.data, self.spec, self.seed, self.dtype = dense, data, spec, seed, dtype
        self.network = GatedNetwork(dense, formats, prepared, data.input_shape)
        least = self.network.ratio([(1,) * len(layer.bounds) for layer in self.network.layers])
        if spec.target is not None and least > spec.target:
            raise BudgetError(
                f"the funnel's target must be reachable: it is {spec.target}, and rank 1 everywhere keeps {least:.3f} "
                "of the MACs. Raise it or gate more layers."
            )
        self.gated_steps = spec.settle_steps + spec.penalty_steps
        self.total = self.gated_steps + steps_of(spec.fine_tune, len(data.train))
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.threshold = spec.threshold
        self.ranks: dict[str, Ranks] | None = None
        """Of the folded layers, once there are some."""
        self._costs = self.network.costs() if spec.mac_weighted else torch.ones_like(self.network.costs())
        self._strength = spec.strength
        self._start = self._last = self._sizes()
        self._speed = torch.zeros_like(self._start)
        gates = spec.fine_tune.model_copy(update={"steps": self.gated_steps, "epochs": None})
        groups = [(self.network.others(), spec.weight_rate), (self.network.gates(), spec.gate_rate)]
        self.training = self._training(self.network.model, gates, seed, groups)

    def run(
        self,
        *,
        checkpoint: Path | None = None,
        checkpoint_steps: int = 100,
        progress: Callable[[int, int], None] | None = None,
    ) -> Funnelled:
        """Make the steps that are left.

        Args:
            checkpoint: a file; where it exists the run goes on from it, and every ``checkpoint_steps`` it is written.
            checkpoint_steps: steps from one writing to the next.
            progress: called with the steps done and their total.

        Raises:
            FloatingPointError: the loss is not finite.
            ModelError: the checkpoint is of another run, or cannot be read or written.
        """
        if checkpoint is not None and checkpoint.exists():
            self.load_state_dict(_read(checkpoint))
        while self.steps < self.total:
            self.step()
            if checkpoint is not None and (self.steps % checkpoint_steps == 0 or self.steps == self.total):
                _write(self.state_dict(), checkpoint)
            if progress is not None:
                progress(self.steps, self.total)
        return self.result()

    def step(self) -> None:
        """One step of the schedule; after the last one under the penalty, the gates are folded."""
        model = self.training.model
        model.train()
        try:
            loss = self.training.step()
        finally:
            model.eval()
        self.steps += 1
        c = self._penalise() if self.spec.settle_steps < self.steps <= self.gated_steps else None
        if self.steps % self.spec.record_steps == 0 or self.steps in (self.gated_steps, self.total):
            self._record(loss, c)
        if self.steps == self.gated_steps:
            self._fold()

    def result(self) -> Funnelled:
        """The network and its ranks; the run must have come to its end."""
        if self.ranks is None or self.steps < self.total:
            raise ValueError(f"a funnel run has a result after its last step, this is {self.steps} of {self.total}")
        known = {layer.name: layer for layer in self.network.layers}
        layers = {
            name: LayerRanks(
                format=known[name].form.name,
                ranks=ranks,
                conv=known[name].conv.to_json(),
                macs=known[name].macs(ranks),
                params=known[name].params(ranks),
            )
            for name, ranks in self.ranks.items()
        }
        ratio = self.network.ratio([self.ranks.get(layer.name, layer.bounds) for layer in self.network.layers])
        return Funnelled(
            model=self.training.model.eval(),
            layers=layers,
            macs_ratio=ratio,
            threshold=self.threshold,
            history=tuple(self.history),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the remaining steps and the result depend on; ``torch.load`` reads it as weights only."""
        return {
            "run": self._identity(),
            "steps": self.steps,
            "strength": self._strength,
            "threshold": self.threshold,
            "sizes": {"start": self._start, "last": self._last, "speed": self._speed},
            "ranks": self.ranks,
            "history": list(self.history),
            "training": self.training.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, in a run made with the same arguments; raises :class:`ModelError`."""
        if state.get("run") != self._identity():
            raise ModelError(
                f"a funnel run goes on from its own checkpoint only: this one is {self._identity()}, the checkpoint's "
                f"is {state.get('run')}. Give another file, or the arguments of that run."
            )
        self.steps, self.ranks, self.history = state["steps"], state["ranks"], list(state["history"])
        self._strength, self.threshold = state["strength"], state["threshold"]
        sizes = {name: value.to(self._start) for name, value in state["sizes"].items()}
        self._start, self._last, self._speed = sizes["start"], sizes["last"], sizes["speed"]
        if self.ranks is not None:
            self._tune(self.network.skeleton(self.ranks))
        self.training.load_state_dict(state["training"])

    def _identity(self) -> str:
        formats = ", ".join(f"{layer.name}: {layer.form.name}" for layer in self.network.layers)
        return (
            f"{self.spec} of seed {self.seed} in {self.dtype} on {self.data.digest or len(self.data.train)}; {formats}"
        )

    def _training(self, model: nn.Module, spec: FineTuneSpec, seed: int, groups: Any = None) -> Training:
        device = next(self.dense.parameters()).device

        def images(split: Split, index: Tensor) -> Tensor:
            return to_input(split.images[index.numpy()], self.data, device)

        split, augment = self.data.train, self.data.augment
        return Training(model, self.dense, split, images, spec, augment, seed=seed, dtype=self.dtype, groups=groups)

    def _tune(self, model: nn.Module) -> None:
        """The folded ``model`` is what is trained from here on."""
        self.training = self._training(model, self.spec.fine_tune, self.seed + 1)

    def _sizes(self) -> Tensor:
        """What the penalty and the threshold see of each gate, ``(G,)`` float64."""
        return self.network.magnitudes().abs() * self._norms()

    def _ranks(self, sizes: Tensor) -> list[Ranks]:
        return self.network.ranks(sizes.abs(), self.spec.threshold)

    def _norms(self) -> Tensor:
        norms = self.network.column_norms()
        return norms.clamp_min(1e-12) if self.spec.scale_free else torch.ones_like(norms)

    def _penalise(self) -> float:
        """Steer the strength and move the gates by one implicit step of the penalty; returns c."""
        spec, network = self.spec, self.network
        progress = (self.steps - spec.settle_steps) / spec.penalty_steps
        if self.steps == spec.settle_steps + 1:
            self._start = self._last = self._sizes()
        c = decayed(spec.c_start, spec.c_end, progress, spec.decay)
        each = c * self._start.clamp_min(1e-12) if spec.decay == "per-gate" else torch.full_like(self._start, c)
        gates, norms = network.magnitudes(), self._norms()
        self._steer(gates.abs() * norms, progress)
        # A constant force moves a gate under momentum by so much a step.
        reach = spec.gate_rate / (1 - spec.fine_tune.momentum) * self._costs * norms.square()
        moved = implicit_step(gates * norms, self._strength * reach, each, spec.penalty) / norms
        if spec.target is not None:
            moved = self._within(spec.target, gates, moved, norms)
        network.set_magnitudes(moved)
        return c

    def _within(self, target: float, gates: Tensor, moved: Tensor, norms: Tensor) -> Tensor:
        """The step to ``moved``, but for the largest of the gates that it would close below the target."""
        sizes = moved.abs() * norms
        if self.network.ratio(self._ranks(sizes)) >= target:
            return moved
        self._strength *= _RELENT
        closing = (sizes <= self.spec.threshold) & (gates.abs() * norms > self.spec.threshold)
        order = torch.argsort(gates.abs() * norms * closing, descending=True)
        low, high = 0, int(closing.sum())
        while low < high:
            middle = (low + high) // 2
            spared = sizes.index_fill(0, order[:middle], math.inf)
            low, high = (low, middle) if self.network.ratio(self._ranks(spared)) >= target else (middle + 1, high)
        return moved.index_copy(0, order[:low], gates[order[:low]])

    def _steer(self, sizes: Tensor, progress: float) -> None:
        """Raise or lower the strength by how far the chains' MACs will be above the line from full rank to the target.

        Gates shrink long before they close: what counts is where they are soon, at the speed they have now.
        """
        spec, network = self.spec, self.network
        self._speed = 0.8 * self._speed + 0.2 * (sizes - self._last)
        self._last = sizes
        if spec.target is None:
            return
        soon = (sizes + _LEAD * spec.penalty_steps * self._speed).clamp_min(0.0)
        whole = network.ratio([layer.bounds for layer in network.layers], revert=False)
        wanted = whole + (spec.target - whole) * min(1.0, (progress + _LEAD) / _ARRIVAL)
        excess = network.ratio(self._ranks(soon), revert=False) - wanted
        self._strength *= math.exp(spec.gain / spec.penalty_steps * excess)

    def _record(self, loss: float, c: float | None) -> None:
        phase = "settle" if self.steps <= self.spec.settle_steps else "penalty"
        entry: dict[str, Any] = {"step": self.steps, "phase": phase, "loss": loss}
        if self.ranks is None:
            ranks = self._ranks(self._sizes())
            entry |= {"c": c, "strength": self._strength, "macs_ratio": self.network.ratio(ranks)}
            entry["alive"] = {layer.name: list(r) for layer, r in zip(self.network.layers, ranks, strict=True)}
        else:
            entry["phase"] = "fine-tune"
        self.history.append(entry)

    def _fold(self) -> None:
        sizes = self._sizes()
        if self.spec.target is not None:
            self.threshold = threshold_for(self.network, sizes, self.spec.target)
        model, self.ranks = self.network.fold(self.network.alive(sizes, self.threshold))
        self._tune(model)


def threshold_for(network: GatedNetwork, sizes: Tensor, target: float) -> float:
    """The threshold on the gates' sizes at which the MAC ratio is nearest to ``target``."""

    def ratio(threshold: float) -> float:
        return network.ratio(network.ranks(sizes, threshold))

    def distance(threshold: float) -> float:
        return abs(ratio(threshold) - target)

    # The ratio falls with the threshold: the first one at which it is at most the target, and the one before.
    thresholds = [-1.0, *sorted(sizes.tolist())]
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(thresholds[middle]) <= target else (middle + 1, high)
    nearest: float = min(thresholds[max(0, low - 1) : low + 1], key=distance)
    return nearest


def _write(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            torch.save(state, unfinished)
            os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot write the checkpoint {path}: {error}. Check the folder and the space left."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its pickle holds
        raise ModelError(f"cannot read the checkpoint {path}: {error}. Remove it to start afresh.") from error
    return state
