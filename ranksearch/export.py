"""From a trial to a rank map, its weights, and back to a network.

A weights file carries its rank map in its metadata, so that it alone is the compressed network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ranksearch.errors import BudgetError, RankMapError
from ranksearch.evaluation import layers_of
from ranksearch.factors import store
from ranksearch.front import knee
from ranksearch.rankmap import LayerRanks, RankMap, WeightsRecord, WidthsRecord
from ranksearch.space import Space
from ranksearch.study import Study
from ranksearch.surgery import skeleton
from ranksearch.trial import Outcome, Trial, best_within

_METADATA = "ranksearch"


def rank_map_of(study: Study, trial: Trial) -> RankMap:
    """The rank map of a trial; with its measurements if it is complete.

    Raises:
        BudgetError: the trial is a funnel run that is not complete, so it has ended in no rank map.
    """
    setting, table, outcome = study.setting, study.setting.table, trial.outcome
    if trial.proposal.funnel:
        if outcome is None:
            raise BudgetError(
                f"a funnel run has a rank map when it is complete, the state of trial {trial.number} is {trial.state} "
                f"({trial.reason}). See `ranksearch trials`."
            )
        layers = {name: LayerRanks.model_validate(layer) for name, layer in (outcome.layers or {}).items()}
        macs, params = outcome.macs, outcome.params
    else:
        layers = layers_of(table.picked(trial.proposal.choices), table.convs, study.space.stabilise)
        macs, params = table.macs(trial.proposal.choices), table.params(trial.proposal.choices)
    metrics: dict[str, float | int | None] = {f"dense_{k}": v for k, v in setting.dense.items() if k not in _COSTS}
    if outcome is not None:
        metrics |= {
            "accuracy": outcome.accuracy,
            "accuracy_search": outcome.accuracy_search,
            "loss": outcome.loss,
            **({} if outcome.latency_ms is None else {"latency_ms": outcome.latency_ms}),
            **({} if outcome.bit_operations is None else {"bit_operations": outcome.bit_operations}),
            **({} if outcome.weight_bytes is None else {"weight_bytes": outcome.weight_bytes}),
            "report_images": outcome.report_images,
        }
    return RankMap(
        model=setting.model,
        layers=layers,
        macs=macs,
        params=params,
        dense_macs=table.dense_macs,
        dense_params=table.dense_params,
        metrics=metrics,
        widths=_widths(study.space),
        provenance=_provenance(study, trial),
    )


def _widths(space: Space) -> WidthsRecord | None:
    return None if space.quantise is None else WidthsRecord(**space.quantise.model_dump(exclude={"weight_bits"}))


_COSTS = ("macs", "params")


def _provenance(study: Study, trial: Trial) -> dict[str, Any]:
    space, outcome = study.space, trial.outcome
    return {
        "study": study.name,
        "trial": trial.number,
        "origin": trial.proposal.origin,
        **({"funnel": trial.proposal.settings} if trial.proposal.funnel else {}),
        **({"fidelity": trial.proposal.fidelity} if trial.proposal.fidelity < 1 else {}),
        "seed": space.seed,
        "data": space.data.model_dump(mode="json"),
        "batch_images": space.evaluation.batch_images,
        "cpus_per_trial": space.resources.threads,
        "gpus_per_trial": space.resources.gpus_per_trial,
        "evaluation": space.evaluation.model_dump(mode="json"),
        # A funnel run's history stays in the study.
        "details": {} if outcome is None else {k: v for k, v in outcome.details.items() if k != "history"},
        "versions": dict(study.setting.versions),
    }


def _within_latency(study: Study, front: list[Trial], ratio: float) -> Trial:
    """The most accurate of the front within a share of the dense latency, of equal ones the fastest."""
    timing = study.setting.table.timing
    timed = [(t, ms) for t in front if (ms := _outcome(t).latency_ms) is not None]
    if timing is None or not timed:
        raise BudgetError(
            f"the trials of {study.name} must have a latency, found none. Search with a `latency` section, or take "
            "another rule."
        )
    fit = [(t, ms) for t, ms in timed if ms <= ratio * timing.dense_ms * (1 + 1e-12)]
    if not fit:
        least = min(ms for _, ms in timed)
        raise BudgetError(
            f"a trial must take at most {ratio * timing.dense_ms:.4g} ms ({ratio:.3f} of dense), the fastest of the "
            f"front takes {least:.4g} ({least / timing.dense_ms:.3f}). Allow more or go on."
        )
    return max(fit, key=lambda pair: (_outcome(pair[0]).accuracy_search, -pair[1]))[0]


def choose(
    study: Study,
    *,
    max_macs_ratio: float | None = None,
    max_gmacs: float | None = None,
    max_latency_ratio: float | None = None,
    max_drop: float | None = None,
    knee_point: bool = False,
    trial: int | None = None,
    trials: list[Trial] | None = None,
) -> Trial:
    """The trial that a rule picks; exactly one rule is given.

    Args:
        study: the search.
        max_macs_ratio: the most accurate with at most this share of the dense MACs.
        max_gmacs: the most accurate with at most so many GMACs.
        max_latency_ratio: the most accurate with at most this share of the dense network's predicted latency.
        max_drop: the cheapest that loses at most so many percentage points.
        knee_point: the point of the front furthest below the line through its ends.
        trial: the trial of this number.
        trials: those to pick from, where they have been read already; for all rules but the last the front will do.

    Accuracies are those on the search images: the report images choose nothing.

    Raises:
        BudgetError: no trial fits; the message names the nearest.
    """
    if trial is not None:
        known = study.trials() if trials is None else trials
        found = next((t for t in known if t.number == trial), None)
        if found is None or found.state != "COMPLETE":
            state = "there is none" if found is None else f"its state is {found.state} ({found.reason})"
            raise BudgetError(
                f"trial {trial} must be a complete trial of {study.name}: {state}. See `ranksearch trials`."
            )
        return found
    front = study.front_trials(trials)
    if not front:
        raise BudgetError(
            f"the front of {study.name} has no point yet. See `ranksearch trials {study.name}` for reasons."
        )
    if knee_point:
        return front[knee([_cost_and_quality(t) for t in front])]
    dense = study.setting.dense
    if max_drop is not None:
        least = dense["accuracy_search"] - max_drop / 100
        fit = [t for t in front if _outcome(t).accuracy_search >= least - 1e-12]
        if not fit:
            best = max(_outcome(t).accuracy_search for t in front)
            raise BudgetError(
                f"a trial must lose at most {max_drop} points, the best of the front loses "
                f"{100 * (dense['accuracy_search'] - best):.2f}. Allow more, or `ranksearch resume` with more trials."
            )
        return min(fit, key=lambda t: (_outcome(t).macs, t.number))
    if max_latency_ratio is not None:
        return _within_latency(study, front, max_latency_ratio)
    limit = (max_gmacs or 0.0) * 1e9 if max_macs_ratio is None else max_macs_ratio * dense["macs"]
    best_fit = best_within(front, limit)
    if best_fit is None:
        least_macs = min(_outcome(t).macs for t in front)
        raise BudgetError(
            f"a trial must have at most {limit / 1e9:.4f} GMACs ({limit / dense['macs']:.3f} of dense), the cheapest "
            f"of the front has {least_macs / 1e9:.4f} ({least_macs / dense['macs']:.3f}). Allow more or go on."
        )
    return best_fit


def _cost_and_quality(trial: Trial) -> tuple[float, float]:
    return float(_outcome(trial).macs), -_outcome(trial).accuracy_search


def _outcome(trial: Trial) -> Outcome:
    return cast(Outcome, trial.outcome)


def save_compressed(
    state: Mapping[str, Any], rank_map: RankMap, weights: Path, map_file: Path | None = None
) -> RankMap:
    """Write the compressed weights with their rank map inside; returns the map that names the file.

    Args:
        state: the compressed network's state dict.
        rank_map: its map.
        weights: file to write, whole or not at all.
        map_file: where the map itself will be saved; the weights are named relative to its folder.

    Raises:
        RankMapError: the file cannot be written.
    """
    bare = rank_map.model_copy(update={"weights": None})
    try:
        store(state, weights, {_METADATA: bare.model_dump_json()})
        digest = file_hash(weights)
    except (OSError, SafetensorError) as error:
        raise RankMapError(
            f"cannot write the weights {weights}: {error}. Check the folder and the space left."
        ) from error
    folder = (map_file or weights).resolve().parent
    target = weights.resolve()
    file = str(target.relative_to(folder)) if target.is_relative_to(folder) else str(target)
    return rank_map.model_copy(update={"weights": WeightsRecord(file=file, sha256=digest)})


def read_compressed(path: Path) -> tuple[RankMap, Path | None]:
    """The rank map in a JSON or a weights file, and the weights' file if there is one.

    Raises:
        RankMapError: it cannot be read, or the weights are not those that the map names.
    """
    if path.suffix == ".json":
        rank_map = RankMap.load(path)
        if rank_map.weights is None:
            return rank_map, None
        weights = path.resolve().parent / rank_map.weights.file
        if ".." in Path(rank_map.weights.file).parts:
            raise RankMapError(
                f"the weights of a rank map must lie in its folder or at an absolute path, {path} names "
                f"{rank_map.weights.file}. Bring them along, or export again."
            )
        if not weights.is_file():
            raise RankMapError(
                f"the weights {weights} that {path} names must exist. Bring them along, or export again."
            )
        if file_hash(weights) != rank_map.weights.sha256:
            raise RankMapError(
                f"the weights {weights} must be those that {path} names, their hash differs. Export again."
            )
        return rank_map, weights
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
    except (OSError, SafetensorError) as error:
        raise RankMapError(f"cannot read {path}: {error}. Give a rank map (.json) or compressed weights.") from error
    if text is None:
        raise RankMapError(f"{path} must hold a rank map, it has none. Give weights that ranksearch compressed.")
    return RankMap.parse(text, str(path)), path


def load_compressed(rank_map: RankMap, dense: nn.Module, weights: Path) -> nn.Module:
    """The compressed network with its weights; ``dense`` gives the structure and is untouched.

    Raises:
        RankMapError: the map is for another model, or the weights do not fit it.
    """
    model = skeleton(rank_map, dense)
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RankMapError(f"the weights {weights} must fit the rank map: {reason}. Export them again.") from error
    return model.eval()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
