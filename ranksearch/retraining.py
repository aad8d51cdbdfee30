"""A full training of a compressed network, epoch by epoch, that a kill at any moment does not lose.

Distillation from the dense network and a cosine, as in ``training.py``; beside the weights that are trained goes their
exponential moving average (Polyak and Juditsky 1992), whose decay grows with the steps: min(decay, (1 + t) / (10 + t)).
After every epoch everything that the rest depends on is written to a checkpoint, from which the training goes on bit
for bit (on CPUs, with the same number of threads). A team of processes makes the same steps together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.checkpoint import read_checkpoint, write_checkpoint
from ranksearch.data import Data, Split, to_input
from ranksearch.decompositions import FORMATS
from ranksearch.errors import ModelError
from ranksearch.factors import content_hash
from ranksearch.refit import Chain, regauge
from ranksearch.rounding import Range, round_while_training, rounding_activations
from ranksearch.scoring import score
from ranksearch.space import FineTuneSpec
from ranksearch.surgery import channels_last
from ranksearch.team import ALONE, Team
from ranksearch.training import Training, steps_of, steps_of_epoch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a network is trained."""

    spec: FineTuneSpec
    dtype: torch.dtype
    """Arithmetic of the network; ``bfloat16`` is mixed precision, the weights stay float32."""
    ema_decay: float
    """Of the moving average of the weights, below 1; 0 keeps none."""
    seed: int
    threads: int
    """CPU threads that the caller has set: the last bits depend on them."""
    batch_images: int
    """Images scored at a time."""
    workers: int = 1
    """Processes among which each batch is split."""
    gpus_per_worker: int = 0
    """Of each of several; one alone takes the device that it is on."""
    regauge_steps: int = 10
    """Steps after which factors with a gauge of their own are brought to their least sensitive one; 0 never."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One point of the curve."""

    epoch: int
    """From 1."""
    steps: int
    """Steps made by its end."""
    loss: float
    """Mean training loss of its steps."""
    accuracy: float
    """Of the network on the search-validation images, 0 to 1."""
    loss_search: float
    """Cross-entropy there, nats per image."""
    accuracy_ema: float | None
    """Of the averaged weights, likewise; None without an average."""
    loss_search_ema: float | None


class Retraining:
    """A training of ``model`` in place, with its average, curve and checkpoints.

    Args:
        model: in evaluation mode, on the device to train on.
        dense: the network that teaches, likewise; it stays as it is.
        data: training images train, search-validation images draw the curve.
        schedule: how.
        chains: layer to format, geometry and ranks, of the layers that were replaced.
        ranges: layer to the range in which what goes into it is rounded, in training and where the curve is drawn;
            gradients pass straight through. A checkpoint keeps them.
        checkpoint: file; where it exists the training goes on from it. None writes none.
        team: the processes that train together. The leader alone has the average and the curve.

    Raises:
        ModelError: the checkpoint is of another training, or cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        data: Data,
        schedule: Schedule,
        *,
        chains: Mapping[str, Chain],
        checkpoint: Path | None,
        ranges: Mapping[str, Range] = {},
        team: Team = ALONE,
    ) -> None:
        self.model, self.dense, self.data, self.schedule, self.checkpoint = model, dense, data, schedule, checkpoint
        self.ranges, self.team = dict(ranges), team
        self.chains = {name: chain for name, chain in chains.items() if not FORMATS[chain[0]].nested}
        self.device = next(model.parameters()).device
        self.identity = self._identity()
        self.average = copy.deepcopy(model).eval() if schedule.ema_decay > 0 and team.leads else None
        self.curve: list[Epoch] = []
        self.training = Training(
            model,
            dense,
            data.train,
            self._input,
            schedule.spec,
            data.augment,
            seed=schedule.seed,
            dtype=schedule.dtype,
            team=team,
        )
        self.total = steps_of(schedule.spec, len(data.train))
        self.epoch_steps = steps_of_epoch(schedule.spec, len(data.train))
        self._losses: list[float] = []
        if checkpoint is not None and checkpoint.exists():
            self._load(read_checkpoint(checkpoint), checkpoint)

    def run(
        self,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        watch: Callable[[list[Epoch]], None] = lambda curve: None,
    ) -> nn.Module:
        """Make the steps that are left; returns the better network, as ``better`` has it.

        Args:
            progress: called after each step with the steps done and their total.
            watch: called with the curve so far, first with what a checkpoint had of it, then after each epoch.

        Raises:
            FloatingPointError: the loss is not finite.
            ModelError: a checkpoint cannot be written.
        """
        watch(self.curve)
        with ExitStack() as stack:
            for network in (self.model, self.average):
                if network is not None:
                    stack.enter_context(rounding_activations(network, self.ranges))
            while not self.done:
                self._step()
                if self.training.steps % self.epoch_steps == 0 or self.training.steps == self.total:
                    if self.team.leads:
                        self._end_epoch()
                        watch(self.curve)
                    self._losses = []
                progress(self.training.steps, self.total)
        return self.better() if self.team.leads else self.model

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.training.steps >= self.total

    def better(self) -> nn.Module:
        """The network or its average, whichever loses less on the search images at the end of the curve."""
        last = self.curve[-1]
        averaged = last.loss_search_ema is not None and last.loss_search_ema <= last.loss_search
        return self.average if self.average is not None and averaged else self.model

    def state_dict(self) -> dict[str, Any]:
        """All that the remaining steps depend on, at the end of an epoch."""
        return {
            "training": self.training.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "curve": [asdict(epoch) for epoch in self.curve],
            "ranges": {name: asdict(each) for name, each in self.ranges.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, in a training made with the same arguments."""
        self.training.load_state_dict(state["training"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.curve = [Epoch(**epoch) for epoch in state["curve"]]
        self.ranges = {name: Range(**each) for name, each in state["ranges"].items()}

    def save(self) -> None:
        """Write the checkpoint."""
        if self.checkpoint is not None:
            write_checkpoint({"retraining": self.identity, **self.state_dict()}, self.checkpoint)

    def _step(self) -> None:
        self.training.set_mode()
        try:
            self._losses.append(self.training.step())
        finally:
            self.model.eval()
        every = self.schedule.regauge_steps
        if self.chains and every and self.training.steps % every == 0:
            if self.team.leads:
                regauge(self.model, self.chains)
            self.team.as_leader(p for name in self.chains for p in self.model.get_submodule(name).parameters())
        if self.average is not None:
            _follow(self.average, self.model, self.schedule.ema_decay, self.training.steps)

    def _end_epoch(self) -> None:
        """The leader's alone."""
        ours = self._score(self.model)
        theirs = None if self.average is None else self._score(self.average)
        self.curve.append(
            Epoch(
                epoch=len(self.curve) + 1,
                steps=self.training.steps,
                loss=sum(self._losses) / len(self._losses),
                accuracy=ours[0],
                loss_search=ours[1],
                accuracy_ema=None if theirs is None else theirs[0],
                loss_search_ema=None if theirs is None else theirs[1],
            )
        )
        self.save()

    def _load(self, state: Mapping[str, Any], file: Path) -> None:
        if state.get("retraining") != self.identity:
            raise ModelError(
                f"a training goes on from its own checkpoint only: this one is {self.identity}, that of "
                f"{file} is {state.get('retraining')}. Give the arguments of that training, or remove the "
                "file to start afresh."
            )
        self.load_state_dict(state)

    def _identity(self) -> str:
        """What the course of the training depends on."""
        data, (ours, taught) = self.data, (content_hash(one.state_dict().values()) for one in (self.model, self.dense))
        return (
            f"{self.schedule} of weights {ours}, taught by {taught}, on {data.digest or len(data.train)} with mean "
            f"{data.mean}, std {data.std} and {data.augment!r}, {len(self.ranges)} activations rounded, "
            f"{self.device.type}"
        )

    def _input(self, split: Split, index: Tensor) -> Tensor:
        return to_input(split.images[index.numpy()], self.data, self.device)

    def _score(self, model: nn.Module) -> tuple[float, float]:
        found = score(model, self.data.search, self.data, batch_images=self.schedule.batch_images, device=self.device)
        return found.accuracy, found.loss


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """What a retraining begins with; it can be pickled, and built in any process."""

    model: nn.Module
    """As it is stored: nothing of it is rounded by parametrisation yet."""
    dense: nn.Module
    data: Data
    schedule: Schedule
    chains: Mapping[str, Chain]
    bits: Mapping[str, int]
    """Of the weights of every layer that is rounded while it trains."""
    ranges: Mapping[str, Range]

    def build(self, device: torch.device, *, checkpoint: Path | None, team: Team = ALONE) -> Retraining:
        """The retraining on a device; networks are copied. See :class:`Retraining`."""
        model, dense = (channels_last(copy.deepcopy(one).eval().to(device)) for one in (self.model, self.dense))
        round_while_training(model, self.bits)
        return Retraining(
            model,
            dense,
            self.data,
            self.schedule,
            chains=self.chains,
            ranges=self.ranges,
            checkpoint=checkpoint,
            team=team,
        )


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float, steps: int) -> None:
    """Move the average towards the network's weights and batch-norm statistics, in place."""
    kept = min(decay, (1 + steps) / (10 + steps))
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(theirs, 1 - kept)
        else:
            ours.copy_(theirs)
