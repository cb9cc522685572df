"""Tasks of any kind: a sampler for each split, from functions of your own, or from rows of a table."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalr.data import Dataset, load
from metalr.errors import ConfigError, DataError, check_seed, check_whole
from metalr.inner import Objective, objective_of
from metalr.models import Model
from metalr.tasks import checks
from metalr.tasks.checks import Checked
from metalr.tasks.host import Draw, feeds
from metalr.tasks.host import sampler as host_sampler
from metalr.tasks.images import make_samplers, make_splits
from metalr.tasks.rows import Rows, check_rows, dealt, row_sampler, row_task, task_ids
from metalr.tasks.samplers import PARTS, OfCountedTasks, Part, Parts, Sample, second_key
from metalr.tasks.standardisation import Standardisation
from metalr.trees import as_numbers, by_column, check_digits, columns_of, path_name
from metalr.types import Episode

VALIDATION = 0x0A1D  # folded into a key


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

    def __repr__(self) -> str:
        plain = {k: v for k, v in self.facts.items() if isinstance(v, (str, int, float)) and not k.endswith("sha256")}
        split = self.facts.get("tasks")
        if isinstance(split, Mapping) and all(isinstance(split.get(part), list) for part in PARTS):
            plain["tasks"] = " + ".join(f"{len(split[part])} {part}" for part in PARTS)
        return f"Tasks({', '.join([repr(self.name), *(f'{name}={value}' for name, value in plain.items())])})"

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
        return checks.check(self, model, objective_of(objective))

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
            leaves = jax.tree.leaves(tree)
            if not leaves:
                raise DataError(f"{what}: expected arrays with a row an example, got {tree!r:.80}")
            if isinstance(tree, (list, tuple)) and all(np.ndim(leaf) == 0 for leaf in leaves[:1000]):
                raise DataError(f"{what}: expected arrays, got a list of numbers; pass np.array({what})")
        ids = task_ids(task)
        _check_indexes(x, y, task)
        columns = {"features": columns_of(x), "targets": columns_of(y)}  # of DataFrames
        for what, tree in (("x", x), ("y", y)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                for of_column, column in by_column(leaf, f"{what} {path_name(path)}".strip()):
                    check_digits(column, of_column)
        x, y = (jax.tree.map(functools.partial(as_numbers, what="x, y"), tree) for tree in (x, y))
        check_rows({"x": x, "y": y}, len(ids), ids.shape)
        names, number, counts = np.unique(ids, return_inverse=True, return_counts=True)
        chosen = dealt(names, counts, validation, test, seed)
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
        facts |= {name: found.get("", found) for name, found in columns.items() if found}
        xs, ys = jax.tree.map(lambda v: jnp.asarray(v[rows]), (x, y))
        pool = {
            part: Rows(xs, ys, *(jnp.asarray(v[chosen[part]], jnp.int32) for v in (first, counts))) for part in PARTS
        }
        sample = row_sampler(shot, query)
        return cls(sample, sample, sample, pool, name, facts, standardisation, task_of=row_task)

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


def _check_indexes(*trees: Any) -> None:
    """Raises DataError where columns of pandas name their rows, and not all in the same order."""
    indexes = [leaf.index for leaf in jax.tree.leaves(trees) if hasattr(leaf, "index") and hasattr(leaf, "isna")]
    if any(not index.equals(indexes[0]) for index in indexes[1:]):
        raise DataError(
            "x, y, task: expected the same rows in the same order, got columns of pandas with other indexes; to pair "
            "them by position: .reset_index(drop=True)"
        )
