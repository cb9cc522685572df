"""Tasks, a model and an objective tried together, before anything large is compiled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalr.errors import ConfigError, DataError, MetalrError, one_line
from metalr.inner import OBJECTIVES, Objective
from metalr.models import Model, predict
from metalr.tasks.host import host_failure
from metalr.tasks.rows import Rows
from metalr.tasks.samplers import PARTS, OfCountedTasks
from metalr.trees import count, path_name
from metalr.types import Episode

if TYPE_CHECKING:
    from metalr.tasks.sets import Tasks


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


def check(tasks: Tasks, model: Model, objective: Objective) -> Checked:
    """As Tasks.check says."""
    shapes: dict[str, Any] = {}
    losses: dict[str, float] = {}
    drawn: dict[str, Episode] = {}
    pixels = model.takes_images and objective.targets == "classes"
    for part in PARTS:
        first, again, other = _three_drawn(tasks, part)
        drawn[part] = first
        _check_counted(tasks, part)
        _check_repeated(part, first, again, other)
        _check_lengths(part, first)
        _check_apart(part, first)
        if model.takes_images and any(v.dtype == jnp.uint8 for v in jax.tree.leaves(first.support_x)):
            raise DataError(f"tasks.{part}: support_x: expected images as float 0..1, got uint8; divide them by 255")
        own = tasks.pool.get(part) if isinstance(tasks.pool, Mapping) else None
        table = own if isinstance(own, Rows) else None  # all of its rows, and not of two episodes alone
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
                + "; numbers are predicted with objective='squared_error'"
                * (leaf.dtype.kind == "f" and not binary)
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
