"""Finding and checking one of Optuna's samplers by its name and options."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from ranksearch.errors import Problem

SAMPLERS: Final = {
    "nsga2": "optuna.samplers:NSGAIISampler",
    "nsga3": "optuna.samplers:NSGAIIISampler",
    "tpe": "optuna.samplers:TPESampler",
    "gp": "optuna.samplers:GPSampler",
    "qmc": "optuna.samplers:QMCSampler",
    "random": "optuna.samplers:RandomSampler",
}
"""Short names of samplers; every other one is given by its import path."""

DEFAULTS: Final[dict[tuple[str, str], dict[str, Any]]] = {
    ("optuna", "nsga2"): {"population_size": 24},
    ("optuna", "nsga3"): {"population_size": 24},
    ("funnel", "nsga2"): {"population_size": 8},
    ("funnel", "nsga3"): {"population_size": 8},
    ("funnel", "tpe"): {"n_startup_trials": 6},
}
"""Options where ours differ from Optuna's, by strategy and sampler: searches of some 60 trials end before a population
of 50 breeds, and funnel runs, which take minutes, are fewer still."""


def find_sampler(name: str) -> type[BaseSampler] | Problem:
    """The sampler's class, or what is wrong with its name."""
    path = SAMPLERS.get(name, name)
    near = get_close_matches(name, SAMPLERS, n=1)
    remedy = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(SAMPLERS)}; or give package.module:Class."
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        return _problem("sampler", "a sampler must be known, or an import path", repr(name), remedy)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        return _problem("sampler", f"a sampler must be importable ({error})", repr(name), remedy)
    if not (inspect.isclass(found) and issubclass(found, BaseSampler)):
        return _problem("sampler", "a sampler must be a subclass of optuna.samplers.BaseSampler", repr(name), remedy)
    if "seed" not in inspect.signature(found).parameters:
        return _problem("sampler", "a sampler must take `seed`, or no search could be repeated", repr(name), remedy)
    return found


def check_options(sampler: type[BaseSampler], options: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the sampler's keyword arguments."""
    known = [name for name in inspect.signature(sampler).parameters if name != "seed"]
    problems = []
    for option in options:
        if option == "seed":
            rule, remedy = "the sampler's seed follows the search's", "Set `seed` of the space instead."
            problems.append(_problem("options.seed", rule, "", remedy))
        elif option not in known:
            near = get_close_matches(option, known, n=1)
            remedy = f"Did you mean `{near[0]}`?" if near else f"{sampler.__name__} takes: {', '.join(known)}."
            problems.append(_problem(f"options.{option}", f"unknown option of {sampler.__name__}", "", remedy))
    if not problems:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                sampler(**{**options, "seed": 0})
        except (TypeError, ValueError) as error:
            rule = f"{sampler.__name__} must accept its options ({error})"
            problems.append(_problem("options", rule, repr(dict(options)), "Correct them; see Optuna's reference."))
    return problems


def _problem(place: str, rule: str, value: str, remedy: str) -> Problem:
    return Problem(address=f"$.strategy.{place}", rule=rule, value=value, remedy=remedy)
