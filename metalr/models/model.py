"""Models as pure functions: `init(key) -> params` and `apply(params, x) -> logits`, made with Flax.

The rest of metalr sees only a `Model`, so a user's own Linen or NNX module goes in through `from_linen` or
`from_nnx`. A model may bring a second, equal formulation that is faster on CPUs (`cpu_apply`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metalr.errors import ConfigError
from metalr.models.convolution import conv_as_patches
from metalr.trees import path_name
from metalr.types import Params

Apply = Callable[..., jax.Array]  # (params, x [n, h, w, c] float32, key=None) -> logits [n, way] float32
NORMS = ("batch", "support", "instance", "none")
CELLS = ("gru", "lstm")
LEARNED_HEAD = "learned"  # a fine-tune starts from the head in the init
CUSTOM = "custom"  # the name of a user's own model
MOST_LAYERS = 64  # a model is built from an artifact's facts before those can be trusted
DTYPES = ("float32", "bfloat16")


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
      name: a key of MODELS, or "custom".
      init: key -> params, a pytree of float32 arrays.
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


def _kernel_first(x: jax.Array, kernel: jax.Array, _: Any, precision: Any = None) -> jax.Array:
    """x [n, inputs] times kernel [inputs, outputs], asked for the other way round.

    It is the same where kernels are stored as they are here; where `fit` keeps them as [rates, outputs, inputs], XLA
    needs no transposed copy of them in every step.
    """
    return jax.lax.dot_general(kernel, x, (((0,), (1,)), ((), ())), precision=precision).T


class _Mlp(nn.Module):
    way: int
    widths: tuple[int, ...]
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, dropout: jax.Array | None = None) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            dense = nn.Dense(width, dtype=_compute(self.dtype), name=f"dense_{i}", dot_general=_kernel_first)
            x = nn.relu(dense(x))
            if dropout is None:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            else:  # Gaussian noise of dropout's variance: its rate has a derivative
                deviation = jnp.sqrt(dropout / (1 - dropout)).astype(x.dtype)
                x = x * (1 + deviation * jax.random.normal(self.make_rng("dropout"), x.shape, x.dtype))
        return _logits(nn.Dense(self.way, dtype=_compute(self.dtype), name="head")(x), self.dtype)


class _Conv4(nn.Module):
    way: int
    channels: int
    layers: int
    norm: str
    dtype: str
    patches: bool  # convolution as patches times a matrix

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, support: jax.Array | None = None) -> jax.Array:
        known = 0  # images in front, whose statistics hold for all
        if support is not None:
            x, known = jnp.concatenate([support, x]), len(support)
        for i in range(self.layers):
            x = nn.Conv(
                self.channels,
                (3, 3),
                strides=2,
                dtype=_compute(self.dtype),
                name=f"conv_{i}",
                conv_general_dilated=conv_as_patches if self.patches else jax.lax.conv_general_dilated,
            )(x)
            if self.norm != "none":
                x = _Norm(per_image=self.norm == "instance", name=f"norm_{i}")(x, known)
            x = nn.relu(x)
        x = x[known:]
        head = nn.Dense(self.way, dtype=_compute(self.dtype), name="head")
        return _logits(head(x.reshape(x.shape[0], -1)), self.dtype)


class _Norm(nn.Module):
    """Normalise each channel by the statistics of this very input; keeps no running averages.

    known: if not 0, the statistics are of that many images, the first ones.
    """

    per_image: bool

    @nn.compact
    def __call__(self, x: jax.Array, known: int = 0) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        scale, bias = scale[None, None, None], bias[None, None, None]
        axes, given = (1, 2) if self.per_image else (0, 1, 2), x.dtype
        x = x.astype(jnp.promote_types(given, jnp.float32))  # sums of squares need more digits than bfloat16 has
        seen = x[:known] if known else x
        mean = seen.mean(axes, keepdims=True)
        variance = jnp.square(seen).mean(axes, keepdims=True) - jnp.square(mean)
        slope = scale * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-5)
        return (x * slope + (bias - mean * slope)).astype(given)


class _Rnn(nn.Module):
    way: int
    cell: str
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        rows = x.reshape(*x.shape[:2], -1)  # one row of the image a time step
        dtype = _compute(self.dtype)
        kind = nn.GRUCell if self.cell == "gru" else nn.OptimizedLSTMCell
        cell = kind(self.width, dtype=dtype)
        zeros = jnp.zeros((x.shape[0], self.width), dtype or x.dtype)
        start: Any = zeros if self.cell == "gru" else (zeros, zeros)
        states: Any = nn.RNN(cell, name="rnn")(rows, initial_carry=start)
        return _logits(nn.Dense(self.way, dtype=dtype, name="head")(states[:, -1]), self.dtype)


def _compute(dtype: str) -> Any:
    """Flax's `dtype` of a layer: None computes in the dtype of params and inputs."""
    return None if dtype == "float32" else jnp.dtype(dtype)


def _logits(x: jax.Array, dtype: str) -> jax.Array:
    return x if dtype == "float32" else x.astype(jnp.float32)


def _dtype_setting(dtype: str) -> dict[str, str]:
    """What goes into a model's settings: nothing for the default, so that older artifacts stay as they are."""
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype: expected one of {DTYPES}, got {dtype!r}")
    return {} if dtype == "float32" else {"dtype": dtype}


def _linen_init(module: nn.Module, example: Any) -> Callable[[jax.Array], Params]:
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


def _image(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def _linen_apply(module: nn.Module) -> Apply:
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


def mlp(
    way: int,
    input_shape: tuple[int, ...] = (28, 28, 1),
    *,
    widths: Sequence[int] = (128,),
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Model:
    """Dense-ReLU(-dropout) layers and a dense head, over inputs of any shape; by default the reference MLP 784-128-way.

    dtype, here and below: "bfloat16" computes layers in it, with params, rates, norms, logits and loss in float32.
    """
    widths = tuple(widths)
    if len(widths) > MOST_LAYERS:
        raise ConfigError(f"model.widths: expected at most {MOST_LAYERS} layers, got {len(widths)}")
    if any(width < 1 for width in widths):
        raise ConfigError(f"model.widths: expected positive layer widths, got {widths}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout: expected 0 <= dropout < 1, got {dropout}")
    settings = {"widths": list(widths), "dropout": dropout} | _dtype_setting(dtype)
    module = _Mlp(way, widths, dropout, dtype)
    return Model(
        name="mlp",
        init=_linen_init(module, _image(input_shape)),
        apply=_linen_apply(module),
        input_shape=input_shape,
        way=way,
        settings=settings,
        relu_stack=dtype == "float32",
        dropout=dropout > 0,
        learned_dropout=True,
    )


def conv4(
    way: int,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    *,
    channels: int = 64,
    layers: int = 4,
    norm: str = "batch",
    dtype: str = "float32",
) -> Model:
    """The few-shot standard: `layers` blocks of 3x3 stride-2 convolution, norm, ReLU; then a dense head.

    norm "batch" uses the statistics of all images given together, which is transductive on a query set (as in
    MAML's published code): one image at a time, predictions are worthless. "support" uses those of the task's support
    set for queries too, so that a prediction depends on its image and the task alone. "instance" uses each image's own;
    "none" leaves it out. Source: Vinyals et al. 2016
    (section 4.1.1) and Finn et al. 2017 (section 5.2), with strides in place of pooling.
    """
    if norm not in NORMS:
        raise ConfigError(f"model.norm: expected one of {NORMS}, got {norm!r}")
    if channels < 1:
        raise ConfigError(f"model.channels: expected a positive number, got {channels}")
    if not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(f"model.layers: expected 1..{MOST_LAYERS}, got {layers}")
    settings = {"channels": channels, "layers": layers, "norm": norm} | _dtype_setting(dtype)
    plain, patched = (_Conv4(way, channels, layers, norm, dtype, patches) for patches in (False, True))
    wrapped: Callable[[Apply], Apply] = WithSupport if norm == "support" else lambda apply: apply
    return Model(
        name="conv4",
        init=_linen_init(plain, _image(input_shape)),
        apply=wrapped(_linen_apply(plain)),
        input_shape=input_shape,
        way=way,
        settings=settings,
        cpu_apply=wrapped(_linen_apply(patched)),
        transductive=norm == "batch",
    )


def rnn(
    way: int,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    *,
    cell: str = "gru",
    width: int = 128,
    dtype: str = "float32",
) -> Model:
    """A GRU or LSTM that reads the image row by row; the last state feeds a dense head."""
    if cell not in CELLS:
        raise ConfigError(f"model.cell: expected one of {CELLS}, got {cell!r}")
    if width < 1:
        raise ConfigError(f"model.width: expected a positive number, got {width}")
    settings = {"cell": cell, "width": width} | _dtype_setting(dtype)
    module = _Rnn(way, cell, width, dtype)
    return Model(
        name="rnn",
        init=_linen_init(module, _image(input_shape)),
        apply=_linen_apply(module),
        input_shape=input_shape,
        way=way,
        settings=settings,
    )


MODELS: dict[str, Callable[..., Model]] = {"mlp": mlp, "conv4": conv4, "rnn": rnn}


def build(name: str, way: int, input_shape: tuple[int, ...], **settings: Any) -> Model:
    """The model of that name. Raises ConfigError for an unknown name or setting.

    Args:
      way: number of outputs: classes, or targets.
      head_start: in settings: "learned", or a row of heads.HEAD_STARTS.
      input_shape: (height, width, channels) of images; an mlp takes inputs of any shape, (features,) say.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name: expected one of {tuple(MODELS)}, got {name!r}")
    _check_shape(name, input_shape, way)
    head_start = settings.pop("head_start", LEARNED_HEAD)

    def of(outputs: int) -> Model:
        try:
            return MODELS[name](outputs, input_shape, **settings)
        except TypeError as error:
            raise ConfigError(f"model {name}: {error}") from error

    if head_start == LEARNED_HEAD:
        return of(way)
    from metalr.models.heads import with_head_start  # it needs this module

    return with_head_start(of, way, head_start)


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

    check_dtypes(jax.eval_shape(init, jax.random.key(0)), "model")
    return Model(name, init, applied, input_shape, None, head, relu_stack=relu_stack)


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
    ordered = [leaves[path_name(p)] for p, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    fixed = jax.tree.unflatten(jax.tree.structure(wanted), ordered)
    return dataclasses.replace(model, name=CUSTOM, settings={}, init=lambda key: fixed)


def _check_shape(name: str, input_shape: Any, way: Any) -> None:
    """Raises ConfigError unless these are (height, width, channels) and a number of classes; or, of an mlp, any."""
    if (
        not isinstance(input_shape, (tuple, list))
        or len(input_shape) not in ((1, 3) if name == "mlp" else (3,))
        or not all(isinstance(n, (int, np.integer)) and n > 0 for n in input_shape)
    ):
        raise ConfigError(f"input_shape: expected (height, width, channels), all positive, got {input_shape!r}")
    if not isinstance(way, (int, np.integer)) or way < 1 + (len(input_shape) == 3):
        raise ConfigError(f"way: expected at least 2 classes, got {way!r}")


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
    init, apply = _linen_init(module, _examples(example_x, 1)), _linen_apply(module)
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
            "or GroupNorm instead of running batch statistics, and leave dropout out"
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params = jax.eval_shape(model.init, jax.random.key(0))
    check_dtypes(params, "model")
    x = _examples(example_x, 3)
    outputs = jax.eval_shape(model.apply, params, x)
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
