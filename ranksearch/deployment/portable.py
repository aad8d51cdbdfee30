"""Safetensors with the rank map inside, torch.export archives, and ONNX models, which run in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ranksearch.deployment.target import Job, Runner, Target
from ranksearch.errors import ExportError, first_line
from ranksearch.export import load_compressed, save_compressed
from ranksearch.latency.runtimes import quiet_exporter
from ranksearch.rankmap import RankMap

INPUT, OUTPUT = "images", "outputs"
"""Names in an ONNX model."""
LARGEST = 1_900_000_000
"""Bytes of weights that one ONNX file can hold; it has a limit of 2 GiB. More go into a file beside it."""


def _write_safetensors(job: Job, path: Path) -> None:
    save_compressed(job.network.state_dict(), job.rank_map, path)


def _read_safetensors(job: Job, path: Path) -> Runner:
    return load_compressed(job.rank_map, job.structure, path)


def _write_pt2(job: Job, path: Path) -> None:
    save_program(job.program, path)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a graph as torch.export does, without the lines of source and the paths that it notes beside nodes."""
    for node in program.graph.nodes:
        for noted in ("stack_trace", "from_node"):
            node.meta.pop(noted, None)
    torch.export.save(program, path)


def _read_pt2(job: Job, path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda images: module(images)


def _write_onnx(job: Job, path: Path) -> None:
    write_onnx(job.program, job.folded.model, job.rank_map, path)


def write_onnx(
    program: ExportedProgram, model: nn.Module, rank_map: RankMap, path: Path, *, opset: int | None = None
) -> None:
    """Write the graph of a network as an ONNX model, of torch's opset where none is asked for.

    Raises:
        ExportError: packages are missing, or an operator has no place in ONNX.
    """
    _required("onnx", "onnxscript", "onnxruntime")
    with quiet_exporter():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
            )
        except Exception as error:  # whatever the exporter meets in a graph
            raise ExportError(
                f"every operator of {rank_map.model.name} must have a place in ONNX: {first_line(error)}. "
                "Use `--to pt2` or `--to python`."
            ) from error
        if made is None:
            raise ExportError("torch.onnx gave no model. Use `--to pt2` or `--to python`.")
        _forget_origins(made)
        size = sum(value.nbytes for value in model.state_dict().values())
        made.save(str(path), external_data=size > LARGEST)


def _forget_origins(made: Any) -> None:
    """Drop what the exporter notes beside nodes and values: lines of source and their paths, more than weights take."""
    graph = made.model.graph
    graph.metadata_props.clear()
    outputs = [value for node in graph for value in node.outputs]
    for noted in (*graph, *outputs, *graph.inputs, *graph.initializers.values()):
        noted.metadata_props.clear()


def read_onnx(job: Job, path: Path) -> Runner:
    """A runner in ONNX Runtime, on the CPU."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # On x86 without VNNI, sums of products of int8 would overflow their 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.contiguous().numpy()})[0])

    return run


def _required(*packages: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise ExportError(
            f"an ONNX export needs onnx, onnxscript and onnxruntime, found no {', '.join(missing)}. "
            "Install them: pip install 'ranksearch[onnx]'."
        )


SAFETENSORS = Target(
    suffix=".safetensors",
    write=_write_safetensors,
    read=_read_safetensors,
    folded=False,
    packages=("torch", "safetensors"),
)
PT2 = Target(suffix=".pt2", write=_write_pt2, read=_read_pt2)
ONNX = Target(
    suffix=".onnx", write=_write_onnx, read=read_onnx, packages=("torch", "onnx", "onnxscript", "onnxruntime")
)
