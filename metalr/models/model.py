"""A network as two pure functions: `init(key) -> params` and `apply(params, x) -> outputs`.

The rest of metalr sees only a `Model`. It may bring a second, equal formulation that is faster on CPUs (`cpu_apply`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalr.errors import ConfigError, MetalrError, one_line
from metalr.trees import path_name
from metalr.types import Params

Apply = Callable[..., jax.Array]  # (params, x [n, h, w, c] float32, key=None) -> logits [n, way] float32
CUSTOM = "custom"  # the name of a user's own model


@dataclasses.dataclass(frozen=True)
class WithSupport:
    """An `Apply` whose predictions also depend on the task's support set: apply(params, x, support=support_x)."""

    function: Apply

    def __call__(self, params: Params, x: jax.Array, **options: Any) -> jax.Array:
        return self.function(params, x, **options)


def predict(apply: Apply, params: Params, support_x: jax.Array, query_x: jax.Array) -> jax.Array:
    """Logits of a task's query set with adapted params: [query, way]."""
    if isinstance(apply, WithSupport):
        return apply(params, query_x, support=support_x)
    return apply(params, query_x)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as two pure functions.

    Attributes:
      name: a row of registry.MODELS, or "custom".
      init: key -> params, a pytree of float32 (or float64) arrays.
      apply: (params, x, key=None) -> logits. x: [n, height, width, channels] float32, 0..1; logits: [n, way]
        float32. With a key, dropout is active; without one, apply is deterministic.
      input_shape: the shape of one input, (height, width, channels) of images; None for inputs that are not one array.
      way: number of outputs; None for outputs that are not [n, outputs].
      head: name of the output layer, the first keys of its path in params joined by "/" (ANIL and BOIL need it).
      settings: what rebuilds the model from MODELS[name]; empty for custom models.
      cpu_apply: the same function in the form that is fastest on CPUs, or None.
      relu_stack: True if the model is exactly Dense-ReLU-…-Dense on flattened images, with params
        {"dense_0": {"kernel", "bias"}, …, "head": {…}}; the factored inner loop may be used then.
      dropout: True if `apply` uses its key; the inner loop then gives one to every step.
      learned_dropout: True if `apply` also takes dropout=rate ([] float), as a learned dropout rate needs.
      transductive: True if predictions for one image depend on the other images given with it.
      start: (init, support_x, support_y) -> params that a fine-tune starts from; None: from the init itself.
      of_way: number of classes -> the same network for tasks with as many; None if it is for one number only.
    """

    name: str
    init: Callable[[jax.Array], Params]
    apply: Apply
    input_shape: tuple[int, ...] | None
    way: int | None
    head: str = "head"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    cpu_apply: Apply | None = None
    relu_stack: bool = False
    dropout: bool = False
    learned_dropout: bool = False
    transductive: bool = False
    start: Callable[[Params, Any, Any], Params] | None = None
    of_way: Callable[[int], Model] | None = None

    def begin(self, init: Params, support_x: Any, support_y: Any) -> Params:
        """The params that a fine-tune on a support set starts from; support_x as `apply` takes it."""
        return init if self.start is None else self.start(init, support_x, support_y)

    @property
    def takes_images(self) -> bool:
        """Whether inputs are [n, height, width, channels] and outputs [n, outputs], as of image classification."""
        return self.input_shape is not None and len(self.input_shape) == 3 and self.way is not None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels). Raises ConfigError for a network of other inputs."""
        if self.input_shape is None or len(self.input_shape) != 3:
            raise ConfigError(
                f"model {self.name!r}: expected a network of images, got inputs of shape {self.input_shape}"
            )
        height, width, channels = self.input_shape
        return height, width, channels

    @property
    def classes(self) -> int:
        """How many classes it tells apart. Raises ConfigError for a network of other outputs."""
        if self.way is None:
            raise ConfigError(f"model {self.name!r}: expected a network of classes, got one of other outputs")
        return self.way

    @property
    def uses_support(self) -> bool:
        """Whether predictions depend on the task's support set: `predict` gives it to `apply`."""
        return isinstance(self.apply, WithSupport)


def unit(x: jax.Array) -> jax.Array:
    """Pixels as models take them, float32 0..1: bytes are scaled, so large sets can stay on the device as bytes."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x.astype(jnp.float32)


def from_function(
    init: Callable[[jax.Array], Params],
    apply: Callable[[Params, Any], Any],
    *,
    name: str = CUSTOM,
    head: str = "head",
    input_shape: tuple[int, ...] | None = None,
    relu_stack: bool = False,
) -> Model:
    """A network of two plain functions of your own, over any inputs and to any outputs.

    Args:
      init: key -> params, a pytree of float32 arrays (nested dicts, say).
      apply: (params, x) -> outputs; x and the outputs are pytrees of arrays with a leading axis [n].
      head: name of the output layer, for algorithms that adapt the head or the body alone.
      input_shape: of one input, if inputs are one array and the fast form for ReLU stacks shall be used.
      relu_stack: whether it is exactly Dense-ReLU-…-Dense with params as `Model.relu_stack` says.

    Raises ConfigError for params that are not float32 or float64.
    """
    if not callable(init) or not callable(apply):
        raise ConfigError(f"model: expected two functions, init and apply, got {init!r} and {apply!r}")

    def applied(params: Params, x: Any, key: jax.Array | None = None) -> Any:
        return apply(params, x)

    try:
        shapes = jax.eval_shape(init, jax.random.key(0))
    except MetalrError:
        raise
    except Exception as error:  # whatever a function of the user's own raises
        raise ConfigError(
            f"model: init: expected a function of a key that jax can trace; it says: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    check_dtypes(shapes, "model")
    check_head(head, shapes)
    shape = None if input_shape is None else tuple(map(int, input_shape))
    return Model(name, init, applied, shape, None, head, relu_stack=relu_stack)


def starting_from(model: Model, params: Params) -> Model:
    """The same network, whose every init is these params: to learn rates for somebody's pre-trained weights.

    With outer.learns "rates" the weights stay what they are, and rates are learned for fine-tunes that start there.
    It is a network of your own from then on: `metalr.load(path, model=...)` needs it again.

    Raises ConfigError for params of another structure, shape or dtype.
    """
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    given = jax.tree.map(jnp.asarray, params)
    expected, came = (
        {path_name(p): (v.shape, str(v.dtype)) for p, v in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (wanted, given)
    )
    for name in sorted({*expected, *came}):
        if expected.get(name) != came.get(name):
            raise ConfigError(
                f"params: {name}: expected {expected.get(name, 'none')} as in the model {model.name}, got "
                f"{came.get(name, 'none')}"
            )
    leaves = {path_name(p): v for p, v in jax.tree_util.tree_leaves_with_path(given)}

    def fixed(key: jax.Array) -> Params:
        # What is drawn says the order of the layers, which jax loses; a compiled program leaves out the numbers.
        return _filled(model.init(key), leaves)

    of_way = model.of_way

    def of_ways(way: int) -> Model:
        assert of_way is not None
        return starting_from(of_way(way), params)

    return dataclasses.replace(model, name=CUSTOM, settings={}, init=fixed, of_way=None if of_way is None else of_ways)


def _filled(tree: Params, leaves: dict[str, jax.Array], prefix: str = "") -> Params:
    """A tree with other leaves, by name; its dicts keep their order."""
    if type(tree) is dict:
        return {key: _filled(value, leaves, f"{prefix}{key}/") for key, value in tree.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[(prefix + path_name(path)).removesuffix("/")], tree)


def check_head(head: str, params: Params) -> None:
    """Raises ConfigError for the name of an output layer that no param has. "head", the default, may be absent."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if head != "head" and not any(name == head or name.startswith(f"{head}/") for name in names):
        raise ConfigError(f"head: expected the first keys of a layer of the params, {names}, got {head!r}")


def check_dtypes(params: Params, what: str) -> None:
    """Raises ConfigError for params that are not float32 or float64, by name.

    Second derivatives need their digits, and files of 16-bit floats cannot be read back.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise ConfigError(
                f"{what}: expected params in float32, got {leaf.dtype} for {jax.tree_util.keystr(path)}; keep params "
                "in float32 and compute in 16 bits (in Flax: param_dtype=jnp.float32, dtype=jnp.bfloat16)"
            )
