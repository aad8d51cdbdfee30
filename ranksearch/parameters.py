"""Proposals as Optuna's parameters, and which of them decide."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from ranksearch.strategies.funnel import RANGES
from ranksearch.table import PriceTable
from ranksearch.trial import MAXIMISED, Proposal, Trial


def parameters_of(proposal: Proposal, table: PriceTable) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """A proposal as Optuna's parameters with their distributions: a candidate a layer, or what a funnel run explores.

    What a funnel run starts from is none: its outcome is not that of these candidates.
    """
    if proposal.funnel:
        explored = [name for name in RANGES if proposal.settings.get(name) is not None]
        params: dict[str, Any] = {f"funnel.{name}": proposal.settings[name] for name in explored}
        return params, {f"funnel.{name}": RANGES[name] for name in explored}
    params = {layer.name: i for layer, i in zip(table.layers, proposal.choices, strict=True)}
    return params, {layer.name: IntDistribution(0, len(layer.candidates) - 1) for layer in table.layers}


def importance(objectives: Sequence[str], table: PriceTable, trials: Sequence[Trial], of: str) -> dict[str, float]:
    """How much each layer's choice decides about an objective; see :meth:`ranksearch.study.Study.importance`."""
    if of not in objectives:
        raise ValueError(f"importance is of one of the objectives {', '.join(objectives)}, found {of!r}.")
    at = [str(name) for name in objectives].index(of)
    whole = optuna.create_study(direction="maximize" if of in MAXIMISED else "minimize")
    # Where some were trained more than others, those that most were trained alike: the others do not compare.
    fidelities = Counter(trial.proposal.fidelity for trial in trials)
    alike = max(fidelities, key=lambda fidelity: (fidelities[fidelity], fidelity), default=1.0)
    for trial in trials:
        if trial.values is not None and not trial.proposal.funnel and trial.proposal.fidelity == alike:
            params, distributions = parameters_of(trial.proposal, table)
            whole.add_trial(create_trial(params=params, distributions=distributions, value=trial.values[at]))
    if len(whole.trials) < 10:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Target and region quantiles")  # then all layers are alike
        return dict(get_param_importances(whole, evaluator=PedAnovaImportanceEvaluator()))
