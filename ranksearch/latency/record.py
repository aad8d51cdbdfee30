"""What was measured of latencies, written to a file and read from it, on this machine or another."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ranksearch.conv import Conv
from ranksearch.errors import LatencyError

_VERSION = 2

Key = tuple[Conv, str, tuple[int, ...]]
"""Geometry of the dense layer, format and ranks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatencyTable:
    """What was measured on one device with one runtime; written to and read from JSON."""

    runtime: str
    batch_images: int
    threads: int
    device: str
    """Name of the processor or GPU."""
    dense_ms: float
    """Of the whole dense network."""
    scale: float
    """What a layer's gain alone is worth in a network: ``a`` above."""
    layers_ms: Mapping[Key, float]
    """Every candidate alone, the dense ones too."""
    checks: tuple[tuple[float, float, float], ...]
    """Of the networks that were built: share of the MACs, predicted and measured milliseconds. The first is dense."""
    versions: Mapping[str, str]
    rank_multiple: int = 1
    """That of the ranks that were timed."""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; ``from_json`` reads it back."""
        rows = [[conv.to_json(), form, list(ranks), ms] for (conv, form, ranks), ms in self.layers_ms.items()]
        plain = {
            name: getattr(self, name)
            for name in ("runtime", "batch_images", "threads", "device", "rank_multiple", "dense_ms", "scale")
        }
        return {
            "latency_table": _VERSION,
            **plain,
            "checks": [list(check) for check in self.checks],
            "versions": dict(self.versions),
            "layers_ms": rows,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The table written by ``to_json``; KeyError, TypeError or ValueError where it is none."""
        if data["latency_table"] != _VERSION:
            raise ValueError(f"version {data['latency_table']!r}")
        rows = {
            (Conv.from_json(conv), str(f), tuple(map(int, ranks))): float(ms)
            for conv, f, ranks, ms in data["layers_ms"]
        }
        if not all(ms > 0 for ms in (*rows.values(), float(data["dense_ms"]))):
            raise ValueError("latencies must be above 0")
        return cls(
            runtime=str(data["runtime"]),
            batch_images=int(data["batch_images"]),
            threads=int(data["threads"]),
            device=str(data["device"]),
            dense_ms=float(data["dense_ms"]),
            scale=float(data["scale"]),
            layers_ms=rows,
            checks=tuple((float(a), float(b), float(c)) for a, b, c in data["checks"]),
            versions={str(k): str(v) for k, v in data["versions"].items()},
            rank_multiple=int(data["rank_multiple"]),
        )

    def save(self, path: Path) -> None:
        """Write it; raises :class:`LatencyError` where that cannot be done."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            aside.write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            raise LatencyError(f"cannot write the latency table {path}: {error}. Name another file.") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it; raises :class:`LatencyError` where there is none."""
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise LatencyError(
                f"a latency table must be a file that `ranksearch latency` wrote, found {path} "
                f"({type(error).__name__}: {error}). Measure one on the target."
            ) from error
