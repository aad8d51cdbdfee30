"""torch.export archives in int8, with the whole numbers and the ranges that ONNX in int8 holds, too.

torchao's PT2E quantisation sets pairs of quantize and dequantize around convolutions and linear layers, at the steps
and in the ranges that it is given here. Such a file runs in torch alone. ``torch.compile`` with freezing makes int8
kernels of it (oneDNN's, on CPUs); biases and the sums of skips stay in float32. Weights of four bits take eight: the
kernels have no fewer. Transposed convolutions, and those of one input channel, compute in float32 with rounded weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ranksearch.deployment.portable import save_program
from ranksearch.deployment.target import Job, Runner, Target, graph_of
from ranksearch.errors import ExportError
from ranksearch.quantise import equalised
from ranksearch.rounding import Range, ranges, round_weights, widths_of
from ranksearch.scoring import RANGE_IMAGES

_BITS = 8
"""Of the weights of a map without widths."""


def _write(job: Job, path: Path) -> None:
    if find_spec("torchao") is None:
        raise ExportError("a pt2-int8 export needs torchao, found none. Install it: pip install 'ranksearch[torchao]'.")
    if not job.calibration:
        raise ExportError("an int8 export is calibrated on images, found none. Give --images other than noise.")
    model, bits, known = _rounded(job)
    program = graph_of(_quantised(model, graph_of(model, job.rank_map), bits, known), job.rank_map)
    save_program(program, path)


def _rounded(job: Job) -> tuple[nn.Module, Mapping[str, int], Mapping[str, Range]]:
    """A folded network of rounded weights, the bits of each layer, and the ranges of what goes into it."""
    widths, images = job.rank_map.widths, torch.cat(job.calibration)[:RANGE_IMAGES]
    if job.ranges is not None and widths is not None:
        layers = {name: layer.bits for name, layer in job.rank_map.layers.items()}
        return job.folded.model, widths_of(job.folded.model, layers, widths.other_bits), job.ranges
    model, _ = equalised(job.folded.model, job.rank_map.model.input_shape, job.calibration)
    bits = widths_of(model, {}, _BITS)
    round_weights(model, bits)
    return model, bits, ranges(model, bits, images, "mse")


def _quantised(
    model: nn.Module, program: ExportedProgram, bits: Mapping[str, int], known: Mapping[str, Range]
) -> nn.Module:
    """The network of ``program`` with whole numbers for weights, and what goes into layers rounded."""
    with _quiet(), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from ranksearch.deployment.annotation import Known, norms_apart

        plain: Any = program.module()
        norms_apart(plain)
        found: GraphModule = convert_pt2e(prepare_pt2e(plain, Known(model, bits, known)))
    # Beside the whole numbers there are still the weights that they have been made of.
    used = {node.target for node in found.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*found.named_parameters(), *found.named_buffers()) if name not in used]:
        owner, _, own = name.rpartition(".")
        delattr(found.get_submodule(owner), own)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries say of themselves: kernels for GPUs that are not here, what torch will drop one day."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read(job: Job, path: Path) -> Runner:
    with _quiet():
        import torch.ao.quantization.fx._decomposed  # names the operators
        from torch._inductor import config as inductor
        from torch._inductor.exc import InvalidCxxCompiler

        compiled = torch.compile(torch.export.load(path).module())
    seen: set[torch.Size] = set()

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        found: Tensor
        if images.shape in seen:
            found = compiled(images)
            return found
        try:
            with _quiet(), inductor.patch(freezing=True):  # it may be compiled
                found = compiled(images)
        except Exception as error:  # the compiler wraps its own in those of whatever called it
            if InvalidCxxCompiler.__name__ in str(error):
                raise ExportError(
                    "a pt2-int8 export is compiled as it is read back, which needs a C++ compiler, found none. Install "
                    "one, g++ or clang++, or use `--to onnx-int8`. No file was left."
                ) from error
            raise
        seen.add(images.shape)
        return found

    return run


PT2_INT8 = Target(suffix=".pt2", write=_write, read=_read, packages=("torch", "torchao"), exact=False)
