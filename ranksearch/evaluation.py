"""How a proposal becomes a network and a score.

``Bench`` holds everything that the evaluation of any proposal needs, as NumPy arrays, so that one copy in shared memory
serves all workers; calling it makes a warm ``Evaluator``. Images: factors, regression, recalibration and fine-tuning
see training images only, the score that a search sees is that of the search-validation images, and the report images
are scored only for trials that may be on the front, unless the space asks for all.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.calibration import Sample
from ranksearch.conv import Conv
from ranksearch.data import Data, Split, to_input
from ranksearch.decompositions import FORMATS, Kind, Report
from ranksearch.factors import factors_at, store
from ranksearch.funnel import Funnel, FunnelSpec
from ranksearch.models import build_model
from ranksearch.pricing import kinds
from ranksearch.rankmap import LayerRanks
from ranksearch.refit import batch_norms, recalibrate, regauge, sensitivity_of, sequential_regression
from ranksearch.rounding import (
    round_for_good,
    round_weights,
    round_while_training,
    weight_bytes,
    widths_of,
)
from ranksearch.scoring import Score, as_deployed, reproducible, score
from ranksearch.space import FineTuneSpec, Space, StabiliseSpec
from ranksearch.surgery import build_layer, channels_last, count_macs, count_params, kernel_of, replaced
from ranksearch.table import FLOAT_BITS, Candidate, PriceTable
from ranksearch.training import fine_tune, steps_of
from ranksearch.trial import Outcome, Task, constraints, minimised, objective_values

_RECORDS = 50
"""Entries in a funnel run's history, at most one or two more."""
_CHECKPOINTS = 20
"""Checkpoints of a funnel run: an interruption loses no more than that share of its steps."""


def device_of(space: Space) -> torch.device:
    """The device of a trial: a GPU where the space asks for one and there is one."""
    return torch.device("cuda" if space.resources.gpus_per_trial > 0 and torch.cuda.is_available() else "cpu")


def layers_of(
    picked: Mapping[str, Candidate], convs: Mapping[str, Conv], stabilise: StabiliseSpec
) -> dict[str, LayerRanks]:
    """The layers of a rank map with these candidates; dense ones are none of them."""
    return {
        name: LayerRanks(
            format=c.format,
            ranks=c.ranks,
            conv=convs[name].to_json(),
            macs=c.macs,
            params=c.params,
            stabilise=None if FORMATS[c.format].nested else stabilise,
            bits=cast(Any, c.bits),
        )
        for name, c in picked.items()
        if not c.dense
    }


Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What every evaluation needs; picklable, large parts as NumPy arrays."""

    space: Space
    data: Data
    table: PriceTable
    dense: Mapping[str, float]
    """Of the dense network: ``accuracy_search``, ``macs`` and more, as :class:`~ranksearch.setting.Setting` has it."""
    state: Arrays
    """The dense network's state dict."""
    factors: Mapping[tuple[str, str, Kind], Arrays]
    """Prepared tensors by layer, format and kind."""
    samples: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Output pixels and the dense outputs there, by layer; empty without regression."""
    logits: np.ndarray
    """``(N, classes)``: the dense network's outputs on the selection images."""
    dtype: str
    """Arithmetic of fine-tuning, settled once for a search: ``float32`` or ``bfloat16``."""
    weights_folder: Path
    """Where the weights of trials that may be on the front go."""
    checkpoints_folder: Path
    """Where funnel runs leave what they go on from, should they be interrupted."""
    cache: Path
    """Where factors that are fitted are kept, for all workers of the machine."""

    def __call__(self) -> Evaluator:
        """A warm evaluator."""
        return Evaluator(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Built:
    """A compressed network, and how it was made."""

    model: nn.Module
    kind: Kind
    recalibrated: bool
    divergence: float
    """Mean Kullback-Leibler divergence from the dense network's outputs on the selection images, nats."""
    reports: Mapping[str, Report]
    """Error and stability of the factors that were fitted, by layer."""


class Evaluator:
    """Builds, restores and scores proposals; holds the network, the factors and the calibration images warm."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.spec = bench.space.evaluation
        self.data = bench.data
        self.device = device_of(bench.space)
        with reproducible(bench.space.resources.threads):
            self.dense = build_model(bench.space.model, weights=None)
            self.dense.load_state_dict({key: torch.tensor(value) for key, value in bench.state.items()})
            self.dense = channels_last(self.dense.eval().to(self.device))
            self.factors = {key: self._tensors(arrays) for key, arrays in bench.factors.items()}
            self.samples = {
                name: Sample(pixels=torch.tensor(pixels), outputs=torch.tensor(outputs, device=self.device))
                for name, (pixels, outputs) in bench.samples.items()
            }
            self.logits = torch.tensor(bench.logits, device=self.device)
            calibration = bench.data.calibration
            refit, select = self.spec.refit_images, self.spec.select_images
            self.refit_images = self._input(calibration[:refit])
            # From the other end, so that a choice is not made on the images that were regressed on, where it can be.
            self.select_images = self._input(calibration[-select:])

    def __call__(self, task: Task) -> Outcome:
        """The outcome of one task.

        Raises:
            DecompositionError: factors could not be fitted.
            FloatingPointError: activations or losses that are not finite; other exceptions of torch as they come.
        """
        started = time.perf_counter()
        space = self.bench.space
        with reproducible(space.resources.threads):
            model, details, layers = self._funnel(task) if task.settings else self._restored(task)
            with as_deployed(model, space.quantise, self.data):
                found = self._score(model, self.data.search)
            outcome = Outcome(
                accuracy_search=found.accuracy,
                loss=found.loss,
                macs=count_macs(model, self.data.input_shape),
                params=count_params(model),
                latency_ms=None if task.settings else self.bench.table.latency_ms(task.choices),
                seconds=0.0,
                **self._few_bits(model, task),
            )
            report, weights = None, None
            kept = task.keep or self._may_be_on_front(outcome, task)
            if kept or self.spec.report == "all":
                with as_deployed(model, space.quantise, self.data):
                    report = self._score(model, self.data.report)
            if kept:
                weights = f"trial-{task.number:05d}.safetensors"
                store(model.state_dict(), self.bench.weights_folder / weights)
        return replace(
            outcome,
            seconds=time.perf_counter() - started,
            accuracy=None if report is None else report.accuracy,
            report_images=0 if report is None else report.images,
            report_right=None if report is None else base64.b64encode(report.right).decode(),
            weights=weights,
            details=details,
            layers=layers,
        )

    def _few_bits(self, model: nn.Module, task: Task) -> dict[str, Any]:
        """What a network of few bits costs; nothing of others."""
        quantise, table = self.bench.space.quantise, self.bench.table
        if quantise is None:
            return {}
        widths = self._widths(model, table.picked(task.choices))
        return {"bit_operations": table.bit_operations(task.choices), "weight_bytes": weight_bytes(model, widths)}

    def _widths(self, model: nn.Module, picked: Mapping[str, Candidate]) -> dict[str, int]:
        """Bits of the weights of every layer of a compressed network."""
        layers = {name: candidate.bits for name, candidate in picked.items() if not candidate.dense}
        return widths_of(model, layers, self.bench.table.other_bits)

    def _restored(self, task: Task) -> tuple[nn.Module, dict[str, Any], None]:
        """The network of the task's choices, restored and fine-tuned, and how it was made."""
        picked = {k: c for k, c in self.bench.table.picked(task.choices).items() if not c.dense}
        built = self.build(picked)
        details: dict[str, Any] = {
            "factors": built.kind,
            "recalibrated": built.recalibrated,
            "divergence": built.divergence,
        }
        if built.reports:
            details["fitted"] = {name: asdict(found) for name, found in built.reports.items()}
        training = self._training(task.fidelity)
        if steps_of(training, len(self.data.train.labels)):
            with as_deployed(built.model, self.bench.space.quantise, self.data):
                round_while_training(built.model, self._widths(built.model, picked))
                details |= self._fine_tune(built.model, picked, training, task.seed)
                round_for_good(built.model)
        return built.model, details, None

    def _funnel(self, task: Task) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
        """The network that a funnel run ends in, how it came there, and the layers of its rank map.

        Pinned layers are what they are pinned to from the start, and trained along. The run goes on from its
        checkpoint where an earlier try has left one; who hears of the outcome removes that.
        """
        table, kind = self.bench.table, kinds(self.bench.space)[-1]
        pins = {name: candidate for name, _, candidate in table.pinned if not candidate.dense}
        gated = {k: c for k, c in table.picked(task.choices).items() if not c.dense and k not in pins}
        pinned, reports = self._chains(pins, kind)
        steps = steps_of(self.spec.fine_tune, len(self.data.train.labels))
        steps += sum(int(task.settings[name] or 0) for name in ("settle_steps", "penalty_steps"))
        settings: dict[str, Any] = dict(task.settings)
        run = Funnel(
            self.dense,
            {name: candidate.format for name, candidate in gated.items()},
            {name: self.factors[name, candidate.format, kind] for name, candidate in gated.items()},
            self.data,
            FunnelSpec(**settings, fine_tune=self.spec.fine_tune, record_steps=-(-steps // _RECORDS)),
            seed=task.seed,
            dtype=getattr(torch, self.bench.dtype),
            pinned=pinned,
        )
        checkpoint = self.bench.checkpoints_folder / task.checkpoint
        result = run.run(checkpoint=checkpoint, checkpoint_steps=-(-steps // _CHECKPOINTS))
        details: dict[str, Any] = {"factors": kind, "threshold": result.threshold, "history": list(result.history)}
        if reports:
            details["fitted"] = {name: asdict(found) for name, found in reports.items()}
        layers = result.layers | layers_of(pins, table.convs, self.bench.space.stabilise)
        return result.model, details, {name: layer.model_dump(mode="json") for name, layer in layers.items()}

    def _may_be_on_front(self, outcome: Outcome, task: Task) -> bool:
        """Whether an outcome keeps the budget's limits and none of the task's incumbents is as good everywhere."""
        space = self.bench.space
        if task.fidelity < 1:
            return False
        if any(value > 0 for value in constraints(outcome, space.budget, self.bench.dense).values()):
            return False
        objectives = tuple(space.objectives)
        point = minimised(objective_values(outcome, objectives), objectives)
        return not any(all(a <= b for a, b in zip(known, point, strict=True)) for known in task.incumbents)

    def build(self, picked: Mapping[str, Candidate]) -> Built:
        """The compressed network of the kind, recalibrated or not, that is nearest to the dense network's outputs."""
        recalibrations = {"auto": (False, True), "always": (True,), "never": (False,)}[self.spec.recalibrate]
        if not batch_norms(self.dense):
            recalibrations = (False,)
        best: Built | None = None
        for kind in kinds(self.bench.space):
            model, reports = self._compress(picked, kind)
            for recalibrated in recalibrations:
                if recalibrated:
                    # Batches of near equal size: none of a single image, whose variance may not exist.
                    batches = -(-len(self.refit_images) // self.spec.batch_images)
                    recalibrate(model, torch.tensor_split(self.refit_images, batches))
                with as_deployed(model, self.bench.space.quantise, self.data):
                    divergence = self._divergence(model)
                if best is None or divergence < best.divergence:
                    kept = replaced(model, {}) if recalibrations[-1] != recalibrated else model
                    best = Built(
                        model=kept, kind=kind, recalibrated=recalibrated, divergence=divergence, reports=reports
                    )
        if best is None or not np.isfinite(best.divergence):
            raise FloatingPointError("the compressed network's outputs are not finite")
        return best

    def _compress(self, picked: Mapping[str, Candidate], kind: Kind) -> tuple[nn.Module, dict[str, Report]]:
        """The network with factors of one kind, refitted if the space says so; and how the fitted layers came out."""
        modules, reports = self._chains(picked, kind)
        model = channels_last(replaced(self.dense, modules))
        widths = self._widths(model, picked)
        round_weights(model, {name: bits for name, bits in widths.items() if name.rpartition(".")[0] not in modules})
        if self.spec.refit:
            convs = self.bench.table.convs
            chains = {name: (c.format, convs[name], c.ranks) for name, c in picked.items()}
            wanted = chains if self.spec.refit_stages == "all" else None
            bits = {name: c.bits for name, c in picked.items()}
            sequential_regression(model, modules, self.samples, self.refit_images, chains=wanted, bits=bits)
        return model, reports

    def _chains(self, picked: Mapping[str, Candidate], kind: Kind) -> tuple[dict[str, nn.Module], dict[str, Report]]:
        """The chains of some layers with factors of one kind; and how the fitted ones came out."""
        modules: dict[str, nn.Module] = {}
        reports: dict[str, Report] = {}
        convs, space = self.bench.table.convs, self.bench.space
        for name, candidate in picked.items():
            weight, bias = kernel_of(self.dense.get_submodule(name))
            prepared, form = self.factors[name, candidate.format, kind], candidate.format
            fit = factors_at(form, convs[name], prepared, candidate.ranks, space.stabilise, self.bench.cache)
            if fit.report is not None:
                reports[name] = fit.report
            modules[name] = build_layer(
                FORMATS[form], convs[name], prepared, candidate.ranks, bias, weight.dtype, fit.kernels
            )
        return modules, reports

    @torch.no_grad()
    def _divergence(self, model: nn.Module) -> float:
        total, start = 0.0, 0
        for images in torch.split(self.select_images, self.spec.batch_images):
            dense = self.logits[start : start + len(images)].log_softmax(1)
            ours = model(images).float().log_softmax(1)
            total += float(F.kl_div(ours, dense, reduction="sum", log_target=True))
            start += len(images)
        return total / start if np.isfinite(total) else float("inf")

    def _training(self, fidelity: float) -> FineTuneSpec:
        """This share of the space's training, a schedule of its own."""
        whole = self.spec.fine_tune
        if fidelity == 1:
            return whole
        steps = round(fidelity * steps_of(whole, len(self.data.train.labels)))
        return whole.model_copy(update={"steps": steps, "epochs": None})

    def _fine_tune(
        self, model: nn.Module, picked: Mapping[str, Candidate], spec: FineTuneSpec, seed: int
    ) -> dict[str, Any]:
        """The loss it ends with and, of formats that are fitted, the sensitivity over the steps."""
        space, convs = self.bench.space, self.bench.table.convs
        chains = {
            name: (candidate.format, convs[name], candidate.ranks)
            for name, candidate in picked.items()
            if not FORMATS[candidate.format].nested and candidate.bits == FLOAT_BITS
        }
        steps = steps_of(spec, len(self.data.train.labels))
        every = space.stabilise.every
        seen: list[list[float]] = [[0, sensitivity_of(model, chains)]]

        def between(done: int) -> None:
            if done == steps or (every and done % every == 0):
                if space.stabilise.method != "none" and every:
                    regauge(model, chains)
                seen.append([done, sensitivity_of(model, chains)])

        loss = fine_tune(
            model,
            self.dense,
            self.data.train,
            lambda split, index: self._input(split.images[index.numpy()]),
            spec,
            self.data.augment,
            seed=seed,
            dtype=getattr(torch, self.bench.dtype),
            between=between if chains else None,
        )
        return {"fine_tune_loss": loss} | ({"sensitivity": seen} if chains else {})

    def _score(self, model: nn.Module, split: Split) -> Score:
        return score(model, split, self.data, batch_images=self.spec.batch_images, device=self.device)

    def _input(self, images: np.ndarray) -> Tensor:
        return to_input(images, self.data, self.device)

    def _tensors(self, arrays: Arrays) -> dict[str, Tensor]:
        return {key: torch.tensor(value, device=self.device) for key, value in arrays.items()}
