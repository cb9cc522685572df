"""Settings of a run as frozen dataclasses. Imports no jax, so that `metalr --help` is instant."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagConversionOff, Positional, arg

from metalr.spaces import GridConfig, SpaceConfig


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What one task is."""

    family: Literal["digits", "rotated", "permuted", "relabeled", "scaled", "classes"] = "digits"
    """Task family: which digits, which transform; see docs/tasks.md."""
    way: int = 3
    """Classes a task (families rotated, permuted, relabeled and scaled use all classes of the data)."""
    shot: int = 1
    """Support images per class."""
    query: int = 15
    """Query images per class."""
    distort: float = 0.0
    """Family classes, meta-training only: strength, 0..1, of one random affine map an episode, mirrored or not, and
    of a weaker one an image."""
    turns: FlagConversionOff[bool] = True  # --tasks.turns False
    """Family classes: take each class in four quarter turns as four classes; the images have to be square."""
    label_noise: float = 0.0
    """Share of the support labels that are drawn anew at random, in every split; query labels stay."""
    shots: tuple[int, ...] = ()
    """Meta-training with another number of support images per class in every outer step, drawn from these; validation
    is the mean over all of them. Results are of tasks with `shot`. None given: always `shot`."""


MODEL_SETTINGS = {
    "mlp": ("widths", "dropout"),
    "conv4": ("channels", "layers", "norm"),
    "rnn": ("cell", "width"),
    "transformer": ("width", "layers", "attention_heads"),
}  # and dtype, which all take


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. A setting that it does not take must stay at its default."""

    name: Literal["mlp", "conv4", "rnn", "transformer"] = "mlp"
    """Kind of network; rnn and transformer read an image row by row."""
    widths: tuple[int, ...] = (128,)
    """mlp: hidden layers."""
    dropout: float = 0.0
    """mlp: dropout rate, active in every inner step (the reference MLP of the full-data benchmark has 0.2)."""
    channels: int = 64
    """conv4: channels of each layer."""
    layers: int = 4
    """conv4: number of convolutions; transformer: of blocks."""
    norm: Literal["batch", "support", "instance", "none"] = "batch"
    """conv4: normalise by the statistics of the whole batch (transductive), of the support set, of each image, or not
    at all."""
    cell: Literal["gru", "lstm"] = "gru"
    """rnn: kind of cell."""
    width: int = 128
    """rnn: state size; transformer: size of a token."""
    attention_heads: int = 4
    """transformer: heads of each attention."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute layers in this dtype; params, rates, norms and loss stay in float32."""

    @property
    def own(self) -> bool:
        """Whether it is a network of the user's own, which no config can build."""
        return self.name == "custom"

    @classmethod
    def of(cls, model: Any) -> ModelConfig:
        """What says as much of a models.Model as a config can: all, or of a network of your own that it is one."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in model.settings.items()}
        for of_inner_loop in ("head_start", "views"):
            given.pop(of_inner_loop, None)
        return cls(model.name, **given)

    def settings(self) -> dict[str, Any]:
        """The settings that this model takes."""
        return {name: getattr(self, name) for name in (*MODEL_SETTINGS.get(self.name, ()), "dtype")}


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """The inner loop. `algorithm` is a row of choices; the settings that are None come from it."""

    algorithm: Literal[
        "joint",
        "maml",
        "fomaml",
        "reptile",
        "imaml",
        "anil",
        "boil",
        "meta_sgd",
        "meta_sgd_layer",
        "lslr",
        "maml_pp",
        "alfa",
        "unicorn_maml",
        "proto_maml",
    ] = "meta_sgd_layer"
    """Row of the algorithm table."""
    steps: int = 5
    """Inner steps that are trained."""
    rate: float | None = None
    """Learning rate that meta-training starts from; None: 0.1 for classes, 0.01 for numbers, 1 for a base that needs
    no rate."""
    granularity: Literal["shared", "layer", "tensor", "channel", "parameter"] | None = None
    """What shares one learning rate."""
    per_step: bool | None = None
    """A rate of its own for every step."""
    knots: int = 0
    """A schedule of that many learned rates, stretched over any number of steps; 0: none."""
    learned: bool | None = None
    """Learn the rates (and momentum, decay and so on)."""
    first_order: bool | None = None
    """Leave second derivatives out of the meta-gradient."""
    adapts: Literal["all", "head", "body"] | None = None
    """Which layers adapt."""
    head_start: Literal["learned", "shared", "zero", "prototypes"] | None = None
    """Where the output layer of a fine-tune starts; all but learned take tasks with any number of classes."""
    views: int = 0
    """prototypes: take the means of the classes over so many distorted copies of each support image too."""
    signed: bool = False
    """Let rates turn negative, as Meta-SGD's paper does; otherwise their logarithm is learned."""
    lowest: float | None = None
    """Smallest rate, by projection; 0 with signed lets rates be exactly zero: a learned mask of what adapts."""
    highest: float | None = None
    """Largest rate, by projection."""
    extend: Literal["hold", "mean", "error"] = "hold"
    """Per-step rates beyond the trained steps."""
    base: str = "sgd"
    """What rates scale: the gradient (sgd), Adam's direction (adam), the steps of an optimizer that needs no rate
    (momo_adam, momo, cocob, prodigy, dadapt_adamw, dog, mechanize), or those of any of optax at a rate of 1."""
    momentum: float | None = None
    """Start of a learned momentum per layer."""
    decay: float | None = None
    """Start of a learned weight decay per layer, a share of the weight in each step."""
    clip: float | None = None
    """Start of a learned largest gradient norm per layer."""
    dropout: float | None = None
    """Start of a learned dropout rate (mlp, as Gaussian noise)."""
    proximal: float | None = None
    """Start of a learned pull towards the init (imaml: fixed)."""
    horizons: tuple[int, ...] = ()
    """Train at these numbers of inner steps: every outer step draws one. None: always inner.steps."""
    horizon_power: float | None = None
    """Start of a learned power per layer: rates of a fine-tune of N steps are multiplied by (inner.steps / N) ** power,
    so that one schedule serves short and long ones; with inner.horizons."""
    support_power: float | None = None
    """Learn, per layer, by which power of its number of examples the rates of another support set are larger (from this
    start; 0: as large); it takes tasks.shots."""
    predicted: bool | None = None
    """Predict rates and decay of each step from the task's gradients and weights."""
    batch_size: int | None = None
    """Minibatch of the support set in each step; None: all of it."""
    derivative: Literal["auto", "reverse", "remat", "truncated", "forward", "evolution"] = "auto"
    """How the meta-gradient goes through the inner steps; auto picks by memory, see docs/long.md."""
    last: int = 10
    """truncated: how many steps, the last ones, are differentiated."""
    pairs: int = 4
    """evolution: pairs of fine-tunes, of each task of an outer step."""
    solver_steps: int = 5
    """imaml: steps of conjugate gradient."""


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """The outer loop."""

    steps: int = 2000
    """Outer steps."""
    meta_batch: int = 16
    """Tasks an outer step."""
    learns: Literal["both", "init", "rates", "rates_of_init"] = "both"
    """What is learned; rates: every outer step draws a new random init, so that the rates stand alone; rates_of_init:
    those of the init that --init gives, which stays as it is."""
    part: Literal["train", "validation"] = "train"
    """Tasks that outer steps draw. validation, if rates alone learn: an init that has seen the training tasks needs
    hardly a step there, and larger ones on new tasks. Results are of meta-test tasks as ever."""
    calibrate: bool = False
    """Minimise the query loss at its best temperature, of each task: for classes, where accuracy counts and confidence
    does not."""
    multi_step: float | None = None
    """Share of the outer steps over which the losses after all inner steps count; None: the algorithm's."""
    first_order_share: float | None = None
    """Share of the outer steps, at the start, that are first order; None: the algorithm's."""
    init_rate: float = 1e-3
    """Outer learning rate of the init."""
    rates_rate: float = 1e-2
    """Outer learning rate of the inner rates (of their logarithms, unless signed)."""
    optimizer: str = "adam"
    """Any optimizer of optax that is made from a learning rate alone."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How both outer learning rates go over the steps."""
    clip: float | None = 10.0
    """Largest global norm of the meta-gradient; None does not clip."""
    validate_every: int = 250
    """Outer steps between two validations on meta-validation tasks; the best init and rates are kept."""
    checkpoint_every: int = 250
    """Outer steps between two checkpoints, from which `metalr train --resume RUN` goes on."""
    on_divergence: Literal["stop", "skip"] = "stop"
    """A step whose loss, gradient or result is not finite: stop with an error, or skip that update and log it."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The held-out protocol."""

    episodes: int = 600
    """Fixed meta-test tasks, the same for every method."""
    validation_episodes: int = 200
    """Fixed meta-validation tasks, for choosing among checkpoints."""
    steps: int | None = None
    """Length of the adaptation curve, beyond the trained steps too; None: 10, or more if more are trained
    (as many as are trained with inner.extend error)."""
    seed: int = 0
    """Seed of those tasks."""
    shown_tasks: int = 3
    """Held-out tasks that the report shows, example by example, 0 to 3: the best, the median and the worst."""


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """What the columns of a table are: --data table.csv (or .parquet), a row an example."""

    task_column: str | None = None
    """The column that says which task a row is of. Whole tasks are held out."""
    target: tuple[str, ...] = ()
    """The column to predict (several with the objective squared_error)."""
    features: tuple[str, ...] = ()
    """The columns to predict from; default: all others."""
    shot: int = 10
    """Rows of a support set."""
    query: int = 10
    """Rows of a query set."""
    standardise: Literal["auto", "none", "inputs", "both"] = "auto"
    """By means and deviations of meta-training tasks; auto: inputs, and targets that are numbers."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run is laid out over the devices of each process. Results are the same but for the last digits."""

    tasks: int | None = None
    """Devices that the tasks of a meta-batch are split over; None: as many as divide it."""
    params: int = 1
    """Devices that each large tensor is split over, for a network that one device does not hold (FSDP); 1: none."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One meta-training run: data, tasks, model, inner loop, outer loop, evaluation."""

    data: str = "mnist12k"
    """mnist12k (bundled), mnist, another prepared name (`metalr data list`), or a path to an .npz, .csv or .parquet."""
    tasks: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig = OuterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    grid: GridConfig = GridConfig()
    mesh: MeshConfig = MeshConfig()
    init: Path | None = None
    """Run or artifact folder whose init and rates meta-training starts from, with a fresh outer optimizer (the init
    alone if its rates were not learned)."""
    seed: int = 0
    """Seed of meta-training."""
    out: Path | None = None
    """Run folder; default in runs/, named by data, tasks, algorithm, seed and settings, and numbered if taken."""
    overwrite: bool = False
    """Replace a run folder that exists."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where numbers go while it runs, beside metrics.jsonl; each needs the extra of its name."""
    objective: str = "cross_entropy"
    """cross_entropy (classes, as of images), binary_cross_entropy (0, 1), squared_error or absolute_error (numbers)."""
    table: Annotated[TableConfig, arg(name="data")] = TableConfig()

    @property
    def curve_steps(self) -> int:
        """Length of the adaptation curve."""
        if self.evaluation.steps is not None:
            return self.evaluation.steps
        return self.inner.steps if self.inner.extend == "error" else max(10, self.inner.steps)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return _plain(self)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """One hyperparameter search: for a network on a whole dataset, or on one held-out task of a family."""

    searcher: Positional[Literal["grid", "random", "tpe", "asha"]] = "grid"
    """grid: all cells, rates side by side; random, tpe and asha: Optuna's (pip install 'metalr[search]')."""
    data: str = "mnist12k"
    """mnist12k (bundled), mnist, another prepared name (`metalr data list`), or a path to an .npz."""
    task: int | None = None
    """Number of a meta-test task of `tasks`; None: the whole dataset as it is."""
    tasks: TaskConfig = TaskConfig(family="rotated", way=10, shot=100, query=50)
    """What a task is, if one is given."""
    model: ModelConfig = ModelConfig(dropout=0.2)
    space: SpaceConfig = SpaceConfig()
    optimizer: str = "adam"
    """Any optimizer of optax that is made from a learning rate alone."""
    trials: int | None = None
    """How many trials; None: as many as the grid has cells."""
    seeds: int = 1
    """Inits and minibatch orders that every trial is averaged over."""
    validation: float = 0.2
    """Share of the training images that chooses, by class."""
    seed: int = 0
    """Seed of the trials, and of which images choose."""
    out: Path | None = None
    """Folder; default runs/search-SEARCHER, numbered if taken."""
    overwrite: bool = False
    """Replace a search that exists."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return _plain(self)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """A comparison of finished runs with everything else, on held-out tasks of their family (or of other data)."""

    data: str | None = None
    """Other data than the runs' own: what was learned there is fine-tuned here."""
    family: str | None = None
    """Another task family than the runs'."""
    shot: int | None = None
    """Support images per class; None: the runs'."""
    query: int | None = None
    """Query images per class; None: the runs'."""
    label_noise: float | None = None
    """Share of the support labels that are drawn anew at random; None: the runs'."""
    widths: tuple[int, ...] | None = None
    """Another mlp than the runs', with hidden layers of these widths: the learned rates alone go over to it, layer by
    layer as they are first, hidden or last. All methods start from a random init."""
    fan_in: float = 0.0
    """With widths: rates of kernels are multiplied by (learned inputs / own inputs) to this power, 0..1."""
    tasks: int = 20
    """Meta-test tasks that all methods meet."""
    searched: int = 5
    """How many of them, the first ones, are searched task by task; 0: none, or 2 and more."""
    lengths: tuple[float, ...] = (1.0, 5.0, 20.0)
    """Lengths of the fine-tunes without a search: epochs, or inner steps where a step takes the whole support set."""
    batch_size: int | None = None
    """Minibatch of those; None: the runs' own. A support set that is not larger is taken whole."""
    space: SpaceConfig = SpaceConfig()
    """What is searched, in epochs."""
    searchers: tuple[str, ...] = ("grid", "random", "tpe", "asha", "tpe+")
    """From the random init; tpe+ is TPE that tries the learned rates first (only where they scale Adam's direction);
    portfolio: cells of the grid that did best on meta-validation tasks, tried in turn."""
    budgets: tuple[float, ...] = (1.0, 3.0, 10.0, 27.0)
    """Budgets of the searches, in mean cells of the grid."""
    rivals: tuple[str, ...] = ("momo_adam", "cocob", "schedule_free_sgd")
    """Optimizers that need no learning rate, at their own defaults, from the random and the pre-trained init; also
    momo, schedule_free_adamw, prodigy, dadapt_adamw, dog, mechanize, adam_cosine."""
    early_stopping: bool = False
    """Stop at the number of steps, of `lengths` up to each, that was best on meta-validation tasks: chosen for what was
    learned, and together with the rate and optimizer for one tuned rate."""
    tuning_tasks: int = 8
    """Meta-validation tasks that the one tuned rate, the portfolios and where to stop early are chosen on."""
    part: Literal["test", "validation"] = "test"
    """Which held-out tasks all methods meet. Choose between settings of meta-training on validation, and look at test
    once."""
    seed: int = 0
    """Seed of the tasks."""
    out: Path | None = None
    """Folder; default runs/compare, numbered if taken."""
    overwrite: bool = False
    """Replace a comparison that exists."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return _plain(self)


@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """What each job of a Slurm cluster asks for; None leaves it to the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: int = 60
    """Longest time of a job. One that needs more saves, and is submitted again (`attempts`)."""
    gpus: int | None = None
    """GPUs of each machine of a job."""
    cores: int | None = None
    """CPU cores of a process."""
    nodes: int = 1
    """Machines of a job. With several, or several processes, a job is one run over all of them."""
    processes: int = 1
    """Processes on each of its machines."""
    memory: str | None = None
    """Memory of each machine, such as 16GB."""
    setup: tuple[str, ...] = ()
    """Lines of shell before each run, such as "module load cuda"."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local and debug are submitit's stand-ins on this machine, to try it out."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """How the runs of a sweep are chosen and carried out; which settings are swept is said beside it."""

    sampler: Literal["grid", "random", "tpe"] = "grid"
    """grid: every combination of the values; random: drawn from them, or from ranges LOW..HIGH; tpe: Optuna's, by the
    score on meta-validation tasks (pip install 'metalr[search]')."""
    trials: int | None = None
    """random and tpe: how many combinations, each run for every seed."""
    workers: int = 1
    """Runs at a time, each in a process of its own with its share of the cores."""
    devices: tuple[str, ...] = ()
    """What CUDA_VISIBLE_DEVICES is for the workers, dealt out in turn (0 1 2 3); none: as it is."""
    launcher: Literal["local", "slurm"] = "local"
    """local: processes on this machine; slurm: an array with a job for each run, through submitit (pip install
    'metalr[slurm]')."""
    slurm: SlurmConfig = SlurmConfig()
    seeds_together: bool = False
    """All seeds of a combination as one program, side by side: for accelerators; on CPUs it is slower."""
    timeout: float | None = None
    """Seconds after which a run is stopped, saved, and counted as failed; of seeds together, for each of them."""
    attempts: int = 3
    """How often a run is begun or taken up again, if it is killed, before it counts as failed."""
    sampler_seed: int = 0
    """Seed of what random and tpe draw."""
    out: Path | None = None
    """Folder; default runs/sweep, numbered if taken."""
    overwrite: bool = False
    """Replace a sweep that exists."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return _plain(self)


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


QUICKSTART = TrainConfig(
    tasks=TaskConfig(family="relabeled", way=10, shot=5),
    outer=OuterConfig(steps=1000, meta_batch=16),
    grid=GridConfig(run=True),
)
