"""Models: shapes, equal formulations, adapters, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metalr import config, inner, models, outer
from metalr.errors import ConfigError
from metalr.inner import descent, hyperparameters
from metalr.learner.matching import order_of

X = jax.random.uniform(jax.random.key(1), (4, 28, 28, 1))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {}),
        ("mlp", {"widths": (32, 16), "dropout": 0.0}),
        ("mlp", {"widths": ()}),
        ("conv4", {"channels": 8}),
        ("conv4", {"channels": 8, "norm": "instance"}),
        ("conv4", {"channels": 8, "norm": "none"}),
        ("rnn", {"width": 16}),
        ("rnn", {"width": 16, "cell": "lstm"}),
        ("transformer", {"width": 16, "layers": 2, "attention_heads": 2}),
    ],
)
def test_every_model_gives_logits_and_gradients(name, settings):
    model = models.build(name, 5, (28, 28, 1), **settings)
    params = model.init(jax.random.key(0))
    logits = jax.jit(model.apply)(params, X)
    assert logits.shape == (4, 5)
    assert logits.dtype == jnp.float32
    grads = jax.jit(jax.grad(lambda p: inner.cross_entropy(model.apply(p, X), jnp.arange(4))))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    rebuilt = models.build(model.name, model.way, model.input_shape, **model.settings)
    np.testing.assert_array_equal(jax.jit(rebuilt.apply)(params, X), logits)


def test_reference_mlp_is_the_default():
    model = models.mlp(10)
    params = model.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "dense_0": {"kernel": (784, 128), "bias": (128,)},
        "head": {"kernel": (128, 10), "bias": (10,)},
    }
    assert model.settings["dropout"] == config.ModelConfig().dropout == 0.0


def test_dropout_is_active_with_a_key_only():
    model = models.mlp(10, dropout=0.2)
    params = model.init(jax.random.key(0))
    np.testing.assert_array_equal(model.apply(params, X), model.apply(params, X))
    with_key = model.apply(params, X, key=jax.random.key(2))
    assert not np.allclose(with_key, model.apply(params, X))
    assert not np.allclose(with_key, model.apply(params, X, key=jax.random.key(3)))


@pytest.mark.parametrize(("norm", "transductive"), [("batch", True), ("instance", False), ("none", False)])
def test_transductive_means_what_it_says(norm, transductive):
    model = models.conv4(3, channels=8, norm=norm)
    params = model.init(jax.random.key(0))
    alone, together = model.apply(params, X[:2]), model.apply(params, X)[:2]
    assert model.transductive == transductive
    assert np.allclose(alone, together, atol=1e-5) != transductive


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet", {}, r"model.name: expected one of \('mlp'"),
        ("mlp", {"widths": (0,)}, "model.widths: expected at least 1, got 0"),
        ("mlp", {"dropout": 1.0}, "model.dropout: expected 0 <= dropout < 1"),
        ("mlp", {"depth": 3}, "model mlp: .*depth"),
        ("conv4", {"norm": "layer"}, "model.norm: expected one of"),
        ("conv4", {"channels": 0}, "model.channels"),
        ("rnn", {"cell": "gr"}, "model.cell: expected one of"),
        ("rnn", {"width": 0}, "model.width"),
        ("transformer", {"width": 10}, "model.width: expected a positive multiple of .*, got 10 and 4"),
        ("transformer", {"layers": 0}, "model.layers: expected 1..64, got 0"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        models.build(name, 5, (28, 28, 1), **settings)


EXAMPLE = np.zeros((1, 8, 8, 1), np.float32)


class Small(nn.Module):
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(3, name="head")(nn.relu(x))


def adapts(model):
    spec = hyperparameters.RatesSpec(steps=2)
    meta = outer.initial(model, spec, jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (3, *model.input_shape))
    fast, _ = inner.adapt(
        model.apply, meta.init, x, jnp.arange(3), descent.optimizer(spec, hyperparameters.actual(spec, meta.rates)), 2
    )
    before, after = (inner.cross_entropy(model.apply(p, x), jnp.arange(3)) for p in (meta.init, fast))
    return bool(after < before)


def test_own_linen_module():
    assert adapts(models.from_linen(Small(), EXAMPLE))


def test_running_statistics_are_refused_with_a_way_out():
    with pytest.raises(
        ConfigError, match=r"Small: expected params only, got the collections \['batch_stats'\].*LayerNorm"
    ):
        models.from_linen(Small(batch_norm=True), EXAMPLE)


def test_dropout_needs_a_module_that_takes_train():
    with pytest.raises(ConfigError, match=r"dropout=True: expected a module called with train=True: .*'train'"):
        models.from_linen(Small(), EXAMPLE, dropout=True)


def test_shapes_are_read_off_the_example_and_the_outputs():
    model = models.from_linen(Small(), EXAMPLE)
    assert (model.input_shape, model.way, model.takes_images) == ((8, 8, 1), 3, True)
    shape = jax.ShapeDtypeStruct((5, 8, 8, 1), jnp.float32)
    assert models.from_linen(Small(), shape).input_shape == (8, 8, 1)

    class Series(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"level": nn.Dense(1)(x["values"]), "trend": nn.Dense(2)(x["time"])}

    example = {"values": np.zeros((1, 4), np.float32), "time": np.zeros((1, 2), np.float32)}
    model = models.from_linen(Series(), example)
    assert (model.input_shape, model.way, model.takes_images) == (None, None, False)
    outputs = model.apply(model.init(jax.random.key(0)), jax.tree.map(lambda v: jnp.ones((7, v.shape[1])), example))
    assert outputs["trend"].shape == (7, 2)


def test_outputs_without_an_axis_of_examples_are_refused():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(x.reshape(x.shape[0], -1)).mean(0)

    with pytest.raises(
        ConfigError, match=r"expected outputs with a leading axis of 3 for 3 examples, got shapes \[\(4,"
    ):
        models.from_linen(Pooled(), EXAMPLE)


class SmallNnx(nnx.Module):
    def __init__(self, rngs, batch_norm=False):
        self.body = nnx.Linear(64, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs) if batch_norm else None
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x.reshape(x.shape[0], -1))))


def test_own_nnx_module():
    model = models.from_nnx(SmallNnx(nnx.Rngs(0)), EXAMPLE)
    a, b = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    assert not np.allclose(a["body"]["kernel"], b["body"]["kernel"])
    assert adapts(model)


def test_nnx_state_is_refused():
    with pytest.raises(ConfigError, match=r"SmallNnx: expected nnx.Param only, got other state \(BatchStat\)"):
        models.from_nnx(SmallNnx(nnx.Rngs(0), batch_norm=True), EXAMPLE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_params_of_16_bits_are_refused_by_every_adapter(dtype):
    """They would train, be written, and never be read again."""

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, param_dtype=dtype, name="head")(x.reshape(x.shape[0], -1))

    class HalfNnx(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(64, 3, param_dtype=dtype, rngs=rngs)

        def __call__(self, x):
            return self.head(x.reshape(x.shape[0], -1))

    message = rf"expected params in float32, got {jnp.dtype(dtype)} for .*head.*; keep params in float32"
    with pytest.raises(ConfigError, match=message):
        models.from_linen(Half(), EXAMPLE)
    with pytest.raises(ConfigError, match=message):
        models.from_nnx(HalfNnx(nnx.Rngs(0)), EXAMPLE)
    by_hand = models.Model("custom", lambda key: {"head": jnp.zeros((3,), dtype)}, lambda p, x: x, (8, 8, 1), 3)
    with pytest.raises(ConfigError, match=message):
        outer.initial_shapes(by_hand, hyperparameters.RatesSpec())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.from_linen(lambda x: x, EXAMPLE), "expected a flax.linen module, such as Net"),
        (lambda: models.from_linen(Small, EXAMPLE), "expected a flax.linen module, such as Net"),
        (lambda: models.from_linen(Small(), 12), r"example_x: expected arrays with a leading axis of examples.*got 12"),
        (lambda: models.from_linen(Small(), (8, 8, 1)), r"example_x: expected arrays with a leading axis.*got 8"),
        (
            lambda: models.from_linen(Small(), ()),
            r"example_x: expected arrays with a leading axis of examples, got \(\)",
        ),
        (lambda: models.from_nnx(lambda x: x, EXAMPLE), "expected a flax.nnx module"),
        (lambda: models.build("mlp", 3, 12), "input_shape: expected"),
    ],
)
def test_what_is_no_module_or_shape_is_said_to_be_none(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_names_of_heads_must_agree():
    model = models.from_linen(Small(), EXAMPLE, head="Dense_0")
    with pytest.raises(ConfigError, match="rates.head: expected the model's head 'Dense_0', got 'head'"):
        outer.initial(model, hyperparameters.RatesSpec(), jax.random.key(0))


@pytest.mark.parametrize("name", list(models.MODELS))
def test_bfloat16_computes_the_same_to_its_digits_with_float32_outside(name):
    settings = {"mlp": {"dropout": 0.0}, "conv4": {"channels": 8}}.get(name, {"width": 16})
    exact, short = (models.build(name, 3, (28, 28, 1), **settings, **more) for more in ({}, {"dtype": "bfloat16"}))
    params = short.init(jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    x = jax.random.uniform(jax.random.key(1), (6, 28, 28, 1))
    a, b = exact.apply(params, x), short.apply(params, x)
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(a).max()) + 0.02)
    assert (np.asarray(a) != np.asarray(b)).any()
    assert not short.relu_stack
    assert "dtype" not in exact.settings
    with pytest.raises(ConfigError, match=r"model.dtype: expected one of"):
        models.build(name, 3, (28, 28, 1), dtype="float16")


@pytest.mark.parametrize("name", list(models.MODELS))
def test_params_are_float32_with_64_bits_too(name):
    """So an artifact can be read whatever jax_enable_x64 is."""
    with jax.enable_x64(True):
        params = models.build(name, 3, (8, 8, 1)).init(jax.random.key(0))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.mlp(0, (3,)), "way: expected at least 1, got 0"),
        (lambda: models.mlp("3", (3,)), "way: expected a whole number"),
        (lambda: models.mlp(3, 3), "input_shape: expected a tuple of numbers, got 3"),
        (lambda: models.mlp(3, (3,), widths=64), r"model.widths: expected a tuple of layer widths, .*, got 64"),
        (lambda: models.mlp(3, (3,), widths=(2.5,)), "model.widths: expected a whole number"),
        (lambda: models.conv4(3, (28, 28)), r"input_shape: expected \(height, width, channels\), got \(28, 28\)"),
        (lambda: models.rnn(3, (28,)), r"input_shape: expected \(height, width, channels\)"),
        (lambda: models.transformer(3, (28, 28, 1), width=8.0), "model.width: expected a whole number"),
        (lambda: models.from_function(lambda: 3, lambda p, x: x), "model: init: expected a function of a key"),
        (
            lambda: models.from_linen(nn.Dense(3), np.zeros((2,), np.float32)[:0].reshape(0)),
            "model, example_x: expected a module that is called with the inputs alone",
        ),
        (lambda: models.from_linen(nn.Dropout(0.5), np.zeros((2, 3), np.float32)), "it says: .*deterministic"),
    ],
)
def test_what_a_network_cannot_be_made_of(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_shape_may_be_a_list():
    model = models.mlp(1, [3], widths=(2,))
    assert model.input_shape == (3,)
    assert model.apply(model.init(jax.random.key(0)), np.zeros((4, 3), np.float32)).shape == (4, 1)


def test_another_start_keeps_the_order_of_the_layers():
    """By which `names="role"` and "depth" know first and last."""
    model = models.from_function(
        lambda key: {"wide_0": {"kernel": jnp.zeros((4, 3))}, "attention_0": {"kernel": jnp.zeros((3, 2))}},
        lambda params, x: x @ params["wide_0"]["kernel"] @ params["attention_0"]["kernel"],
    )
    given = jax.jit(lambda: jax.tree.map(lambda v: v + 1, model.init(jax.random.key(0))))()  # sorted by name
    assert [*given] == ["attention_0", "wide_0"]
    started = models.starting_from(model, given)
    assert order_of(started.init) == ["wide_0/kernel", "attention_0/kernel"]
    np.testing.assert_array_equal(started.init(jax.random.key(1))["wide_0"]["kernel"], np.ones((4, 3)))


def test_an_output_layer_of_another_name_has_to_be_there():
    def init(key):
        return {"dense": {"kernel": jnp.ones((2, 3))}}

    assert models.from_function(init, lambda p, x: x @ p["dense"]["kernel"], head="dense").head == "dense"
    with pytest.raises(
        ConfigError, match=r"head: expected .* of a layer of the params, \['dense/kernel'\], got 'dens'"
    ):
        models.from_function(init, lambda p, x: x @ p["dense"]["kernel"], head="dens")
    with pytest.raises(ConfigError, match="head: expected the first keys of a layer .* got 'lost'"):
        models.from_linen(nn.Dense(3), np.zeros((1, 2), np.float32), head="lost")
