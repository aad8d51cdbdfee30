"""The search space: a YAML file as frozen, validated data.

Every field carries its own description; the JSON Schema for editors is generated from them. This module checks what
can be checked without the network and the data (types, ranges, unknown keys); ``search`` checks the rest.
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Ratio = Annotated[float, Field(gt=0, le=1)]
Objective = Literal["accuracy", "loss", "macs", "params", "latency", "bit-operations"]
COSTS = ("macs", "params", "latency", "bit-operations")
"""The objectives that a network costs."""
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A mapping of a space file: frozen, with no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSpec(Section):
    """The pretrained network."""

    name: str
    """A built-in architecture (``resnet20``, ``resnet18``, ...) or a factory as ``package.module:function``."""
    weights: str | None = None
    """File of the pretrained weights (safetensors, or a ``torch.save`` state dict). A relative path is looked for in
    ``data.root``, then beside the space file, then in the working directory. Only the built-in ``digits-cnn``, which
    is trained on first use, and your own factories may leave it out."""
    options: dict[str, Any] = {}
    """Keyword arguments of the architecture, such as ``num_classes``."""


class AugmentSpec(Section):
    """Random changes of the images that fine-tuning sees."""

    flip: bool = False
    """Mirror left to right, half of the time."""
    crop_px: Annotated[int, Field(ge=0)] = 0
    """Pad by so many pixels and crop back at random."""


class DataSpec(Section):
    """Images with labels, in three disjoint splits: calibration and fine-tuning, search-validation, report."""

    source: str = "digits"
    """``digits`` (embedded), ``npz``, ``folder`` (one sub-folder a class), or a factory ``package.module:function``."""
    root: str | None = None
    """Folder of the data. ``${NAME}`` is replaced by that environment variable."""
    train: list[str] = []
    """``.npz`` files, or sub-folders, with the calibration and fine-tuning images, under ``root``."""
    validation: list[str] = []
    """``.npz`` files, or sub-folders, with the images for search-validation and report, under ``root``."""
    train_images: Positive | None = None
    """How many training images to use at most; all by default."""
    calibration_images: Positive = 2048
    """How many of the training images collect statistics, the first ones; regression, recalibration and the choice
    between kinds of factors take some of these."""
    search_images: Positive | None = None
    """How many validation images score trials: the first ones; half of them by default."""
    report_images: Positive | None = None
    """How many validation images score the front: those after the search images; the rest by default."""
    image_size_px: Positive | None = None
    """Height and width images of a folder are brought to: resized to 8/7 of it, then cropped at the centre."""
    mean: list[float] = [0.0]
    """Mean of each channel, on the scale 0 to 1, subtracted from the images."""
    std: list[Annotated[float, Field(gt=0)]] = [1.0]
    """Standard deviation of each channel, on the scale 0 to 1, that images are divided by."""
    augment: AugmentSpec = AugmentSpec()
    options: dict[str, Any] = {}
    """Keyword arguments of a factory."""

    @model_validator(mode="after")
    def _channels_agree(self) -> DataSpec:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std must have one value a channel each, found {len(self.mean)} and {len(self.std)}"
            )
        return self


class LayersSpec(Section):
    """Which layers are searched. Patterns are shell patterns on module names, such as ``layer1.*.conv2``."""

    include: list[str] = []
    """Layers to search. Empty: every convolution and linear layer but the first convolution (the stem) and the last
    linear layer (the classifier)."""
    exclude: list[str] = []
    """Layers left dense."""
    min_share: Annotated[float, Field(ge=0, lt=1)] = 0.002
    """Layers with a smaller share of the network's MACs stay dense, unless ``include`` is given."""


class PinnedSpec(Section):
    """A format and ranks a layer is fixed to."""

    format: str
    """One of the formats, whether or not it is among those searched."""
    ranks: list[Positive]
    """Its ranks, as many as the format has."""


class RanksSpec(Section):
    """Which ranks are candidates."""

    ratios: Annotated[list[Ratio], Field(min_length=1)] = [
        0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0,
    ]  # fmt: skip
    """Candidate ranks, as shares of the layer's largest rank; for ``cp`` and ``cp4`` of the rank at which the layer
    costs as much as dense. ``tkd-cp`` takes them for its two channel ranks, ``tensor-chain`` for the channels that its
    terms have together."""
    values: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Candidate ranks as numbers, instead of ``ratios``; larger than a layer's largest rank means that one."""
    joint: bool = False
    """One ratio for all the ranks of a layer; else every combination that no other beats in both MACs and error."""
    rank_multiple: Positive | None = None
    """Ranks are rounded up to a multiple of this. By default 1; where an objective or a limit is the latency, or
    latencies were brought along, the largest multiple that is as fast as any on the target, which is measured."""

    @property
    def multiple(self) -> int:
        """The rank multiple, 1 as long as it is left open."""
        return self.rank_multiple or 1


class StabiliseSpec(Section):
    """How the factors of formats that are fitted (``cp``, ``cp4``, ``tkd-cp``, ``tensor-chain``) are stabilised.

    Large terms that cancel make a fit hard to train and to quantise. A fit's sensitivity is its expected squared error
    per unit variance of noise on its factors. Formats that are sliced have nothing to stabilise.
    """

    method: Literal["epc", "norms", "bounded", "none"] = "epc"
    """``epc``: the least sensitivity at an error within ``slack`` of the fit's. ``norms``: likewise the least sum of
    the terms' squared norms. ``bounded``: the least error at a sensitivity within ``limit``. ``none``: only the scales
    of the factors are balanced. The tensor chain knows ``epc`` alone and takes it for ``norms`` and ``bounded``."""
    slack: Annotated[float, Field(ge=1)] = 1.05
    """Allowed error (norm of the difference) of ``epc`` and ``norms``, as a multiple of the fit's."""
    every: Annotated[int, Field(ge=0)] = 10
    """Steps of fine-tuning after which the factors are brought to their least sensitive gauge again, which leaves the
    network as it is; 0 never does. ``none`` never does either."""
    limit: Annotated[float, Field(gt=0)] = 2.0
    """Allowed sensitivity of ``bounded``, as a multiple of that of as many orthogonal terms of equal size."""


class QuantiseSpec(Section):
    """Factors and activations of few bits, as a network of whole numbers computes with them; simulated in float32.

    Weights have a scale for each output channel, activations one for each tensor, symmetric between a layer's factors.
    """

    weight_bits: Annotated[list[Literal[4, 8]], Field(min_length=1)] = [8]
    """Widths that the factors of every layer may have: a dimension of the search, beside format and ranks."""
    other_bits: Literal[8, 32] = 8
    """Width of the weights of layers that stay dense or are pinned; 32 is float32."""
    activation_bits: Literal[8, 32] = 8
    """Width of what goes into every convolution and linear layer, between factors too; 32 is float32."""
    clip: Literal["mse", "percentile"] = "mse"
    """Ranges of activations: those of the least squared error of rounding, or without the outermost 0.01 % of values.
    """


class LatencySpec(Section):
    """How the latency of candidates is measured: each alone, on the device that trials run on, before the search."""

    runtime: Literal["eager", "compile", "onnxruntime"] = "eager"
    """What runs the network where it is deployed: PyTorch as it is, ``torch.compile``, or ONNX Runtime on the CPU."""
    batch_images: Positive = 1
    """Images at a time."""
    threads: Positive | None = None
    """CPU threads; those of a trial by default."""
    table: str | None = None
    """File that ``ranksearch latency`` wrote for this space, maybe on another machine; nothing is measured then."""


class BudgetSpec(Section):
    """What a search may use, and the limits that its result has to keep."""

    trials: Positive = 60
    """How many proposals to try; retries after an interruption are not counted."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall time after which no new trial starts."""
    targets: list[Ratio] = []
    """Shares of the dense network's MACs that matter most: strategies that can aim try these first, each with their
    dearest rank map within it."""
    max_macs_ratio: Ratio | None = None
    """Trials with more MACs than this share of the dense network's are infeasible."""
    max_latency_ratio: Ratio | None = None
    """Trials that are predicted to take more than this share of the dense network's latency are infeasible."""
    max_drop: Annotated[float, Field(ge=0)] | None = None
    """Trials that lose more accuracy than this, in percentage points on the search images, are infeasible."""


class StrategySpec(Section):
    """How proposals are made."""

    name: str = "auto"
    """A strategy, by default ``auto``, or ``optuna`` where a sampler or seeds are named. ``auto``, ``optuna`` and
    ``greedy-multi-step`` learn from the trials, ``random`` does not; ``funnel`` trains the network under a penalty that
    closes ranks, and learns how to; the others read a ladder of rank maps off the price table: ``knapsack``,
    ``greedy``, ``lc``, ``water-filling``, ``energy``, ``uniform``, ``eps``, ``evbmf``, ``alds``."""
    price: str | None = None
    """The loss of a candidate that ``auto``, ``knapsack``, ``greedy``, ``lc`` and ``eps`` reckon with: ``predicted``
    (the error of the table), or a measured one of replacing that layer alone: ``weight``, ``output``, ``divergence``,
    ``loss``, ``second-order``, ``drop``. By default ``divergence`` of ``auto`` and ``predicted`` of the others."""
    price_images: Positive = 256
    """Calibration images, with their labels, that a measured price is measured on."""
    price_points: Annotated[int, Field(ge=2)] | None = 6
    """Candidates of a layer and width, for each rank of a format, that ``divergence``, ``loss`` and ``drop`` are
    measured of; the others' are interpolated. Null: all are measured, as they are for the prices that take little
    time."""
    sampler: str | None = None
    """Optuna's sampler of ``optuna`` and ``funnel``: ``nsga2``, ``nsga3``, ``tpe``, ``gp``, ``qmc``, ``random``, or a
    class as ``package.module:Class``. By default ``nsga2`` of ``optuna`` and ``tpe`` of ``funnel``."""
    seeds: list[str] = ["uniform", "energy"]
    """Strategies whose points ``optuna`` tries first."""
    seed_points: Annotated[int, Field(ge=0)] = 16
    """How many points each of them gives."""
    seed_maps: list[str] = []
    """Rank maps of your own (JSON files) to try first; their ranks are candidates too, of formats that are among
    ``formats``."""
    batch: Positive = 4
    """How many proposals are made before their outcomes are looked at, when ``deterministic``; ``greedy-multi-step``
    measures as many moves at a time."""
    rungs: list[Annotated[float, Field(ge=0, lt=1)]] = []
    """Shares of the training (``evaluation.fine_tune``), rising, that candidates get before the promising ones get all
    of it: with ``[0]`` every candidate is scored untrained first. Only trials with all of it are on the front; each
    promotion is a trial of the budget's. Empty: every candidate gets all of it at once."""
    promote: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the trials of one rung that go on to the next."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the strategy or, of ``optuna``, of its sampler. Of ``auto``: ``first`` (trials
    before it learns, 8), ``min_gain`` (it ends where more trials promise to enlarge the hypervolume by less than this
    share), ``cost``. Of ``funnel``: ``targets`` (shares of the dense MACs to end at, by default those of the budget, or
    0.5, 0.7 and 0.35; an empty list leaves the MACs to strength and threshold), ``settle_steps``, ``penalty_steps``,
    ``weight_rate``, ``gate_rate``, ``penalty`` (``funnel``, ``l1``, ``l2``), ``mac_weighted``, ``scale_free``,
    ``format`` (of the gated layers; by default the first of ``formats`` that a layer can be gated in).
    """

    @model_validator(mode="before")
    @classmethod
    def _of_what_it_names(cls, data: Any) -> Any:
        """Only Optuna's samplers start from seeds, so who names these means ``optuna``."""
        if isinstance(data, dict) and "name" not in data and {"sampler", "seeds", "seed_points"} & data.keys():
            return {**data, "name": "optuna"}
        return data


_RATES: Final = {"adam": 1e-3, "sgd": 1e-2}
_SOFT: Final = {"adam": 8.0, "sgd": 2.0}
"""Of each optimiser the default learning rate, and temperature (benchmarks/results/brief_training.md)."""


class FineTuneSpec(Section):
    """A brief training of the compressed network: one cosine cycle of the learning rate with a linear warm-up.

    A network that the regression has restored stands in a narrow valley: by default the batch norms keep the statistics
    that it was restored under, and Adam gives every factor steps of its own size.
    """

    steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps; 0 trains nothing."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training images, instead of ``steps``."""
    batch_images: Positive = 128
    """Images of an optimiser step."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """Adam with decoupled weight decay, or SGD with Nesterov momentum."""
    learning_rate: Annotated[float, Field(gt=0)] = Field(default_factory=lambda known: _RATES[known["optimiser"]])
    """Largest learning rate of the cycle; by default 0.001 of Adam and 0.01 of SGD."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD, and of Adam the decay of its mean gradient."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """Statistics that batch norms use: those they have, or those of each batch, which the network then learns anew."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of SGD added to the gradient; of Adam weights shrink by it, times the learning rate, at every step."""
    distill: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Weight of the divergence from the dense network's outputs; the rest weighs the labels."""
    temperature: Annotated[float, Field(gt=0)] = Field(default_factory=lambda known: _SOFT[known["optimiser"]])
    """Softening of both outputs in the divergence; by default 8 with Adam and 2 with SGD. Of images that the dense
    network knows by heart, only outputs that are softened much tell what else they are like."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of training; ``auto`` takes bfloat16 on devices that multiply in it, float32 elsewhere."""

    @model_validator(mode="after")
    def _one_length(self) -> FineTuneSpec:
        if self.steps and self.epochs:
            raise ValueError("give steps or epochs, not both")
        return self


class EvaluationSpec(Section):
    """How a proposal becomes a network and a score."""

    factors: Literal["auto", "weight-only", "activation-aware"] = "auto"
    """Kind of factors; ``auto`` takes per candidate the kind nearer to the dense network's outputs."""
    recalibrate: Literal["auto", "always", "never"] = "auto"
    """Whether batch-norm statistics are collected afresh; ``auto`` decides per candidate, likewise."""
    refit: bool = True
    """Sequential regression: going forward once, each layer is refitted on the dense network's outputs."""
    refit_stages: Literal["last", "all"] = "all"
    """What of each layer is refitted: all its stages, or the last alone, which takes about two thirds of the time."""
    refit_images: Positive = 512
    """Calibration images that the regression uses, all in one pass: they bound the memory it takes."""
    select_images: Positive = 512
    """Calibration images on which divergences from the dense network are measured."""
    fine_tune: FineTuneSpec = FineTuneSpec()
    batch_images: Positive = 128
    """Images scored at a time; small batches stay in a processor's cache."""
    report: Literal["front", "all"] = "front"
    """Trials whose accuracy on the report images is measured: those that may be on the front, or every one. Weights
    are kept of the front alone."""


class ResourcesSpec(Section):
    """Where trials run."""

    engine: Literal["local", "ray"] = "local"
    """``local``: in this process, one trial after the other. ``ray``: in parallel on Ray workers."""
    workers: Positive | None = None
    """Trials at once on Ray, as many as fit by default; with ``local`` the processes that measure prices."""
    cpus_per_trial: Annotated[int | float, Field(gt=0)] = 1
    """CPUs of a trial, or a share of one; rounded up, its threads. Results depend on the threads in the last bits, so
    they do not follow the machine."""
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.0
    """Share of a GPU that a trial takes, of its memory too; 0 runs on the CPU. A trial that runs out of memory is tried
    once more alone on its GPU, with all of it."""
    memory_gb_per_trial: Annotated[float, Field(ge=0)] = 0.0
    """Main memory that a trial takes, 2**30 bytes: no more trials start on a machine than fit. 0 counts none."""
    trial_minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall time of one trial: one that takes longer fails. No limit by default."""
    labels: dict[str, str] = {}
    """Labels that machines of a Ray cluster must have to run trials, as ``ray start --labels`` gave them."""
    address: str = "local"
    """Ray cluster to run on; ``local`` starts one on this machine, ``auto`` joins that of this machine."""

    @property
    def threads(self) -> int:
        """CPU threads of a trial."""
        return max(1, ceil(self.cpus_per_trial))

    @property
    def memory_bytes(self) -> int:
        """Main memory that a trial takes."""
        return round(self.memory_gb_per_trial * 2**30)


class JobSpec(Section):
    """What ``ranksearch submit`` sends to a cluster beside the space; a search itself reads none of it."""

    folder: str | None = None
    """Folder that all files sent lie in, relative to the working directory; by default the working directory where the
    space file lies in it, else the space file's folder. Files that the space names by relative paths are sent from
    there, and its Python files where the space names a factory."""
    include: list[str] = []
    """Further files to send: shell patterns in that folder, such as ``classes/*.txt``."""
    requirements: str | None = None
    """File in that folder of requirements that every machine installs first, each pinned as ``name==version``."""
    environment: dict[str, str] = {}
    """Environment variables of the search and its workers on the cluster. Those that the space names as ``${NAME}``
    travel by themselves, with the value that they have where ``submit`` runs unless they are given here."""
    secrets: list[str] = []
    """Names of further environment variables to send whose values are recorded nowhere."""
    python: str = "python"
    """Python of the cluster's machines."""


class TrackingSpec(Section):
    """MLflow."""

    enabled: bool = True
    """Whether the search and its trials are logged to MLflow."""
    uri: str | None = None
    """A tracking server or database; a SQLite file beside the studies by default. A password is written ``${NAME}``,
    and read from that environment variable whenever a connection is made."""
    experiment: str = "ranksearch"
    """MLflow's experiment that the search's run goes to; made where it does not exist."""
    max_runs: Positive = 1000
    """Trials from this number on get a run of their own only where they were on the front when they ended; the table
    among the artifacts has all of them."""


class Space(Section):
    """A search: what to compress, how, by how much, and with what."""

    name: str | None = None
    """Name of the study; that of the file by default."""
    model: ModelSpec
    data: DataSpec = DataSpec()
    layers: LayersSpec = LayersSpec()
    fix: dict[str, Literal["dense"] | PinnedSpec] = {}
    """Layers pinned to a choice: pattern to ``dense`` or ``{format: ..., ranks: [...]}``."""
    formats: Annotated[list[str], Field(min_length=1)] = ["tucker2", "svd"]
    """Formats a layer may take; dense is always among the choices."""
    ranks: RanksSpec = RanksSpec()
    stabilise: StabiliseSpec = StabiliseSpec()
    latency: LatencySpec | None = None
    """Given, latencies are measured and every trial has a predicted one, as it has where an objective or a limit is
    the latency."""
    quantise: QuantiseSpec | None = None
    """Given, every trial is scored with weights and activations of few bits; needed for ``bit-operations``."""
    objectives: Annotated[list[Objective], Field(min_length=2)] = ["accuracy", "macs"]
    """What makes the front; the accuracy and loss are those on the search-validation images. With ``latency``
    candidates are left out that are no faster than the dense layer. ``bit-operations`` are MACs times the bits of the
    weights times those of the activations."""
    budget: BudgetSpec = BudgetSpec()
    strategy: StrategySpec = StrategySpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()
    job: JobSpec = JobSpec()
    seed: Annotated[int, Field(ge=0)] = 0
    """Of all that is drawn: proposals, pixels of the regression, batches of training."""
    deterministic: bool = True
    """Proposals in synchronous batches: the same seed gives the same trials with any number of workers."""

    @model_validator(mode="after")
    def _objectives_differ(self) -> Space:
        if len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives must differ, found {self.objectives}")
        if not {"accuracy", "loss"} & set(self.objectives) or not set(COSTS) & set(self.objectives):
            raise ValueError(
                f"objectives must hold a quality (accuracy or loss) and a cost ({', '.join(COSTS[:-1])} or {COSTS[-1]})"
            )
        return self

    @model_validator(mode="after")
    def _rungs(self) -> Space:
        rungs, tuned = self.strategy.rungs, self.evaluation.fine_tune
        if not rungs:
            return self
        if sorted(set(rungs)) != rungs:
            raise ValueError(f"strategy.rungs must rise, found {rungs}")
        if not tuned.steps and tuned.epochs is None:
            raise ValueError(
                f"strategy.rungs are shares of a training, and evaluation.fine_tune trains nothing, found {rungs}: "
                "give it steps or epochs, or leave the rungs out"
            )
        if "funnel" in (self.strategy.name, *self.strategy.seeds):
            raise ValueError(
                "a funnel run is a training of its own: take another strategy, or leave out strategy.rungs"
            )
        return self

    @model_validator(mode="after")
    def _widths(self) -> Space:
        if "bit-operations" in self.objectives and self.quantise is None:
            raise ValueError("the objective bit-operations needs widths to count with: add a section `quantise`")
        if self.quantise is not None:
            if len(set(self.quantise.weight_bits)) != len(self.quantise.weight_bits):
                raise ValueError(f"quantise.weight_bits must differ, found {self.quantise.weight_bits}")
            if "funnel" in (self.strategy.name, *self.strategy.seeds):
                raise ValueError("a funnel run trains in float32: take another strategy, or leave out `quantise`")
            if not self.evaluation.refit:
                raise ValueError("weights of few bits are restored by the regression: quantise needs evaluation.refit")
        return self

    @model_validator(mode="after")
    def _latency_of_rank_maps(self) -> Space:
        if self.latencies is not None and "funnel" in (self.strategy.name, *self.strategy.seeds):
            raise ValueError("a funnel run ends in ranks that no latency was measured for: take another strategy")
        return self

    @property
    def latencies(self) -> LatencySpec | None:
        """How latencies are measured; None where nothing asks for them."""
        return LatencySpec() if self.latency is None and self.needs_latencies else self.latency

    @property
    def needs_latencies(self) -> bool:
        """Whether an objective or a limit is the latency."""
        return "latency" in self.objectives or self.budget.max_latency_ratio is not None
