"""The rank map: a versioned JSON of layer to format and ranks, the product of a search; no tensors.

Alone it rebuilds the compressed network's structure and can decompose afresh; with its weights it is the compressed
network.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ranksearch.conv import Conv
from ranksearch.errors import RankMapError
from ranksearch.space import StabiliseSpec


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LayerRanks(_Record):
    """What one layer becomes; layers that are not in the map stay dense."""

    format: str
    ranks: tuple[int, ...]
    conv: dict[str, Any]
    """Geometry of the dense layer, as :meth:`ranksearch.conv.Conv.to_json` writes it."""
    macs: int
    """MACs per image of the compressed layer."""
    params: int
    stabilise: StabiliseSpec | None = None
    """How the factors were stabilised, where they are a fit; applied afresh, they are stabilised likewise."""
    bits: Literal[4, 8, 32] = 32
    """Of each weight; under 32 the weights are whole multiples of a scale for each output channel."""

    @property
    def geometry(self) -> Conv:
        """The dense layer's geometry."""
        return Conv.from_json(self.conv)


class ModelRecord(_Record):
    """The network that the map is for."""

    name: str
    options: dict[str, Any] = {}
    input_shape: tuple[int, int, int]
    """Channels, height, width of one image."""
    weights: str | None = None
    """Where the dense weights were read."""
    weights_sha256: str | None = None
    """Hash of the dense weights' tensors (names, shapes, values)."""


class WidthsRecord(_Record):
    """The widths of a network of few bits, beside those of its layers' factors."""

    other_bits: Literal[8, 32]
    """Of the weights of all other convolutions and linear layers."""
    activation_bits: Literal[8, 32]
    """Of what goes into every convolution and linear layer."""
    clip: Literal["mse", "percentile"]
    """How the ranges of activations are found."""


class WeightsRecord(_Record):
    """The file of the compressed weights."""

    file: str
    """Relative to the rank map's folder."""
    sha256: str


class RankMap(_Record):
    """Layer to format and ranks, with what they cost and where they come from."""

    schema_name: Literal["ranksearch/rank-map"] = "ranksearch/rank-map"
    version: Literal[1] = 1
    model: ModelRecord
    layers: dict[str, LayerRanks]
    macs: int
    """MACs per image of the whole compressed network."""
    params: int
    dense_macs: Annotated[int, Field(ge=1)]
    dense_params: int
    metrics: dict[str, float | int | None] = {}
    """What the search measured: accuracy (report images), accuracy_search, loss, ..."""
    widths: WidthsRecord | None = None
    """None where the network computes in float32."""
    weights: WeightsRecord | None = None
    provenance: dict[str, Any] = {}
    """Study, trial, seed, versions, the space's data section."""

    @property
    def macs_ratio(self) -> float:
        """MACs as a share of the dense network's."""
        return self.macs / self.dense_macs

    def save(self, path: str | Path) -> Path:
        """Write the map as JSON, whole or not at all."""
        path = Path(path)
        text = json.dumps(self.model_dump(mode="json"), indent=2)
        try:
            handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.chmod(part, 0o644)
                os.replace(part, path)
            finally:
                Path(part).unlink(missing_ok=True)
        except OSError as error:
            raise RankMapError(
                f"cannot write the rank map {path}: {error}. Check the folder and the space left."
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The map in the JSON file ``path``.

        Raises:
            RankMapError: the file cannot be read, or is not a rank map of this version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RankMapError(f"cannot read the rank map {path}: {error}. Check the path.") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str = "rank map") -> Self:
        """The map in a JSON text."""
        try:
            rank_map = cls.model_validate_json(text)
            for layer in rank_map.layers.values():
                _ = layer.geometry
        except ValidationError as error:
            first = error.errors()[0]
            place = "$" + "".join(f".{part}" for part in first["loc"])
            raise RankMapError(
                f"{source} is not a rank map of version 1: at {place}: {first['msg']}. Export it again."
            ) from error
        except (TypeError, ValueError) as error:
            raise RankMapError(f"{source} holds a layer with impossible geometry: {error}. Export it again.") from error
        return rank_map

    def apply(self, model: Any, statistics: Any = None) -> Any:
        """A compressed copy of the dense ``model``, decomposed afresh at these ranks; ``model`` is untouched.

        Args:
            model: a ``torch.nn.Module`` with the layers that the map names.
            statistics: layer to :class:`ranksearch.calibration.Statistics`, for activation-aware factors.

        Raises:
            RankMapError: the map is for another model.
        """
        from ranksearch.surgery import apply_rank_map

        return apply_rank_map(self, model, statistics)
