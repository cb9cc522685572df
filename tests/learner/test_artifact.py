"""Artifacts: exact round trips, refused damage, the reuse API and its errors."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metalr
from metalr import inner, models, outer
from metalr.errors import ArtifactError, ConfigError, DataError, MetalrWarning, StorageError
from metalr.inner import descent, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.outer import algorithms, devices
from metalr.storage import sealed

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (9, 8, 8), dtype=np.uint8)
Y = np.arange(9) % 3


def learner(algorithm="meta_sgd_layer", model=None, **settings):
    row = algorithms.ALGORITHMS[algorithm]
    model = model or models.mlp(3, (8, 8, 1), widths=(6,), dropout=0.0)
    spec = RatesSpec(
        row.granularity, per_step=row.per_step, adapts=row.adapts, predicted=row.predicted, decay=row.decay,
        proximal=row.proximal, steps=3, initial=0.4, **settings,
    )  # fmt: skip
    meta = outer.initial(model, spec, jax.random.key(0))
    noisy = {k: v + 0.1 * jax.random.normal(jax.random.key(1), v.shape) for k, v in meta.rates.items()}
    return metalr.Learner(model, spec, meta.init, hyperparameters.actual(spec, noisy), {"split_sha256": "abc"})


def leaves(tree):
    return [np.asarray(v) for v in jax.tree.leaves(tree)]


@pytest.mark.smoke
@pytest.mark.parametrize("algorithm", list(algorithms.ALGORITHMS))
def test_round_trip_is_exact_for_every_algorithm(algorithm, tmp_path):
    saved = learner(algorithm)
    loaded = metalr.load(metalr.save(tmp_path / "a", saved))
    assert loaded.spec == saved.spec
    assert loaded.facts == saved.facts
    for tree in ("init", "rates"):
        for a, b in zip(leaves(getattr(saved, tree)), leaves(getattr(loaded, tree)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    for steps in (None, 0, 5):
        a, b = (one.apply(one.adapt(X, Y, steps=steps), X) for one in (saved, loaded))
        np.testing.assert_array_equal(a, b)


def test_a_learner_is_pickled_as_its_artifact():
    saved = learner("lslr")
    saved.adapt(X, Y)  # compiled programs stay behind
    loaded = pickle.loads(pickle.dumps(saved))
    assert loaded.facts == saved.facts
    np.testing.assert_array_equal(saved.apply(saved.adapt(X, Y), X), loaded.apply(loaded.adapt(X, Y), X))
    own = models.from_function(lambda key: {"head": {"kernel": jnp.ones((2, 3))}}, lambda p, x: x @ p["head"]["kernel"])
    with pytest.raises(AttributeError, match="[Cc]an't pickle"):
        pickle.dumps(learner(model=own))


@pytest.mark.parametrize("model", [models.conv4(3, (8, 8, 1), channels=4, layers=2), models.rnn(3, (8, 8, 1), width=5)])
def test_other_models_round_trip(model, tmp_path):
    saved = learner(model=model)
    loaded = metalr.load(metalr.save(tmp_path / "a", saved))
    np.testing.assert_array_equal(loaded.apply(loaded.adapt(X, Y), X), saved.apply(saved.adapt(X, Y), X))


def test_adapt_is_the_plain_inner_loop():
    learned = learner()
    x = jnp.asarray(X, jnp.float32)[..., None] / 255
    expected, _ = inner.adapt(
        learned.model.apply, learned.init, x, Y, descent.optimizer(learned.spec, learned.rates), 4
    )
    for a, b in zip(leaves(learned.adapt(X, Y, steps=4)), leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rates_adapt_another_init(tmp_path):
    learned = learner()
    other = learned.model.init(jax.random.key(7))
    expected = dataclasses.replace(learned, init=other).adapt(X, Y)
    for a, b in zip(leaves(learned.adapt(X, Y, init=other)), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="init: expected params as the learner's own init, .*got {"):
        learned.adapt(X, Y, init=models.mlp(3, (8, 8, 1), widths=(7,)).init(jax.random.key(0)))
    alone = dataclasses.replace(learned, facts={"outer": {"learns": "rates"}})
    cards = [(metalr.save(tmp_path / n, one) / "README.md").read_text() for n, one in (("a", learned), ("b", alone))]
    assert "a meta-learned initialization" in cards[0]
    assert "A network, mlp (" in cards[0]
    assert "logits = learned.apply" in cards[0]
    assert "a random initialization that was not learned" in cards[1]


def test_all_forms_of_images_are_the_same():
    learned = learner()
    forms = [X, X[..., None], X / 255.0, (X / np.float32(255))[..., None], jnp.asarray(X)]
    results = [learned.apply(learned.adapt(form, Y), form) for form in forms]
    for other in results[1:]:
        np.testing.assert_allclose(results[0], other, rtol=1e-5, atol=1e-6)


def test_fewer_ways_than_trained():
    fast = learner().adapt(X[:4], np.array([0, 1, 0, 1]))
    assert leaves(fast)[0].shape == leaves(learner().init)[0].shape


def test_many_tasks_at_once():
    learned = learner()
    xs, ys = np.stack([X, X[::-1], 255 - X]), np.stack([Y, Y[::-1], Y])
    fast = learned.adapt(xs, ys)
    logits = learned.apply(fast, xs)
    assert logits.shape == (3, 9, 3)
    with pytest.raises(DataError, match="x: expected images for 3 tasks, as params are, got 2"):
        learned.apply(fast, xs[:2])
    for i in range(3):
        alone = learned.apply(learned.adapt(xs[i], ys[i]), xs[i])
        np.testing.assert_allclose(logits[i], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(algorithms.ALGORITHMS))
def test_as_optax_in_an_own_training_loop(name):
    learned = learner(name)
    x, tx = jnp.asarray(X, jnp.float32)[..., None] / 255, learned.as_optax()
    params, state = learned.init, tx.init(learned.init)
    for _ in range(5):
        grads = jax.grad(lambda p: inner.cross_entropy(learned.apply(p, x), Y))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(leaves(params), leaves(learned.adapt(X, Y, steps=5)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(algorithms.ALGORITHMS))
def test_as_optax_on_a_part_of_the_tree(name):
    """Under multi_transform a step is the same for the part that it gets, or it says why it cannot be."""
    learned = learner(name)
    labels = {layer: "mine" if layer == "head" else "other" for layer in learned.init}
    tx = optax.multi_transform({"mine": learned.as_optax(), "other": optax.set_to_zero()}, labels)
    if learned.spec.predicted:
        with pytest.raises(ConfigError, match=r"the whole tree, because steps are predicted.*missing \['dense_0/b"):
            tx.init(learned.init)
        return
    grads = jax.tree.map(jnp.ones_like, learned.init)
    part, _ = tx.update(grads, tx.init(learned.init), learned.init)
    whole, _ = learned.as_optax().update(grads, learned.as_optax().init(learned.init), learned.init)
    jax.tree.map(np.testing.assert_array_equal, part["head"], whole["head"])
    assert not any(np.asarray(v).any() for v in jax.tree.leaves(part["dense_0"]))


def test_as_optax_needs_whole_layers_to_clip_by_their_norm():
    learned = learner()
    spec = dataclasses.replace(learned.spec, clip=1.0)
    meta = outer.initial(learned.model, spec, jax.random.key(0))
    tx = metalr.Learner(learned.model, spec, meta.init, hyperparameters.actual(spec, meta.rates)).as_optax()
    layer = {"dense_0": {"kernel": True, "bias": True}, "head": {"kernel": False, "bias": False}}
    optax.masked(tx, layer).init(meta.init)
    mask = {"dense_0": {"kernel": True, "bias": False}, "head": {"kernel": True, "bias": True}}
    with pytest.raises(ConfigError, match=r"expected whole layers, because .*missing \['dense_0/bias'\]"):
        optax.masked(tx, mask).init(meta.init)


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_as_optax_refuses_lengths_that_are_none(steps):
    with pytest.raises(ConfigError, match=r"steps: expected an integer of at least 1, got"):
        learner().as_optax(steps)


def test_as_optax_in_the_training_loop_of_nnx():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(64, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.head(x.reshape(len(x), -1))

    net, x = Net(), jnp.asarray(X, jnp.float32)[..., None] / 255
    learned = learner(model=models.from_nnx(net, np.zeros((1, 8, 8, 1), np.float32)))
    nnx.update(net, learned.init)
    optimizer = nnx.Optimizer(net, learned.as_optax(), wrt=nnx.Param)
    for _ in range(5):
        optimizer.update(net, nnx.grad(lambda net: inner.cross_entropy(net(x), Y))(net))
    expected = learned.adapt(X, Y, steps=5)["head"]["kernel"]
    np.testing.assert_allclose(net.head.kernel[...], expected, rtol=1e-4, atol=1e-5)


def test_params_of_another_network_are_refused_by_name():
    learned = learner()
    for params, message in (
        ({"dense_0": learned.init["dense_0"]}, r"params: expected head/bias of shape \[3\], as in `init`, got none"),
        (learned.init | {"x": jnp.ones(2)}, r"params: expected x of shape absent"),
        (jax.tree.map(lambda v: v[..., :1], learned.init), "params: expected dense_0/"),
    ):
        with pytest.raises(ConfigError, match=message):
            learned.apply(params, X)


def test_a_transductive_network_warns_of_few_images():
    learned = learner(model=models.conv4(3, (8, 8, 1), channels=4, layers=1))
    with pytest.warns(MetalrWarning, match=r"x: 1 images for 3 classes.*transductive.*model.norm support"):
        learned.apply(learned.init, X[:1])
    learned.apply(learned.init, X)


def test_statistics_of_the_support_set_make_single_predictions_mean_something():
    learned = learner(model=models.conv4(3, (8, 8, 1), channels=4, layers=1, norm="support"))
    fast = learned.adapt(X, Y)
    together = learned.apply(fast, X, X)
    alone = np.concatenate([learned.apply(fast, X[i : i + 1], X) for i in range(len(X))])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    batch = learner(model=models.conv4(3, (8, 8, 1), channels=4, layers=1))
    np.testing.assert_allclose(together, batch.apply(fast, X), rtol=1e-4, atol=1e-5)  # queries = support set
    with pytest.raises(ConfigError, match="support_x: expected the task's support images, got None"):
        learned.apply(fast, X)
    with pytest.raises(ConfigError, match="support_x: expected None with this network, got images"):
        batch.apply(fast, X, X)
    many = learned.adapt(np.stack([X, X]), np.stack([Y, Y]))
    of_many = learned.apply(many, np.stack([X, X]), np.stack([X, X]))
    np.testing.assert_allclose(of_many[1], together, rtol=1e-4, atol=1e-5)


def test_where_to_stop_is_the_shortest_of_the_best_that_fit():
    learned = learner()
    assert learned.best_steps() == learned.spec.steps  # trained for one number
    scores = {"5": 0.7, "20": 0.9, "1": 0.7, "50": 0.9, "100": None}
    learned = dataclasses.replace(learned, facts={"validated_steps": scores})
    assert [learned.best_steps(most) for most in (None, 60, 20, 19, 1)] == [20, 20, 20, 1, 1]
    lower = dataclasses.replace(learned, objective=inner.OBJECTIVES["squared_error"])
    assert lower.best_steps() == 1
    with pytest.raises(ConfigError, match="at_most: expected at least 1 inner steps, got 0"):
        learned.best_steps(0)


def test_names_of_classes_may_be_an_array(tmp_path):
    learned = learner()
    fast = learned.adapt(X[:6], Y[:6])
    for classes in (np.array([3, 5, 8]), np.array(["a", "b", "c"])):
        learned.save_params(tmp_path / "fast.safetensors", fast, classes)
        jax.tree.map(np.testing.assert_array_equal, learned.load_params(tmp_path / "fast.safetensors"), fast)


@pytest.mark.parametrize("classes", ["abc", ["a", "b"], ["a", "b", "a"], list("abcd")])
def test_names_of_classes_are_one_for_each_output(classes, tmp_path):
    learned = learner()
    with pytest.raises(ConfigError, match="classes: expected 3 names that differ, one an output"):
        learned.save_params(tmp_path / "fast.safetensors", learned.adapt(X[:6], Y[:6]), classes)


def test_params_of_a_learner_that_means_something_else_are_refused(tmp_path):
    """Same shapes, other units: outputs would be read as what they are not."""
    learned = learner()
    path = tmp_path / "fast.safetensors"
    learned.save_params(path, learned.adapt(X[:6], Y[:6]))
    of_columns = dataclasses.replace(learned, facts={"features": ["a", "b"]})
    of_objective = dataclasses.replace(learned, objective=inner.OBJECTIVES["squared_error"])
    for other in (of_columns, of_objective):
        with pytest.raises(ArtifactError, match="expected params that this learner fine-tuned"):
            other.load_params(path)


def test_a_file_of_another_kind_is_not_overwritten(tmp_path):
    learned = learner()
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    fast = learned.adapt(X[:6], Y[:6])
    with pytest.raises(ConfigError, match=r"mine.csv: expected a new file, or one of fine-tuned params to replace"):
        learned.save_params(tmp_path / "mine.csv", fast)
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    for _ in range(2):
        learned.save_params(tmp_path / "fast.safetensors", fast)


def test_a_support_set_of_rows_has_examples():
    table = learner(model=models.mlp(3, (4,), widths=(5,)))
    with pytest.raises(DataError, match="support_x: expected one example or more, got none"):
        table.adapt(np.zeros((0, 4), np.float32), np.zeros(0, int))


def test_a_learner_says_what_it_is_in_one_line():
    text = repr(learner())
    assert len(text.splitlines()) == 1
    assert len(text) < 300
    assert "mlp" in text
    assert "3 classes" in text


def test_a_run_folder_loads_as_its_artifact(tmp_path):
    metalr.save(tmp_path / "run" / "artifact", learner())
    (tmp_path / "run" / "config.json").write_text("{}")
    jax.tree.map(np.testing.assert_array_equal, metalr.load(tmp_path / "run").init, learner().init)


def test_the_public_face_shows_itself():
    assert {"load", "save", "Learner"} <= set(dir(metalr))
    code = "import metalr; metalr.config.TrainConfig, metalr.data.from_arrays, metalr.runs.resume; "
    jobs = "from metalr import runs; runs.comparing.run, runs.searching.run, runs.sweeping.run"
    subprocess.run([sys.executable, "-c", code + jobs], check=True)
    with pytest.raises(AttributeError, match="module 'metalr.runs' has no attribute 'nothing'"):
        getattr(metalr.runs, "nothing")  # noqa: B009


def test_custom_model_is_asked_for(tmp_path):
    custom = dataclasses.replace(models.mlp(3, (8, 8, 1), widths=(6,), dropout=0.0), name="custom", settings={})
    path = metalr.save(tmp_path / "a", learner(model=custom))
    with pytest.raises(ArtifactError, match=r"custom model; pass it: metalr.load\(path, model="):
        metalr.load(path)
    np.testing.assert_array_equal(metalr.load(path, model=custom).adapt(X, Y)["head"]["bias"].shape, (3,))
    other = models.mlp(3, (8, 8, 1), widths=(7,))
    with pytest.raises(ArtifactError, match=r"init/dense_0/bias: expected float32 \[7\], got float32 \[6\]"):
        metalr.load(path, model=other)
    with pytest.raises(ArtifactError, match=r"missing \['init/dense_1/bias'"):
        metalr.load(path, model=models.mlp(3, (8, 8, 1), widths=(6, 7)))


@pytest.mark.parametrize(
    ("x", "y", "steps", "error", "message"),
    [
        (X[:, :4], Y, 1, DataError, r"support_x: expected shape \[n, 8, 8, 1\].*got \[9, 4, 8\]"),
        (X.astype(np.int32), Y, 1, DataError, "support_x: expected dtype uint8.*got int32"),
        (X.astype(np.float32), Y, 1, DataError, r"support_x: expected float pixels within 0\.\.1.*divide by 255"),
        (np.where(X > 9, np.nan, 0.0), Y, 1, DataError, "support_x: expected finite pixels"),
        (X[:0], Y[:0], 1, DataError, "support_x: expected at least one image"),
        (X, Y[:4], 1, DataError, r"support_y: expected integers of shape \[9\], got int64 \[4\]"),
        (X, Y * 1.0, 1, DataError, "support_y: expected integers"),
        (X, Y + 1, 1, DataError, r"support_y: expected labels 0\.\.2 \(trained 3-way\), got 1\.\.3"),
        (X, Y - 1, 1, DataError, r"support_y: expected labels 0\.\.2"),
        (X, np.zeros(9, int) + 2, 1, DataError, "support_y: expected at least one image of each class, got none of 0"),
        (X, Y, -1, ConfigError, "steps: expected at least 0, got -1"),
    ],
)
def test_bad_input_is_refused_before_compiling(x, y, steps, error, message):
    learned = learner()
    with pytest.raises(error, match=message) as caught:
        learned.adapt(x, y, steps=steps)
    assert "\n" not in str(caught.value)
    assert learned._adapt._cache_size() == 0


@pytest.mark.parametrize("name", ["learner.safetensors", "metalr.json", "README.md"])
def test_every_flipped_byte_is_refused(name, tmp_path):
    path = metalr.save(tmp_path / "a", learner())
    content = (path / name).read_bytes()
    for position in RNG.integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(RNG.integers(8))
        (path / name).write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged|newer|upgrade|describe"):
            metalr.load(path)
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        (path / name).write_bytes(content[:cut])
        with pytest.raises(ArtifactError):
            metalr.load(path)
    (path / name).unlink()
    with pytest.raises(ArtifactError, match="found none|cannot be read: No such file"):
        metalr.load(path)


def rewrite(path, change):
    facts = json.loads((path / "metalr.json").read_text())
    change(facts)
    facts["sha256"] = sealed._sha256_of(facts)
    (path / "metalr.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(format=3), "has format 3, this metalr reads up to 2; upgrade metalr"),
        (lambda f: f.pop("model"), "does not describe a learner"),
        (lambda f: f["model"].update(way=4), "expected float32"),
        (lambda f: f["rates"].update(granularity="neuron"), "rates.granularity"),
        (lambda f: f["rates"].update(per_step=True), r"rates/dense_0: expected float32 \[3\]"),
        (lambda f: f["files"].clear(), "its sha256 is not the one in the manifest"),
        (lambda f: f.update(files=[]), "expected an object of files"),
        (lambda f: f["model"].update(name="conv4", settings={"layers": 10**6}), "model.layers: expected 1..64"),
        (lambda f: f["model"]["settings"].update(widths=[8] * 10**5), "model.widths: expected at most 64"),
        (lambda f: f["model"]["settings"].update(widths=[10**7]), "expected"),
        (lambda f: f["model"].update(way=10**12), "expected"),
        (lambda f: f["model"].update(input_shape=[8, "8", 1]), "does not describe a learner"),
        (lambda f: f["model"].update(input_shape=[8, 8, 1, 1, 1]), "input_shape: expected"),
        (lambda f: f["model"].update(name="../../etc"), "expected one of|custom"),
    ],
)
def test_consistent_but_wrong_facts(tmp_path, change, message):
    path = metalr.save(tmp_path / "a", learner())
    rewrite(path, change)
    with pytest.raises(ArtifactError, match=message):
        metalr.load(path)


@pytest.mark.parametrize("name", ["format1_mlp", "format1_conv4", "format2_mlp"])
def test_artifacts_of_older_versions_load(name):
    """Golden artifacts: written once, never again; expected.npz holds what they did then."""
    golden = Path(__file__).parents[1] / "golden" / name
    learned, expected = metalr.load(golden), np.load(golden.with_suffix(".npz"))
    logits = learned.apply(learned.adapt(expected["x"], expected["y"]), expected["x"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_links_are_refused(tmp_path):
    path = metalr.save(tmp_path / "a", learner())
    for name in ("learner.safetensors", "metalr.json", "README.md"):
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
        with pytest.raises(ArtifactError, match=f"{name}: expected a regular file"):
            metalr.load(path)
        (path / name).unlink()
        (tmp_path / name).rename(path / name)
    metalr.load(path)


def test_saving_refuses(tmp_path):
    path = metalr.save(tmp_path / "a", learner())
    with pytest.raises(ArtifactError, match="exists already"):
        metalr.save(path, learner())
    metalr.save(path, learner(), overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for target in (tmp_path / "mine", tmp_path):
        with pytest.raises(ArtifactError, match="expected an artifact folder to overwrite"):
            metalr.save(target, learner(), overwrite=True)
    bad = dataclasses.replace(learner(), rates={"dense_0": jnp.array(jnp.nan), "head": jnp.array(0.1)})
    with pytest.raises(ArtifactError, match="rates/dense_0: expected finite values"):
        metalr.save(tmp_path / "b", bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        metalr.save(tmp_path / "file" / "c", learner())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "mine"]


@pytest.mark.smoke
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("model", [models.mlp(3, (8, 8, 1)), models.conv4(3, (8, 8, 1), channels=4, layers=2)])
def test_inner_loop_lowers_for_every_platform(platform, model):
    learned = learner(model=model)
    x = jnp.asarray(X)[..., None]
    with devices.every_platform(True):
        exported = jax.export.export(learned._adapt, platforms=[platform])(
            learned.init, learned.rates, x, jnp.asarray(Y, jnp.int32), steps=3, batched=False
        )
    assert exported.platforms == (platform,)
    text = exported.mlir_module()
    if model.name == "conv4":
        assert ("stablehlo.convolution" in text) == (platform == "tpu")  # products elsewhere: see devices.by_platform


def test_labels_of_a_table_are_checked_as_jax_arrays_too():
    model = models.mlp(3, (4,), widths=(5,))
    learned = learner(model=model)
    x = np.random.default_rng(0).random((4, 4), np.float32)
    for labels in (jnp.array([0, 1, 2, 9]), np.array([0, 1, 2, 9]), jnp.array([0.0, 1.0, 2.0, 1.0])):
        with pytest.raises(DataError, match="support_y: expected integer labels 0..2 with cross_entropy, got"):
            learned.adapt(x, labels)


@pytest.mark.parametrize(
    "kind", ["mlp", "no hidden layer", "tensor", "conv4", "shared head", "zero head alone", "table", "support"]
)
def test_a_predictor_is_apply_of_adapt(kind):
    table = kind == "table"
    network = {
        "no hidden layer": lambda: models.mlp(3, (8, 8, 1), widths=()),
        "conv4": lambda: models.conv4(3, (8, 8, 1), channels=3, layers=2),
        "support": lambda: models.conv4(3, (8, 8, 1), channels=3, layers=2, norm="support"),
        "shared head": lambda: models.build("mlp", 3, (8, 8, 1), widths=(6,), head_start="shared"),
        "zero head alone": lambda: models.build("mlp", 3, (8, 8, 1), widths=(), head_start="zero"),
        "table": lambda: models.mlp(1, (20,), widths=(6,)),
    }.get(kind, lambda: models.mlp(3, (8, 8, 1), widths=(7, 6)))()
    learned = learner("lslr" if kind == "tensor" else "meta_sgd_layer", model=network)
    x, y, query = X[:6], Y[:6], X
    if table:
        x, query = RNG.random((6, 20), np.float32), RNG.random((9, 20), np.float32)
        y = x[:, 0]
        learned = dataclasses.replace(learned, objective=inner.OBJECTIVES["squared_error"])
    fast = learned.adapt(x, y, steps=3)
    expected = learned.apply(fast, query, x if kind == "support" else None)
    np.testing.assert_allclose(learned.predictor(x, y, steps=3)(query), expected, rtol=2e-4, atol=2e-5)
    if table:
        for fine_tune in learned.adapt, learned.predictor:
            with pytest.raises(DataError, match="expected 6 targets, as inputs, got 5"):
                fine_tune(x, y[:5])
    else:
        with pytest.raises(DataError, match="expected one task"):
            learned.predictor(x[None], y[None])
