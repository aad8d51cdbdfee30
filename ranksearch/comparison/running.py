"""Running a comparison: its searches one after the other, each resumable, then one training of all that they chose."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path

from ranksearch.comparison.result import Choice, Comparison, Run, choice_of, chosen, run_of
from ranksearch.comparison.variants import (
    TRAINED,
    Variant,
    check_comparable,
    check_same,
    check_variant,
    given_maps,
    variants_of,
)
from ranksearch.driver import Watch
from ranksearch.engine.resources import check
from ranksearch.errors import PriceError, Problem, RankMapError, SpaceError, TrackingError
from ranksearch.export import rank_map_of
from ranksearch.launch import ended, read_space, resume, search
from ranksearch.location import located
from ranksearch.preparation import Notify, silent
from ranksearch.rankmap import RankMap
from ranksearch.space import Space
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.table import FLOAT_BITS
from ranksearch.trial import Outcome

_logger = logging.getLogger("ranksearch")

Began = Callable[[str, int, int], None]
"""Told the name of a study before it is searched, which one it is (from 1), and of how many."""


def compare(
    space: Space | str | Path,
    strategies: Sequence[str],
    *,
    seeds: int | Sequence[int] = 3,
    targets: Sequence[float] = (0.7, 0.5, 0.35),
    fine_tune_steps: int = 0,
    maps: Mapping[str, Sequence[str | Path]] | None = None,
    settings: Sequence[str] = (),
    storage: str | Path | None = None,
    name: str | None = None,
    notify: Notify = silent,
    watch: Watch | None = None,
    began: Began | None = None,
) -> Comparison:
    """Compare strategies on one network, each with the space's budget of trials; called again, it continues.

    Args:
        space: the search space, or its YAML file.
        strategies: names of strategies; ``optuna:tpe`` names a sampler too.
        seeds: the seeds, or how many, from the space's on.
        targets: shares of the dense network's MACs at which accuracies are compared.
        fine_tune_steps: steps of training that every chosen rank map gets in the end; 0 trains none.
        maps: rank maps made elsewhere: the name of their row to JSON files.
        settings: changes as ``dotted.key=value``, as ``--set`` takes them.
        storage: where studies live; ``RANKSEARCH_STORAGE`` or ``~/.ranksearch``.
        name: what the studies' names begin with, ``<name>-<strategy>-<seed>``; the space's by default.
        notify: told what is being prepared.
        watch: told of every trial that ended.
        began: told of every study that is searched.

    Raises:
        SpaceError: names that are unknown, all of them at once; or no strategy can run on this space.
        StudyError: a study of this comparison was made from another space.
        RanksearchError: as :func:`ranksearch.search`; but a strategy alone that cannot run is told in the result.
        KeyboardInterrupt: after the study that ran has been left in good order.
    """
    store = Store(storage)
    space, base = read_space(space, settings)
    space = located(space, base)
    check(space.resources)
    name = name or space.name or "comparison"
    store.folder_of(name)
    numbers = tuple(range(space.seed, space.seed + seeds) if isinstance(seeds, int) else seeds)
    aims = tuple(sorted(set(targets), reverse=True))
    _check_numbers(numbers, aims, fine_tune_steps)
    folder = store.folder / "comparisons" / name
    files = {label: _copied(paths, folder) for label, paths in (maps or {}).items()}
    work = _Work(
        store=store, name=name, space=space, targets=aims, steps=fine_tune_steps, folder=folder, notify=notify,
        watch=watch, began=began, variants=variants_of(space, strategies, files), seeds=numbers,
    )  # fmt: skip
    work.check()
    runs = [run for seed in numbers for run in work.seed(seed)]
    if not runs:
        raise next(iter(work.failures.values()))
    found = Comparison(
        name=name,
        strategies=tuple(variant.label for variant in work.variants),
        seeds=numbers,
        targets=aims,
        fine_tune_steps=fine_tune_steps,
        runs=tuple(runs),
        failures={label: " ".join(str(error).split()) for label, error in work.failures.items()},
    )
    if space.tracking.enabled:
        _record(found, space, store, work.uids)
    return found


def _record(found: Comparison, space: Space, store: Store, uids: Sequence[str]) -> None:
    """Write the result into MLflow; where that fails the result is not lost, and a later call writes it."""
    from ranksearch.comparison.pictures import comparison_html, comparison_png
    from ranksearch.tracking import record_comparison

    documents: dict[str, str | bytes] = {
        "comparison.csv": found.frame().to_csv(index=False),
        "curves.csv": found.curves().to_csv(index=False),
        "comparison.json": json.dumps(found.to_json(), indent=2, allow_nan=False),
        "comparison.html": comparison_html(found),
        "comparison.png": comparison_png(found),
    }
    tags = {"model": space.model.name, "strategies": ", ".join(found.strategies)}
    try:
        record_comparison(
            space.tracking, store.folder, name=found.name, studies=uids, metrics=found.metrics(), tags=tags,
            documents=documents,
        )  # fmt: skip
    except TrackingError as error:
        _logger.warning("MLflow lacks the comparison %s: %s Compare again to add it.", found.name, error)


def _check_numbers(seeds: Sequence[int], targets: Sequence[float], steps: int) -> None:
    rules = {
        "seeds": (bool(seeds) and min(seeds) >= 0 and len(set(seeds)) == len(seeds), "different, from 0 on", seeds),
        "targets": (bool(targets) and 0 < targets[-1] <= targets[0] <= 1, "over 0 and at most 1", targets),
        "fine_tune_steps": (steps >= 0, "at least 0", steps),
    }
    problems = [
        Problem(address=key, rule=f"{key} must be {rule}", value=str(value), remedy="Correct them.")
        for key, (kept, rule, value) in rules.items()
        if not kept
    ]
    if problems:
        raise SpaceError("comparison", problems)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """The searches of a comparison; ``failures`` and ``uids`` fill as they run."""

    store: Store
    name: str
    space: Space
    variants: list[Variant]
    seeds: Sequence[int]
    targets: tuple[float, ...]
    steps: int
    folder: Path
    """Where the rank maps are kept that are evaluated."""
    notify: Notify
    watch: Watch | None
    began: Began | None
    failures: dict[str, SpaceError | PriceError] = field(default_factory=dict)
    """Variant to the error with which it could not search."""
    uids: list[str] = field(default_factory=list)
    """Of the studies that searched."""

    def check(self) -> None:
        """Check the names of all studies, and that those that exist are of this space, before anything is run."""
        known = set(self.store.names())
        for seed in self.seeds:
            for variant in self.variants:
                name = self._study_name(variant.slug, seed)
                self.store.folder_of(name)
                if name in known:
                    check_same(self.store.open(name), variant.space(self.space, seed, self.targets))
            if self.steps:
                for study in self._trained(seed):
                    check_same(study, self._training(study.space.strategy.seed_maps, seed))

    def seed(self, seed: int) -> list[Run]:
        """All searches of one seed, and the training of what they chose."""
        studies: dict[str, Study] = {}
        place = self.seeds.index(seed) * (len(self.variants) + bool(self.steps))
        for i, variant in enumerate(self.variants):
            if variant.label not in self.failures:
                wanted = variant.space(self.space, seed, self.targets)
                try:
                    check_variant(wanted)
                    studies[variant.label] = self._searched(self._study_name(variant.slug, seed), wanted, place + i)
                    check_comparable(list(studies.values()))
                except (SpaceError, PriceError) as error:
                    self.failures[variant.label] = error
        self.uids.extend(study.uid for study in studies.values())
        after = self._train(list(studies.values()), seed, place + len(self.variants)) if self.steps else {}
        return [run_of(label, seed, study, self.targets, after) for label, study in studies.items()]

    def _searched(self, name: str, wanted: Space, place: int) -> Study:
        """The finished study of this name: left as it is, continued or begun."""
        exists, storage = name in self.store.names(), self.store.url or self.store.folder
        trials = wanted.budget.trials
        if exists and ended(study := self.store.open(name), trials):
            return study
        if self.began is not None:
            self.began(name, place + 1, len(self.seeds) * (len(self.variants) + bool(self.steps)))
        if exists:
            return resume(name, storage=storage, trials=trials, notify=self.notify, watch=self.watch)
        return search(wanted, storage=storage, name=name, notify=self.notify, watch=self.watch)

    def _train(self, studies: Sequence[Study], seed: int, place: int) -> dict[Choice, Outcome]:
        """Fine-tune every rank map that was chosen at a target, each once; returns their outcomes."""
        picked = [(study, trial) for study in studies for target in self.targets if (trial := chosen(study, target))]
        wanted = {choice_of(study, trial): rank_map_of(study, trial) for study, trial in picked}
        done = [self._searched(study.name, study.space, place) for study in self._trained(seed)]
        check_comparable([*studies, *done])
        known = {choice_of(study, trial) for study in done for trial in study.trials()}
        missing = [_kept(rank_map, self.folder) for choice, rank_map in wanted.items() if choice not in known]
        if missing:
            taken = set(self.store.names())
            name = next(one for one in self._trained_names(seed) if one not in taken)
            done.append(self._searched(name, self._training([str(file) for file in missing], seed), place))
        return {
            choice_of(study, trial): trial.outcome
            for study in done
            for trial in study.trials()
            if trial.outcome is not None
        }

    def _trained(self, seed: int) -> list[Study]:
        """The studies of this seed's training: one, and one more each time that rank maps were chosen later."""
        known = set(self.store.names())
        return [self.store.open(name) for name in takewhile(known.__contains__, self._trained_names(seed))]

    def _trained_names(self, seed: int) -> Iterator[str]:
        base = self._study_name(TRAINED, seed)
        return (base if i == 1 else f"{base}-{i}" for i in count(1))

    def _training(self, files: Sequence[str], seed: int) -> Space:
        """The space under which rank maps are trained."""
        tuned = self.space.evaluation.fine_tune.model_copy(update={"steps": self.steps, "epochs": None})
        evaluation = self.space.evaluation.model_copy(update={"fine_tune": tuned, "report": "all"})
        spec = given_maps(self.space.strategy, [Path(file) for file in files])
        variant = Variant(label=TRAINED, spec=spec, trials=len(files))
        return variant.space(self.space, seed, ()).model_copy(update={"evaluation": evaluation})

    def _study_name(self, slug: str, seed: int) -> str:
        return f"{self.name}-{slug}-{seed}"


def _copied(paths: Sequence[str | Path], folder: Path) -> list[Path]:
    """The user's rank maps where they stay as they are now; equal ones once."""
    return list(dict.fromkeys(_kept(RankMap.load(path), folder) for path in paths))


def _kept(rank_map: RankMap, folder: Path) -> Path:
    """Write a rank map under the hash of its layers, formats and ranks, so that a study always finds what it began."""
    layers = {
        name: (layer.format, layer.ranks, *([layer.bits] if layer.bits < FLOAT_BITS else ()))
        for name, layer in rank_map.layers.items()
    }
    digest = hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:16]}.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RankMapError(f"cannot make the folder {folder}: {error}. Check the space left.") from error
        rank_map.save(path)
    return path
