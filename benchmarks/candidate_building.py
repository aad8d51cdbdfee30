"""Building a candidate from the cache against decomposing the network with tensorly, same layers and ranks.

Run from the root of the repository: ``python -m benchmarks.candidate_building``. Both sides start from the dense
network and make every 3x3 convolution but the stem a Tucker-2 chain at half its ranks, weight-only: ours slices
prepared factors and brings them to the orthonormal gauge, tensorly runs ``partial_tucker`` a layer as it comes (SVD
start, then up to 100 iterations). ``factors`` is this step alone; ``network`` adds the compressed copy of the whole
network, whose assembly is the same for both sides and was measured once. Medians of several, one thread. Exits with 1
where a ratio of the factors is under 50.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, Prepared, chain, compressed_stages, prepare
from ranksearch.models.cifar_resnet import resnet20
from ranksearch.models.resnet import resnet18
from ranksearch.surgery import build_chain, find_layers, kernel_of, replaced

FORM = FORMATS["tucker2"]
LEAST_RATIO = 50.0


def ranks_of(conv: Conv) -> tuple[int, int]:
    """Half of the channels."""
    return max(1, conv.in_channels // 2), max(1, conv.out_channels // 2)


Kernels = dict[str, list[Tensor]]


def sliced(convs: Mapping[str, Conv], prepared: Mapping[str, Prepared]) -> Kernels:
    """Kernels of the stages of every layer, out of prepared factors."""
    return {name: chain(FORM, conv, prepared[name], ranks_of(conv), None)[0] for name, conv in convs.items()}


def decomposed(convs: Mapping[str, Conv], weights: Mapping[str, Tensor]) -> Kernels:
    """Kernels of the stages of every layer, by tensorly."""
    kernels: Kernels = {}
    for name, conv in convs.items():
        r_in, r_out = ranks_of(conv)
        (core, (last, first)), _ = partial_tucker(weights[name].numpy(), rank=[r_out, r_in], modes=[0, 1])
        kernels[name] = [torch.tensor(a) for a in (first.T[..., None, None], core, last[..., None, None])]
    return kernels


def assembled(model: nn.Module, convs: Mapping[str, Conv], kernels: Kernels) -> nn.Module:
    """The compressed copy of the network."""
    modules = {n: build_chain(compressed_stages(FORM, conv, ranks_of(conv)), kernels[n]) for n, conv in convs.items()}
    return replaced(model, modules)


def median_ms(work: Callable[[], object], times: int) -> float:
    """Median wall time in milliseconds."""
    took = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return 1e3 * statistics.median(took)


def compare(name: str, model: nn.Module, size_px: int) -> float:
    """Print one row of the table; returns the ratio of the factors."""
    layers = find_layers(model, (3, size_px, size_px))[1:]
    convs = {layer.name: layer.conv for layer in layers if layer.conv.kernel == (3, 3)}
    weights = {n: kernel_of(model.get_submodule(n))[0] for n in convs}
    prepared: dict[str, Prepared] = {}

    def fill() -> None:
        prepared.update({n: prepare(FORM, conv, weights[n]) for n, conv in convs.items()})

    once = median_ms(fill, 1)
    assembled(model, convs, sliced(convs, prepared))
    ours = median_ms(lambda: sliced(convs, prepared), 15)
    ours_whole = median_ms(lambda: assembled(model, convs, sliced(convs, prepared)), 15)
    theirs = median_ms(lambda: decomposed(convs, weights), 3)
    theirs_whole = theirs + ours_whole - ours
    row = f"{name:10} {len(convs):6} {once:8.0f} |{ours:8.1f} {theirs:10.0f} {theirs / ours:6.0f} |"
    print(f"{row}{ours_whole:8.1f} {theirs_whole:10.0f} {theirs_whole / ours_whole:6.0f}", flush=True)
    return theirs / ours


def main() -> int:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("milliseconds; `prepare` is paid once a search and kept on disk")
    print(f"{'':10} {'':>6} {'':>8} |{'factors':^26} |{'network':^26}")
    columns = f"{'cache':>8} {'tensorly':>10} {'ratio':>6}"
    print(f"{'network':10} {'layers':>6} {'prepare':>8} |{columns} |{columns}")
    found = [compare("ResNet-20", resnet20().eval(), 32), compare("ResNet-18", resnet18().eval(), 224)]
    return 0 if min(found) >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
