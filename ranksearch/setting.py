"""What a search settled before its first trial, as frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ranksearch.config import recorded_space
from ranksearch.rankmap import ModelRecord
from ranksearch.space import Space
from ranksearch.table import PriceTable

_SAME_LOSS = 2e-3
"""Share by which the dense network's loss may differ on another machine; a tenth of it where the loss is near 0."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a search settled before its first trial; kept with the study, so that nothing else is needed to read it."""

    space: Space
    table: PriceTable
    model: ModelRecord
    dense: Mapping[str, float]
    """Of the dense network: ``accuracy`` (report images), ``accuracy_search``, ``loss``, ``macs``, ``params``,
    and ``latency_ms`` where latencies were measured."""
    left_dense: Mapping[str, str]
    """Layer to the reason why it is not searched."""
    classes: int
    data_digest: str
    """Hash of the images and labels; a study is continued on the same ones only."""
    dtype: str
    """Arithmetic of fine-tuning."""
    versions: Mapping[str, str]
    priced_seconds: float = field(default=0.0, compare=False)
    """Wall time in which the prices that the strategy reads were measured, once, for the cache maybe."""

    def loses(self, loss: float) -> bool:
        """Whether this is the dense network's loss on the search images, but for the rounding of another machine.

        It tells what hashes of weights and images do not: the forward pass, and how its inputs are normalised.
        """
        return math.isclose(loss, self.dense["loss"], rel_tol=_SAME_LOSS, abs_tol=_SAME_LOSS / 10)

    def comparable(self, other: Setting) -> bool:
        """Whether the two searched the same network on the same data, so that their accuracies can be compared."""
        mine, its = (
            (one.model.weights_sha256, one.data_digest, one.model.name, one.dense["macs"]) for one in (self, other)
        )
        return mine == its and self.loses(other.dense["loss"])

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; ``from_json`` reads it back."""
        return {
            "space": self.space.model_dump(mode="json"),
            "table": self.table.to_json(),
            "model": self.model.model_dump(mode="json"),
            "dense": dict(self.dense),
            "left_dense": dict(self.left_dense),
            "classes": self.classes,
            "data_digest": self.data_digest,
            "dtype": self.dtype,
            "versions": dict(self.versions),
            "priced_seconds": self.priced_seconds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Setting:
        """The setting written by ``to_json``."""
        return cls(
            space=recorded_space(data["space"]),
            table=PriceTable.from_json(data["table"]),
            model=ModelRecord.model_validate(data["model"]),
            **{key: data[key] for key in ("dense", "left_dense", "classes", "data_digest", "dtype", "versions")},
            priced_seconds=data.get("priced_seconds", 0.0),
        )
