"""scikit-learn's own checks of an estimator, and what fine-tuning from a learned init does under its name."""

import json
import pickle
import re
from pathlib import Path

import jax
import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import metalr
from metalr import models
from metalr.config import EvaluationConfig, ModelConfig, OuterConfig, TableConfig, TrainConfig
from metalr.errors import ConfigError, DataError
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.runs import training
from metalr.runs.progress import ConsoleReporter
from metalr.sklearn import MetaClassifier, MetaRegressor


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@parametrize_with_checks([MetaClassifier(steps=30, hidden=(16,)), MetaRegressor(steps=30, hidden=(16,))])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def waves(tasks, rows=20, seed=0):
    """Rows of tasks with one surface, of another height and offset in each: x, y, task."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(tasks), rows)
    x = rng.uniform(-1, 1, (len(task), 3))
    height, offset = rng.uniform(-2, 2, tasks), rng.uniform(-1, 1, tasks)
    return x, height[task] * (np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2]) + offset[task], task


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    out = tmp_path_factory.mktemp("sklearn") / "waves"
    return MetaRegressor.from_tasks(*waves(60), out=out, hidden=(40, 40), outer_steps=400)


def test_a_learned_regressor_is_better_than_a_plain_one(learned):
    x, y, task = waves(20, rows=60, seed=1)
    errors = {"learned": [], "plain": []}
    for name, model in (("learned", learned), ("plain", MetaRegressor(hidden=(40, 40)))):
        for number in range(10):
            of = np.flatnonzero(task == number)
            fitted = clone(model).fit(x[of[:10]], y[of[:10]])
            errors[name].append(np.mean((fitted.predict(x[of[10:]]) - y[of[10:]]) ** 2))
    assert np.mean(errors["learned"]) < 0.8 * np.mean(errors["plain"])
    assert learned.get_params()["learned"].endswith("waves")
    again = MetaRegressor.from_tasks(*waves(60), out=learned.learned, hidden=(40, 40), outer_steps=400)
    assert again.learned == learned.learned  # a finished one is taken as it is


def test_it_works_where_scikit_learn_does(learned):
    x, y, task = waves(4, rows=60, seed=2)
    x, y = x[task == 0], y[task == 0]
    scores = cross_val_score(learned, x, y, cv=3)
    assert scores.shape == (3,)
    search = GridSearchCV(learned, {"steps": [1, 5]}, cv=3).fit(x, y)
    assert search.best_params_["steps"] in (1, 5)
    plain = make_pipeline(StandardScaler(), MetaClassifier(steps=50)).fit(x, np.where(y > 0, "up", "down"))
    assert set(plain.predict(x)) <= {"up", "down"}
    np.testing.assert_allclose(plain.predict_proba(x).sum(1), 1)


def test_a_fitted_one_is_kept_without_pickle_and_with_it(learned, tmp_path):
    x, y, _ = waves(1, seed=3)
    fitted = clone(learned).fit(x, y)
    expected = fitted.predict(x)
    fitted.save(tmp_path / "kept")
    assert not list((tmp_path / "kept").rglob("*.pkl"))
    np.testing.assert_array_equal(MetaRegressor.load(tmp_path / "kept").predict(x), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(x), expected)
    frame = pytest.importorskip("pandas").DataFrame(x, columns=["a", "b", "c"])
    of_frame = MetaRegressor(steps=5).fit(frame, y)
    of_frame.save(tmp_path / "frame")
    back = MetaRegressor.load(tmp_path / "frame")
    np.testing.assert_array_equal(back.predict(frame), of_frame.predict(frame))
    with pytest.raises(ValueError, match="feature names should match"):
        back.predict(frame[["b", "a", "c"]])
    labels = np.where(y > 0, "up", "down")
    classes = MetaClassifier(steps=5).fit(x, labels)
    classes.save(tmp_path / "classes")
    back = MetaClassifier.load(tmp_path / "classes")
    assert back.classes_.tolist() == ["down", "up"]
    np.testing.assert_array_equal(back.predict(x), classes.predict(x))
    np.testing.assert_allclose(back.predict_proba(x), classes.predict_proba(x), rtol=1e-6)
    assert back.get_params() == classes.get_params()  # nothing was learned: an ordinary network again
    refitted = clone(back).fit(np.tile(x, 2), np.arange(len(x)) % 3)
    assert refitted.predict_proba(np.tile(x, 2)).shape == (len(x), 3)
    with pytest.raises(ConfigError, match="path: .*: exists already"):
        classes.save(tmp_path / "classes")
    (tmp_path / "classes" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"path: .*: expected a new folder or .*, found other files: \['notes.txt'\]"):
        classes.save(tmp_path / "classes", overwrite=True)
    (tmp_path / "classes" / "notes.txt").unlink()
    MetaClassifier(steps=np.int64(5)).fit(x, labels).save(tmp_path / "classes", overwrite=True)
    with pytest.raises(ConfigError, match="expected a MetaRegressor, found a MetaClassifier"):
        MetaRegressor.load(tmp_path / "classes")
    with pytest.raises(ConfigError, match="expected a folder that save"):
        MetaRegressor.load(tmp_path)
    (tmp_path / "classes" / "estimator.json").write_text(json.dumps({"estimator": "MetaClassifier"}))
    with pytest.raises(ConfigError, match="expected a folder that save"):
        MetaClassifier.load(tmp_path / "classes")


def test_a_learner_may_be_given_itself(learned, tmp_path):
    x, y, task = waves(4, rows=60, seed=2)
    x, y = x[task == 0][:20], y[task == 0][:20]
    of_path = clone(learned).fit(x, y)
    of_learner = clone(MetaRegressor(metalr.load(learned.learned))).fit(x, y)
    np.testing.assert_array_equal(of_learner.predict(x), of_path.predict(x))
    of_learner.save(tmp_path / "saved")
    np.testing.assert_array_equal(MetaRegressor.load(tmp_path / "saved").predict(x), of_path.predict(x))


@pytest.mark.parametrize("kind", [MetaClassifier, MetaRegressor])
def test_a_fit_that_fails_leaves_nothing_half_fitted(kind):
    """Classes of the failed one beside params of the one before would be wrong predictions, with no error."""
    x, numbers, _ = waves(1)
    good = np.where(numbers > 0, "up", "down") if kind is MetaClassifier else numbers
    model = kind(steps=3, hidden=(4,))
    with pytest.raises(ConfigError, match="steps"):
        kind(steps=2.5, hidden=(4,)).fit(x, good)
    with pytest.raises((ConfigError, ValueError)):
        model.fit(x, np.full(20, "up"))
    with pytest.raises(NotFittedError):
        model.predict(x)
    before = model.fit(x, good).predict(x)
    other = np.where(numbers > np.median(numbers), "a", "b") if kind is MetaClassifier else numbers[:, None]
    with pytest.raises(ConfigError, match="steps"):
        model.set_params(steps=-1).fit(x, other)
    np.testing.assert_array_equal(model.predict(x), before)


def test_partial_fit_goes_on(learned):
    x, y, _ = waves(1, rows=40, seed=4)
    model = clone(learned).fit(x, y)
    first = model.score(x, y)
    for _ in range(10):
        model.partial_fit(x, y)
    assert model.score(x, y) > first


def test_the_readmes_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.S)
    table = next(block for block in blocks if "from_arrays" in block).partition("init = ")[0]
    scope = {}
    exec(table, scope)
    exec(next(block for block in blocks if "metalr.sklearn" in block).replace("300", "20"), scope)
    assert scope["model"].predict(scope["x"][10:20]).shape == (10,)


def test_classes_that_were_learned_keep_their_meaning(tmp_path):
    """A task that shows classes 1 and 2 of three is fine-tuned on outputs 1 and 2; names are numbered in order."""
    rng = np.random.default_rng(0)
    x, task = rng.normal(size=(600, 2)), np.repeat(np.arange(30), 20)
    y = np.digitize(x[:, 0] + 0.2 * rng.normal(size=30)[task], [-0.5, 0.5])
    made = MetaClassifier.from_tasks(x, y, task, out=tmp_path / "a", hidden=(8,), outer_steps=40)
    rows = np.flatnonzero((task == 0) & (y > 0))
    shown = clone(made).set_params(steps=1).fit(x[rows], y[rows])
    expected = shown.learner_.apply(shown.learner_.adapt(x[rows].astype(np.float32), y[rows], 1), x.astype(np.float32))
    np.testing.assert_allclose(
        shown.predict_proba(x)[:, 1] / shown.predict_proba(x)[:, 0], np.exp(expected[:, 2] - expected[:, 1]), rtol=1e-3
    )
    assert shown.classes_.tolist() == shown.outputs_.tolist() == [1, 2]
    assert set(shown.predict(x)) <= {1, 2}
    shown.save(tmp_path / "kept")
    np.testing.assert_array_equal(MetaClassifier.load(tmp_path / "kept").predict(x), shown.predict(x))
    named = clone(made).fit(x[rows], np.array(["no", "low", "high"])[y[rows]])
    assert named.outputs_.tolist() == [0, 1]
    assert clone(made).fit(x[rows], y[rows].astype(float)).outputs_.tolist() == [1, 2]  # as pandas has integers, often
    again = clone(made).partial_fit(x[rows], y[rows], classes=[1, 2])
    assert again.outputs_.tolist() == [1, 2]


def test_classes_of_a_table_are_its_outputs_in_every_task(tmp_path):
    """A task that shows the last two of three classes: their outputs are those that learned them."""
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    x, store = rng.normal(size=(600, 2)), np.repeat(np.arange(30), 20)
    for column, names in ((["high", "low", "mid"], ["low", "mid"]), ([1, 2, 3], [2, 3])):
        y = np.array(column)[np.digitize(x[:, 0], [-0.5, 0.5])]
        frame = pandas.DataFrame({"b": x[:, 0], "a": x[:, 1], "store": store, "y": y})
        path = tmp_path / f"{names[0]}.csv"
        frame.to_csv(path, index=False)
        out = tmp_path / f"run {names[0]}"
        config = TrainConfig(
            str(path), model=ModelConfig(widths=(8,)), outer=OuterConfig(steps=4, meta_batch=2, validate_every=4),
            table=TableConfig("store", ("y",)), evaluation=EvaluationConfig(4, 4, shown_tasks=0), out=out,
        )  # fmt: skip
        training.run(config, name="t", reporter=ConsoleReporter(quiet=True))
        of = frame[frame.y.isin(names)][:12]
        fitted = MetaClassifier(str(out), steps=1).fit(of[["b", "a"]], of["y"])
        assert fitted.outputs_.tolist() == [1, 2]
        assert fitted.classes_.tolist() == names
        with pytest.raises(DataError, match=r"X: expected the columns \['b', 'a'\], in this order, got \['a', 'b'\]"):
            MetaClassifier(str(out)).fit(of[["a", "b"]], of["y"])
        with pytest.raises(ConfigError, match="y: expected one of the classes"):
            MetaClassifier(str(out)).fit(of[["b", "a"]], np.where(of["y"] == names[0], "new", "other"))


def test_columns_of_a_frame_are_those_of_meta_training(tmp_path):
    pandas = pytest.importorskip("pandas")
    x, y, task = waves(6, seed=5)
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    made = MetaRegressor.from_tasks(frame, y, task, out=tmp_path / "a", hidden=(4,), outer_steps=4)
    clone(made).fit(frame[:10], y[:10])
    with pytest.raises(DataError, match=r"X: expected the columns \['a', 'b', 'c'\], in this order"):
        clone(made).fit(frame[["c", "b", "a"]][:10], y[:10])
    with pytest.raises(ConfigError, match=r"y: expected 1 columns, as .* was learned for, got 2"):
        clone(made).fit(frame[:10], np.stack([y, y], 1)[:10])


def test_an_output_layer_that_each_fine_tune_makes_does_not_go_on(tmp_path):
    net, spec = models.build("mlp", 3, (2,), widths=(8,), head_start="prototypes"), RatesSpec("layer", steps=2)
    init = net.init(jax.random.key(0))
    rates = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, init))
    path = metalr.save(tmp_path / "a", metalr.Learner(net, spec, init, rates))
    x = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    y = np.arange(12) % 4  # more than it was learned with
    model = MetaClassifier(str(path)).fit(x, y)
    assert model.predict_proba(x).shape == (12, 4)
    for other in (model, MetaClassifier(str(path))):
        with pytest.raises(ConfigError, match="learned: expected a learned output layer, which partial_fit goes on"):
            other.partial_fit(x, y, classes=range(4))


def test_refusals(learned, tmp_path):
    x, y, task = waves(6, seed=5)
    with pytest.raises(DataError, match="X: expected rows of shape"):
        clone(learned).fit(np.tile(x, 2), y)
    with pytest.raises(ConfigError, match="learned: expected one of cross_entropy for a MetaClassifier"):
        MetaClassifier(learned.learned).fit(x, y > 0)
    with pytest.raises(ConfigError, match="y: expected 2 classes or more, got one class"):
        MetaClassifier().fit(x, np.zeros(len(x), int))
    for fit in (MetaRegressor(steps=1).fit, MetaRegressor(steps=1).partial_fit):
        with pytest.raises(DataError, match="X: column 0 expected numbers that float32 can tell apart"):
            fit(1.7e9 + np.arange(200.0)[:, None], np.arange(200.0))
    with pytest.raises(ValueError, match="cannot be used to seed"):
        MetaRegressor.from_tasks(x, y, task, out=tmp_path / "b", random_state=[0, 1])
    with pytest.raises(ConfigError, match="out: expected the path of a run folder, got None"):
        MetaRegressor.from_tasks(x, y, task, out=None)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="classes: expected all classes at the first call"):
        MetaClassifier().partial_fit(x, y > 0)
    with pytest.raises(DataError, match=r"y: expected classes 0..n-1 that mean the same in all tasks"):
        MetaClassifier.from_tasks(x, (y > 0).astype(int) + 1, task, out=tmp_path / "a")
