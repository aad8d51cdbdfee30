"""How many workers a machine or a cluster holds, told before anything is prepared where that can be known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil, inf
from typing import NamedTuple

from ranksearch.errors import EngineError
from ranksearch.space import ResourcesSpec


class Node(NamedTuple):
    """One machine."""

    cpus: float
    gpus: float
    memory: float = inf
    """Bytes that Ray gives to tasks."""
    labels: Mapping[str, str] = {}


def check(spec: ResourcesSpec) -> None:
    """Whether this machine has what trials on it need; a cluster elsewhere is asked by the engine that joins it.

    Raises:
        EngineError: it has not.
    """
    if spec.address != "local" and spec.engine == "ray":
        return
    gpus = _gpus() if spec.gpus_per_trial else 0
    if spec.engine == "ray":
        # A Ray that is started here has no labels of ours.
        workers(spec, [Node(local_cpus(spec), gpus, _memory(), labels={})])
    elif spec.gpus_per_trial > gpus:
        raise EngineError(
            f"a trial needs {spec.gpus_per_trial:g} GPUs, and PyTorch finds {gpus} with CUDA on this machine. "
            "Search with --set resources.gpus_per_trial=0, or where there are GPUs."
        )


def local_cpus(spec: ResourcesSpec) -> int:
    """CPUs of a Ray that is started here: as many as there are, or as the workers asked for need together."""
    return max(ceil((spec.workers or 0) * spec.cpus_per_trial), os.cpu_count() or 1)


def workers(spec: ResourcesSpec, nodes: Sequence[Node]) -> int:
    """How many trials run at once: as asked, or as many as fit the machines; a trial has one machine's resources.

    Raises:
        EngineError: not even one fits, or fewer than asked for.
    """
    fitting = sum(_fitting(spec, node) for node in nodes)
    if fitting >= (spec.workers or 1):
        return spec.workers or fitting
    need = f"a trial needs {_needed(spec)}, and Ray has {_all_told(spec, nodes)}"
    if fitting:
        raise EngineError(
            f"{need}: {fitting} fit at once, found resources.workers={spec.workers}. "
            f"Lower it to {fitting}, or leave it out for as many as fit."
        )
    labelled = [node for node in nodes if _is_labelled(spec, node)]
    if nodes and not labelled:
        remedy = "Start machines with `ray start --labels`, or change resources.labels"
    elif spec.gpus_per_trial > max((node.gpus for node in nodes), default=0.0):
        remedy = "Search with --set resources.gpus_per_trial=0"
    elif spec.memory_bytes > max((node.memory for node in labelled), default=inf):
        remedy = "Lower resources.memory_gb_per_trial"
    else:
        remedy = "Lower resources.cpus_per_trial"
    raise EngineError(f"{need}: none fits. {remedy}, or search on larger machines.")


def check_team(spec: ResourcesSpec, nodes: Sequence[Node] | None = None) -> None:
    """Whether all the workers of a training run at once; without ``nodes`` this machine is asked, where it is meant.

    Raises:
        EngineError: they do not.
    """
    if nodes is None:
        if spec.address != "local":
            return
        nodes = [Node(os.cpu_count() or 1, _gpus() if spec.gpus_per_trial else 0)]
    fitting = sum(_fitting(spec, node) for node in nodes)
    if fitting >= (spec.workers or 1):
        return
    if fitting:
        remedy = f"{fitting} fit at once. Give --workers {fitting}, or train on more machines with --address"
    elif spec.gpus_per_trial > max((node.gpus for node in nodes), default=0.0):
        remedy = "none fits. Leave out --gpus-per-worker, or train where there are GPUs with --address"
    else:
        remedy = "none fits. Lower --threads, or train on larger machines with --address"
    raise EngineError(
        f"each worker of a training needs {_needed(spec)}, and Ray has {_all_told(spec, nodes)}: "
        f"found --workers {spec.workers}, {remedy}."
    )


def _fitting(spec: ResourcesSpec, node: Node) -> int:
    if not _is_labelled(spec, node):
        return 0
    fitting = _times(node.cpus, spec.cpus_per_trial)
    if spec.memory_bytes and node.memory < inf:
        fitting = min(fitting, int(node.memory // spec.memory_bytes))
    if spec.gpus_per_trial >= 1:
        return min(fitting, _times(node.gpus, spec.gpus_per_trial))
    if spec.gpus_per_trial > 0:
        # A share of a GPU cannot be put together from two.
        return min(fitting, int(node.gpus) * _times(1, spec.gpus_per_trial))
    return fitting


def _times(whole: float, share: float) -> int:
    """How often a share fits, in spite of its rounding."""
    return int(whole / share + 1e-9)


def _is_labelled(spec: ResourcesSpec, node: Node) -> bool:
    return all(node.labels.get(name) == value for name, value in spec.labels.items())


def _needed(spec: ResourcesSpec) -> str:
    memory = f", {spec.memory_gb_per_trial:g} GB of memory" if spec.memory_bytes else ""
    labels = f" on a machine labelled {_shown(spec.labels)}" if spec.labels else ""
    return f"{spec.cpus_per_trial:g} CPUs and {spec.gpus_per_trial:g} GPUs{memory}{labels}"


def _all_told(spec: ResourcesSpec, nodes: Sequence[Node]) -> str:
    """What all machines have."""
    kinds = Counter(_told(spec, node) for node in nodes)
    return " + ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()) or "no machine"


def _told(spec: ResourcesSpec, node: Node) -> str:
    """What a machine has of that which the space counts."""
    memory = f", {node.memory / 2**30:.1f} GB" if spec.memory_bytes and node.memory < inf else ""
    own = {name: node.labels[name] for name in spec.labels if name in node.labels}
    labels = f" ({_shown(own) or 'no such label'})" if spec.labels else ""
    return f"{node.cpus:g} CPUs and {node.gpus:g} GPUs{memory}{labels}"


def _shown(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def _memory() -> int:
    """Bytes of this machine; Ray, which keeps some for itself, tells the rest when it has started."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> int:
    import torch  # seconds of imports, so only where GPUs are asked for

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
