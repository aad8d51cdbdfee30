"""Chains at full rank whose ranks are behind gates, and what remains of them when gates close.

Every stage but the last is weight-normalised (Salimans, Kingma 2016): the magnitude of a filter is the gate of its
rank. Gates start at the square root of their singular value, in the metric of the factors' kind, and the next stage
takes what is left (ours: orthonormal factors would hide the importance). A layer whose gates leave it no cheaper than
dense goes back to one convolution, that of the whole chain (arXiv 2112.03690, equations 10 and 11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, Format, Prepared, Ranks, compressed_stages
from ranksearch.decompositions.gauge import orthonormal_gauge
from ranksearch.errors import ModelError, UnsupportedLayer
from ranksearch.surgery import build_chain, build_stage, channels_last, count_macs, find_layers, kernel_of, replaced

_LEAST = 1e-3
"""Smallest gate at the start, squared, relative to the layer's largest: a gate at zero would never open."""
_CORRELATE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class GatedLayer:
    """One layer behind gates."""

    name: str
    form: Format
    conv: Conv
    bounds: Ranks
    """Gates of each stage but the last."""

    def macs(self, ranks: Ranks) -> int:
        """MACs per image of the chain."""
        return sum(stage.macs for stage in compressed_stages(self.form, self.conv, ranks))

    def params(self, ranks: Ranks) -> int:
        """Parameters of the chain."""
        return sum(stage.params for stage in compressed_stages(self.form, self.conv, ranks))


class GatedNetwork:
    """A copy of a dense network with the named layers behind gates.

    The gates of all layers stand behind each other in one vector, as ``magnitudes`` gives them.

    Args:
        dense: the pretrained network, which stays as it is.
        formats: layer to the name of its format.
        prepared: layer to its prepared tensors.
        input_shape: of one image.
        pinned: layer to the module that it is from the start, for layers that are not gated.

    Raises:
        ModelError: no such layer.
        UnsupportedLayer: the format is not for a layer, has no gate for each rank, or the layer is run several times.
    """

    def __init__(
        self,
        dense: nn.Module,
        formats: Mapping[str, str],
        prepared: Mapping[str, Prepared],
        input_shape: Shape,
        pinned: Mapping[str, nn.Module] | None = None,
    ) -> None:
        found = {layer.name: layer for layer in find_layers(dense, input_shape)}
        missing = [name for name in formats if name not in found]
        if missing or not formats:
            raise ModelError(
                f"the layers to gate must be convolutions or linear layers that run, found {', '.join(missing)} among "
                f"them. The network has {', '.join(list(found)[:4])}, ..."
            )
        self.layers: list[GatedLayer] = []
        modules: dict[str, nn.Module] = dict(pinned or {})
        for name, form_name in formats.items():
            layer, form = found[name], FORMATS[form_name]
            if layer.calls != 1:
                raise UnsupportedLayer(f"{name} is run {layer.calls} times in one forward pass. Leave it dense.")
            bounds = _gates_of(form, layer.conv)
            self.layers.append(GatedLayer(name=name, form=form, conv=layer.conv, bounds=bounds))
            modules[name] = _gated_chain(
                form, layer.conv, bounds, prepared[name], *kernel_of(dense.get_submodule(name))
            )
        self.dense_macs = count_macs(dense, input_shape)
        others = count_macs(replaced(dense, pinned), input_shape) if pinned else self.dense_macs
        self.other_macs = others - sum(layer.conv.macs for layer in self.layers)
        self.model = channels_last(replaced(dense, modules))

    def gates(self) -> list[nn.Parameter]:
        """The parameters that are gates, stage by stage and layer by layer."""
        return [_gate(stage) for layer in self.layers for stage in self._stages(layer)[:-1]]

    def others(self) -> list[nn.Parameter]:
        """The parameters that are not and that are trained."""
        gates = {id(gate) for gate in self.gates()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in gates]

    @torch.no_grad()
    def magnitudes(self) -> Tensor:
        """The gates in float64, ``(G,)``."""
        return torch.cat([gate.detach().flatten() for gate in self.gates()]).double()

    @torch.no_grad()
    def set_magnitudes(self, values: Tensor) -> None:
        """Write what ``magnitudes`` reads."""
        gates = self.gates()
        for gate, value in zip(gates, torch.split(values, [gate.numel() for gate in gates]), strict=True):
            gate.copy_(value.reshape(gate.shape))

    @torch.no_grad()
    def column_norms(self) -> Tensor:
        """``(G,)``: what each gate's channel meets in the last stage, where that comes next; 1 elsewhere.

        The last stage is free of penalties: it could grow while a gate shrinks, with nothing gained.
        """
        norms: list[Tensor] = []
        for layer in self.layers:
            *gated, last = self._stages(layer)
            norms += [torch.ones_like(_gate(stage)).flatten() for stage in gated[:-1]]
            norms.append(kernel_of(last)[0].transpose(0, 1).flatten(1).norm(dim=1))
        return torch.cat(norms).double()

    def costs(self) -> Tensor:
        """``(G,)``: MACs that a gate's rank costs at full ranks, relative to their mean."""
        costs: list[float] = []
        for layer in self.layers:
            whole = layer.macs(layer.bounds)
            for i, bound in enumerate(layer.bounds):
                less = tuple(max(1, rank - (i == j)) for j, rank in enumerate(layer.bounds))
                costs += [float(whole - layer.macs(less))] * bound
        found = torch.tensor(costs, dtype=torch.float64, device=self.gates()[0].device)
        return found / found.mean()

    def alive(self, sizes: Tensor, threshold: float) -> list[list[Tensor]]:
        """Indices of the gates over a threshold, of every layer and stage; the largest one in any case."""
        values = iter(torch.split(sizes, [bound for layer in self.layers for bound in layer.bounds]))
        found: list[list[Tensor]] = []
        for layer in self.layers:
            found.append([])
            for _ in layer.bounds:
                value = next(values)
                over = (value > threshold).nonzero().flatten()
                found[-1].append(over if len(over) else value.argmax().reshape(1))
        return found

    def ranks(self, sizes: Tensor, threshold: float) -> list[Ranks]:
        """How many gates are over a threshold, of every layer and stage."""
        return [tuple(len(indices) for indices in stages) for stages in self.alive(sizes, threshold)]

    def ratio(self, ranks: Sequence[Ranks], *, revert: bool = True) -> float:
        """MACs of the network as a share of the dense one's; ``revert``: no layer costs more than dense."""
        macs = self.other_macs
        for layer, kept in zip(self.layers, ranks, strict=True):
            macs += min(layer.macs(kept), layer.conv.macs) if revert else layer.macs(kept)
        return macs / self.dense_macs

    @torch.no_grad()
    def fold(self, alive: Sequence[Sequence[Tensor]]) -> tuple[nn.Module, dict[str, Ranks]]:
        """The plain network of the gates that are alive, and the ranks of the layers that are not dense again.

        A layer that is no cheaper keeps all its gates, in one dense convolution. Chains come in the orthonormal gauge.
        """
        modules: dict[str, nn.Module] = {}
        ranks: dict[str, Ranks] = {}
        for layer, indices in zip(self.layers, alive, strict=True):
            stages = self._stages(layer)
            weights = [kernel_of(stage)[0].double() for stage in stages]
            weight, bias = kernel_of(stages[-1])
            kept = tuple(len(chosen) for chosen in indices)
            if layer.macs(kept) >= layer.conv.macs:
                modules[layer.name] = build_stage(layer.conv, _product(weights).to(weight), bias)
                continue
            for i, chosen in enumerate(indices):
                weights[i], weights[i + 1] = weights[i][chosen], weights[i + 1][:, chosen]
            kernels = [kernel.to(weight) for kernel in orthonormal_gauge(weights)]
            modules[layer.name] = build_chain(compressed_stages(layer.form, layer.conv, kept), kernels, bias)
            ranks[layer.name] = kept
        return channels_last(replaced(self.model, modules)), ranks

    def skeleton(self, ranks: Mapping[str, Ranks]) -> nn.Module:
        """A network of the structure that ``fold`` gives at these ranks, its factors zero."""
        modules: dict[str, nn.Module] = {}
        for layer in self.layers:
            weight, _ = kernel_of(self._stages(layer)[-1])
            if layer.name in ranks:
                modules[layer.name] = build_chain(compressed_stages(layer.form, layer.conv, ranks[layer.name])).to(
                    weight
                )
            else:
                modules[layer.name] = build_stage(layer.conv, weight.new_zeros(layer.conv.weight_shape), None)
        return channels_last(replaced(self.model, modules))

    def _stages(self, layer: GatedLayer) -> list[nn.Module]:
        return list(cast(nn.Sequential, self.model.get_submodule(layer.name)))


def _gate(stage: nn.Module) -> nn.Parameter:
    """The magnitudes of a weight-normalised stage."""
    return stage.get_parameter("parametrizations.weight.original0")


def _gates_of(form: Format, conv: Conv) -> Ranks:
    """The numbers of gates; raises :class:`UnsupportedLayer` where the ranks are not the stages' output channels."""
    bounds = form.max_rank(conv)
    stages = form.stages(conv, bounds)
    if tuple(stage.out_channels for stage in stages[:-1]) != bounds or any(stage.groups > 1 for stage in stages):
        raise UnsupportedLayer(
            f"a gated layer needs a format whose ranks are the channels between its stages, as tucker2 and svd have; "
            f"{form.name} is none. Take one of these."
        )
    return bounds


def _gated_chain(
    form: Format, conv: Conv, bounds: Ranks, prepared: Prepared, weight: Tensor, bias: Tensor | None
) -> nn.Module:
    """The chain at full rank, equal to the dense layer, its stages but the last weight-normalised."""
    kernels = [kernel.double() for kernel in form.factors(prepared, bounds)]
    for i in range(len(bounds)):
        norms = kernels[i].flatten(1).norm(dim=1)
        gates = _singular_values(prepared["energy"], i, float(weight.norm())).sqrt()
        # A filter of zeros has no direction: it gets one, and the next stage does not listen.
        directions = (kernels[i].movedim(0, -1) / torch.where(norms > 0, norms, 1.0)).movedim(-1, 0)
        directions[norms == 0] = directions[0].numel() ** -0.5
        kernels[i] = (directions.movedim(0, -1) * gates).movedim(-1, 0)
        kernels[i + 1] = (kernels[i + 1].movedim(1, -1) * (norms / gates)).movedim(-1, 1)
    chain = build_chain(compressed_stages(form, conv, bounds), [kernel.to(weight) for kernel in kernels], bias)
    stages = list(cast(nn.Sequential, chain))
    for stage in stages[:-1]:
        parametrizations.weight_norm(stage, dim=1 if isinstance(stage, nn.modules.conv._ConvTransposeNd) else 0)
    # The layer may become dense again, and a dense layer without a bias has no room for one.
    cast(nn.Parameter, stages[-1].bias).requires_grad_(conv.bias)
    return chain


def _singular_values(energy: Tensor, axis: int, norm: float) -> Tensor:
    """Singular values of one mode in the metric of the factors, scaled to the kernel's norm and floored above zero."""
    last = tuple(slice(None) if i == axis else -1 for i in range(energy.ndim))
    kept = energy[last].double()
    values = kept.diff(prepend=kept.new_zeros(1)).clamp_min(0).sqrt()
    return norm * values.clamp_min(_LEAST * float(values.max()) + 1e-30) + 1e-30


def _product(weights: Sequence[Tensor]) -> Tensor:
    """The kernel ``(T, S, ...)`` of a chain: its outputs for patches with a single one."""
    channels = weights[0].shape[1]
    sizes = [1 + sum(extent - 1 for extent in extents) for extents in zip(*(w.shape[2:] for w in weights), strict=True)]
    count = channels * prod(sizes)
    out = torch.eye(count, dtype=weights[0].dtype, device=weights[0].device).reshape(count, channels, *sizes)
    for weight in weights:
        out = _CORRELATE[weight.ndim](out, weight)
    return out.reshape(count, -1).T.reshape(-1, channels, *sizes)
