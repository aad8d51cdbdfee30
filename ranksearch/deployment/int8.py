"""ONNX in int8: the whole numbers of a rank map with widths, else those of ONNX Runtime's own quantiser.

Both have weights per output channel and activations per tensor. Before ONNX Runtime's quantiser the factors are
equalised on the calibration images, which then give the activations' ranges by percentile. In ONNX Runtime the
convolutions really run in int8; how fast, the manifest says.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ranksearch.deployment.portable import INPUT, read_onnx, write_onnx
from ranksearch.deployment.target import Job, Target, graph_of
from ranksearch.deployment.whole import write_whole
from ranksearch.errors import ExportError
from ranksearch.quantise import equalised


def _write(job: Job, path: Path) -> None:
    if not job.calibration:
        raise ExportError("an int8 export is calibrated on images, found none. Give --images other than noise.")
    if job.ranges is not None and job.rank_map.widths is not None:
        write_whole(job, job.rank_map.widths, path)
        return
    model, _ = equalised(job.folded.model, job.rank_map.model.input_shape, job.calibration)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "float32.onnx"
        write_onnx(graph_of(model, job.rank_map), model, job.rank_map, whole)
        _quantised(whole, path, job.calibration)


def _quantised(whole: Path, path: Path, batches: Iterable[Tensor]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises what was done already: folding, shapes
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            quantize_static(
                str(whole),
                str(path),
                _Reader(batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                # Seven bits of weights: on x86 without VNNI, sums of products with eight overflow their 16 bits.
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.Percentile,
            )
    finally:
        root.setLevel(level)


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next inputs by name; None after the last."""
        images = next(self._batches, None)
        return None if images is None else {INPUT: images.contiguous().numpy()}


ONNX_INT8 = Target(
    suffix=".onnx",
    write=_write,
    read=read_onnx,
    packages=("torch", "onnx", "onnxscript", "onnxruntime"),
    exact=False,
)
