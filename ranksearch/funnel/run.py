"""A funnel run: gated layers are trained until the gates that are left cost what was asked for.

Chu, Lee, "Low-rank Tensor Decomposition for Compression of CNNs Using Funnel Regularization" (arXiv 2112.03690): train
at full rank, train under the penalty ``strength * sum of F_c(gate)`` while c falls, drop the gates under a threshold,
put layers back that are no cheaper, fold, fine-tune. Ours: the implicit step of the penalty (``penalty.py``); each
gate's strength in proportion to the MACs of its rank; the strength steered to a MAC target (``steering.py``), and the
threshold that meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.checkpoint import read_checkpoint, write_checkpoint
from ranksearch.data import Data, Split, to_input
from ranksearch.decompositions import Prepared, Ranks
from ranksearch.errors import BudgetError, ModelError
from ranksearch.funnel.gates import GatedNetwork
from ranksearch.funnel.spec import FunnelSpec
from ranksearch.funnel.steering import Steering, threshold_for
from ranksearch.rankmap import LayerRanks
from ranksearch.space import FineTuneSpec
from ranksearch.training import Training, steps_of


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
        pinned: layer to the module that it is from the start; trained like the rest.

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
        pinned: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.dense, self.data, self.spec, self.seed, self.dtype = dense, data, spec, seed, dtype
        self.network = GatedNetwork(dense, formats, prepared, data.input_shape, pinned)
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
        self.steering = Steering(self.network, spec)
        gated = {"steps": self.gated_steps, "epochs": None, "temperature": spec.temperature}
        gates = spec.fine_tune.model_copy(update=gated)
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
            self.load_state_dict(read_checkpoint(checkpoint))
        while self.steps < self.total:
            self.step()
            if checkpoint is not None and (self.steps % checkpoint_steps == 0 or self.steps == self.total):
                write_checkpoint(self.state_dict(), checkpoint)
            if progress is not None:
                progress(self.steps, self.total)
        return self.result()

    def step(self) -> None:
        """One step of the schedule; after the last one under the penalty, the gates are folded."""
        model = self.training.model
        self.training.set_mode()
        try:
            loss = self.training.step()
        finally:
            model.eval()
        self.steps += 1
        penalised = self.steps - self.spec.settle_steps if self.steps <= self.gated_steps else 0
        c = self.steering.step(penalised) if penalised > 0 else None
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
            "threshold": self.threshold,
            "steering": self.steering.state_dict(),
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
        self.threshold = state["threshold"]
        self.steering.load_state_dict(state["steering"])
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

    def _record(self, loss: float, c: float | None) -> None:
        phase = "settle" if self.steps <= self.spec.settle_steps else "penalty"
        entry: dict[str, Any] = {"step": self.steps, "phase": phase, "loss": loss}
        if self.ranks is None:
            ranks = self.steering.ranks(self.steering.sizes())
            entry |= {"c": c, "strength": self.steering.strength, "macs_ratio": self.network.ratio(ranks)}
            entry["alive"] = {layer.name: list(r) for layer, r in zip(self.network.layers, ranks, strict=True)}
        else:
            entry["phase"] = "fine-tune"
        self.history.append(entry)

    def _fold(self) -> None:
        sizes = self.steering.sizes()
        if self.spec.target is not None:
            self.threshold = threshold_for(self.network, sizes, self.spec.target)
        model, self.ranks = self.network.fold(self.network.alive(sizes, self.threshold))
        self._tune(model)
