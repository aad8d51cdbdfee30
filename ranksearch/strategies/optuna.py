"""Optuna's samplers as a strategy: a rank map is a point with one whole number a layer, its candidate's index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from optuna.distributions import IntDistribution

from ranksearch.strategies.asking import Asker, Params
from ranksearch.strategies.history import maps, proposals_made, tried
from ranksearch.strategies.random import ATTEMPTS, step_to_new
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, Proposal, Signal, Trial

NAME = "optuna"
ASKS: Final = 2
"""A sampler that has settled repeats itself, and asking is dear: then a neighbour of what it suggests is tried."""


@dataclass(frozen=True, kw_only=True)
class Optuna:
    """Rank maps that one of Optuna's samplers suggests; DONE when every one was tried."""

    asker: Asker

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        known, index = tried(trials), proposals_made(trials)
        if len(known) >= table.size:
            return DONE
        space = {
            layer.name: IntDistribution(0, len(layer.candidates) - 1)
            for layer in table.layers
            if len(layer.candidates) > 1
        }

        def choices_of(params: Params) -> tuple[int, ...]:
            return tuple(params.get(layer.name, 0) for layer in table.layers)

        def params_of(trial: Trial) -> Params:
            named = zip(table.layers, trial.proposal.choices, strict=True)
            return {layer.name: i for layer, i in named if layer.name in space}

        params, note = self.asker.suggest(
            space, maps(trials), params_of, index, lambda p: choices_of(p) not in known, ASKS
        )
        choices = choices_of(params)
        if choices in known:
            rng = np.random.default_rng([self.asker.seed, index, ATTEMPTS])
            choices = step_to_new(table, choices, known, rng)
        return Proposal(choices=choices, origin=NAME, note=note)
