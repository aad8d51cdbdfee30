"""Tucker-2 and CP of one wide kernel against tensorly, at equal or lower error.

Run from the root of the repository: ``python -m benchmarks.decomposition_speed``. The kernel is 512 x 512 x 3 x 3,
float32, as the widest layers of ResNet-18: random with spectra decaying as 1 / n along every mode, plus 2 % of noise
(made here: pretrained weights of a network of this width would have to be downloaded). Ours Tucker-2 at (128, 128) is
``hooi`` with three sweeps, and, in a row of its own, the format's ``prepare``, whose HOSVD serves every rank of the
layer, and ``chain``; tensorly's is ``partial_tucker`` as it comes. Ours CP is ``cp_als`` at rank 128 on the kernel with
its spatial modes merged, 9 x 512 x 512, and, in a row of its own, the error-preserving correction that follows it;
tensorly's is ``parafac`` as it comes: SVD start, up to 100 iterations. Each runs in a process of its own, one thread;
seconds are CPU time, the least of the runs, which others on the machine disturb less than the clock; memory is the peak
over that before the work. Exits with 1 where ``hooi`` or ``cp_als`` takes more than 0.2 of tensorly's time or has a
higher error (equal within a millionth), or anything of ours takes over 1 GB.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tensorly import cp_to_tensor
from tensorly.decomposition import parafac, partial_tucker
from tensorly.tenalg import multi_mode_dot
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, chain, prepare
from ranksearch.decompositions.als import cp_als, cp_tensor
from ranksearch.decompositions.hooi import hooi
from ranksearch.decompositions.stabilise import correct

CHANNELS, RANK = 512, 128
MOST_TIME, MOST_MEMORY_MB = 0.2, 1000.0


def kernel() -> Tensor:
    """``(T, S, height, width)``, norm about 1, float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHANNELS, CHANNELS, 9, generator=generator)
    for mode, size in enumerate(weight.shape):
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
        weight = torch.tensordot(basis / torch.arange(1, size + 1), weight.movedim(mode, 0), 1).movedim(0, mode)
    noise = torch.randn(weight.shape, generator=generator)
    found: Tensor = weight / weight.norm() + 0.02 * noise / noise.norm()
    return found.reshape(CHANNELS, CHANNELS, 3, 3).contiguous()


def merged(weight: Tensor) -> Tensor:
    """``(spatial, S, T)``."""
    return weight.flatten(2).permute(2, 1, 0).contiguous()


def our_hooi(weight: Tensor) -> Callable[[], np.ndarray]:
    """Ours at these ranks; returns what reconstructs the kernel."""
    core, bases = hooi(weight, {0: RANK, 1: RANK})
    return lambda: torch.einsum("bakl,tb,sa->tskl", core, bases[0], bases[1]).numpy()


def our_hosvd(weight: Tensor) -> Callable[[], np.ndarray]:
    """Ours at all ranks."""
    conv = Conv(in_channels=CHANNELS, out_channels=CHANNELS, kernel=(3, 3), padding=(1, 1), size=(7, 7))
    form = FORMATS["tucker2"]
    (first, core, last), _ = chain(form, conv, prepare(form, conv, weight), (RANK, RANK), None)
    return lambda: torch.einsum("asxy,bakl,tbzw->tskl", first, core, last).numpy()


def their_tucker(weight: Tensor) -> Callable[[], np.ndarray]:
    """Tensorly's."""
    (core, factors), _ = partial_tucker(weight.numpy(), rank=[RANK, RANK], modes=[0, 1])
    return lambda: np.asarray(multi_mode_dot(core, factors, modes=[0, 1]))


def our_cp(weight: Tensor) -> Callable[[], np.ndarray]:
    """Ours."""
    fit = cp_als(merged(weight), RANK)
    return lambda: cp_tensor(fit.factors).permute(2, 1, 0).reshape(weight.shape).numpy()


def our_corrected_cp(weight: Tensor) -> Callable[[], np.ndarray]:
    """Ours, with the error-preserving correction."""
    tensor = merged(weight)
    factors = correct(tensor, cp_als(tensor, RANK).factors)
    return lambda: cp_tensor(factors).permute(2, 1, 0).reshape(weight.shape).numpy()


def their_cp(weight: Tensor) -> Callable[[], np.ndarray]:
    """Tensorly's."""
    found = parafac(merged(weight).numpy(), RANK)
    return lambda: np.asarray(cp_to_tensor(found)).transpose(2, 1, 0).reshape(weight.shape)


METHODS = {f.__name__: f for f in (our_hooi, our_hosvd, their_tucker, our_cp, our_corrected_cp, their_cp)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run took."""

    seconds: float
    error: float
    """Squared norm of the residual over that of the kernel."""
    extra_mb: float
    """Peak resident memory over that before the work."""


def peak_mb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def present_mb() -> float:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measured(name: str) -> Row:
    """One run, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    weight = kernel()
    before = present_mb()
    started = time.process_time()
    rebuild = METHODS[name](weight)
    seconds, extra = time.process_time() - started, peak_mb() - before
    dense = weight.double().numpy()
    error = float(((dense - rebuild()) ** 2).sum() / (dense**2).sum())
    return Row(seconds=seconds, error=error, extra_mb=extra)


def best(name: str, times: int) -> Row:
    """The fastest of several runs, each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measured, (name,)) for _ in range(times)]
    return min(rows, key=lambda row: row.seconds)


def main() -> int:
    """Print the table."""
    rows = (
        ("Tucker-2 (128, 128), HOOI", "our_hooi", "their_tucker"),
        ("Tucker-2 (128, 128), slice of the HOSVD", "our_hosvd", "their_tucker"),
        ("CP rank 128", "our_cp", "their_cp"),
        ("CP rank 128, corrected at slack 1.05", "our_corrected_cp", "their_cp"),
    )
    theirs: dict[str, Row] = {}
    print("| | ours, s | tensorly, s | ours / tensorly | error, ours | error, tensorly | extra MB, ours | tensorly |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    failed = False
    for label, our, their in rows:
        ours = best(our, 3)
        if their not in theirs:
            theirs[their] = best(their, 1)
        other = theirs[their]
        ratio = ours.seconds / other.seconds
        cells = [f"{ours.seconds:.2f}", f"{other.seconds:.2f}", f"{ratio:.3f}", f"{ours.error:.4e}"]
        cells += [f"{other.error:.4e}", f"{ours.extra_mb:.0f}", f"{other.extra_mb:.0f}"]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
        failed |= ours.extra_mb > MOST_MEMORY_MB
        if our in ("our_hooi", "our_cp"):
            failed |= ratio > MOST_TIME or ours.error > other.error * (1 + 1e-6)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
