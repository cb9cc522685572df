"""Tasks of any kind: a sampler for each split, from functions of your own, or from rows of a table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalr.data import Dataset, load
from metalr.errors import ConfigError, DataError, MetalrError, check_seed, check_whole, one_line
from metalr.inner import OBJECTIVES, Objective, objective_of
from metalr.models import Model, predict
from metalr.tasks.host import Draw, feeds, host_failure
from metalr.tasks.host import sampler as host_sampler
from metalr.tasks.images import Part, Parts, Sampler, choose, make_samplers, make_splits, second_key
from metalr.tasks.standardisation import Standardisation
from metalr.trees import as_numbers, by_column, check_digits, count, path_name, whole_numbers
from metalr.types import Episode

PARTS = ("train", "validation", "test")
VALIDATION = 0x0A1D  # folded into a key
Sample = Callable[..., Episode]  # key -> Episode, or (pool, key) -> Episode; traceable by jax


@dataclasses.dataclass(frozen=True)
class OfCountedTasks:
    """A sampler of tasks that can be counted, which says which of them a key draws: two keys may draw the same.

    Attributes:
      sample: (pool, key) -> Episode.
      task_of: (pool, key) -> int32 [], traceable by jax.
    """

    sample: Callable[[Any, jax.Array], Episode]
    task_of: Callable[[Any, jax.Array], jax.Array]

    def __call__(self, pool: Any, key: jax.Array) -> Episode:
        return self.sample(pool, key)

    @functools.cached_property
    def tasks_of(self) -> Callable[[Any, jax.Array], jax.Array]:
        """(pool, keys [n]) -> [n] int32; compiled once."""
        return jax.jit(jax.vmap(self.task_of, (None, 0)))


@dataclasses.dataclass(frozen=True, eq=False)
class Tasks:
    """Samplers of meta-training, meta-validation and meta-test tasks.

    Attributes:
      train, validation, test: key -> Episode, traceable by jax. The same key gives the same episode; shapes are fixed.
        With a pool: (pool, key) -> Episode. One function for both validation and test gives each other episodes.
      pool: arrays that the samplers draw from, an argument of the compiled program, so that large data is not compiled
        into it. A Mapping with the keys "train", "validation" and "test" gives each split its own.
      name: what reports call the tasks.
      facts: plain JSON values that say what the tasks are and how they were split; they travel with every result, and
        their hash tells whether two runs are of the same tasks.
      standardisation: how the numbers in the episodes were standardised, which goes with what is learned; None: they
        are as they were.
      prefetch: called with the keys [n] of meta-training episodes before they are needed (see `from_host`).
      task_of: key -> int32 [], or with a pool (pool, key) -> int32 []: which of a split's tasks a key draws, where
        those can be counted, as the shops of a table can. Intervals are over tasks then, and not over episodes. A
        Mapping gives each split its own.
    """

    train: Sample
    validation: Sample
    test: Sample
    pool: Any = None
    name: str = "tasks"
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    standardisation: Standardisation | None = None
    prefetch: Callable[[jax.Array], None] | None = None
    task_of: Callable[..., jax.Array] | Mapping[str, Callable[..., jax.Array]] | None = None

    @property
    def parts(self) -> Parts:
        """What each split is drawn from, and who draws."""
        return Parts(*(self.sampler(part) for part in PARTS))

    def sampler(self, part: str) -> Part:
        """(pool, `sample(pool, key) -> Episode`) of one split, "train", "validation" or "test"."""
        if part not in PARTS:
            raise ConfigError(f"tasks: expected a split of {PARTS}, got {part!r}")
        function, alone = getattr(self, part), self.pool is None
        task_of = self.task_of[part] if isinstance(self.task_of, Mapping) else self.task_of
        own = isinstance(self.pool, Mapping) and set(self.pool) == set(PARTS)
        pool = () if self.pool is None else self.pool[part] if own else self.pool

        # Both are drawn with the same keys: the episodes to choose by are not those to be judged on.
        apart = part == "validation" and not own and _same(self.validation, self.test)

        def key_of(key: jax.Array) -> jax.Array:
            return jax.random.fold_in(second_key(key), VALIDATION) if apart else key

        def sample(pool: Any, key: jax.Array) -> Episode:
            return _as_episode(function(key_of(key)) if alone else function(pool, key_of(key)), part)

        def counted(pool: Any, key: jax.Array) -> jax.Array:
            assert task_of is not None
            return task_of(key_of(key)) if alone else task_of(pool, key_of(key))

        return Part(pool, sample if task_of is None else OfCountedTasks(sample, counted))

    @property
    def sha256(self) -> str:
        """The hash of the name and the facts."""
        return hashlib.sha256(json.dumps([self.name, dict(self.facts)], sort_keys=True).encode()).hexdigest()

    def check(self, model: Model, objective: str | Objective) -> Checked:
        """Try the tasks, the model and the objective together, before anything large is compiled.

        Every split is drawn from with two keys and again with the first: the same key must give the same episode,
        another key of meta-training another one, all episodes the same shapes and dtypes, all numbers must be finite,
        support and query must be disjoint in at least one example, labels must be those that the model has outputs for,
        and the loss of a random init must be finite, and all metrics numbers.

        Raises:
          DataError: naming the split and the field. ConfigError: model or objective do not fit the episodes.
        """
        objective = objective_of(objective)
        shapes: dict[str, Any] = {}
        losses: dict[str, float] = {}
        drawn: dict[str, Episode] = {}
        pixels = model.takes_images and objective.targets == "classes"
        for part in PARTS:
            first, again, other = _three_drawn(self, part)
            drawn[part] = first
            _check_counted(self, part)
            _check_repeated(part, first, again, other)
            _check_lengths(part, first)
            _check_apart(part, first)
            if model.takes_images and any(v.dtype == jnp.uint8 for v in jax.tree.leaves(first.support_x)):
                raise DataError(
                    f"tasks.{part}: support_x: expected images as float 0..1, got uint8; divide them by 255"
                )
            own = self.pool.get(part) if isinstance(self.pool, Mapping) else None
            table = own if isinstance(own, _Rows) else None  # all of its rows, and not of two episodes alone
            way = _outputs_of(part, model, first) if objective.targets == "classes" else model.way
            of_table = None if table is None else table.y
            for field, y in (("y", of_table), ("support_y", first.support_y), ("query_y", first.query_y)):
                if y is not None:
                    check_labels(f"tasks.{part}: {field}", y, objective, way)
            seen = [first.support_x, first.query_x, other.support_x, other.query_x] if table is None else [table.x]
            pixels = pixels and all(bool((v >= 0).all() & (v <= 1).all()) for v in jax.tree.leaves(seen))
            shapes[part] = jax.tree.map(lambda v: (v.shape, str(v.dtype)), first)
            losses[part] = _loss_of_init(part, model, objective, first)
        if not shapes["train"] == shapes["validation"] == shapes["test"]:
            raise DataError(f"tasks: expected the same shapes and dtypes in all splits, got {shapes}")
        _check_judged_apart(drawn["validation"], drawn["test"])
        return Checked(shapes["train"], losses, pixels)

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        y: Any,
        task: Any,
        *,
        shot: int = 10,
        query: int = 10,
        validation: float = 0.15,
        test: float = 0.15,
        standardise: str = "none",
        seed: int = 0,
        name: str = "arrays",
    ) -> Tasks:
        """Tasks out of the rows of a table: one task id a row. Whole tasks are held out.

        Args:
          x, y: inputs and targets, pytrees of arrays (numpy arrays, columns of pandas) with a leading axis [rows].
            Numbers are kept as they are; float64 becomes float32.
          task: [rows] task ids: integers or strings.
          shot, query: rows of a support and of a query set. A task with fewer than shot + query rows gives
            both sets their share of its rows, disjoint, and repeats them to fill the sets; `facts` names such tasks. A
            task needs 2 rows.
          validation, test: shares of the tasks; at least one each.
          standardise: "inputs", or "both" inputs and targets, by means and deviations over the rows of meta-training
            tasks; "none" leaves numbers as they are. What is learned keeps them: `adapt` and `apply` take and give
            numbers in your units, and metrics other than the loss are in your units too.
          seed: deals the tasks to the splits.

        Raises:
          DataError: lengths that differ, values that are not finite or no numbers, a task of one row, under 3 tasks.
          ConfigError: shot or query below 1, shares that leave nothing to train on, or another `standardise`.
        """
        check_whole("shot", shot)
        check_whole("query", query)
        check_seed("seed", seed)
        for what, share in (("validation", validation), ("test", test)):
            if not isinstance(share, Real):
                raise ConfigError(f"{what}: expected a share of the tasks, got {share!r}")
        for what, tree in (("x", x), ("y", y)):
            if not jax.tree.leaves(tree):
                raise DataError(f"{what}: expected arrays with a row an example, got {tree!r:.80}")
        ids = _task_ids(task)
        columns = getattr(x, "columns", None)  # of a DataFrame
        for what, tree in (("x", x), ("y", y)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                for name, column in by_column(leaf, f"{what} {path_name(path)}".strip()):
                    check_digits(column, name)
        x, y = (jax.tree.map(functools.partial(as_numbers, what="x, y"), tree) for tree in (x, y))
        _check_rows({"x": x, "y": y}, len(ids), ids.shape)
        names, number, counts = np.unique(ids, return_inverse=True, return_counts=True)
        chosen = _dealt(names, counts, validation, test, seed)
        rows = np.argsort(number, kind="stable")
        first = np.cumsum(counts) - counts
        digest = hashlib.sha256()
        for leaf in (*jax.tree.leaves((x, y)), ids.astype(str)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        seen = np.isin(number, chosen["train"])
        of_training = jax.tree.map(lambda v: v[seen], x), jax.tree.map(lambda v: v[seen], y)
        standardisation = Standardisation.of(of_training[0], of_training[1], standardise)
        if standardisation is not None:
            x, y = standardisation.inputs(x), standardisation.targets(y)
        facts = {
            "rows": len(ids), "shot": shot, "query": query, "sha256": digest.hexdigest(),
            "tasks": {part: [str(names[i]) for i in chosen[part]] for part in PARTS},
            "small_tasks": [str(n) for n in names[counts < shot + query]],
        } | ({"standardise": standardise} if standardisation else {})  # fmt: skip
        if columns is not None:
            facts["features"] = [str(name) for name in columns]
        xs, ys = jax.tree.map(lambda v: jnp.asarray(v[rows]), (x, y))
        pool = {
            part: _Rows(xs, ys, *(jnp.asarray(v[chosen[part]], jnp.int32) for v in (first, counts))) for part in PARTS
        }
        sample = _row_sampler(shot, query)
        return cls(sample, sample, sample, pool, name, facts, standardisation, task_of=_row_task)

    @classmethod
    def from_images(
        cls,
        images: Dataset | str | Path,
        family: str,
        way: int,
        shot: int,
        query: int = 15,
        *,
        distort: float = 0.0,
        label_noise: float = 0.0,
        turns: bool = True,
        seed: int = 0,
    ) -> Tasks:
        """A family of image-classification tasks, as `metalr train --tasks.family` has them: see docs/tasks.md.

        Episodes have x [way * shot, height, width, channels] float32 and y [way * shot] int32 labels.

        Args:
          images: the name of a dataset ("mnist12k" is bundled), a path to an .npz, or a metalr.data.Dataset, such as
            metalr.data.from_arrays(images, labels) gives.
          family: a row of tasks.FAMILIES.
          way, shot, query: classes of a task, and support and query images of each.
          distort, label_noise: as of tasks.make_sampler. turns, seed: as of tasks.make_splits.

        Raises:
          ConfigError: what the family cannot do. DataError: no such dataset, or one that is too small.
        """
        dataset = load(str(images)) if isinstance(images, str | Path) else images
        splits = make_splits(dataset, family, seed, turns=turns)
        made = make_samplers(splits, way, shot, query, distort=distort, label_noise=label_noise)
        facts = {
            "data": dataset.name, "sha256": dataset.sha256, "split_sha256": splits.sha256, "family": family,
            "way": way, "shot": shot, "query": query, "distort": distort, "label_noise": label_noise,
        }  # fmt: skip
        pool = {name: part.pool for name, part in made._asdict().items()}
        train, validation, test = (part.sample for part in made)
        return cls(train, validation, test, pool, f"{dataset.name} {family}", facts)

    @classmethod
    def from_host(
        cls,
        train: Draw,
        validation: Draw,
        test: Draw,
        *,
        name: str = "tasks",
        facts: Mapping[str, Any] | None = None,
        workers: int = 2,
        ahead: int = 256,
    ) -> Tasks:
        """Tasks that cannot be sampled by jax: read from files, simulated, or given by a loader such as Grain.

        While the device works, threads draw the episodes of the next steps.

        Args:
          train, validation, test: rng -> Episode of numpy arrays, of the same shapes each time. All that is random
            comes from rng, a numpy.random.Generator that is made from the episode's key: so a resumed run sees the same
            episodes. Of a dataset that has a length and items: `lambda rng: read(dataset[rng.integers(len(dataset))])`.
          name, facts: as of `Tasks`.
          workers: threads that draw; ahead: the most episodes that are kept waiting.

        Raises DataError: a function that gives no Episode, or not arrays of numbers.
        """
        made = feeds((train, validation, test), workers, ahead)

        def prefetch(keys: jax.Array) -> None:
            made[0].prefetch(np.asarray(jax.random.key_data(keys)))

        of_train, of_validation, of_test = map(host_sampler, made)
        return cls(of_train, of_validation, of_test, name=name, facts=facts or {}, prefetch=prefetch)


def _same(one: Any, other: Any) -> bool:
    """Whether two functions are one: also a method that was taken twice from an object, and equal partials."""
    if isinstance(one, functools.partial) and isinstance(other, functools.partial):
        return (
            _same(one.func, other.func)
            and [*map(id, one.args)] == [*map(id, other.args)]
            and {k: id(v) for k, v in one.keywords.items()} == {k: id(v) for k, v in other.keywords.items()}
        )
    return one is other or (isinstance(one, types.MethodType) and one == other)


def _as_episode(drawn: Any, part: str) -> Episode:
    if isinstance(drawn, (tuple, list)) and len(drawn) == len(Episode._fields):
        return Episode(*drawn)
    size = f" of {len(drawn)}" if isinstance(drawn, (tuple, list)) else ""
    raise DataError(
        f"tasks.{part}: expected a function that gives an Episode(support_x, support_y, query_x, query_y), got "
        f"{type(drawn).__name__}{size}"
    )


def _three_drawn(tasks: Tasks, part: str) -> tuple[Episode, Episode, Episode]:
    """Episodes of two keys, the first of them twice. Raises DataError for a sampler that cannot be traced."""
    pool, sample = tasks.sampler(part)
    draw = jax.jit(sample)
    try:
        first, again, other = (draw(pool, jax.random.key(seed)) for seed in (0, 0, 1))
    except MetalrError:
        raise
    except (ValueError, RuntimeError) as error:
        failed = host_failure(error)
        if failed is None:
            failed = DataError(f"tasks.{part}: the sampler failed: {type(error).__name__}: {one_line(error)}")
        raise failed from error
    except jax.errors.JAXTypeError as error:
        raise DataError(
            f"tasks.{part}: expected a sampler that jax can trace (jax.numpy, no Python branches on values): "
            f"{one_line(error)}"
        ) from error
    except TypeError as error:
        raise DataError(
            f"tasks.{part}: expected a function of {'a key' if tasks.pool is None else 'the pool and a key'} that "
            f"gives an Episode of arrays of numbers: {one_line(error)}"
        ) from error
    except Exception as error:  # whatever a sampler of the user's own raises
        raise DataError(f"tasks.{part}: the sampler failed: {type(error).__name__}: {one_line(error)}") from error
    return first, again, other


def _check_repeated(part: str, first: Episode, again: Episode, other: Episode) -> None:
    """Raises DataError unless a key gives its own episode: the same again, and finite."""
    leaves = jax.tree_util.tree_leaves_with_path(first)
    for (path, a), b, c in zip(leaves, jax.tree.leaves(again), jax.tree.leaves(other), strict=True):
        where = f"tasks.{part}: {path_name(path)}"
        if a.ndim < 1:
            raise DataError(f"{where}: expected a leading axis of examples, got shape []")
        if jnp.issubdtype(a.dtype, jnp.floating) and not bool(jnp.isfinite(a).all() & jnp.isfinite(c).all()):
            raise DataError(f"{where}: expected finite values, got others")
        if not bool((a == b).all()):
            raise DataError(f"{where}: expected the same values for the same key, got others")
    if part == "train" and all(bool((a == c).all()) for (_, a), c in zip(leaves, jax.tree.leaves(other), strict=True)):
        raise DataError(
            "tasks.train: expected another episode for another key, got the same; draw all that is random with "
            "jax.random and the key (np.random is drawn once, when jax traces the function), or use Tasks.from_host"
        )


def _check_lengths(part: str, episode: Episode) -> None:
    """Raises DataError for sets that are empty, or whose inputs and targets are not as many."""
    for field, value in episode._asdict().items():
        lengths = {leaf.shape[0] for leaf in jax.tree.leaves(value)}
        if len(lengths) != 1 or 0 in lengths:
            raise DataError(f"tasks.{part}: {field}: expected one number of examples, got {sorted(lengths)}")
    for field, of in (("support", "support_x support_y"), ("query", "query_x query_y")):
        x, y = (count(getattr(episode, name)) for name in of.split())
        if x != y:
            raise DataError(f"tasks.{part}: {field}: expected as many targets as inputs, got {x} and {y}")


def _check_apart(part: str, episode: Episode) -> None:
    support, query = jax.tree.leaves(episode.support_x), jax.tree.leaves(episode.query_x)
    if len(support) == len(query) and all(
        a.shape == b.shape and bool((a == b).all()) for a, b in zip(support, query, strict=True)
    ):
        raise DataError(f"tasks.{part}: expected a query set apart from the support set, got the same inputs")


def _check_judged_apart(validation: Episode, test: Episode) -> None:
    """Raises DataError for validation and test episodes of one key that are the same."""
    if all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(validation), jax.tree.leaves(test), strict=True)):
        raise DataError(
            "tasks.validation: expected other episodes than tasks.test has, which judge what these choose, got the "
            "same for the same key; hold other tasks out for it, or fold a number of its own into the key"
        )


def check_labels(where: str, y: Any, objective: Objective, way: int | None) -> None:
    """Raises DataError for targets that an objective of classes has no output for. way: outputs, if that is known."""
    if objective.targets not in ("classes", "binary"):
        return
    binary = objective.targets == "binary"
    most = 1 if binary else np.inf if way is None else way - 1
    for leaf in map(np.asarray, jax.tree.leaves(y)):
        if not binary and leaf.ndim != 1:
            raise DataError(f"{where}: expected one label an example, shape [n], got {list(leaf.shape)}")
        whole = leaf.dtype.kind in "iu" or (binary and (leaf.dtype.kind == "b" or bool((leaf == np.round(leaf)).all())))
        if not whole or (leaf.size and (leaf.min() < 0 or leaf.max() > most)):
            upto = "0, 1, …" if most == np.inf else f"0..{most}"
            raise DataError(
                f"{where}: expected integer labels {upto} with {objective.name}, got {leaf.dtype} "
                f"{leaf.min()}..{leaf.max()}"
            )


def _outputs_of(part: str, model: Model, episode: Episode) -> int | None:
    """How many outputs a network has for an example, if those are one row; also of one that does not say it."""
    if model.way is not None:
        return model.way

    with _said_of(part):
        found = jax.tree.leaves(jax.eval_shape(functools.partial(_of_init, model), episode))
    return found[0].shape[1] if len(found) == 1 and found[0].ndim == 2 else None


def _of_init(model: Model, episode: Episode) -> Any:
    """Outputs of a random init for an episode's query set."""
    start = model.begin(model.init(jax.random.key(0)), episode.support_x, episode.support_y)
    return predict(model.apply, start, episode.support_x, episode.query_x)


@contextlib.contextmanager
def _said_of(part: str) -> Iterator[None]:
    """What a network or a loss of the user's own raises when it is traced, as a ConfigError."""
    try:
        yield
    except MetalrError:
        raise
    except Exception as error:
        raise ConfigError(f"model, objective: do not fit the episodes of tasks.{part}: {one_line(error)}") from error


def _loss_of_init(part: str, model: Model, objective: Objective, episode: Episode) -> float:
    """The query loss of a random init. Raises as Tasks.check says."""

    def measured(episode: Episode) -> tuple[dict[str, Any], Any]:
        outputs = _of_init(model, episode)
        found = objective.measure(outputs, episode.query_y) | {"the loss": objective.loss(outputs, episode.query_y)}
        return found, outputs

    with _said_of(part):
        found, outputs = jax.jit(measured)(episode)
    _check_pairs(objective, outputs, episode.query_y, found["the loss"])
    for name, value in found.items():
        if np.shape(value) != ():
            raise ConfigError(f"objective: expected {name} to be one number, got an array of {list(np.shape(value))}")
    loss = float(found["the loss"])
    if not np.isfinite(loss):
        raise DataError(f"tasks.{part}: expected a finite loss of a random init, got {loss}")
    return loss


def _check_pairs(objective: Objective, outputs: Any, targets: Any, loss: jax.Array) -> None:
    """Raises ConfigError for a loss of one's own that pairs every output of [n, 1] with every target of [n].

    Such a loss is neither the mean over examples nor that of outputs in the targets' shape.
    """
    known = OBJECTIVES.get(objective.name)
    if known is not None or not all(isinstance(v, jax.Array) for v in (outputs, targets)):
        return
    if len(targets) < 2 or outputs.shape != (*targets.shape, 1) or np.shape(loss) != ():
        return
    try:
        flat = objective.loss(outputs[..., 0], targets)
        each = [objective.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    except Exception:  # it wants [n, 1], or several examples
        return
    if not any(np.allclose(loss, other, rtol=1e-3, atol=1e-6) for other in (flat, np.mean(each, axis=0))):
        raise ConfigError(
            f"objective {objective.name!r}: expected a loss of outputs {list(outputs.shape)} and targets "
            f"{list(targets.shape)} that is a mean over examples, got one that pairs every output with every target; "
            "in it, first outputs.reshape(targets.shape)"
        )


def _check_counted(tasks: Tasks, part: str) -> None:
    """Raises DataError unless task_of, if there is one, gives an integer."""
    pool, sample = tasks.sampler(part)
    if not isinstance(sample, OfCountedTasks):
        return
    try:
        found = jax.eval_shape(sample.task_of, pool, jax.random.key(0))
    except Exception as error:  # whatever a function of the user's own raises
        raise DataError(f"tasks.{part}: task_of: {type(error).__name__}: {one_line(error)}") from error
    if getattr(found, "shape", None) != () or not jnp.issubdtype(found.dtype, jnp.integer):
        raise DataError(f"tasks.{part}: task_of: expected an integer, shape [], got {found}")


class Checked(NamedTuple):
    """What `Tasks.check` found.

    Attributes:
      shapes: an Episode of (shape, dtype). losses: of a random init, by split.
      pixels: whether inputs are images with values 0..1, of which classes are to be told.
    """

    shapes: Any
    losses: dict[str, float]
    pixels: bool = False

    def __str__(self) -> str:
        rows = []
        for path, (shape, dtype) in jax.tree_util.tree_leaves_with_path(self.shapes, is_leaf=_is_shape):
            rows.append(f"{path_name(path):24} {dtype:10} {list(shape)}")
        losses = ", ".join(f"{part} {loss:.4g}" for part, loss in self.losses.items())
        return "\n".join([*rows, f"loss of a random init: {losses}"])


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], str)


class _Rows(NamedTuple):
    """The rows of a table, sorted by task, and where each task of a split begins and how many rows it has."""

    x: Any
    y: Any
    first: jax.Array  # [tasks] int32
    size: jax.Array  # [tasks] int32


def _is_missing(value: Any) -> bool:
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _task_ids(task: Any) -> np.ndarray:
    """[rows] integers or strings. Raises DataError for a row without one, and for ids of several kinds."""
    ids = np.asarray(task)
    if ids.ndim != 1:
        raise DataError(f"task: expected one id a row, shape [rows], got {list(ids.shape)}")
    if ids.dtype.kind in "iuUb":
        return ids
    values = ids.ravel().tolist()
    without = [row for row, value in enumerate(values) if _is_missing(value)]
    if without:
        raise DataError(f"task: expected an id in every row, got none in {len(without)}, first in row {without[0]}")
    kinds = {type(value).__name__ for value in values}
    if ids.dtype.kind == "f" and whole_numbers(ids):
        return ids.astype(np.int64)  # as pandas has integers, once some were missing
    if kinds - {"str"} and kinds - {"int"}:
        raise DataError(f"task: expected integers or strings, got {', '.join(sorted(kinds))}")
    return ids.astype(str) if kinds == {"str"} else ids.astype(np.int64)


def _check_rows(trees: Mapping[str, Any], rows: int, shape: tuple[int, ...]) -> None:
    """Raises DataError unless every column has one finite value a task id, which are of `shape`."""
    for what, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            column = f"{what} {path_name(path)}".strip()
            if leaf.shape[:1] != shape:
                raise DataError(f"{column}: expected {rows} rows, one a task id, got shape {list(leaf.shape)}")
            if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
                bad = np.flatnonzero(~np.isfinite(leaf).reshape(len(leaf), -1).all(1))
                raise DataError(
                    f"{column}: expected finite values, got others in {len(bad)} rows, first in row {bad[0]}"
                )


def _dealt(names: np.ndarray, counts: np.ndarray, validation: float, test: float, seed: int) -> dict[str, np.ndarray]:
    """The tasks of each split, by their places in `names`, sorted. counts: rows of each task.

    Raises DataError for tasks of one row, or too few tasks; ConfigError for shares that leave none to train on.
    """
    lonely = [str(n) for n in names[counts < 2]]
    if lonely:
        raise DataError(f"task: expected at least 2 rows of each task, got one of {', '.join(lonely[:5])}")
    if len(names) < 3:
        raise DataError(f"task: expected at least 3 tasks, one for each split, got {len(names)}")
    held = {"validation": max(1, round(validation * len(names))), "test": max(1, round(test * len(names)))}
    if not (0 < validation < 1 and 0 < test < 1) or sum(held.values()) >= len(names):
        raise ConfigError(f"validation, test: expected shares that leave tasks to train on, got {validation}, {test}")
    order = np.random.default_rng(seed).permutation(len(names))
    parts = np.split(order, [held["test"], held["test"] + held["validation"]])
    return dict(zip(("test", "validation", "train"), map(np.sort, parts), strict=True))


def _row_task(rows: _Rows, key: jax.Array) -> jax.Array:
    """Which task of the split a key draws: int32 []."""
    return jax.random.randint(jax.random.split(key)[0], (), 0, len(rows.first))


def _row_sampler(shot: int, query: int) -> Sample:
    """(rows, key) -> an episode of one random task of the split."""
    need = shot + query

    def sample(rows: _Rows, key: jax.Array) -> Episode:
        task, row_key = _row_task(rows, key), jax.random.split(key)[1]
        have = rows.size[task]
        enough = choose(row_key, jnp.maximum(have, need), need)
        # Too few: a random order of them, whose first part fills the support set over and over, the rest the query set.
        order = jnp.argsort(jnp.where(jnp.arange(need) < have, jax.random.uniform(row_key, (need,)), 2.0))
        share = jnp.clip(have * shot // need, 1, jnp.maximum(have - 1, 1))
        rest = jnp.maximum(have - share, 1)
        few = jnp.concatenate([order[jnp.arange(shot) % share], order[(share + jnp.arange(query) % rest) % need]])
        picked = rows.first[task] + jnp.where(have >= need, enough, few)
        x, y = jax.tree.map(lambda v: v[picked], (rows.x, rows.y))
        parts = [
            jax.tree.map(lambda v, at=at: v[at], tree) for at in (slice(shot), slice(shot, None)) for tree in (x, y)
        ]
        return Episode(*parts)

    return sample


def sinusoid(shot: int = 10, query: int = 10) -> Tasks:
    """Sine curves of random amplitude 0.1..5 and phase 0..pi, inputs -5..5 (Finn et al. 2017, section 5.1).

    Inputs and targets are [n, 1] float32. The three splits draw from the same distribution with keys of their own.
    """
    check_whole("shot", shot)
    check_whole("query", query)

    def of(part: int) -> Sample:
        def sample(key: jax.Array) -> Episode:
            amplitude_key, phase_key, x_key = jax.random.split(jax.random.fold_in(second_key(key), part), 3)
            amplitude = jax.random.uniform(amplitude_key, dtype=jnp.float32, minval=0.1, maxval=5.0)
            phase = jax.random.uniform(phase_key, dtype=jnp.float32, minval=0.0, maxval=jnp.pi)
            x = jax.random.uniform(x_key, (shot + query, 1), jnp.float32, minval=-5.0, maxval=5.0)
            y = amplitude * jnp.sin(x - phase)
            return Episode(x[:shot], y[:shot], x[shot:], y[shot:])

        return sample

    facts = {"shot": shot, "query": query, "amplitude": [0.1, 5.0], "phase": [0.0, float(np.pi)], "x": [-5.0, 5.0]}
    return Tasks(of(0), of(1), of(2), name="sinusoid", facts=facts)


def mixture(*parts: Tasks, weights: tuple[float, ...] | None = None) -> Tasks:
    """Tasks that each come from one of several task sets of the same shapes, drawn by `weights` (default: equal)."""
    if len(parts) < 2:
        raise ConfigError(f"mixture: expected at least 2 task sets, got {len(parts)}")
    given = (1.0,) * len(parts) if weights is None else tuple(weights)
    good = len(given) == len(parts) and all(isinstance(w, Real) and 0 < w < np.inf for w in given)
    if not good:
        raise ConfigError(f"weights: expected a positive number for each of {len(parts)} task sets, got {weights}")
    shares = np.asarray(given, float)
    first, *rest = (each.standardisation for each in parts)
    if any(other is not first and not (first and first.same_as(other)) for other in rest):
        raise ConfigError("mixture: expected task sets that are standardised alike, got some that are not")
    for part in PARTS:
        shapes = [jax.eval_shape(each.sampler(part)[1], each.sampler(part)[0], jax.random.key(0)) for each in parts]
        for other, each in zip(shapes[1:], parts[1:], strict=True):
            if other != shapes[0]:
                raise ConfigError(
                    f"mixture: expected task sets of the same shapes and dtypes, got {shapes[0]} of {parts[0].name} "
                    f"and {other} of {each.name}"
                )
    log_shares = np.log(shares / shares.sum()).astype(np.float32)
    name = " + ".join(each.name for each in parts)

    def drawn(key: jax.Array) -> jax.Array:
        own = jax.random.fold_in(second_key(key), zlib.crc32(name.encode()))  # a mixture of mixtures draws twice
        return jax.random.categorical(own, jnp.asarray(log_shares))

    def task_of(part: str) -> Callable[[Any, jax.Array], jax.Array]:
        samplers = [each.sampler(part).sample for each in parts]

        def of(sample: Sampler, pool: Any, key: jax.Array) -> jax.Array:
            if isinstance(sample, OfCountedTasks):
                return sample.task_of(pool, key).astype(jnp.int32)
            return (jax.random.bits(key) >> 8).astype(jnp.int32)  # no task comes twice

        def counted(pools: Any, key: jax.Array) -> jax.Array:
            which = drawn(key)
            branches = [lambda pools, i=i, one=one: of(one, pools[i], key) for i, one in enumerate(samplers)]
            return which + len(parts) * jax.lax.switch(which, branches, pools)

        return counted

    def of(part: str) -> Sample:
        samplers = [each.sampler(part)[1] for each in parts]

        def sample(pools: Any, key: jax.Array) -> Episode:
            which = drawn(key)
            branches = [lambda pools, key, i=i, one=one: one(pools[i], key) for i, one in enumerate(samplers)]
            return jax.lax.switch(which, branches, pools, key)

        return sample

    def prefetch(keys: jax.Array) -> None:
        for each in parts:
            if each.prefetch is not None:
                each.prefetch(keys)

    ahead = prefetch if any(each.prefetch is not None for each in parts) else None
    pool = {part: [each.sampler(part)[0] for each in parts] for part in PARTS}
    facts = {"of": [{"name": each.name, **each.facts} for each in parts], "weights": shares.tolist()}
    counted = {part: task_of(part) for part in PARTS} if any(each.task_of is not None for each in parts) else None
    return Tasks(of("train"), of("validation"), of("test"), pool, name, facts, first, ahead, counted)
