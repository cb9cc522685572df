"""A learned init and learned rates, ready to fine-tune: adapting, predicting, evaluating, taking the rates along."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalr import data, inner, models, trees
from metalr.errors import ArtifactError, ConfigError, DataError, MetalrError, MetalrWarning, one_line
from metalr.evaluation import protocol
from metalr.inner import descent, factored, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, OBJECTIVES, Objective
from metalr.learner import params as params_file
from metalr.learner.matching import Matching, Names, match, order_of, rates_for
from metalr.learner.params import ClassNames
from metalr.models import Model
from metalr.outer import devices
from metalr.tasks import OfCountedTasks, Standardisation, Tasks, check_labels
from metalr.types import Curve, Episode, Params, Rates

FEW_IMAGES_A_CLASS = 2  # below, a transductive network's statistics say too little
LEARNED, FIXED = "learned rates", "fixed rates"  # what reports call hyperparameters
RATES_ALONE = "rates"  # the setting outer.learns of a learner without a learned init


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """A learned init and learned rates, ready to fine-tune on a new task.

    Attributes:
      model: the network.
      spec: the static choices about the rates.
      init: the learned initialization, the model's params pytree.
      rates: the learned hyperparameters (actual, not logarithms), name -> array; see metalr.inner.hyperparameters.
      facts: where it comes from: tasks, data, split hash, training settings. Plain JSON values.
      objective: what the inner loop minimises and evaluation measures.
      standardisation: of the tasks that it was trained on: `adapt` and `apply` take and give numbers in your own units.
    """

    model: Model
    spec: RatesSpec
    init: Params
    rates: Rates
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: Objective = CROSS_ENTROPY
    standardisation: Standardisation | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the files of its artifact: compiled programs and functions cannot be. Not with a network or an
        objective of your own, which are pickled as they are, if they can be."""
        from metalr.learner import artifact

        if self.model.name in models.MODELS and self.objective.name in OBJECTIVES:
            return artifact.from_files, (artifact.to_files(self),)
        return super().__reduce_ex__(protocol)

    def adapt(self, support_x: Any, support_y: Any, steps: int | None = None, *, init: Params | None = None) -> Params:
        """Fine-tune on a task's support set; compiled once a shape.

        Args:
          support_x: [support, height, width] or [support, height, width, channels]; uint8 0..255 or float 0..1.
            A further leading axis adapts many tasks at once. A network of other inputs takes what its sampler gave in
            training: any pytree of arrays with a leading axis [support], one task at a time; jax.vmap(learned.adapt)
            takes many.
          support_y: [support] integers (or [tasks, support]), the labels 0..n-1 with n at most the trained way, each
            present in every task. With inner.head_start other than "learned" there may be any number of
            classes. A network of other outputs takes targets as in training.
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
        of_ways = self._of_ways_in(support_y)
        if of_ways is not self:
            return of_ways.adapt(support_x, support_y, steps, init=start)
        x, y, batched = self._support(support_x, support_y, steps)
        with self._said_of("support_x"):
            return self._adapt(start, self.rates, x, y, steps=int(steps), batched=batched)

    def best_steps(self, at_most: int | None = None) -> int:
        """The number of inner steps that was best on meta-validation tasks, of those trained for (inner.horizons).

        More steps are not always better: where labels are partly wrong, say, the last ones learn the mistakes. Early
        stopping with no search: `learned.adapt(x, y, learned.best_steps())`. Trained for one number: that.

        Args:
          at_most: longer ones are left out.

        Raises:
          ConfigError: all are longer.
        """
        validated = self.facts.get("validated_steps") or {str(self.spec.steps): 0.0}
        fitting = [steps for steps in sorted(map(int, validated)) if at_most is None or steps <= at_most]
        if not fitting:
            raise ConfigError(f"at_most: expected at least {min(map(int, validated))} inner steps, got {at_most}")
        scores = {steps: validated[str(steps)] for steps in fitting}  # null where it was no number
        return self.objective.best(fitting, lambda steps: np.nan if scores[steps] is None else scores[steps])

    def predictor(self, support_x: Any, support_y: Any, steps: int | None = None) -> Callable[[Any], jax.Array]:
        """Fine-tune on a task's support set; a function from inputs to outputs, as `apply` of `adapt` gives.

        For ReLU stacks on small support sets it never writes a fine-tuned first kernel, which is most of the work: the
        fastest way if it is predictions that are wanted, and not params.

        Args: of one task, as of `adapt`. Raises as `adapt`.
        """
        steps = self.spec.steps if steps is None else steps
        of_ways = self._of_ways_in(support_y)
        if of_ways is not self:
            return of_ways.predictor(support_x, support_y, steps)
        x, y, batched = self._support(support_x, support_y, steps)
        if batched:
            raise DataError("support_y: expected one task, shape [support]; for many tasks: adapt")
        # With a head that is made for each task, the first layer has to be another one: it is the init's.
        fits = self.model.start is None or len(self.init) > 1
        if not fits or not factored.pays(self.model, self.spec, self.objective.loss, trees.count(y), steps):
            fast = self.adapt(support_x, support_y, steps)
            return lambda x: self.apply(fast, x, support_x if self.model.uses_support else None)
        found, own = self._factors(self.init, self.rates, x, y, steps=int(steps)), self.standardisation

        def predict(x: Any) -> jax.Array:
            given = self._images(x, "x", False) if self.classifies_images else self._inputs(x, "x")
            outputs = self._factored_outputs(self.init, found, given)
            return outputs if own is None else own.outputs(outputs)

        return predict

    @functools.cached_property
    def _factors(self) -> Callable[..., factored.Factors]:
        def factors(init: Params, rates: Rates, x: Any, y: Any, *, steps: int) -> factored.Factors:
            x = self._prepared(x)
            start = self.model.begin(init, x, y)
            return factored.factors(start, rates, self.spec, x, y, steps, self.objective.loss)

        return jax.jit(factors, static_argnames="steps")

    @functools.cached_property
    def _factored_outputs(self) -> Callable[..., jax.Array]:
        def outputs(init: Params, found: factored.Factors, x: Any) -> jax.Array:
            return factored.outputs(init, found, self._prepared(x))

        return jax.jit(outputs)

    def evaluate(self, tasks: Tasks, episodes: int = 600, steps: int | None = None, seed: int = 0) -> Curve:
        """The adaptation curve on held-out tasks: the fixed meta-test episodes of a seed, the same for every method.

        Args:
          tasks: their `test` sampler is drawn from.
          steps: length of the curve: those of one fine-tune of so many steps, over which a schedule with knots is
            stretched, as `adapt` does. Default: 10 steps, or as many as were trained if those are more (or if
            spec.extend is "error"); a schedule then holds after the trained ones.

        Rates that were learned alone (outer.learns "rates") start from a random init for each task. With
        inner.head_start other than "learned", tasks may have another number of classes than the trained ones.

        Returns: Curve, the objective's score after the numbers of inner steps in `curve.steps`, with its 95 % interval
        over tasks: 0, 1, 2, … up to 20 steps, and 0, 1, 2, 5, 10, 20, 50, … up to more.

        Raises:
          ConfigError: episodes that the network or the objective cannot take. DataError: labels that the network has no
            output for, or images that are not float 0..1.
        """
        if not isinstance(tasks, Tasks):
            raise ConfigError(f"tasks: expected a metalr.Tasks, got {type(tasks).__name__}")
        length = hyperparameters.curve_steps(self.spec.steps, self.spec.extend) if steps is None else steps
        for name in ("features", "targets"):
            known, came = self.facts.get(name), tasks.facts.get(name)
            if None not in (known, came) and known != came:
                raise ConfigError(f"tasks: expected the {name} {known}, in this order, got {came}")
        pool, sample = tasks.sampler("test")
        keys = protocol.episode_keys(seed, episodes)
        model = self.model if self.model.of_way is None else self._of_way(_ways_in(tasks, keys)).model
        own = self.standardisation
        if tasks.standardisation is None and own is not None:
            given = sample

            def sample(pool: Any, key: jax.Array) -> Episode:
                x, y, query_x, query_y = given(pool, key)
                return Episode(own.inputs(x), own.targets(y), own.inputs(query_x), own.targets(query_y))

            if isinstance(given, OfCountedTasks):
                sample = OfCountedTasks(sample, given.task_of)
        elif tasks.standardisation is not None and not tasks.standardisation.same_as(own):
            raise ConfigError(
                "tasks: expected those that this was trained on, or tasks that are not standardised; their "
                "standardisation is another one"
            )
        self._check_episodes(model, tasks, pool, sample, keys)
        run = protocol.make_evaluator(
            model, self.spec, sample, length, of_steps=steps, random_init=self.rates_alone, objective=self.objective
        )
        return run(pool, self.init, self.rates, keys)

    def _check_episodes(self, model: Model, tasks: Tasks, pool: Any, sample: Any, keys: jax.Array) -> None:
        """Raises as `evaluate` says unless the network can take the episodes of these keys."""

        def of_init(init: Params, pool: Any, key: jax.Array) -> tuple[Episode, jax.Array]:
            episode, _, start = protocol.begin(model, sample, pool, init, False, key)
            outputs = models.predict(model.apply, start, episode.support_x, episode.query_x)
            return episode, self.objective.loss(outputs, episode.query_y)

        try:
            episode, _ = jax.eval_shape(of_init, self.init, pool, keys[0])
        except MetalrError:
            raise
        except Exception as error:  # whatever a network or a loss of the user's own makes of them
            raise ConfigError(f"tasks: their episodes do not fit the learner's network: {one_line(error)}") from error
        if self.classifies_images and episode.query_x.dtype == np.uint8:
            raise DataError("tasks: expected images as float 0..1, got uint8; divide them by 255")
        if self.objective.targets == "classes" and model.way is not None and model.of_way is None:
            ways = _ways_in(tasks, keys)
            if ways > model.classes:
                raise DataError(f"tasks: expected labels 0..{model.classes - 1}, got some up to {ways - 1}")

    def apply(self, params: Params, x: Any, support_x: Any = None) -> jax.Array:
        """Outputs for inputs in any of the forms that `adapt` takes, of images logits [n, way] float32.

        Differentiable in params.

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
        ways = self._outputs_of(trees.leaf_shapes(params))
        if ways != self.model.way and self.model.of_way is not None:
            return self._of_way(ways).apply(params, x, support_x)
        if not self.classifies_images:
            if batched or support_x is not None:
                raise ConfigError(
                    "params: expected those of one task, and no support_x, with a network of other inputs"
                )
            x = self._inputs(x, "x")
            with self._said_of("x"):
                outputs = self._apply(params, x)
            return outputs if self.standardisation is None else self.standardisation.outputs(outputs)
        images = self._images(x, "x", batched)
        if batched and images.shape[0] != tasks:
            raise DataError(f"x: expected images for {tasks} tasks, as params are, got {images.shape[0]}")
        if self.model.uses_support != (support_x is not None):
            expected = "the task's support images" if self.model.uses_support else "None with this network"
            raise ConfigError(f"support_x: expected {expected}, got {'None' if support_x is None else 'images'}")
        if support_x is not None:
            return self._apply(params, images, self._images(support_x, "support_x", batched))
        count = images.shape[1 if batched else 0]
        if self.model.transductive and count < FEW_IMAGES_A_CLASS * self.model.classes:
            warnings.warn(
                f"x: {count} images for {self.model.way} classes: this network normalises by the statistics of the "
                "images "
                "given together (transductive), so predictions are good for many images of all classes only; give "
                "more, or train a network with model.norm support",
                MetalrWarning,
                stacklevel=2,
            )
        return self._apply(params, images)

    def save_params(self, path: Path | str, params: Params, classes: Sequence[Any] | ClassNames | None = None) -> None:
        """Write fine-tuned params of one task to a .safetensors file, with a hash; `load_params` reads it.

        Args:
          classes: what the outputs 0, 1, … are called, for `metalr predict`, or the names of some outputs; default:
            nothing.

        Raises:
          ConfigError: params of another network, or of many tasks; names that are not one for each output; a file of
            another kind at that place. StorageError: it cannot be written.
        """
        if self._check_params(params)[0]:
            raise ConfigError("params: expected those of one task, got a leading axis of tasks")
        if classes is not None and not isinstance(classes, ClassNames):
            outputs = self._outputs_of(trees.leaf_shapes(params))
            wrong = len(classes) != (outputs or len(classes)) or len(set(classes)) < len(classes)
            if isinstance(classes, str) or wrong:
                raise ConfigError(f"classes: expected {outputs} names that differ, one an output, got {classes!r}")
            classes = ClassNames.of_outputs(classes)
        params_file.write(path, params, classes, self._meaning)

    @property
    def _meaning(self) -> str:
        """A hash of what inputs and outputs stand for: the objective, the columns of a table, the standardisation."""
        columns = [self.facts.get(name) for name in ("features", "targets", "table")]
        digest = hashlib.sha256(json.dumps([self.objective.name, columns], sort_keys=True).encode())
        if self.standardisation is not None:
            for name, value in sorted(self.standardisation.named().items()):
                digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def load_params(self, path: Path | str) -> Params:
        """Params that `save_params` (or `metalr adapt --out`) wrote, as `apply` takes them.

        Raises:
          ArtifactError: no such file, a damaged one, params of another network, or of a learner with another objective,
            other columns or another standardisation.
        """
        tensors = params_file.read(path, self._meaning)
        dtypes = {trees.path_name(p): v.dtype for p, v in jax.tree_util.tree_leaves_with_path(self.init)}
        shapes = self._fast_shapes({name: value.shape for name, value in tensors.items()})
        expected = {name: np.empty(shape, dtypes[name]) for name, shape in shapes.items()}
        for name in sorted({*expected, *tensors}):
            want, got = (
                f"{v.dtype} {list(v.shape)}" if (v := of.get(name)) is not None else "none"
                for of in (expected, tensors)
            )
            if want != got:
                raise ArtifactError(f"{path}: {name}: expected {want} as in the learned init, got {got}")
        return jax.tree.unflatten(jax.tree.structure(self.init), [jnp.asarray(tensors[name]) for name in expected])

    def _check_params(self, params: Params) -> tuple[bool, int]:
        """(whether params have a leading axis [tasks], how many). Raises ConfigError for those of another network."""
        came = trees.leaf_shapes(params)
        expected = self._fast_shapes(came)
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

    def _support(self, x: Any, y: Any, steps: int) -> tuple[Any, Any, bool]:
        """A support set as training had it, and whether it has a leading axis [tasks]. Raises as `adapt` says."""
        hyperparameters.check_steps(self.spec, steps)
        if self.classifies_images:
            batched = np.ndim(y) == 2
            x = self._images(x, "support_x", batched)
            return x, self._labels(y, x.shape[: 1 + batched]), batched
        x, y = self._inputs(x, "support_x"), self._targets(y)
        if trees.count(x) != trees.count(y):
            raise DataError(f"support_y: expected {trees.count(x)} targets, as inputs, got {trees.count(y)}")
        return x, y, False

    @contextlib.contextmanager
    def _said_of(self, what: str) -> Iterator[None]:
        """What a network of your own raises when it is traced with inputs that it does not take, as a DataError."""
        try:
            yield
        except (MetalrError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if self.model.name in models.MODELS:
                raise
            raise DataError(
                f"{what}: expected inputs that the network takes, as in training; it says: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error

    def _of_ways_in(self, y: Any) -> Learner:
        """The learner for as many classes as a support set has, if the network takes any number; else this one."""
        if self.model.of_way is None or isinstance(y, jax.core.Tracer):
            return self
        y = np.asarray(y)
        return self._of_way(int(y.max()) + 1) if y.size and np.issubdtype(y.dtype, np.integer) else self

    def _of_way(self, ways: int) -> Learner:
        """The same learner for tasks with another number of classes; made once."""
        assert self.model.of_way is not None
        if ways == self.model.way:
            return self
        if ways not in self._other_ways:
            self._other_ways[ways] = dataclasses.replace(self, model=self.model.of_way(ways))
        return self._other_ways[ways]

    @functools.cached_property
    def _other_ways(self) -> dict[int, Learner]:
        return {}

    def _outputs_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many outputs params of these shapes have."""
        of_head = [shape[-1] for name, shape in shapes.items() if name.startswith(f"{self.model.head}/") and shape]
        return of_head[0] if of_head else 0

    def _fast_shapes(self, came: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of fine-tuned params: those of the init, and of any number of classes where that is free."""
        shapes = trees.leaf_shapes(self.init)
        if self.model.of_way is None:
            return shapes
        ways = self._outputs_of(came)
        of_head = {name: shape for name, shape in shapes.items() if name.startswith(f"{self.model.head}/")}
        return shapes | {name: (*shape[:-1], ways) for name, shape in of_head.items()}

    def __repr__(self) -> str:
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.init))
        inputs, outputs = described(self.model)
        tasks = self.facts.get("tasks", {})
        trained = f", trained on {tasks['family']!r} tasks" if "family" in tasks else ""
        return (
            f"Learner({self.model.name} with {count:,} params, {inputs}, {outputs}; "
            f"{self.kind_of_rates} ({self.spec.granularity}, {self.spec.steps} steps){trained})"
        )

    def as_optax(
        self,
        steps: int | None = None,
        *,
        like: Params | None = None,
        names: Names = None,
        default: float | str | None = None,
        fan_in: float = 0.0,
        support: int | None = None,
    ) -> optax.GradientTransformation:
        """Gradient descent with the learned hyperparameters, for any training loop.

        On params named as `init` nothing else is needed (Flax's outer level "params" may stand around them). For
        another network, of other names, width or depth, say what its tensors are like; `matching` shows the outcome.

        Give params to its update(grads, state, params), and value=loss if `spec.base` looks at the loss. What is not
        part of an update stays with your loop: minibatches (`spec.batch_size`) and dropout (`rates["dropout:all"]`).

        A learner that was trained on standardised numbers has init and rates for these: give your loop
        `standardisation.inputs(x)` and `standardisation.targets(y)`.

        Under `optax.multi_transform` or `optax.masked` it takes a part of the tree too, but for what needs more than a
        tensor's own gradient: prediction (all layers) and clipping (whole layers) say so.

        Beyond the trained steps, per-step rates go on by spec.extend ("error" cannot be raised in a compiled loop: it
        holds).

        Args:
          steps: the length of your fine-tune, over which a schedule with knots is stretched; default: as trained.
          like: your params, or their shapes, as the model's init gives them; with them `names` and `default` count.
          names: which learned tensor each of yours is like. A mapping from your tensors' names (or layers' names, or
            patterns such as `layer_*`) to learned ones; a function of your tensor's name; "depth": the learned tensor
            of the same kind (kernel, bias, norm, embedding) at the nearest relative depth; "role": the mean of the
            learned tensors of the same kind that are in the first, a hidden or the last layer too. None: by the same
            name.
          default: the rate of tensors that are like none: a number, or "mean" of the learned rates. None refuses them.
          fan_in: the rate of a kernel is also multiplied by (inputs of the learned one / its own inputs) to this power,
            0..1, for layers of another width. An Adam step has the same size whatever the gradient, so more inputs move
            an output further: with power 1 if the steps of all weights pull the same way (Yang et al. 2022, Tensor
            Programs V, table 3), with 0.5 if they do not (Everett et al. 2024). 0: no change.
          support: the examples of your task, if rates go with them (inner.support_power); default: as trained.

        Raises ConfigError unless steps and support are None or integers of at least 1; for a tensor without a rate; for
        rates that are predicted, which are for their own network only.
        """
        if steps is not None and (not isinstance(steps, (int, np.integer)) or steps < 1):
            raise ConfigError(f"steps: expected an integer of at least 1, got {steps!r}")
        whole = isinstance(support, (int, np.integer)) and support >= 1
        if support is not None and (self.spec.support_power is None or not whole):
            raise ConfigError(
                "support: expected a number of examples with rates that go with it (inner.support_power), None with "
                f"others, got {support!r}"
            )
        if like is None:
            if names is not None or default is not None or fan_in:
                raise ConfigError("like: expected your params beside names, default and fan_in, got None")
            rates = hyperparameters.of_size(self.spec, self.rates, support)
            own = descent.optimizer(self.spec, rates, steps, tensors=trees.leaf_names(self.init))
            return _within_params(own)
        found = self.matching(like, names=names, default=default, fan_in=fan_in)
        spec, rates = rates_for(self.spec, self.rates, self.init, like, found)
        rates = hyperparameters.of_size(spec, rates, support)
        return descent.optimizer(spec, rates, steps, tensors=trees.leaf_names(like))

    def matching(
        self, like: Params, *, names: Names = None, default: float | str | None = None, fan_in: float = 0.0
    ) -> Matching:
        """Which learned tensors each of your tensors takes its rate from, to look at: print it. Arguments as above."""
        return match(self.spec, self.rates, self.init, like, names, default, fan_in, order=self._order)

    def with_views(self, views: int) -> Learner:
        """The same learner, whose output layer is made of more than a task's own images: a better one from few.

        Each support image is looked at as it is and as so many distorted copies, always the same ones, when the means
        of the classes are taken. (The inner steps see the images alone.) It costs views times the support set in
        forward passes. Only for what was trained with inner.head_start prototypes, and for images; views of 0: none.

        Raises ConfigError for other learners.
        """
        own = self.model
        if own.name not in models.MODELS or own.way is None or own.input_shape is None:
            raise ConfigError(f"views: expected a network of metalr's own, got {own.name!r}")
        settings = {name: value for name, value in own.settings.items() if name != "views"}
        model = models.build(own.name, own.way, own.input_shape, **settings, views=views)
        return dataclasses.replace(self, model=model)

    def for_network(
        self,
        model: Model,
        *,
        names: Names = "role",
        default: float | str | None = None,
        fan_in: float = 0.0,
        seed: int = 0,
    ) -> Learner:
        """The learned rates on another network, wider or deeper, say: a learner that has no learned init.

        What was learned of an init is left behind: `evaluate` draws a random one for each task, and `adapt` begins from
        one of `seed`, or from the one that you give it.

        Args:
          model: for the same tasks as the learner's own: with the same inputs and outputs.
          names, default, fan_in: which learned tensor each of its tensors is like; see `as_optax`.
          seed: of the random init that is stored with it.

        Raises ConfigError for a network of other inputs or outputs, one that cannot take a learned dropout rate, a
        tensor without a rate, and rates that are predicted from the layers that they were learned on.
        """
        own = self.model
        if (model.input_shape, model.way) != (own.input_shape, own.way):
            raise ConfigError(
                f"model: expected inputs {own.input_shape} and {own.way} outputs as the learner has, got "
                f"{model.input_shape} and {model.way}; for other tasks, take the rates along with as_optax(like=...)"
            )
        if self.spec.dropout is not None and not model.learned_dropout:
            raise ConfigError(f"model: expected a network that takes a learned dropout rate, got {model.name}")
        init = model.init(jax.random.key(seed))  # without jit, which would sort its layers by name
        found = match(self.spec, self.rates, self.init, init, names, default, fan_in, model.head, self._order)
        spec, rates = rates_for(self.spec, self.rates, self.init, init, found)
        outer = {**self.facts.get("outer", {}), "learns": RATES_ALONE}
        how = {"model": own.name, "names": str(names), "default": default, "fan_in": fan_in}
        facts = {k: v for k, v in self.facts.items() if not k.startswith("validat")}  # of the network left behind
        facts |= {"outer": outer, "carried_from": how}
        spec = dataclasses.replace(spec, head=model.head)
        return dataclasses.replace(self, model=model, spec=spec, init=init, rates=rates, facts=facts)

    @functools.cached_property
    def _order(self) -> list[str]:
        """The tensors' names in the order of the network."""
        return order_of(self.model.init)

    @property
    def rates_alone(self) -> bool:
        """Whether no init was learned (outer.learns "rates"): a task begins from a random one then."""
        return self.facts.get("outer", {}).get("learns") == RATES_ALONE

    @property
    def classifies_images(self) -> bool:
        """Whether it takes images in all forms, uint8 too, and labels; others take what their sampler gave.

        Tasks of your own whose images were standardised, or had values beyond 0..1 (`facts["pixels"]` false), are such.
        """
        of_classes = self.model.takes_images and self.objective.targets == "classes"
        return of_classes and self.standardisation is None and self.facts.get("pixels", True)

    @property
    def kind_of_rates(self) -> str:
        """What reports call them: "learned rates", or "fixed rates" as of MAML."""
        return LEARNED if self.facts.get("learned_rates", True) else FIXED

    @functools.cached_property
    def _adapt(self) -> Callable[..., Params]:
        model, spec, objective = self.model, self.spec, self.objective

        def adapt(init: Params, rates: Rates, x: Any, y: Any, *, steps: int, batched: bool) -> Params:
            support = jax.tree.leaves(y)[0].shape[int(batched)]
            fast = factored.pays(model, spec, objective.loss, support, steps)

            def one(apply: models.Apply, init: Params, rates: Rates, task: tuple[Any, Any]) -> Params:
                init = model.begin(init, *task)
                if fast:
                    return factored.adapt(init, rates, spec, *task, steps, objective.loss)
                optimizer, options = descent.fine_tune(spec, rates, support, dropout=model.dropout, of_steps=steps)
                options |= {"key": jax.random.key(0), "loss": objective.loss}
                return inner.adapt(apply, init, *task, optimizer, steps, **options)[0]

            def tasks(apply: models.Apply, group: int, init: Params, rates: Rates, x: Any, y: Any) -> Params:
                if not batched:
                    return one(apply, init, rates, (x, y))
                return devices.map_tasks(functools.partial(one, apply, init, rates), (x, y), group)

            def here(init: Params, rates: Rates, x: Any, y: Any) -> Params:
                x = self._prepared(x)
                alone = functools.partial(one, model.cpu_apply or model.apply, init, rates)

                def group() -> int:
                    return devices.fitting_group(alone, (x, y)) if batched else 1

                return devices.by_platform(model, tasks, init, rates, x, y, accelerator_group=group)

            if not batched:
                return here(init, rates, x, y)
            mesh = devices.task_mesh(trees.count(y))
            return devices.split_tasks(here, mesh, 2, mean=False)(init, rates, x, y)

        return jax.jit(adapt, static_argnames=("steps", "batched"))

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        many = 5 if self.classifies_images else None  # axes of the images of many tasks

        def outputs(params: Params, x: Any, support_x: Any = None) -> Any:
            def forward(apply: models.Apply, _: int, params: Params, x: Any, *support: Any) -> Any:
                def one(params: Params, x: Any, *support: Any) -> Any:
                    return models.predict(apply, params, support[0], x) if support else apply(params, x)

                return jax.vmap(one)(params, x, *support) if many and x.ndim == many else one(params, x, *support)

            support = () if support_x is None else (self._prepared(support_x),)
            return devices.by_platform(self.model, forward, params, self._prepared(x), *support)

        return jax.jit(outputs)

    def _prepared(self, x: Any) -> Any:
        """Inputs as the network takes them: images as float32 0..1, others as they are."""
        return models.unit(x) if self.classifies_images else x

    def _inputs(self, x: Any, what: str) -> Any:
        """Inputs of any kind, standardised as in training. Raises DataError for another structure or shape."""
        trees.check_columns(x, self.facts.get("features"), what)
        x = _examples(x, what)
        shape = self.model.input_shape
        if shape is not None and [leaf.shape[1:] for leaf in jax.tree.leaves(x)] != [shape]:
            got = [list(leaf.shape) for leaf in jax.tree.leaves(x)]
            several = len(got) == 1 and got[0][2:] == list(shape) and what == "support_x"
            raise DataError(
                f"{what}: expected shape [n, {', '.join(map(str, shape))}], got {got[0] if len(got) == 1 else got}"
                + "; jax.vmap(learned.adapt) takes several tasks at once" * several
            )
        if self.standardisation is None:
            return x
        return self.standardisation.inputs(x, what)

    def _targets(self, y: Any) -> Any:
        """Targets of any kind, standardised as in training.

        Raises DataError for labels that the network lacks, other columns, and another shape than in training where the
        loss is one of the user's own: it might broadcast.
        """
        trees.check_columns(y, self.facts.get("targets"), "support_y")
        y = _examples(y, "support_y")
        expected = self.facts.get("target_shapes")
        came = [list(leaf.shape[1:]) for leaf in jax.tree.leaves(y)]
        if expected is not None and came != expected:
            raise DataError(f"support_y: expected shapes {expected} after the axis of examples, got {came}")
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(y)):
            check_labels("support_y", y, self.objective, self.model.way)
        return y if self.standardisation is None else self.standardisation.targets(y, "support_y")

    def _images(self, x: Any, what: str, batched: bool) -> Any:
        height, width, channels = self.model.image_shape
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
            if values.min() < 0 or values.max() >= self.model.classes:
                raise DataError(
                    f"support_y: expected labels 0..{self.model.classes - 1} (trained {self.model.way}-way), "
                    f"got {values.min()}..{values.max()}"
                )
            counts = (np.atleast_2d(values)[..., None] == np.arange(values.max() + 1)).any(1)
            if not counts.all():
                missing = int(np.argwhere(~counts)[0, 1])
                raise DataError(f"support_y: expected at least one image of each class, got none of {missing}")
        return y.astype(np.int32)


def _ways_in(tasks: Tasks, keys: jax.Array) -> int:
    """How many classes the meta-test tasks of these keys have together; image families say it themselves."""
    if "way" in tasks.facts:
        return int(tasks.facts["way"])
    pool, sample = tasks.sampler("test")

    def highest(key: jax.Array) -> jax.Array:
        episode = sample(pool, key)
        return jnp.maximum(episode.support_y.max(), episode.query_y.max())

    return 1 + int(jax.jit(lambda keys: jax.lax.map(highest, keys).max())(keys))


def _within_params(own: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same on a tree with Flax's outer level, {"params": tree}."""

    def init(params: Params) -> Any:
        return own.init(_inside(params))

    def update(grads: Params, state: Any, params: Params | None = None, **more: Any) -> tuple[Params, Any]:
        updates, state = own.update(_inside(grads), state, None if params is None else _inside(params), **more)
        return ({"params": updates} if _inside(grads) is not grads else updates), state

    return type(own)(init, update)


def _inside(tree: Params) -> Params:
    return tree["params"] if isinstance(tree, Mapping) and set(tree) == {"params"} else tree


def described(model: Model) -> tuple[str, str]:
    """Inputs and outputs of a network in words."""
    if model.takes_images:
        return f"{'x'.join(map(str, model.image_shape))} images", f"{model.classes} classes"
    shape = "inputs of any kind" if model.input_shape is None else f"inputs of shape {list(model.input_shape)}"
    if model.way is None:
        return shape, "outputs of its own"
    return shape, f"{model.way} output{'s' * (model.way != 1)}"


def _examples(tree: Any, what: str) -> Any:
    """Inputs or targets of one task, as arrays. Raises DataError unless all have one leading axis and are finite."""
    arrays = jax.tree.map(lambda v: v if isinstance(v, jax.Array) else trees.as_numbers(v, what), tree)
    leaves = jax.tree.leaves(arrays)
    if leaves and isinstance(tree, (list, tuple)) and all(leaf.ndim < 1 for leaf in leaves):
        raise DataError(f"{what}: expected arrays, got a list of numbers; pass np.array({what})")
    if not leaves or any(leaf.ndim < 1 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) > 1:
        shapes = [list(leaf.shape) for leaf in leaves]
        raise DataError(f"{what}: expected arrays with one leading axis of examples, got shapes {shapes}")
    if not leaves[0].shape[0]:
        raise DataError(f"{what}: expected one example or more, got none")
    for leaf in leaves:
        tracer = isinstance(leaf, jax.core.Tracer)
        if not tracer and jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            raise DataError(f"{what}: expected finite values, got others")
    return arrays
