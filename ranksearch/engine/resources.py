"""How many workers a machine or a cluster holds, told before anything is prepared where that can be known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from ranksearch.errors import EngineError
from ranksearch.space import ResourcesSpec

Node = tuple[float, float]
"""CPUs and GPUs of one machine."""


def check(spec: ResourcesSpec) -> None:
    """Whether this machine has what trials on it need; a cluster elsewhere is asked by the engine that joins it.

    Raises:
        EngineError: it has not.
    """
    if spec.address != "local" and spec.engine == "ray":
        return
    gpus = _gpus() if spec.gpus_per_trial else 0
    if spec.engine == "ray":
        workers(spec, [(local_cpus(spec), gpus)])
    elif spec.gpus_per_trial > gpus:
        raise EngineError(
            f"a trial needs {spec.gpus_per_trial:g} GPUs, and PyTorch finds {gpus} with CUDA on this machine. "
            "Search with --set resources.gpus_per_trial=0, or where there are GPUs."
        )


def local_cpus(spec: ResourcesSpec) -> int:
    """CPUs of a Ray that is started here: as many as there are, or as the workers asked for need together."""
    return max((spec.workers or 0) * spec.cpus_per_trial, os.cpu_count() or 1)


def workers(spec: ResourcesSpec, nodes: Sequence[Node]) -> int:
    """How many trials run at once: as asked, or as many as fit the machines; a trial has one machine's resources.

    Raises:
        EngineError: not even one fits, or fewer than asked for.
    """
    fitting = sum(_fitting(spec, node) for node in nodes)
    if fitting >= (spec.workers or 1):
        return spec.workers or fitting
    kinds = Counter(f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in nodes)
    found = " + ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()) or "no machine"
    need = f"a trial needs {spec.cpus_per_trial} CPUs and {spec.gpus_per_trial:g} GPUs, and Ray has {found}"
    if fitting:
        raise EngineError(
            f"{need}: {fitting} fit at once, found resources.workers={spec.workers}. "
            f"Lower it to {fitting}, or leave it out for as many as fit."
        )
    lacking = spec.gpus_per_trial > max((gpus for _, gpus in nodes), default=0.0)
    remedy = "Search with --set resources.gpus_per_trial=0" if lacking else "Lower resources.cpus_per_trial"
    raise EngineError(f"{need}: none fits. {remedy}, or search on larger machines.")


def _fitting(spec: ResourcesSpec, node: Node) -> int:
    cpus, gpus = node
    fitting = int(cpus // spec.cpus_per_trial)
    if spec.gpus_per_trial >= 1:
        return min(fitting, int(gpus // spec.gpus_per_trial))
    if spec.gpus_per_trial > 0:
        # A share of a GPU cannot be put together from two.
        return min(fitting, int(gpus) * int(1 / spec.gpus_per_trial + 1e-9))
    return fitting


def _gpus() -> int:
    import torch  # seconds of imports, so only where GPUs are asked for

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
