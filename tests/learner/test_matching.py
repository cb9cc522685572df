"""Learned rates in one's own loop over another network: by name, depth, role, mapping and function."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import metalr
from metalr import inner, models, outer
from metalr.errors import ConfigError
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.learner import matching

RATES = {"dense_0": 0.1, "dense_1": 0.2, "head": 0.4}


def learner(granularity="layer", rates=None, **settings):
    model = models.mlp(3, (4,), widths=(5, 5))
    spec = RatesSpec(granularity, steps=4, **settings)
    meta = outer.initial(model, spec, jax.random.key(0))
    actual = hyperparameters.actual(spec, meta.rates)
    given = RATES if rates is None and granularity == "layer" else rates or {}
    return metalr.Learner(model, spec, meta.init, actual | {k: jnp.asarray(v, jnp.float32) for k, v in given.items()})


class Net(nn.Module):
    """Deeper and wider than what was learned on, with a norm, and a name of its own for the output layer."""

    depth: int = 12

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = nn.relu(nn.Dense(7, name=f"layer_{i}")(x))
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(2, name="a_last_one")(x)


PARAMS = Net().init(jax.random.key(0), jnp.zeros((1, 4)))["params"]


def rates_of(tx, params, kind="kernel"):
    """The rate of each tensor, read off one update for gradients of one."""
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return {k: float(-jnp.mean(v)) for k, v in nn.module.traverse_util.flatten_dict(updates, sep="/").items()}


def test_places_go_by_the_order_of_the_network_not_of_the_alphabet():
    places = {each.name: each.place for each in matching.tensors_of(PARAMS) if each.kind == "kernel"}
    assert list(places) == [f"layer_{i}/kernel" for i in range(12)] + ["a_last_one/kernel"]
    assert (places["layer_0/kernel"], places["a_last_one/kernel"]) == (0, 1)
    assert places["layer_10/kernel"] > places["layer_2/kernel"]
    kinds = {each.name: each.kind for each in matching.tensors_of(PARAMS)}
    assert (kinds["norm/scale"], kinds["norm/bias"], kinds["layer_3/bias"]) == ("norm", "norm", "bias")


def test_by_depth_and_by_role():
    learned = learner()
    by_depth = rates_of(learned.as_optax(like=PARAMS, names="depth", default=0.0), PARAMS)
    kernels = [by_depth[f"layer_{i}/kernel"] for i in range(12)] + [by_depth["a_last_one/kernel"]]
    np.testing.assert_allclose(kernels, sorted(kernels), rtol=1e-5)
    np.testing.assert_allclose([kernels[0], kernels[6], kernels[-1]], [0.1, 0.2, 0.4], rtol=1e-6)
    by_role = rates_of(learned.as_optax(like=PARAMS, names="role", default="mean"), PARAMS)
    found = [by_role[f"{name}/kernel"] for name in ("layer_0", "layer_1", "layer_11", "a_last_one")]
    np.testing.assert_allclose(found, [0.1, 0.2, 0.2, 0.4], rtol=1e-6)
    np.testing.assert_allclose(by_role["norm/scale"], (0.1 * 0.2 * 0.4) ** (1 / 3), rtol=1e-5)


class Named(nn.Module):
    """Layers whose names do not sort as they stand."""

    names: tuple[str, ...] = ("stem", "mid")

    @nn.compact
    def __call__(self, x):
        for name in self.names:
            x = nn.relu(nn.Dense(5, name=name)(x))
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize("by", ["role", "depth"])
def test_learned_layers_are_in_the_order_of_their_network_after_jit_and_loading(by, tmp_path):
    """JAX and files sort a tree's names: mid would come before stem."""
    model = models.from_linen(Named(), np.zeros((1, 4), np.float32))
    spec = RatesSpec("layer", steps=4)
    meta = outer.initial(model, spec, jax.random.key(0))
    rates = {name: jnp.float32(rate) for name, rate in (("stem", 0.1), ("mid", 0.2), ("head", 0.4))}
    metalr.save(tmp_path / "a", metalr.Learner(model, spec, jax.jit(lambda p: p)(meta.init), rates))
    learned = metalr.load(tmp_path / "a", model)
    longer = ("one", "a", "z", "b")
    for names, expected in ((("stem", "mid"), [0.1, 0.2, 0.4]), (longer, [0.1, 0.2, 0.2, 0.2, 0.4])):
        mine = Named(names).init(jax.random.key(1), jnp.zeros((1, 4)))["params"]
        found = rates_of(learned.as_optax(like=mine, names=by), mine)
        kernels = [found[f"{name}/kernel"] for name in (*names, "head")]
        if by == "role":
            np.testing.assert_allclose(kernels, expected, rtol=1e-5)
        else:
            np.testing.assert_allclose([kernels[0], kernels[-1]], [0.1, 0.4], rtol=1e-5)
            np.testing.assert_allclose(kernels, sorted(kernels), rtol=1e-5)


@pytest.mark.parametrize("kind", [{"decay": 0.1}, {"proximal": 0.1}])
def test_what_does_not_adapt_does_not_shrink(kind):
    """Neither on its own network, nor elsewhere, nor with a default rate of zero."""
    learned = learner(adapts="head", initial=0.1, rates={}, **kind)
    x, y = np.ones((3, 4), np.float32), np.arange(3)

    def moved(tx, params, of):
        still = jax.tree.map(jnp.zeros_like, params)
        far = jax.tree.map(lambda v: v + 1.0, params)
        updates, _ = tx.update(still, tx.init(params), far)
        return [float(abs(updates[name]["kernel"]).max()) for name in of]

    for like in (None, learned.init):
        tx = learned.as_optax(like=like)
        body, head = moved(tx, learned.init, ("dense_0", "head"))
        assert body == 0 < head
    other = learned.for_network(learned.model)
    fast = other.adapt(x, y, steps=3, init=learned.init)
    np.testing.assert_array_equal(fast["dense_0"]["kernel"], learned.init["dense_0"]["kernel"])
    body = learner(initial=0.1, rates={}, **kind)
    tx = body.as_optax(like=learned.init, names={"head": "head"}, default=0.0)
    assert moved(tx, learned.init, ("dense_0", "head"))[0] == 0


def test_another_network_knows_no_best_number_of_steps():
    learned = dataclasses.replace(learner(), facts={"validated_steps": {"1": 0.9, "20": 0.8}, "seed": 3})
    assert learned.best_steps() == 1
    other = learned.for_network(models.mlp(3, (4,), widths=(9, 9)))
    assert other.best_steps() == other.spec.steps == 4
    assert other.facts["seed"] == 3


def test_by_mapping_pattern_and_function():
    learned = learner()
    names = {"a_last_one": "head", "layer_0": "dense_0", "layer_*": "dense_1"}
    found = rates_of(learned.as_optax(like=PARAMS, names=names, default=0.03), PARAMS)
    picked = [found[name] for name in ("a_last_one/bias", "layer_0/kernel", "layer_11/kernel", "norm/scale")]
    np.testing.assert_allclose(picked, [0.4, 0.1, 0.2, 0.03], rtol=1e-6)
    for names in ({"A_last_one": "head"}, {"a_last_one": "head", "layer/*": "dense_0/kernel"}):
        with pytest.raises(
            ConfigError, match=r"names: expected names or patterns of your tensors .* that fit none: \["
        ):
            learned.as_optax(like=PARAMS, names=names, default=0.03)
    tx = learned.as_optax(like=PARAMS, names=lambda name: "head/kernel" if "kernel" in name else None, default=0.0)
    found = rates_of(tx, PARAMS)
    assert found["layer_5/kernel"] == pytest.approx(0.4)
    assert found["layer_5/bias"] == 0


def test_rates_of_kernels_go_with_one_over_their_inputs():
    learned = learner()  # kernels of 4 x 5, 5 x 5 and 5 x 3; here 4 x 7, 7 x 7 and 7 x 2
    tx = learned.as_optax(like=PARAMS, names="role", default=0.03, fan_in=1.0)
    found = rates_of(tx, PARAMS)
    names = ("layer_0/kernel", "layer_5/kernel", "a_last_one/kernel", "layer_5/bias", "norm/scale")
    np.testing.assert_allclose([found[name] for name in names], [0.1, 0.2 * 5 / 7, 0.4 * 5 / 7, 0.2, 0.03], rtol=1e-5)
    printed = str(learned.matching(PARAMS, names="role", default=0.03, fan_in=1.0))
    assert "dense_1/kernel, x 0.714 for its inputs" in printed
    assert "layer_5/bias       0.2 " in printed
    found = rates_of(learned.as_optax(like=PARAMS, names="role", default=0.03, fan_in=0.5), PARAMS)
    assert found["layer_5/kernel"] == pytest.approx(0.2 * (5 / 7) ** 0.5)


def test_on_another_network_it_is_a_learner_without_a_learned_init():
    learned = learner()
    wide = models.mlp(3, (4,), widths=(9, 9, 9))
    other = learned.for_network(wide, fan_in=1.0)
    assert other.rates_alone
    assert not learned.rates_alone
    assert other.model is wide
    x, y = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), np.arange(6) % 3
    start = wide.init(jax.random.key(5))
    fast = other.adapt(x, y, steps=3, init=start)
    tx = learned.as_optax(like=start, names="role", fan_in=1.0)
    params, state = start, tx.init(start)
    for _ in range(3):
        grads = jax.grad(
            lambda p: optax.softmax_cross_entropy_with_integer_labels(wide.apply(p, x), y).mean()
        )(params)  # fmt: skip
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), fast, params)


def test_without_a_learned_init_every_task_is_evaluated_from_one_of_its_own():
    """A network whose outputs are its init's alone: tasks of one init would all have one score."""
    model = models.from_function(
        lambda key: {"head": {"kernel": jax.random.normal(key, (1, 1))}}, lambda p, x: x @ p["head"]["kernel"]
    )

    def sample(key):
        x = jnp.ones((2, 1))
        return metalr.Episode(x, jnp.zeros((2, 1)), x, jnp.zeros((2, 1)))

    tasks = metalr.Tasks(train=sample, validation=sample, test=sample)
    spec = RatesSpec(steps=1)
    init, rates = model.init(jax.random.key(0)), {"head": jnp.float32(1e-6)}
    own = metalr.Learner(model, spec, init, rates, objective=inner.OBJECTIVES["squared_error"])
    assert np.ptp(own.evaluate(tasks, episodes=8, steps=1).tasks[:, 0]) < 1e-6
    assert np.ptp(own.for_network(model, names="depth").evaluate(tasks, episodes=8, steps=1).tasks[:, 0]) > 0.1


def test_a_network_that_jax_took_apart_has_its_layers_in_order():
    """JAX sorts a dict's keys by name, so layer_10 would come before layer_2."""
    sorted_by_jax = jax.tree.map(jnp.asarray, jax.jit(lambda p: p)(PARAMS))
    assert [*sorted_by_jax][:4] == ["a_last_one", "layer_0", "layer_1", "layer_10"]
    found = [each.name for each in matching.tensors_of(sorted_by_jax, "a_last_one") if each.kind == "kernel"]
    deep = models.mlp(3, (4,), widths=(5,) * 12)
    meta = outer.initial(deep, RatesSpec(), jax.random.key(0))
    init = jax.jit(lambda tree: tree)(meta.init)
    learned = metalr.Learner(deep, RatesSpec(), init, hyperparameters.actual(RatesSpec(), meta.rates))
    own = learned.matching(deep.init(jax.random.key(0)), names="depth").sources
    assert all(of == (name,) for name, of in own.items())
    places = {each.name: each.place for each in matching.tensors_of(sorted_by_jax, "a_last_one")}
    assert sorted(found, key=places.get) == [f"layer_{i}/kernel" for i in range(12)] + ["a_last_one/kernel"]


def test_the_output_layer_of_another_network_is_the_one_it_says():
    own = models.from_linen(Net(3), np.zeros((1, 4), np.float32), head="a_last_one")
    learned = dataclasses.replace(learner(), model=models.mlp(2, (4,), widths=(5, 5)))
    found = learned.for_network(own, default=0.03)
    rates = {name: float(rate) for name, rate in found.rates.items()}
    assert rates["layer_0/kernel"] == pytest.approx(0.1)
    assert rates["layer_2/kernel"] == pytest.approx(0.2)
    assert rates["a_last_one/kernel"] == pytest.approx(0.4)
    assert found.spec.head == "a_last_one"
    assert found.facts["carried_from"] == {"model": "mlp", "names": "role", "default": 0.03, "fan_in": 0.0}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.mlp(3, (5,), widths=(5,)), r"model: expected inputs \(4,\) and 3 outputs .* got \(5,\) and 3"),
        (models.mlp(2, (4,), widths=(5,)), r"model: expected inputs .* got \(4,\) and 2; for other tasks, .*as_optax"),
        (
            dataclasses.replace(models.mlp(3, (4,), widths=(5,)), learned_dropout=False),
            "model: expected a network that takes a learned dropout rate",
        ),
    ],
)
def test_networks_that_cannot_take_the_rates(model, message):
    with pytest.raises(ConfigError, match=message):
        learner(dropout=0.1).for_network(model)


def test_inputs_are_of_kernels_alone():
    def factors(learned, own):
        rates = metalr.Learner(models.mlp(3, (4,)), RatesSpec(), learned, {name: jnp.float32(1) for name in learned})
        return rates.matching(own, names=lambda name: name, fan_in=1.0).factors

    def tree(vocabulary, wide, heads):
        return {
            "embed": {"embedding": jnp.zeros((vocabulary, wide))},
            "query": {"kernel": jnp.zeros((wide, heads, 4)), "bias": jnp.zeros((heads, 4))},
            "conv": {"kernel": jnp.zeros((3, 3, wide, 8))},
            "out": {"kernel": jnp.zeros((wide, 3))},
        }

    found = factors(tree(100, 16, 4), tree(200, 32, 8))
    assert found == pytest.approx(
        {"embed/embedding": 1, "query/kernel": 0.5, "query/bias": 1, "conv/kernel": 0.5, "out/kernel": 0.5}
    )
    same = factors(tree(100, 784, 4), tree(100, 784, 4))
    assert set(same.values()) == {1.0}


def test_predicted_rates_are_for_their_own_network():
    predicted = learner(predicted=True)
    message = "like: expected None, because these rates are predicted from the layers"
    with pytest.raises(ConfigError, match=message):
        predicted.as_optax(like=PARAMS, default=0.1)
    with pytest.raises(ConfigError, match=message):
        predicted.for_network(models.mlp(3, (4,), widths=(9, 9)))


def test_what_was_matched_can_be_printed():
    text = str(learner().matching(PARAMS, names="depth", default=0.03))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["layer_0/kernel"] == ["0.1", "dense_0/kernel"]
    assert lines["norm/scale"] == ["0.03", "default"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"default: expected a rate .* for tensors that none is learned for: \['layer_0/"),
        ({"names": "role"}, r"none is learned for: \['norm/scale', 'norm/bias'\]"),
        ({"names": "deep", "default": 0.1}, "names: expected a mapping, a function, or one of"),
        ({"names": {"layer_0": "dense_9"}, "default": 0.1}, "expected a learned tensor, one of .*got 'dense_9/"),
        ({"names": "role", "default": 0.1, "fan_in": 2}, "fan_in: expected a power of 0..1, got 2"),
        ({"default": -1.0}, "default: expected a rate of at least 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        learner().as_optax(like=PARAMS, **options)


def test_rates_that_go_with_the_size_of_the_support_set():
    learned = learner(support_power=0.5, support=4)
    for like in (None, learned.init):
        found = rates_of(learned.as_optax(like=like, support=16), learned.init)
        assert found["dense_1/kernel"] == pytest.approx(0.4)
        assert rates_of(learned.as_optax(like=like), learned.init)["dense_1/kernel"] == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="support: expected a number of examples .* got 3"):
        learner().as_optax(support=3)
    for support in (0, 2.5, "10"):
        with pytest.raises(ConfigError, match=f"support: expected a number of examples .* got {support!r}"):
            learned.as_optax(support=support)


def test_names_need_params_to_look_at():
    with pytest.raises(ConfigError, match="like: expected your params beside names, default and fan_in"):
        learner().as_optax(fan_in=1.0)
    with pytest.raises(ConfigError, match="like: expected your params beside names"):
        learner().as_optax(names="role")
    with pytest.raises(ConfigError, match="rates are predicted from the layers"):
        learner(predicted=True).as_optax(like=PARAMS, names="depth", default=0.1)


@pytest.mark.parametrize("granularity", ["shared", "tensor", "channel", "parameter"])
@pytest.mark.parametrize("times", [{}, {"per_step": True}, {"knots": 2}])
def test_every_granularity_fits_another_network(granularity, times):
    learned = learner(granularity, momentum=0.5, decay=0.01, initial=0.1, **times)
    tx = learned.as_optax(like=PARAMS, names="depth", default="mean")
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(5):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("granularity", ["layer", "parameter"])
def test_on_its_own_network_it_is_what_it_was(granularity):
    learned = learner(granularity, momentum=0.5, clip=0.3, rates={})
    grads = jax.tree.map(lambda v: jnp.sin(7 * v), learned.init)

    def two_steps(tx, wrap=lambda tree: tree):
        state, params = tx.init(wrap(learned.init)), wrap(learned.init)
        for _ in range(2):
            updates, state = tx.update(wrap(grads), state, params)
            params = optax.apply_updates(params, updates)
        return params

    expected = two_steps(learned.as_optax())
    found = two_steps(learned.as_optax(like=learned.init))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), expected, found)
    outer_level = two_steps(learned.as_optax(), lambda tree: {"params": tree})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), {"params": expected}, outer_level)


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(Net().apply({"params": params}, x), y).mean()


@pytest.mark.parametrize("around", ["plain", "multi_transform", "masked", "MultiSteps", "TrainState"])
def test_it_trains_another_network_in_loops_of_optax_and_flax(around):
    tx = learner().as_optax(like=PARAMS, names="role", default="mean")
    if around == "multi_transform":
        labels = jax.tree_util.tree_map_with_path(lambda path, _: "head" if "last" in str(path[0]) else "body", PARAMS)
        tx = optax.multi_transform({"head": tx, "body": tx}, labels)
    elif around == "masked":
        kernels = jax.tree.map(lambda leaf: leaf.ndim > 1, PARAMS)
        rest = jax.tree.map(lambda chosen: not chosen, kernels)
        tx = optax.chain(optax.masked(tx, kernels), optax.masked(optax.set_to_zero(), rest))
    elif around == "MultiSteps":
        tx = optax.MultiSteps(tx, 2)
    x = jax.random.normal(jax.random.key(0), (30, 4))
    y = (x[:, 0] > 0).astype(jnp.int32)
    state = TrainState.create(apply_fn=Net().apply, params=PARAMS, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params, x, y)))
    before = float(loss(state.params, x, y))
    for _ in range(40):
        state = step(state)
    assert float(loss(state.params, x, y)) < before


def test_it_trains_a_module_of_nnx():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 9, rngs=rngs)
            self.last = nnx.Linear(9, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    net = Own(nnx.Rngs(0))
    tx = learner().as_optax(like=nnx.state(net, nnx.Param), names={"first": "dense_0", "last": "head"})
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (30, 4))
    y = (x[:, 0] > 0).astype(jnp.int32)

    def loss(net):
        return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

    before = float(loss(net))
    for _ in range(30):
        optimizer.update(net, nnx.grad(loss)(net))
    assert float(loss(net)) < 0.7 * before
