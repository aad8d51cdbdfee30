"""A process among those that train one network together, each on its share of every batch.

Gradients are those of the whole batch: ``DistributedDataParallel`` averages them over the processes, whose group is
there already. Batch norms see the share of their process, and keep the statistics of the first one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, kw_only=True)
class Team:
    """One process's place among all; alone, nothing is exchanged."""

    place: int = 0
    """From 0. The first one leads: it averages weights, draws the curve and reports."""
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.place == 0

    def share(self, count: int) -> slice:
        """This process's part of a batch of ``count`` images; all parts together are the batch, in its order."""
        return slice(count * self.place // self.size, count * (self.place + 1) // self.size)

    def joined(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients that are the mean over all, and at first the leader's weights."""
        if self.size == 1:
            return model
        # Where parameters may be unused, gradients are never arranged anew after the first step: after an interruption
        # they are added up in the same order as without one, to the same bits.
        return DistributedDataParallel(model, find_unused_parameters=True)

    def total(self, value: Tensor) -> float:
        """The sum of one number over all."""
        value = value.detach()
        if self.size > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return float(value)

    @torch.no_grad()
    def as_leader(self, tensors: Iterable[Tensor]) -> None:
        """Give all the leader's values, in place."""
        for tensor in tensors if self.size > 1 else ():
            distributed.broadcast(tensor, 0)


ALONE = Team()
