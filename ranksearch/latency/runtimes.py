"""The ways to run a network that latencies are measured in: eager, ``torch.compile``, ONNX Runtime."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ranksearch.errors import LatencyError, first_line
from ranksearch.surgery import channels_last

Runtime = Literal["eager", "compile", "onnxruntime"]
RUNTIMES: Final[tuple[Runtime, ...]] = get_args(Runtime)


def runner(module: nn.Module, images: Tensor, runtime: Runtime, *, threads: int = 1) -> Callable[[], Any]:
    """A call that runs a copy of ``module`` on ``images`` once and waits until it is done.

    Args:
        module: a network or a layer, in float32.
        images: its input ``(N, C, *size)``; batches of images run channels-last but in ONNX Runtime, which lays them
            out itself.
        runtime: ``eager`` and ``compile`` run on the module's device, ``onnxruntime`` on the CPU.
        threads: CPU threads of ``onnxruntime``; the others take those that PyTorch is set to.

    Raises:
        LatencyError: the runtime is not installed, or cannot run the module.
    """
    own = copy.deepcopy(module).eval().requires_grad_(False)
    if runtime == "onnxruntime":
        return _onnx(own.cpu(), images.cpu(), threads)
    own = channels_last(own)
    x = images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images
    called: Callable[[Tensor], Any] = own

    @torch.no_grad()
    def run() -> None:
        called(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

    if runtime == "compile":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                called = torch.compile(own)
                run()  # compiles; the errors of compilers are of many types
        except Exception as error:
            raise LatencyError(
                f"torch.compile must be able to compile the network, found {first_line(error)}. Install a "
                "C++ compiler, or take latency.runtime: eager."
            ) from error
    return run


def _onnx(module: nn.Module, images: Tensor, threads: int) -> Callable[[], Any]:
    try:
        import onnx  # noqa: F401  (the exporter needs it)
        import onnxruntime
    except ImportError as error:
        raise LatencyError(
            f"latency.runtime: onnxruntime needs onnx and onnxruntime, found no {error.name}. Install them: "
            "pip install 'ranksearch[onnx]'."
        ) from error
    file = io.BytesIO()
    try:
        with quiet_exporter():
            # The exporter by tracing: that by torch.export takes a second a layer, and there are hundreds.
            torch.onnx.export(module, (images,), cast(Any, file), dynamo=False)
    except Exception as error:
        raise LatencyError(
            f"the network must be exportable to ONNX, found {type(error).__name__}: {error}. Take another "
            "latency.runtime."
        ) from error
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without what PyTorch's ONNX exporter says about itself: deprecations inside torch, and a missing torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
