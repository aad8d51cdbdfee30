"""A parallel ``map`` over Ray workers, which hold the function warm: it travels to each machine once."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import ActorPool

from ranksearch.engine import reason
from ranksearch.engine.cluster import carried, cluster, nodes, quiet
from ranksearch.engine.pool import Work, answer
from ranksearch.engine.resources import workers
from ranksearch.errors import EngineError
from ranksearch.secrecy import adopt
from ranksearch.space import ResourcesSpec


def over_actors(spec: ResourcesSpec) -> Callable[[Work, Iterable[Any]], Iterator[Any]]:
    """A ``map`` over as many workers as trials run at once; results come in the order of the items.

    An error of the function is raised here as it is. Ray is started, or connected to, for as long as it takes.

    Raises:
        EngineError: there are no workers to be had, or one died.
    """

    def run(work: Work, items: Iterable[Any]) -> Iterator[Any]:
        left = list(items)
        with quiet(spec.address), cluster(spec):
            count = min(workers(spec, nodes()), len(left))
            wanted: dict[str, Any] = {"num_cpus": spec.cpus_per_trial, "num_gpus": spec.gpus_per_trial}
            if spec.memory_bytes:
                wanted["memory"] = spec.memory_bytes
            if spec.labels:
                wanted["label_selector"] = dict(spec.labels)
            actor: Any = ray.remote(**wanted)(_Worker)
            held = ray.put(work)
            pool = ActorPool([actor.remote(held, carried()) for _ in range(count)])
            try:
                for content in pool.map(lambda worker, item: worker.answer.remote(item), left):
                    done, value = pickle.loads(content)
                    if not done:
                        raise value
                    yield value
            except RayError as error:
                raise EngineError(
                    f"a worker that measures prices died: {reason(error)}. "
                    "Where memory is short, lower resources.workers or strategy.price_images."
                ) from error

    return run


class _Worker:
    """Holds the function."""

    def __init__(self, work: Work, variables: dict[str, str]) -> None:
        adopt()
        os.environ.update(variables)
        self._work = work

    def answer(self, item: Any) -> bytes:
        """See :func:`ranksearch.engine.pool.answer`."""
        return answer(self._work, item)
