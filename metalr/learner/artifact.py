"""What meta-training leaves behind: a Learner, and its folder on disk that anyone can check, read and reuse.

A folder holds learner.safetensors (init and actual rates), README.md (a short model card) and metalr.json (format
version, model, rates, tasks, versions, sha256 of every file and of its own content). Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as tensor_bytes

import metalr
from metalr import data, inner, models, trees
from metalr.errors import ArtifactError, ConfigError, DataError, MetalrWarning, one_line
from metalr.inner import descent, factored, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.models import Model
from metalr.outer import devices
from metalr.storage import folders, sealed
from metalr.types import Params, Rates

FORMAT = 2  # 2: hyperparameters beside rates, schedules; 1 is read too
TENSORS, FACTS, CARD = "learner.safetensors", "metalr.json", "README.md"
FEW_IMAGES_A_CLASS = 2  # below, a transductive network's statistics say too little
LEARNED, FIXED = "learned rates", "fixed rates"  # what reports call hyperparameters
MAX_BYTES = {TENSORS: 1 << 32, FACTS: sealed.MANIFEST_BYTES, CARD: 1 << 24}


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """A learned init and learned rates, ready to fine-tune on a new task.

    Attributes:
      model: the network.
      spec: the static choices about the rates.
      init: the learned initialization, the model's params pytree.
      rates: the learned hyperparameters (actual, not logarithms), name -> array; see metalr.inner.hyperparameters.
      facts: where it comes from: tasks, data, split hash, training settings. Plain JSON values.
    """

    model: Model
    spec: RatesSpec
    init: Params
    rates: Rates
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def adapt(self, support_x: Any, support_y: Any, steps: int | None = None, *, init: Params | None = None) -> Params:
        """Fine-tune on a task's support set; compiled once a shape.

        Args:
          support_x: [support, height, width] or [support, height, width, channels]; uint8 0..255 or float 0..1.
            A further leading axis adapts many tasks at once.
          support_y: [support] integers (or [tasks, support]), the labels 0..n-1 with n at most the trained way, each
            present in every task.
          steps: inner steps; default: as many as were trained.
          init: params to start from; default: the learned init. Rates that were learned alone (outer.learns "rates")
            hold for any random init, `model.init(key)`; the one stored beside them is such a one.

        A schedule with knots is stretched over the steps. Minibatches, if training had them, and dropout, if the
        model has it, are drawn in every step as they were in training, with a fixed key.

        Returns:
          Params as in `init` (with a leading axis [tasks] for many tasks).

        Raises:
          DataError: a wrong shape, dtype, label or pixel. ConfigError: steps that spec.extend forbids, or an init of
            another network.
        """
        if init is not None:
            expected, came = (jax.tree.map(np.shape, tree) for tree in (self.init, init))
            if came != expected:
                raise ConfigError(f"init: expected params as the learner's own init, {expected}, got {came}")
        start = self.init if init is None else init
        steps = self.spec.steps if steps is None else steps
        hyperparameters.check_steps(self.spec, steps)
        batched = np.ndim(support_y) == 2
        x = self._images(support_x, "support_x", batched)
        y = self._labels(support_y, x.shape[: 1 + batched])
        return self._adapt(start, self.rates, x, y, steps=int(steps))

    def apply(self, params: Params, x: Any, support_x: Any = None) -> jax.Array:
        """Logits [n, way] float32 of images in any of the forms that `adapt` takes (differentiable in params).

        Params with a leading axis [tasks], as from `adapt` on many tasks, take images with one too.

        Args:
          support_x: the images that the params were adapted to; needed by a network that normalises by their
            statistics (conv4 with norm "support"), and by no other.

        Warns (MetalrWarning) where a transductive network is given few images: it normalises by the statistics of the
        images that are given together, which then say little.

        Raises:
          ConfigError: params of another network. DataError: a wrong shape, dtype or pixel.
        """
        batched, tasks = self._check_params(params)
        images = self._images(x, "x", batched)
        if batched and images.shape[0] != tasks:
            raise DataError(f"x: expected images for {tasks} tasks, as params are, got {images.shape[0]}")
        if self.model.uses_support != (support_x is not None):
            expected = "the task's support images" if self.model.uses_support else "None with this network"
            raise ConfigError(f"support_x: expected {expected}, got {'None' if support_x is None else 'images'}")
        if support_x is not None:
            return self._apply(params, images, self._images(support_x, "support_x", batched))
        count = images.shape[1 if batched else 0]
        if self.model.transductive and count < FEW_IMAGES_A_CLASS * self.model.way:
            warnings.warn(
                f"x: {count} images for {self.model.way} classes: this network normalises by the statistics of the "
                "images "
                "given together (transductive), so predictions are good for many images of all classes only; give "
                "more, or train a network with model.norm support",
                MetalrWarning,
                stacklevel=2,
            )
        return self._apply(params, images)

    def _check_params(self, params: Params) -> tuple[bool, int]:
        """(whether params have a leading axis [tasks], how many). Raises ConfigError for those of another network."""
        expected, came = trees.leaf_shapes(self.init), trees.leaf_shapes(params)
        leading = {shape[: len(shape) - len(expected[name])] for name, shape in came.items() if name in expected}
        lead = leading.pop() if len(leading) == 1 else ()
        for name in sorted({*expected, *came}):
            wanted = (*lead, *expected[name]) if name in expected else None
            if came.get(name) != wanted or len(lead) > 1:
                raise ConfigError(
                    f"params: expected {name} of shape {'absent' if wanted is None else list(wanted)}, as in `init`, "
                    "got "
                    f"{list(came[name]) if name in came else 'none'}"
                )
        return bool(lead), lead[0] if lead else 0

    def __repr__(self) -> str:
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.init))
        shape = "x".join(map(str, self.model.input_shape))
        tasks = self.facts.get("tasks", {})
        trained = f", trained on {tasks['family']!r} tasks" if "family" in tasks else ""
        return (
            f"Learner({self.model.name} with {count:,} params, {shape} images, {self.model.way} classes; "
            f"{self.kind_of_rates} ({self.spec.granularity}, {self.spec.steps} steps){trained})"
        )

    def as_optax(self, steps: int | None = None) -> optax.GradientTransformation:
        """Gradient descent with the learned hyperparameters, for any training loop over params named as `init`.

        Give params to its update(grads, state, params). What is not part of an update stays with your loop:
        minibatches (`spec.batch_size`) and dropout (`rates["dropout:all"]`).

        Args:
          steps: the length of your fine-tune, over which a schedule with knots is stretched; default: as trained.

        Under `optax.multi_transform` or `optax.masked` it takes a part of the tree too, but for what needs more than a
        tensor's own gradient: prediction (all layers) and clipping (whole layers) say so.

        Beyond the trained steps, per-step rates go on by spec.extend ("error" cannot be raised in a compiled loop: it
        holds).

        Raises ConfigError unless steps is None or an integer of at least 1.
        """
        if steps is not None and (not isinstance(steps, (int, np.integer)) or steps < 1):
            raise ConfigError(f"steps: expected an integer of at least 1, got {steps!r}")
        return descent.optimizer(self.spec, self.rates, steps, tensors=trees.leaf_names(self.init))

    @property
    def kind_of_rates(self) -> str:
        """What reports call them: "learned rates", or "fixed rates" as of MAML."""
        return LEARNED if self.facts.get("learned_rates", True) else FIXED

    @functools.cached_property
    def _adapt(self) -> Callable[..., Params]:
        model, spec = self.model, self.spec

        def adapt(init: Params, rates: Rates, x: jax.Array, y: jax.Array, *, steps: int) -> Params:
            fast = factored.pays(model, spec, y.shape[-1], steps)

            def tasks(
                apply: models.Apply, group: int, init: Params, rates: Rates, x: jax.Array, y: jax.Array
            ) -> Params:
                def one(task: tuple[jax.Array, jax.Array]) -> Params:
                    if fast:
                        return factored.adapt(init, rates, spec, *task, steps)
                    drop = hyperparameters.dropout(spec, rates, model.dropout)
                    return inner.adapt(
                        apply, init, *task, descent.optimizer(spec, rates, steps), steps, key=jax.random.key(0),
                        batch_size=spec.minibatch(y.shape[-1]), dropout=drop,
                    )[0]  # fmt: skip

                return devices.map_tasks(one, (x, y), group) if y.ndim == 2 else one((x, y))

            def here(init: Params, rates: Rates, x: jax.Array, y: jax.Array) -> Params:
                group = 1
                if y.ndim == 2:
                    products = model.cpu_apply or model.apply
                    group = devices.fitting_group(
                        lambda t: tasks(products, 1, init, rates, models.unit(t[0]), t[1]), (x, y)
                    )
                return devices.by_platform(model, tasks, init, rates, models.unit(x), y, accelerator_group=group)

            if y.ndim == 1:
                return here(init, rates, x, y)
            return devices.split_tasks(here, devices.task_mesh(y.shape[0]), 2, mean=False)(init, rates, x, y)

        return jax.jit(adapt, static_argnames="steps")

    @functools.cached_property
    def _apply(self) -> Callable[..., jax.Array]:
        def logits(params: Params, x: jax.Array, support_x: jax.Array | None = None) -> jax.Array:
            def forward(apply: models.Apply, _: int, params: Params, x: jax.Array, *support: jax.Array) -> jax.Array:
                def one(params: Params, x: jax.Array, *support: jax.Array) -> jax.Array:
                    return models.predict(apply, params, support[0], x) if support else apply(params, x)

                return jax.vmap(one)(params, x, *support) if x.ndim == 5 else one(params, x, *support)

            support = () if support_x is None else (models.unit(support_x),)
            return devices.by_platform(self.model, forward, params, models.unit(x), *support)

        return jax.jit(logits)

    def _images(self, x: Any, what: str, batched: bool) -> Any:
        height, width, channels = self.model.input_shape
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        lead = x.shape[: 1 + batched]
        if x.shape[1 + batched :] not in ((height, width), (height, width, channels)) or (
            x.ndim == 2 + len(lead) and channels != 1
        ):
            axes = "[tasks, n, " if batched else "[n, "
            raise DataError(
                f"{what}: expected shape {axes}{height}, {width}, {channels}] (channel axis optional if 1), "
                f"got {list(x.shape)}"
            )
        if not all(lead):
            raise DataError(f"{what}: expected at least one image, got shape {list(x.shape)}")
        if isinstance(x, jax.core.Tracer):
            if x.dtype != np.uint8 and not jnp.issubdtype(x.dtype, jnp.floating):
                raise DataError(f"{what}: expected dtype uint8 (0..255) or float (0..1), got {x.dtype}")
        else:
            data.check_pixels(np.asarray(x), what)
        return x.reshape(*lead, height, width, channels)

    def _labels(self, y: Any, shape: tuple[int, ...]) -> Any:
        y = y if isinstance(y, jax.Array) else np.asarray(y)
        if y.shape != shape or not np.issubdtype(y.dtype, np.integer):
            raise DataError(f"support_y: expected integers of shape {list(shape)}, got {y.dtype} {list(y.shape)}")
        if not isinstance(y, jax.core.Tracer):
            values = np.asarray(y)
            if values.min() < 0 or values.max() >= self.model.way:
                raise DataError(
                    f"support_y: expected labels 0..{self.model.way - 1} (trained {self.model.way}-way), "
                    f"got {values.min()}..{values.max()}"
                )
            counts = (np.atleast_2d(values)[..., None] == np.arange(values.max() + 1)).any(1)
            if not counts.all():
                missing = int(np.argwhere(~counts)[0, 1])
                raise DataError(f"support_y: expected at least one image of each class, got none of {missing}")
        return y.astype(np.int32)


def save(path: Path | str, learner: Learner, *, overwrite: bool = False) -> Path:
    """Write an artifact folder, whole or not at all; returns its path.

    Raises:
      ArtifactError: the folder exists (and not overwrite), or a value is not finite. StorageError: it cannot be
        written.
    """
    path = Path(path).resolve()
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path}: exists already; pass another path, or overwrite=True")
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= set(MAX_BYTES)):
        raise ArtifactError(f"{path}: expected an artifact folder to overwrite, got something else")
    tensors = trees.named_arrays(learner.init, "init") | {
        f"rates/{group}": np.asarray(value, order="C") for group, value in learner.rates.items()
    }
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ArtifactError(f"{name}: expected finite values, got {int((~np.isfinite(value)).sum())} others")
    contents = {TENSORS: tensor_bytes(tensors)}
    facts = {
        "format": FORMAT,
        "model": {
            "name": learner.model.name,
            "way": learner.model.way,
            "input_shape": list(learner.model.input_shape),
            "head": learner.model.head,
            "settings": learner.model.settings,
            "transductive": learner.model.transductive,
        },
        "preprocessing": "uint8 / 255, or float 0..1 as it is; shape [n, height, width, channels]; no centring",
        "rates": dataclasses.asdict(learner.spec),
        "inner_steps": learner.spec.steps,
        "facts": learner.facts,
        "versions": {"metalr": metalr.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }
    contents[CARD] = _card(learner, facts).encode()
    folders.make(path.parent, parents=True)
    sealed.write(path, contents, FACTS, facts)
    return path


def describe(learner: Learner) -> dict[str, Any]:
    """What was learned, as plain JSON values: for `metalr show` and the model card.

    Keys: model, rule, steps, rates and starts (name -> mean, or a list over time; and where training began),
    rates_health, adapts (rate's name -> whether any of it is alive), fixed (tensors without a rate), facts.
    """
    spec, rates = learner.spec, learner.rates
    begun = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, learner.init))
    starts = {name: float(np.ravel(value)[0]) for name, value in hyperparameters.summary(spec, begun).items()}
    health = hyperparameters.health(spec, rates)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(learner.init)]
    time = f"{spec.knots} knots over any number of steps" if spec.knots else "per step" if spec.per_step else "constant"
    parts = [f"one rate a {spec.granularity}" if spec.granularity != "shared" else "one shared rate", time, spec.base]
    parts += [f"minibatches of {spec.batch_size}"] * (spec.batch_size is not None)
    return {
        "model": learner.model.name,
        "rule": ", ".join([*parts, "positive" if spec.positive else "signed"] + ["predicted"] * spec.predicted),
        "steps": spec.steps,
        "rates": hyperparameters.summary(spec, rates),
        "starts": starts,
        "rates_health": health,
        "adapts": {name: shares["dead"] < 1 for name, shares in health.items()},
        "fixed": [trees.path_name(path) for path in paths if hyperparameters.group_of(spec, path) is None],
        "facts": learner.facts,
    }


def _card(learner: Learner, facts: dict[str, Any]) -> str:
    rows = "\n".join(f"| {g} | {v} |" for g, v in hyperparameters.summary(learner.spec, learner.rates).items())
    norm = "Predictions depend on the other images of the batch (transductive).\n" if learner.model.transductive else ""
    alone = learner.facts.get("outer", {}).get("learns") == "rates"
    init = "a random initialization that was not learned" if alone else "a meta-learned initialization"
    return (
        f"# A metalr learner\n\nA {facts['model']['name']} with {learner.model.way} outputs for "
        f"{'x'.join(map(str, learner.model.input_shape))} images: {init} and meta-learned inner-loop "
        f"learning rates ({learner.spec.granularity}), trained for {learner.spec.steps} steps.\n{norm}\n"
        '```python\nimport metalr\nlearned = metalr.load("this/folder")\n'
        "fast = learned.adapt(support_x, support_y)\nlogits = learned.apply(fast, query_x)\n```\n\n"
        f"| group | learning rate (mean) |\n|---|---|\n{rows}\n\n"
        f"Trained on:\n\n```json\n{json.dumps(learner.facts, indent=1)}\n```\n"
    )


def folder_of(path: Path | str) -> Path:
    """The artifact folder that is meant by it or by its run folder.

    Raises ArtifactError for the folder of a run that has not got as far.
    """
    path = Path(path)
    if (path / FACTS).exists() or not (path / "config.json").is_file():
        return path
    if not (path / "artifact").is_dir():
        raise ArtifactError(
            f"{path}: expected a finished run, found one without an artifact; go on with: metalr train --resume {path}"
        )
    return path / "artifact"


def load(path: Path | str, model: Model | None = None) -> Learner:
    """Read an artifact after checking its hashes, names, shapes, dtypes and values.

    Args:
      path: an artifact folder, or a run folder with one.
      model: needed for a custom model only, built as it was for training.

    Raises:
      ArtifactError: missing, damaged, of a newer format, or not fitting the model.
    """
    return _load(folder_of(path), model)


def load_to_show(path: Path | str) -> Learner:
    """As `load`, but of a custom model too, without its code: it can be looked at, not applied."""
    return _load(folder_of(path), None, without_code=True)


def _without_code(path: Path, facts: dict[str, Any], info: dict[str, Any]) -> Model:
    """A custom model that is known by its params only."""
    try:
        tensors = parse_tensors(sealed.read_file(path, TENSORS, facts, MAX_BYTES[TENSORS]))
    except SafetensorError as error:
        raise ArtifactError(f"{path / TENSORS}: not a safetensors file: {one_line(error)}") from error
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        kind, *parts = name.split("/")
        if kind == "init":
            at = tree
            for part in parts[:-1]:
                at = at.setdefault(part, {})
            at[parts[-1]] = value

    def refuse(*_: Any, **__: Any) -> Any:
        raise ArtifactError(f"{path}: holds a custom model; to apply it: metalr.load(path, model=...)")

    settings: dict[str, Any] = {"input_shape": tuple(info["input_shape"]), "way": info["way"], "head": info["head"]}
    # A model of your own may take any rate of dropout: what it can do is not asked here.
    return Model(info["name"], lambda _: jax.tree.map(jnp.asarray, tree), refuse, **settings, learned_dropout=True)


def _load(path: Path, model: Model | None, *, without_code: bool = False) -> Learner:
    facts = sealed.read_manifest(path, FACTS, FORMAT)
    try:
        info = facts["model"]
        if model is None and info["name"] not in models.MODELS:
            if not without_code:
                raise ArtifactError(f"{path}: holds a custom model; pass it: metalr.load(path, model=...)")
            model = _without_code(path, facts, info)
        if model is None:
            model = models.build(info["name"], info["way"], tuple(info["input_shape"]), **info["settings"])
        spec = RatesSpec(**facts["rates"])
        expected = jax.eval_shape(model.init, jax.random.key(0))
        raw = jax.eval_shape(functools.partial(hyperparameters.initial_raw, spec), expected)
        if spec.dropout is not None and not model.learned_dropout:
            raise ArtifactError(f"{path / FACTS}: expected no dropout rate for the model {info['name']!r}")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{path / FACTS}: does not describe a learner: {one_line(error)}") from error
    if (list(model.input_shape), model.way) != (list(info["input_shape"]), info["way"]):
        raise ArtifactError(
            f"{path}: expected a model for images {info['input_shape']} and {info['way']} classes, "
            f"got {list(model.input_shape)} and {model.way}"
        )
    if model.name == info["name"] and model.settings != info["settings"]:
        raise ArtifactError(f"{path}: expected model settings {info['settings']}, got {model.settings}")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((expected, raw)))
    try:
        tensors = parse_tensors(sealed.read_file(path, TENSORS, facts, min(size + (1 << 20), MAX_BYTES[TENSORS])))
    except SafetensorError as error:
        raise ArtifactError(f"{path / TENSORS}: not a safetensors file: {one_line(error)}") from error
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    wanted = {f"init/{trees.path_name(p)}": leaf for p, leaf in leaves} | {f"rates/{g}": v for g, v in raw.items()}
    if set(wanted) != set(tensors):
        missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
        raise ArtifactError(f"{path / TENSORS}: expected the model's tensors; missing {missing}, unexpected {extra}")
    for name, want in wanted.items():
        got = tensors[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ArtifactError(
                f"{path / TENSORS}: {name}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
            )
        if not np.isfinite(got).all():
            raise ArtifactError(f"{path / TENSORS}: {name}: expected finite values only")
    arrays = [jnp.asarray(tensors[f"init/{trees.path_name(p)}"]) for p, _ in leaves]
    init = jax.tree.unflatten(jax.tree.structure(expected), arrays)
    rates = {group: jnp.asarray(tensors[f"rates/{group}"]) for group in raw}
    sealed.read_file(path, CARD, facts, MAX_BYTES[CARD])
    return Learner(model, spec, init, rates, facts.get("facts", {}))


def write_params(path: Path, params: Params) -> None:
    """Write a params pytree as one .safetensors file of tensors under their path names.

    Raises StorageError if it cannot be written.
    """
    tensors = {name.partition("/")[2]: value for name, value in trees.named_arrays(params, "params").items()}
    folders.make(path.parent, parents=True)
    folders.write_file(path, tensor_bytes(tensors))
