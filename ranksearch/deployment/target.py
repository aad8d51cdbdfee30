"""What a file format of networks is: how one is written and run again; and the graph that such files are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ranksearch.errors import ExportError, first_line
from ranksearch.folding import Folded, folded
from ranksearch.rankmap import RankMap
from ranksearch.rounding import Range

Runner = Callable[[Tensor], Tensor]
"""Outputs ``(N, classes)`` of images ``(N, C, H, W)``, both float32 on the CPU."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A network to be written."""

    rank_map: RankMap
    network: nn.Module
    """The compressed network as it was built, in evaluation mode, float32, on the CPU."""
    structure: nn.Module
    """A network of the dense architecture, whatever its weights."""
    calibration: tuple[Tensor, ...] = ()
    """Batches of calibration images, for formats that are not exact."""
    ranges: Mapping[str, Range] | None = None
    """Of what goes into each module, where the file is to hold the whole numbers of a rank map with widths."""

    @cached_property
    def folded(self) -> Folded:
        """The network with less work, its weights contiguous, as files hold them; whole multiples stay such."""
        found = folded(self.network, self.rank_map.model.input_shape, merge=self.ranges is None)
        for parameter in found.model.parameters():
            parameter.data = parameter.data.contiguous()
        return found

    @cached_property
    def program(self) -> ExportedProgram:
        """The folded network as a graph; raises :class:`ExportError` as :func:`graph_of` does."""
        return graph_of(self.folded.model, self.rank_map)


def graph_of(model: nn.Module, rank_map: RankMap) -> ExportedProgram:
    """A network as a graph of torch's operators, for any number of images.

    Raises:
        ExportError: torch.export cannot follow it.
    """
    # Two images: torch.export takes the sizes 0 and 1 for constants.
    images = torch.zeros(2, *rank_map.model.input_shape)
    try:
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("images", min=1)},))
    except Exception as error:  # torch.export raises whatever its stages meet
        raise ExportError(
            f"a network must be one graph for any number of images to be exported, {rank_map.model.name} is not: "
            f"{first_line(error)}. Take what depends on the values or the number of images out of its forward, or use "
            "`--to safetensors`."
        ) from error


@dataclass(frozen=True, kw_only=True)
class Target:
    """One format of files."""

    suffix: str
    """Of the file that is named by the user."""
    write: Callable[[Job, Path], None]
    """Writes the network to a file and, if need be, others beside it."""
    read: Callable[[Job, Path], Runner]
    """Reads it back; of the job it may take the map and the structure, not the network."""
    folded: bool = True
    """Whether the file holds the folded network."""
    exact: bool = True
    """Whether the file must compute what the network does, up to rounding; else it is calibrated on images."""
    packages: tuple[str, ...] = ("torch",)
    """Whose versions the manifest records."""
