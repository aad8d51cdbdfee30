"""Running a search: strategy, engine, study and tracking wired together; the public Python entry."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from math import inf, log
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from ranksearch.config import literal_passwords, load_space
from ranksearch.driver import Driver, Watch, finished, history, task_of
from ranksearch.engine import Factory, build_engine, build_map
from ranksearch.engine.resources import check
from ranksearch.errors import Problem, SpaceError, StudyError, TakenOver
from ranksearch.evaluation import Bench, Evaluator
from ranksearch.factors import threads
from ranksearch.latency import LatencyTable, checked
from ranksearch.location import located
from ranksearch.preparation import (
    Network,
    Notify,
    check_dense,
    factorise,
    latencies_of,
    make_bench,
    read_network,
    settle,
    silent,
    with_rank_multiple,
)
from ranksearch.pricing import Factors, price, unknown_formats
from ranksearch.rankmap import RankMap
from ranksearch.setting import Setting
from ranksearch.space import Space
from ranksearch.storage import Store
from ranksearch.strategies import Strategy, Terms, build_strategy
from ranksearch.study import Study
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, Outcome, Trial

if TYPE_CHECKING:
    from ranksearch.engine.meter import Meter
    from ranksearch.tracking import Tracker


def search(
    space: Space | str | Path,
    *,
    settings: Sequence[str] = (),
    storage: str | Path | None = None,
    name: str | None = None,
    notify: Notify = silent,
    named: Callable[[str], None] | None = None,
    watch: Watch | None = None,
) -> Study:
    """Search the ranks of a network; returns the study with its trials and its front.

    Args:
        space: the search space, or its YAML file.
        settings: changes as ``dotted.key=value``, as ``--set`` takes them.
        storage: where studies live: a folder or a database's URL; ``RANKSEARCH_STORAGE`` or ``~/.ranksearch``.
        name: of the study; must be new. By default the space's, numbered where it is taken.
        notify: told what is being prepared.
        named: told the study's name before anything is prepared.
        watch: told of every trial that ended.

    Raises:
        RanksearchError: a mistake in the space, the network, the data or the storage; nothing is written then.
        KeyboardInterrupt: after the study has been left in good order.
    """
    store = Store(storage)
    space, base = read_space(space, settings)
    space = located(space, base)
    check(space.resources)
    with ExitStack() as stack, store.explained():
        with store.reserved(name or space.name or "search", exact=name is not None) as name:
            if named is not None:
                named(name)
            with threads(_all_threads()):
                network, factors, failed = _factorised(space, store, notify)
                setting = settle(network, factors, failed, store.cache, notify, build_map(space.resources))
                choices = seed_choices(setting)
            tracker = stack.enter_context(_tracking(space, store.folder))
            study = store.create(name, setting)
        with study.driving():
            with threads(_all_threads()):
                bench = make_bench(network, factors, setting, study.weights_folder, store.cache, notify)
            drive(study, bench, choices, tracker, notify, watch)
    return study


def _factorised(
    space: Space, store: Store, notify: Notify, *, timed: bool = False
) -> tuple[Network, Factors, dict[str, str]]:
    """The network of a new search, its layers' prepared factors, and the layers that have none with the reason."""
    network = with_rank_multiple(read_network(space, store.cache, notify), store.cache, notify, timed=timed)
    return network, *factorise(network, store.cache, notify)


def read_space(space: Space | str | Path, settings: Sequence[str] = ()) -> tuple[Space, Path | None]:
    """A space, or that of a YAML file with the file's folder, all of its names checked.

    Raises:
        SpaceError: naming every problem at once, unknown formats, strategies and samplers among them.
    """
    if not isinstance(space, Space):
        return load_space(space, settings, further_problems), Path(space).resolve().parent
    if settings:
        raise ValueError("settings change a YAML file; give the space with its values instead")
    if problems := further_problems(space):
        raise SpaceError(space.name or "space", problems)
    return space, None


def further_problems(space: Space) -> list[Problem]:
    """What is wrong with a space beyond types and ranges: unknown names, and passwords."""
    problems = [*unknown_formats(space), *literal_passwords(space)]
    try:
        _strategy(space, ())
    except SpaceError as error:
        problems += error.problems
    return problems


def resume(
    name: str,
    *,
    storage: str | Path | None = None,
    trials: int | None = None,
    notify: Notify = silent,
    watch: Watch | None = None,
) -> Study:
    """Continue a stopped or killed search; with a larger ``trials``, extend a finished one.

    A finished search is left as it is; MLflow is given what it lacks.

    Raises:
        RanksearchError: no such study, or its network or data cannot be read or have changed.
    """
    store = Store(storage)
    study = store.open(name)
    with study.driving(), store.explained():
        study.recover()
        if trials is not None:
            study.extend(trials)
        bench, choices = None, []
        if not finished(study):
            check(study.space.resources)
            _, bench = bench_of(study, store, notify)
            choices = seed_choices(study.setting)
        with _tracking(study.space, store.folder) as tracker:
            drive(study, bench, choices, tracker, notify, watch)
    return study


def ended(study: Study, trials: int) -> bool:
    """Whether ``resume`` with so many trials would try nothing: all are made, or the strategy has no further proposal.

    Raises:
        RanksearchError: the strategy cannot run on this study.
    """
    latest = {trial.index: trial for trial in study.trials()}
    if any(trial.state == "RUNNING" or trial.retry for trial in latest.values()):
        return False
    if len(latest) >= trials:
        return True
    strategy = _strategy(study.space, seed_choices(study.setting))
    return strategy.propose(study.setting.table, history(latest, study.space.objectives)) is DONE


def open_study(name: str, *, storage: str | Path | None = None) -> Study:
    """The study of this name, to read; raises :class:`StudyError` where there is none."""
    return Store(storage).open(name)


def inspect(
    space: Space | str | Path,
    *,
    settings: Sequence[str] = (),
    storage: str | Path | None = None,
    notify: Notify = silent,
) -> Setting:
    """What a search would start from: the layers, the candidates, the dense network's scores; no trial is run.

    No price is measured either, which may take minutes and nothing here shows. Only the built-in digits network is
    trained, where that was not done before.
    """
    space, base = read_space(space, settings)
    store = Store(storage)
    space = located(space, base)
    with threads(_all_threads()):
        network, factors, failed = _factorised(space, store, notify)
        setting = settle(network, factors, failed, store.cache, notify, priced=False)
        seed_choices(setting)
        return setting


def time_candidates(
    space: Space | str | Path,
    *,
    settings: Sequence[str] = (),
    networks: int = 0,
    storage: str | Path | None = None,
    notify: Notify = silent,
) -> tuple[LatencyTable, list[tuple[float, float, float]]]:
    """Latencies of all candidates of a space on this machine, whether its search asks for them or not.

    Args:
        space: the search space, or its YAML file.
        settings: changes as ``--set`` takes them.
        networks: random rank maps whose networks are built and timed too.
        storage: where the cache is.
        notify: told what is being done.

    Returns:
        the latencies; and of the random rank maps, by share of the MACs, the predicted and measured milliseconds.

    Raises:
        LatencyError: they cannot be measured; other errors as :func:`search` raises them.
    """
    space, base = read_space(space, settings)
    store = Store(storage)
    space = located(space, base)
    with threads(_all_threads()):
        network, factors, _ = _factorised(space, store, notify, timed=True)
        table, _ = price(network.space, network.selection, factors)
        found = latencies_of(network, table, store.cache, notify)
    rng = Random(space.seed)
    maps = [[rng.randrange(len(layer.candidates)) for layer in table.layers] for _ in range(networks)]
    return found, checked(network.model, network.data.input_shape, table, found, maps, notify) if maps else []


def bench_of(study: Study, store: Store, notify: Notify = silent) -> tuple[Network, Bench]:
    """The bench of a study that exists: prepared again, mostly from the cache, under the study's own setting."""
    with threads(_all_threads()):
        network = read_network(study.space, store.cache, notify)
        if network.record.weights_sha256 != study.setting.model.weights_sha256:
            raise StudyError(
                f"the network must be that of the study, the weights in {network.record.weights} have changed since. "
                "Restore them, or search again."
            )
        check_dense(network, study.setting, store.cache)
        factors, _ = factorise(network, store.cache, notify)
        return network, make_bench(network, factors, study.setting, study.weights_folder, store.cache, notify)


def rebuild(study: Study, trial: Trial, store: Store, folder: Path, notify: Notify = silent) -> Outcome:
    """Evaluate a trial again from its seed: the same network bit for bit, its weights kept in ``folder``."""
    _, bench = bench_of(study, store, notify)
    notify("building the trial again", 0, 1)
    bench = replace(bench, weights_folder=folder, checkpoints_folder=folder)
    return Evaluator(bench)(replace(task_of(study, trial, ()), keep=True))


def _all_threads() -> int:
    return os.cpu_count() or 1


def _strategy(space: Space, choices: Sequence[tuple[int, ...]], setting: Setting | None = None) -> Strategy:
    """The space's strategy; with the setting, once there is one, for the limits that come from the dense network."""
    budget = space.budget
    known: dict[str, float] = {}
    if setting is not None:
        known["worst_loss"] = log(max(2, setting.classes))
        # On rungs candidates are seen before the training that may make up for a drop.
        if budget.max_drop is not None and not space.strategy.rungs:
            known["least_accuracy"] = max(0.0, setting.dense["accuracy_search"] - budget.max_drop / 100)
    terms = Terms(
        seed=space.seed,
        objectives=tuple(space.objectives),
        targets=tuple(budget.targets),
        max_macs_ratio=budget.max_macs_ratio or inf,
        max_latency_ratio=budget.max_latency_ratio or inf,
        formats=tuple(space.formats),
        **known,
    )
    return build_strategy(space.strategy, terms, seed_choices=choices)


def seed_choices(setting: Setting) -> list[tuple[int, ...]]:
    """The user's rank maps as choices of the price table: per layer the nearest candidate of the map's format.

    Raises:
        RankMapError: a map cannot be read.
        SpaceError: a map names layers that are not searched.
    """
    found, problems = [], []
    for i, path in enumerate(setting.space.strategy.seed_maps):
        rank_map = RankMap.load(path)
        strangers = [name for name in rank_map.layers if name not in setting.table.convs]
        if strangers:
            problems.append(
                Problem(
                    address=f"$.strategy.seed_maps[{i}]",
                    rule="a seed's layers must be among the searched ones",
                    value=", ".join(strangers[:4]),
                    remedy="Widen layers.include, or remove the map.",
                )
            )
        found.append(_nearest_choices(setting.table, rank_map))
    if problems:
        raise SpaceError(setting.space.name or "space", problems)
    return found


def _nearest_choices(table: PriceTable, rank_map: RankMap) -> tuple[int, ...]:
    choices = []
    for layer in table.layers:
        wanted = rank_map.layers.get(layer.name)
        same = [i for i, c in enumerate(layer.candidates) if wanted is not None and c.format == wanted.format]
        if wanted is None or not same:
            choices.append(len(layer.candidates) - 1)
        else:
            macs, ranks = wanted.macs, wanted.ranks
            choices.append(
                min(
                    same,
                    key=lambda i: (
                        layer.candidates[i].ranks != ranks,
                        abs(layer.candidates[i].macs - macs),
                        abs(layer.candidates[i].bits - wanted.bits),
                    ),
                )
            )
    return tuple(choices)


def drive(
    study: Study,
    factory: Factory | None,
    choices: Sequence[tuple[int, ...]],
    tracker: Tracker | None,
    notify: Notify,
    watch: Watch | None,
) -> None:
    """Drive the engine until the budget is used up, MLflow following; without evaluators only MLflow is brought on."""
    view = None
    if tracker is not None:
        from ranksearch.tracking import View

        view = View(study, tracker)
    meter = _meter(study)

    def ended(study: Study, trial: Trial) -> None:
        if meter is not None:
            meter.ended(trial)
        if watch is not None:
            watch(study, trial)

    driver = Driver(study, _strategy(study.space, choices, study.setting), view=view, watch=ended)
    status: Literal["FINISHED", "KILLED", "FAILED"] | None = "FAILED"
    try:
        if factory is not None:
            notify("starting the workers", 0, 1)
            build_engine(study.space.resources, meter).run(factory, driver)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except TakenOver:
        status = None  # all that is left to end, and to write, is the other driver's
        if tracker is not None:
            tracker.drop()
        raise
    finally:
        if status is not None:
            driver.stop()
            if view is not None:
                view.finish(status)


def _meter(study: Study) -> Meter | None:
    """What exports the search's figures: Ray's agents do, so none without Ray."""
    if study.space.resources.engine != "ray":
        return None
    from ranksearch.engine.meter import Meter

    return Meter(study)


def _tracking(space: Space, folder: Path) -> AbstractContextManager[Tracker | None]:
    """The connection to MLflow; none where the space wants none."""
    if not space.tracking.enabled:
        return nullcontext()
    from ranksearch.tracking import connected

    return connected(space, folder)
