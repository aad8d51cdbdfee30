"""A worker's share of its GPU's memory: a limit while others work beside it, all of it while it works alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray


def place() -> str:
    """The machine that this worker is on, and its GPUs: whoever is there too shares their memory."""
    gpus = ",".join(str(gpu) for gpu in sorted(map(str, ray.get_gpu_ids())))
    return f"{ray.get_runtime_context().get_node_id()}/{gpus}"


def limit(share: float) -> None:
    """Let this process take no more of its GPU's memory than its share: beyond it, allocation fails here alone."""
    if _divided(share):
        import torch

        torch.cuda.set_per_process_memory_fraction(share)


@contextmanager
def whole(share: float) -> Iterator[None]:
    """All of the GPU's memory for the block."""
    if _divided(share):
        import torch

        torch.cuda.set_per_process_memory_fraction(1.0)
    try:
        yield
    finally:
        release(share)
        limit(share)


def release(share: float) -> None:
    """Give what is cached back to the GPU, for those who share it."""
    if _divided(share):
        import torch

        torch.cuda.empty_cache()


def _divided(share: float) -> bool:
    """Whether several processes share a GPU that is there; Ray's GPUs may be declared only."""
    if not 0 < share < 1:
        return False
    import torch  # seconds of imports, so only where GPUs are asked for

    return torch.cuda.is_available()
