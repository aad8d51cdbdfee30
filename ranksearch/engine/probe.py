"""A function on every machine of a Ray cluster, for checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ranksearch.engine import reason
from ranksearch.engine.cluster import cluster, quiet
from ranksearch.space import ResourcesSpec

_SECONDS = 120.0
"""How long a machine may take to answer: the first task there starts a process, which imports torch."""


def on_every_machine(spec: ResourcesSpec, work: Callable[[], Any]) -> dict[str, Any]:
    """What ``work`` returns on every machine of the cluster, by address; an exception where it raised, as its reason.

    Raises:
        EngineError: the cluster cannot be reached.
    """
    found: dict[str, Any] = {}
    with quiet(spec.address), cluster(spec):
        task: Any = ray.remote(num_cpus=0)(lambda: work())  # a plain function: Ray takes no partial
        asked = {}
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"]:
                place = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
                asked[f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"] = task.options(
                    scheduling_strategy=place
                ).remote()
        for name, answer in asked.items():
            try:
                found[name] = ray.get(answer, timeout=_SECONDS)
            except Exception as error:
                found[name] = RuntimeError(reason(error))
    return found
