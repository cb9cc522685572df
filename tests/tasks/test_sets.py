"""Tasks of any kind: splits by task id, small tasks, samplers that cannot work, and what the check says of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr import Episode, Learner, Objective, Tasks, models, outer, tasks, trees
from metalr.errors import ConfigError, DataError
from metalr.inner import OBJECTIVES, hyperparameters
from metalr.inner.hyperparameters import RatesSpec

ERROR = OBJECTIVES["squared_error"]
LINE = models.from_function(
    lambda key: {"head": {"kernel": jax.random.normal(key, (2, 1))}}, lambda p, x: x @ p["head"]["kernel"]
)


def table(sizes=(30, 30, 4, 30, 30, 30, 30, 30)):
    """Rows of tasks of these sizes; the first input is the number of the row, the second that of its task."""
    ids = np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(0).permutation(len(ids))
    ids = ids[order]
    x = np.stack([np.arange(len(ids)), ids], axis=1).astype(np.float32)
    return x, x[:, :1] * 2, np.array([f"store {i}" for i in ids])


def test_every_task_is_in_one_split_and_rows_stay_with_their_task():
    x, y, ids = table()
    made = Tasks.from_arrays(x, y, ids, shot=5, query=5, seed=3, name="stores")
    assert made.name == "stores"
    held = made.facts["tasks"]
    assert sorted(name for names in held.values() for name in names) == sorted({*ids})
    assert {part: len(names) for part, names in held.items()} == {"train": 6, "validation": 1, "test": 1}
    for part in ("train", "validation", "test"):
        pool, sample = made.sampler(part)
        draw = jax.jit(sample)
        seen = set()
        for seed in range(40):
            episode = draw(pool, jax.random.key(seed))
            of = {int(v) for v in np.asarray([*episode.support_x[:, 1], *episode.query_x[:, 1]])}
            assert len(of) == 1
            seen |= of
            np.testing.assert_array_equal(episode.support_y, episode.support_x[:, :1] * 2)
            rows = np.asarray(episode.support_x[:, 0]), np.asarray(episode.query_x[:, 0])
            assert not set(rows[0]) & set(rows[1])
        assert {f"store {i}" for i in seen} == set(held[part])


def test_a_small_task_repeats_its_rows_and_is_named():
    x, y, ids = table((30, 4, 30))
    made = Tasks.from_arrays(x, y, ids, shot=6, query=3)
    assert made.facts["small_tasks"] == ["store 1"]
    part = next(part for part, names in made.facts["tasks"].items() if "store 1" in names)
    pool, sample = made.sampler(part)
    episode = sample(pool, jax.random.key(0))
    support, query = set(np.asarray(episode.support_x[:, 0])), set(np.asarray(episode.query_x[:, 0]))
    assert (len(support), len(query)) == (2, 2)  # 4 rows in the shares 6 : 3, rounded down for the support set
    assert not support & query


def test_tasks_say_what_they_are():
    x, y, task = table()
    made = Tasks.from_arrays(x, y, task, shot=5, query=5, name="shops")
    assert repr(made) == "Tasks('shops', rows=214, shot=5, query=5, tasks=6 train + 1 validation + 1 test)"
    assert repr(Tasks(draw, draw, draw, facts={"tasks": {"train": 3}})) == "Tasks('tasks')"


def test_the_split_is_known_by_its_hash():
    x, y, ids = table()
    one, same, other = (Tasks.from_arrays(x, y, ids, seed=s).sha256 for s in (0, 0, 1))
    assert one == same != other
    assert Tasks.from_arrays(x + 1, y, ids).sha256 != one


def test_trees_of_columns_of_any_kind():
    x, y, ids = table()
    columns = {"a": x[:, 0], "b": {"c": x.astype(np.float64), "d": ids == "store 0"}}
    made = Tasks.from_arrays(columns, y[:, 0], ids, shot=2, query=2)
    pool, sample = made.sampler("train")
    episode = sample(pool, jax.random.key(0))
    assert {k: v.dtype for k, v in [("a", episode.support_x["a"]), ("c", episode.support_x["b"]["c"])]} == {
        "a": np.float32, "c": np.float32,
    }  # fmt: skip
    assert episode.support_x["b"]["d"].dtype == bool
    assert episode.query_y.shape == (2,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": np.zeros(3)}, DataError, "x: expected 3 rows, one a task id, got shape"),
        (
            {"y": np.full((214, 1), np.nan)},
            DataError,
            "y: expected finite values, got others in 214 rows, first in row 0",
        ),
        ({"task": np.arange(214)}, DataError, "expected at least 2 rows of each task, got one of 0, 1"),
        ({"task": np.zeros(214, int)}, DataError, "expected at least 3 tasks"),
        ({"x": np.array(["a"] * 214)}, DataError, "expected numbers, got <U1; turn categories into numbers"),
        ({"shot": 0}, ConfigError, "shot: expected at least 1, got 0"),
        ({"shot": 2.5}, ConfigError, "shot: expected a whole number of at least 1, got 2.5"),
        ({"query": "3"}, ConfigError, "query: expected a whole number of at least 1, got '3'"),
        (
            {"task": np.full(214, np.nan)},
            DataError,
            "task: expected an id in every row, got none in 214, ",
        ),
        ({"task": np.array(["a", None] * 107, object)}, DataError, "got none in 107, first in row 1"),
        ({"task": np.array(["a", 1] * 107, object)}, DataError, "task: expected integers or strings, got int, str"),
        (
            {"x": 1.7e9 + np.arange(214.0)[:, None]},
            DataError,
            "x: column 0 expected numbers that float32 can tell apart, got values near 1.7e[+]09 that differ by",
        ),
        ({"validation": 0.9, "test": 0.9}, ConfigError, "expected shares that leave tasks to train on"),
    ],
)
def test_tables_that_cannot_work(change, error, message):
    x, y, ids = table()
    with pytest.raises(error, match=message):
        Tasks.from_arrays(**({"x": x, "y": y, "task": ids} | change))


def draw(key, noise=0.0, n=4):
    x = jax.random.normal(key, (n, 2))
    return Episode(x, x[:, :1] + noise, x + 1, x[:, :1])


def test_the_check_says_what_it_found():
    found = Tasks(draw, draw, draw).check(LINE, ERROR)
    assert set(found.losses) == {"train", "validation", "test"}
    assert "support_x" in str(found)
    assert "loss of a random init: train" in str(found)


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (lambda key: draw(key, jnp.nan), DataError, "tasks.train: support_y: expected finite values"),
        (lambda key: draw(key, n=5), DataError, "the same shapes and dtypes in all splits"),
        (lambda key: Episode(*draw(key)[:2], *draw(key)[:2]), DataError, "expected a query set apart from the support"),
        (lambda key: draw(key)._replace(query_y=jnp.zeros(3)), DataError, "query: expected as many targets as inputs"),
        (lambda key: draw(key)._replace(query_y=jnp.zeros(())), DataError, "expected a leading axis of examples"),
        (lambda key: draw(jax.random.key(7)), DataError, "tasks.train: expected another episode for another key"),
        (
            lambda key: draw(key)[:3],
            DataError,
            "gives an Episode.support_x, .*, got tuple of 3",
        ),
        (lambda key: None, DataError, "got NoneType"),
        (lambda: None, DataError, "tasks.train: expected a function of a key that gives an Episode"),
        (
            lambda key: draw(key) if jax.random.uniform(key) < 2 else None,
            DataError,
            "expected a sampler that jax can trace",
        ),
        (
            lambda key: draw(key)._replace(query_y=jnp.zeros((4, 3))),
            ConfigError,
            "expected outputs of the targets' shape",
        ),
        (
            lambda key: draw(key)._replace(query_x=jnp.zeros((4, 7))),
            ConfigError,
            "do not fit the episodes of tasks.train",
        ),
    ],
)
def test_samplers_that_cannot_work_are_named(train, error, message):
    with pytest.raises(error, match=message):
        Tasks(train, draw, draw).check(LINE, ERROR)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        (
            "cross_entropy",
            [0, 1, -1],
            r"tasks.train: y: expected integer labels 0..1 with cross_entropy, got .* -1..1",
        ),
        (
            "cross_entropy",
            [0, 1, 2],
            r"tasks.train: y: expected integer labels 0..1 with cross_entropy, got .* 0..2",
        ),
        ("binary_cross_entropy", [0, 1, 4], r"expected integer labels 0..1 with binary_cross_entropy"),
        ("binary_cross_entropy", [-1.0, 1.0, 1.0], r"expected integer labels 0..1 .*, got float32 -1.0..1.0"),
    ],
)
def test_labels_without_an_output_are_refused_wherever_they_are(name, labels, message):
    """In all rows of a table, not only in those of the episodes that are tried."""
    x, _, ids = table((200,) * 8)
    y = np.tile(np.asarray(labels)[:2], len(x) // 2)
    y[::97] = labels[2]
    outputs = 1 if name.startswith("binary") else 2
    made = Tasks.from_arrays(x, y, ids, shot=2, query=2)
    with pytest.raises(DataError, match=message):
        made.check(models.mlp(outputs, (2,), widths=(3,)), name)
    made = Tasks.from_arrays(x, y == 1, ids, shot=2, query=2)
    if outputs == 1:
        made.check(models.mlp(outputs, (2,), widths=(3,)), name)


def test_metrics_are_numbers():
    each = Objective("each", lambda outputs, y: ((outputs - y) ** 2).mean(), {"errors": lambda outputs, y: outputs - y})
    with pytest.raises(ConfigError, match=r"objective: expected errors to be one number, got an array of \[4, 1\]"):
        Tasks(draw, draw, draw).check(LINE, each)
    host = Objective("host", lambda outputs, y: ((outputs - y) ** 2).mean(), {"mean": lambda out, y: float(out.mean())})
    with pytest.raises(ConfigError, match="model, objective: do not fit the episodes of tasks.train"):
        Tasks(draw, draw, draw).check(LINE, host)


def test_randomness_of_its_own_is_found_out():
    count = iter(range(100))

    def sample(key):
        return draw(
            key, noise=jax.pure_callback(lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), jnp.float32))
        )

    with pytest.raises(DataError, match="expected the same values for the same key"):
        Tasks(sample, sample, sample).check(LINE, ERROR)


def test_sinusoid_is_that_of_the_paper():
    made = tasks.sinusoid(shot=10, query=50)
    episode = jax.vmap(made.train)(jax.random.split(jax.random.key(0), 500))
    x, y = np.asarray(episode.query_x), np.asarray(episode.query_y)
    assert (x.min() >= -5, x.max() <= 5, np.abs(y).max() <= 5) == (True, True, True)
    tops = np.abs(y).max(1)
    assert tops.min() < 0.5
    assert tops.max() > 4.5
    assert not np.allclose(made.train(jax.random.key(1)).support_x, made.test(jax.random.key(1)).support_x)


class Simulator:
    """A sampler that is a method, which is a new object each time it is taken from its own."""

    def draw(self, key):
        return sample_line(key)


def sample_line(key):
    x = jax.random.normal(key, (8, 2))
    return Episode(x[:4], x[:4, :1], x[4:], x[4:, :1])


@pytest.mark.parametrize("draw", [Simulator().draw, functools.partial(sample_line)])
def test_a_method_or_a_partial_given_twice_is_one_function(draw):
    made = Tasks(draw, Simulator().draw, Simulator().draw)  # of two objects: their episodes say that they are the same
    with pytest.raises(DataError, match=r"tasks.validation: expected other episodes than tasks.test has"):
        made.check(LINE, "squared_error")
    simulator = Simulator()
    made = Tasks(draw, simulator.draw, simulator.draw)
    made.check(LINE, "squared_error")
    of = {part: made.sampler(part).sample((), jax.random.key(3)) for part in ("validation", "test")}
    assert not np.array_equal(of["validation"].support_x, of["test"].support_x)
    copied = functools.partial(draw)
    Tasks(draw, functools.partial(copied.func), functools.partial(copied.func)).check(LINE, "squared_error")


def test_labels_below_zero_or_of_two_axes_are_refused_without_a_known_number_of_outputs():
    x, _, ids = table()
    three = models.from_function(
        lambda key: {"head": {"kernel": jax.random.normal(key, (2, 3))}}, lambda p, x: x @ p["head"]["kernel"]
    )
    of = np.arange(len(x)) % 3
    for y, message in (
        (of - 1, r"tasks.train: y: expected integer labels 0..2 with cross_entropy, got int32 -1..1"),
        (of + 1, r"expected integer labels 0..2 with cross_entropy, got int32 1..3"),
        (of[:, None], r"expected one label an example, shape \[n\], got"),
        (of > 1, r"expected integer labels 0..2 with cross_entropy, got bool"),
    ):
        with pytest.raises(DataError, match=message):
            Tasks.from_arrays(x, y, ids).check(three, "cross_entropy")
    Tasks.from_arrays(x, of, ids).check(three, "cross_entropy")


def test_a_loss_of_ones_own_that_pairs_all_outputs_with_all_targets_is_refused():
    x, y, ids = table()
    made = Tasks.from_arrays(x / 100, y[:, 0] / 100, ids)
    model = models.mlp(1, (2,), widths=(4,))
    broadcast = Objective("mine", lambda outputs, targets: jnp.square(outputs - targets).mean())
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ConfigError, match=r"pairs every output with every target; in it, first outputs.reshape"),
    ):
        made.check(model, broadcast)
    for good in (
        lambda outputs, targets: jnp.square(outputs[:, 0] - targets).mean(),
        lambda outputs, targets: jnp.square(outputs.reshape(targets.shape) - targets).mean(),
        lambda outputs, targets: jnp.square(outputs - targets[:, None]).mean(),
    ):
        made.check(model, Objective("mine", good))


def test_frames_of_several_dtypes_are_numbers_and_columns_are_named():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"size": [1.5, 2.0, 3.0] * 6, "open": [True, False, True] * 6, "n": [1, 2, 3] * 6})
    ids, y = np.repeat(np.arange(3), 6), np.arange(18.0)
    for given in (frame, frame.convert_dtypes()):
        pool = Tasks.from_arrays(given, y, ids, shot=2, query=2).pool["train"]
        np.testing.assert_allclose(pool.x, frame.to_numpy(np.float32))
        assert pool.x.dtype == np.float32
    target = Tasks.from_arrays(frame, frame["n"].astype("Int64") - 1, ids, shot=2, query=2).pool["train"].y
    assert target.dtype == np.int32
    alone = Tasks.from_arrays(frame[["n"]].astype("Int64"), y, ids, shot=2, query=2).pool["train"].x
    assert alone.shape == (18, 1)
    frame["second"] = 1.7e9 + np.arange(18)
    with pytest.raises(DataError, match="column 'second':.* expected numbers that float32 can tell apart"):
        Tasks.from_arrays(frame, y, ids)
    del frame["second"]
    frame["day"] = pandas.date_range("2020", periods=18)
    with pytest.raises(DataError, match="column 'day': expected numbers"):
        Tasks.from_arrays(frame, y, ids)
    frame["day"] = pandas.array([1, None, *range(16)], "Int64")
    with pytest.raises(DataError, match="column 'day': expected a number in every row, row 1 has none"):
        Tasks.from_arrays(frame, y, ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.ma.masked_less(np.arange(18.0), 3)}, "x, y: expected numbers everywhere, got masked ones"),
        ({"task": np.zeros((18, 1), int)}, r"task: expected one id a row, shape \[rows\], got \[18, 1\]"),
        ({"task": [0.0, np.inf] * 9}, "task: expected integers or strings, got float"),
        ({"task": [0.0, 1e300] * 9}, "task: expected integers or strings, got float"),
        ({"x": None}, "x: expected arrays with a row an example, got None"),
        ({"validation": "a"}, "validation: expected a share of the tasks, got 'a'"),
        ({"seed": -1}, r"seed: expected 0 <= seed < 2\^32, got -1"),
        ({"shot": True}, "shot: expected a whole number of at least 1, got True"),
    ],
)
def test_arguments_of_a_wrong_kind(change, message):
    given = {"x": np.arange(36.0).reshape(18, 2), "y": np.arange(18.0), "task": np.repeat(np.arange(3), 6)} | change
    with pytest.raises((DataError, ConfigError), match=message):
        Tasks.from_arrays(given.pop("x"), given.pop("y"), given.pop("task"), **given)


def test_whatever_a_sampler_raises_is_said_of_it():
    def broken(key):
        return {}["a"]

    with pytest.raises(DataError, match="tasks.train: the sampler failed: KeyError: 'a'"):
        Tasks(broken, sample_line, sample_line).check(LINE, "squared_error")
    with pytest.raises(DataError, match="failed: KeyError: 'a'"):
        Tasks.from_host(broken, broken, broken)
    with pytest.raises(ConfigError, match=r"tasks: expected a function of a numpy.random.Generator, got \[1\]"):
        Tasks.from_host([1], [1], [1])
    with pytest.raises(ConfigError, match="weights: expected a positive number"):
        tasks.mixture(tasks.sinusoid(), tasks.sinusoid(), weights=(1.0, np.inf))


def test_a_mixture_draws_from_all_by_weight():
    zeros, ones = (Tasks(*[lambda key, v=v: jax.tree.map(lambda a: 0 * a + v, draw(key))] * 3) for v in (0.0, 1.0))
    made = tasks.mixture(zeros, ones, weights=(1.0, 3.0))
    pool, sample = made.sampler("train")
    values = jax.vmap(lambda key: sample(pool, key).support_x.mean())(jax.random.split(jax.random.key(0), 400))
    assert float(values.mean()) == pytest.approx(0.75, abs=0.07)
    assert set(np.asarray(values).tolist()) == {0.0, 1.0}
    with pytest.raises(ConfigError, match="at least 2 task sets"):
        tasks.mixture(zeros)
    larger = Tasks(*[lambda key: draw(key, n=5)] * 3, name="larger")
    with pytest.raises(ConfigError, match="mixture: expected task sets of the same shapes .* of larger"):
        tasks.mixture(zeros, larger)


def test_one_function_for_validation_and_test_gives_each_other_episodes():
    """Both are drawn with the same keys: what is chosen by would be what is judged on."""

    def sample(key):
        x = jax.random.normal(key, (4, 2))
        return Episode(x[:2], x[:2, :1], x[2:], x[2:, :1])

    def number(key):
        return jax.random.randint(key, (), 0, 1000)

    shared = Tasks(sample, sample, sample, task_of=number)
    apart = Tasks(sample, lambda key: sample(key), sample)
    key = jax.random.key(3)
    drawn = {part: shared.sampler(part).sample((), key).support_x for part in ("train", "validation", "test")}
    assert not np.array_equal(drawn["validation"], drawn["test"])
    np.testing.assert_array_equal(drawn["test"], sample(key).support_x)
    np.testing.assert_array_equal(drawn["train"], drawn["test"])
    np.testing.assert_array_equal(apart.sampler("validation").sample((), key).support_x, drawn["test"])
    counted = [shared.sampler(part).sample.task_of((), key) for part in ("validation", "test")]
    assert counted[0] != counted[1] == number(key)
    mixed = tasks.mixture(shared, Tasks(*[lambda key: sample(jax.random.fold_in(key, 1))] * 3, name="b"))
    for part in ("validation", "test"):  # a task has one number there too
        pool, sampler = mixed.sampler(part)
        keys = jax.random.split(jax.random.key(0), 40)
        numbers = np.asarray(sampler.tasks_of(pool, keys))
        own = np.asarray([shared.sampler(part).sample.task_of((), key) for key in keys])
        assert (numbers[numbers % 2 == 0] == 2 * own[numbers % 2 == 0]).all()
        assert 5 < (numbers % 2 == 0).sum() < 35


@pytest.mark.parametrize("task_of", [lambda key: jnp.zeros(()), lambda key: jnp.zeros(2, int), lambda key: 1 / 0])
def test_a_number_of_a_task_is_tried_before_training(task_of):
    x, y, ids = table()
    made = Tasks.from_arrays(x, y, ids, shot=5, query=5)
    wrong = dataclasses.replace(made, task_of=lambda pool, key: task_of(key))
    with pytest.raises(DataError, match="tasks.train: task_of: (expected an integer|ZeroDivisionError)"):
        wrong.check(LINE, ERROR)


def test_which_task_a_key_draws_is_known_where_tasks_can_be_counted():
    x, y, ids = table()
    made = Tasks.from_arrays(x, y, ids, shot=5, query=5, test=0.4)
    pool, sample = made.sampler("test")
    keys = jax.random.split(jax.random.key(0), 30)
    stores = jax.vmap(lambda key: sample(pool, key).support_x[0, 1])(keys)
    of = np.asarray(jax.vmap(sample.task_of, (None, 0))(pool, keys))
    assert len({*of.tolist()}) == len(made.facts["tasks"]["test"]) == 3
    assert len({*zip(of.tolist(), stores.tolist(), strict=True)}) == 3
    endless = Tasks(*[lambda key: jax.tree.map(lambda v: 0 * v - 1.0, made.test(pool, key))] * 3, name="endless")
    assert not isinstance(endless.sampler("test")[1], tasks.OfCountedTasks)
    pools, mixed = tasks.mixture(made, endless).sampler("test")
    stores = jax.vmap(lambda key: mixed(pools, key).support_x[0, 1])(keys)
    of = np.asarray(jax.vmap(mixed.task_of, (None, 0))(pools, keys))
    counted = of[np.asarray(stores) >= 0]
    assert len({*counted.tolist()}) <= 3
    assert len({*of.tolist()}) == len({*counted.tolist()}) + (np.asarray(stores) < 0).sum()


def test_a_mixture_of_mixtures_draws_from_all():
    a, b, c = (
        Tasks(*[lambda key, v=v: jax.tree.map(lambda x: 0 * x + v, draw(key))] * 3, name=str(v)) for v in (0, 1, 2)
    )
    pool, sample = tasks.mixture(tasks.mixture(a, b), c).sampler("train")
    values = jax.vmap(lambda key: sample(pool, key).support_x.mean())(jax.random.split(jax.random.key(0), 400))
    counts = [int((values == v).sum()) for v in (0, 1, 2)]
    np.testing.assert_allclose(counts, [100, 100, 200], atol=45)


def test_integers_that_do_not_fit_are_refused():
    x = np.arange(40).reshape(20, 2) * 100_000_000
    with pytest.raises(DataError, match="expected integers of 32 bits, got 0 to 3900000000; give numbers as floats"):
        Tasks.from_arrays(x, np.ones(20), np.arange(20) // 5, shot=2, query=2)


def test_image_families_are_those_of_the_command_line(blobs):
    own = tasks.Tasks.from_images(blobs, "digits", 3, 2, 3, label_noise=0.2)
    splits = tasks.make_splits(blobs, "digits")
    for part, split in zip(("train", "validation", "test"), splits, strict=True):
        pool, sample = own.sampler(part)
        of_split, drawn = tasks.make_sampler(split, 3, 2, 3, label_noise=0.2)
        one, other = jax.jit(sample)(pool, jax.random.key(1)), jax.jit(drawn)(of_split, jax.random.key(1))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert own.facts["split_sha256"] == splits.sha256
    checked = own.check(models.mlp(3, (8, 8, 1)), OBJECTIVES["cross_entropy"])
    assert checked.losses.keys() == {"train", "validation", "test"}
    with pytest.raises(ConfigError, match="tasks.way: expected at most 4"):
        tasks.Tasks.from_images(blobs, "digits", 5, 2, 3)
    with pytest.raises(DataError, match="fashion"):
        tasks.Tasks.from_images("fashion", "digits", 5, 2, 3)


def test_bytes_are_refused_where_a_network_takes_images():
    """Training would see 0..255, and adapt 0..1."""
    x = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 1)).astype(np.uint8)
    made = Tasks.from_arrays(x, np.tile([0, 1, 2], 14)[:40], np.repeat(np.arange(4), 10), shot=3, query=3)
    with pytest.raises(DataError, match="support_x: expected images as float 0..1, got uint8; divide them by 255"):
        made.check(models.mlp(3, (6, 6, 1)), OBJECTIVES["cross_entropy"])


def test_a_learner_takes_the_images_of_every_family(blobs):
    model = models.mlp(10, (8, 8, 1), widths=(8,))
    spec = RatesSpec(steps=1)
    meta = outer.initial(model, spec, jax.random.key(0))
    learned = Learner(model, spec, meta.init, hyperparameters.actual(spec, meta.rates))
    made = Tasks.from_images(blobs, "scaled", 10, 2, 3)
    pool, sample = made.sampler("test")
    for seed in range(5):
        episode = jax.jit(sample)(pool, jax.random.key(seed))
        learned.apply(learned.adapt(episode.support_x, episode.support_y), episode.query_x)


def test_columns_of_pandas_are_known_by_name_and_row():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(rng.normal(size=(40, 4)).astype(np.float32), columns=["a", "b", "y", "z"])
    task = pandas.Series(np.repeat(np.arange(8), 5), index=frame.index)
    options = {"shot": 2, "query": 2, "standardise": "both"}
    made = Tasks.from_arrays(frame[["a", "b"]], frame[["y", "z"]], task, **options)
    assert (made.facts["features"], made.facts["targets"]) == (["a", "b"], ["y", "z"])
    model = models.mlp(2, (2,), widths=(4,))
    spec = RatesSpec(steps=1)
    meta = outer.initial(model, spec, jax.random.key(0))
    rates = hyperparameters.actual(spec, meta.rates)
    facts = {"features": made.facts["features"], "targets": made.facts["targets"]}
    learned = Learner(model, spec, meta.init, rates, facts, OBJECTIVES["squared_error"], made.standardisation)
    learned.adapt(frame[["a", "b"]], frame[["y", "z"]])
    with pytest.raises(DataError, match=r"support_y: expected the columns \['y', 'z'\], in this order"):
        learned.adapt(frame[["a", "b"]], frame[["z", "y"]])
    swapped = Tasks.from_arrays(frame[["b", "a"]], frame[["y", "z"]], task, **options)
    with pytest.raises(
        ConfigError, match=r"tasks: expected the features \['a', 'b'\], in this order, got \['b', 'a'\]"
    ):
        learned.evaluate(swapped, episodes=4)
    nested = Tasks.from_arrays({"left": frame[["a"]], "right": frame[["b"]]}, frame["y"], task, shot=2, query=2)
    assert nested.facts["features"] == {"left": ["a"], "right": ["b"]}
    with pytest.raises(DataError, match=r"x left: expected the columns \['a'\], in this order, got \['b'\]"):
        trees.check_columns({"left": frame[["b"]], "right": frame[["b"]]}, nested.facts["features"], "x")
    with pytest.raises(DataError, match="x, y, task: expected the same rows in the same order"):
        Tasks.from_arrays(frame[["a", "b"]], frame["y"].sample(frac=1, random_state=0), task, shot=2, query=2)
    Tasks.from_arrays(frame[["a", "b"]].to_numpy(), frame["y"], task.to_numpy(), shot=2, query=2)
    with pytest.raises(DataError, match=r"x: expected arrays, got a list of numbers; pass np.array\(x\)"):
        Tasks.from_arrays(frame[["a", "b"]].to_numpy().tolist(), frame["y"], task, shot=2, query=2)


def test_a_loss_of_ones_own_meets_targets_of_the_trained_shape_only():
    """It may broadcast where the losses of metalr refuse."""
    model = models.mlp(1, (2,), widths=(4,))
    spec = RatesSpec(steps=1)
    meta = outer.initial(model, spec, jax.random.key(0))
    own = Objective("own", lambda outputs, targets: jnp.square(outputs - targets).mean())
    facts = {"target_shapes": [[1]]}
    learned = Learner(model, spec, meta.init, hyperparameters.actual(spec, meta.rates), facts, own)
    x = np.ones((3, 2), np.float32)
    learned.adapt(x, x[:, :1])
    for y in (x[:, 0], x):
        with pytest.raises(DataError, match=r"support_y: expected shapes \[\[1\]\] after the axis of examples"):
            learned.adapt(x, y)
