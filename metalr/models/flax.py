"""Models of Flax modules: a user's own Linen or NNX module, and what the kinds of this package share."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metalr.errors import ConfigError, MetalrError, check_whole, one_line
from metalr.models.model import CUSTOM, Apply, Model, check_dtypes, check_head
from metalr.types import Params

DTYPES = ("float32", "bfloat16")


def layer_dtype(dtype: str) -> Any:
    """Flax's `dtype` of a layer: None computes in the dtype of params and inputs."""
    return None if dtype == "float32" else jnp.dtype(dtype)


def logits(x: jax.Array, dtype: str) -> jax.Array:
    return x if dtype == "float32" else x.astype(jnp.float32)


def dtype_setting(dtype: str) -> dict[str, str]:
    """What goes into a model's settings: nothing for the default, so that older artifacts stay as they are."""
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype: expected one of {DTYPES}, got {dtype!r}")
    return {} if dtype == "float32" else {"dtype": dtype}


def linen_init(module: nn.Module, example: Any) -> Callable[[jax.Array], Params]:
    """example: inputs of one example as ShapeDtypeStructs, with a leading axis of 1."""

    def init(key: jax.Array) -> Params:
        variables = module.init(key, jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), example))
        other = sorted(set(variables) - {"params"})
        if other:
            raise ConfigError(
                f"{type(module).__name__}: expected params only, got the collections {other}; the inner loop keeps "
                "no running state, so use LayerNorm or GroupNorm instead of running averages, or "
                "normalise by the current batch's own mean and variance without storing them"
            )
        return variables["params"]

    return init


def network(
    name: str,
    module: nn.Module,
    input_shape: tuple[int, ...],
    way: int,
    settings: dict[str, Any],
    any_shape: bool = False,
    **facts: Any,
) -> Model:
    """A kind of this package: `module` over inputs [n, *input_shape] float32. facts: other fields of the Model.

    Raises ConfigError for a shape that is none (of an mlp any, of others [height, width, channels]), or no outputs.
    """
    check_whole("way", way)
    if not isinstance(input_shape, (tuple, list)) or (len(input_shape) != 3 and not any_shape) or not input_shape:
        expected = "a tuple of numbers" if any_shape else "(height, width, channels)"
        raise ConfigError(f"input_shape: expected {expected}, got {input_shape!r}")
    for size in input_shape:
        check_whole("input_shape", size)
    input_shape = tuple(map(int, input_shape))
    init = linen_init(module, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
    apply = facts.pop("apply", linen_apply(module))
    return Model(name, init, apply, input_shape, way, settings=settings, **facts)


def linen_apply(module: nn.Module) -> Apply:
    call: Any = module.apply

    def apply(
        params: Params,
        x: jax.Array,
        key: jax.Array | None = None,
        dropout: jax.Array | None = None,
        support: jax.Array | None = None,
    ) -> jax.Array:
        if key is None:
            return call({"params": params}, x, **({} if support is None else {"support": support}))
        rate = {} if dropout is None else {"dropout": dropout}
        return call({"params": params}, x, train=True, rngs={"dropout": key}, **rate)

    return apply


def from_linen(
    module: nn.Module, example_x: Any, *, head: str = "head", dropout: bool = False, transductive: bool = False
) -> Model:
    """A user's own Linen module, called as module(x) -> outputs; with dropout, as module(x, train=True) in inner steps.

    Args:
      example_x: inputs as the module takes them, of any number of examples: arrays, or jax.ShapeDtypeStructs, in any
        pytree; only their shapes and dtypes are used. For images: np.zeros((1, height, width, channels), np.float32).
      head: name of the output layer.
      transductive: whether a prediction depends on the other examples that are given with it.

    Raises:
      ConfigError: no module, no example, the module keeps state beside params (running batch statistics), or its
        outputs have no leading axis of examples. Checked here, by abstract evaluation.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model: expected a flax.linen module, such as Net(), got {type(module).__name__} {module!r}; for plain "
            "functions use from_function(init, apply)"
        )
    init, apply = linen_init(module, _examples(example_x, 1)), linen_apply(module)
    return _checked(Model(CUSTOM, init, apply, None, None, head, dropout=dropout, transductive=transductive), example_x)


def from_nnx(module: Any, example_x: Any, *, head: str = "head", transductive: bool = False) -> Model:
    """A user's own NNX module, called as module(x) -> outputs. example_x, head, transductive: as in `from_linen`.

    `init(key)` draws every parameter named "kernel" anew with LeCun-normal values and keeps all others as the module
    had them, because an NNX module carries its parameters already. Dropout layers are not taken: they hold a stream
    of random numbers, which is state.

    Raises:
      ConfigError: no module, no example, state beside nnx.Param, or outputs without a leading axis of examples.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise ConfigError(
            f"model: expected a flax.nnx module, such as Net(rngs=nnx.Rngs(0)), got {type(module).__name__} {module!r}"
        )
    graph, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    if jax.tree.leaves(rest):
        kinds = sorted({type(v).__name__ for v in jax.tree.leaves(rest, is_leaf=lambda v: isinstance(v, nnx.Variable))})
        raise ConfigError(
            f"{type(module).__name__}: expected nnx.Param only, got other state ({', '.join(kinds)}); use LayerNorm "
            "or GroupNorm instead of running batch statistics, and leave out what holds random numbers (dropout, "
            "recurrent cells of NNX: take those of Linen)"
        )
    values = nnx.to_pure_dict(params)

    def init(key: jax.Array) -> Params:
        leaves, tree = jax.tree_util.tree_flatten_with_path(values)
        draw = nn.initializers.lecun_normal()
        fresh = [
            draw(jax.random.fold_in(key, i), v.shape, v.dtype) if path[-1] == jax.tree_util.DictKey("kernel") else v
            for i, (path, v) in enumerate(leaves)
        ]
        return jax.tree.unflatten(tree, fresh)

    def apply(given: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        state = jax.tree.map(lambda v: v, params)
        nnx.replace_by_pure_dict(state, given)
        return nnx.merge(graph, state)(x)

    return _checked(Model(CUSTOM, init, apply, None, None, head, transductive=transductive), example_x)


def _examples(example_x: Any, count: int) -> Any:
    """The shapes and dtypes of `count` examples like these. Raises ConfigError for what has no leading axis."""

    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None or len(shape) < 1 or 0 in shape[1:]:
            raise ConfigError(
                f"example_x: expected arrays with a leading axis of examples, such as np.zeros((1, 28, 28, 1), "
                f"np.float32), got {leaf!r:.80}"
            )
        return jax.ShapeDtypeStruct((count, *shape[1:]), jax.dtypes.canonicalize_dtype(dtype))

    if not jax.tree.leaves(example_x):
        raise ConfigError(f"example_x: expected arrays with a leading axis of examples, got {example_x!r:.80}")
    return jax.tree.map(of, example_x)


def _checked(model: Model, example_x: Any) -> Model:
    """The model with the shapes of its inputs and outputs, tried by abstract evaluation on 3 examples."""
    x = _examples(example_x, 3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            params = jax.eval_shape(model.init, jax.random.key(0))
        check_dtypes(params, "model")
        check_head(model.head, params)
        outputs = jax.eval_shape(model.apply, params, x)
    except MetalrError:
        raise
    except Exception as error:  # whatever a module of the user's own raises
        shapes = [list(leaf.shape) for leaf in jax.tree.leaves(x)]
        raise ConfigError(
            f"model, example_x: expected a module that is called with the inputs alone, and an example of them with a "
            f"leading axis of examples; with inputs of shape {', '.join(map(str, shapes))} it says: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
    if not shapes or any(len(shape) < 1 or shape[0] != 3 for shape in shapes):
        raise ConfigError(f"model: expected outputs with a leading axis of 3 for 3 examples, got shapes {shapes}")
    if model.dropout:
        try:
            jax.eval_shape(model.apply, params, x, jax.random.key(0))
        except TypeError as error:
            raise ConfigError(f"model: dropout=True: expected a module called with train=True: {error}") from error
    shape = x.shape[1:] if isinstance(x, jax.ShapeDtypeStruct) else None
    one = isinstance(outputs, jax.ShapeDtypeStruct) and len(outputs.shape) == 2
    return dataclasses.replace(model, input_shape=shape, way=outputs.shape[1] if one else None)
