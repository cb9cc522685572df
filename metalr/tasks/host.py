"""Tasks that cannot be sampled in a compiled program: loaders, simulators, Grain. Drawn on the host, ahead of time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from metalr.errors import ConfigError, DataError, MetalrError, check_whole, one_line
from metalr.trees import as_numbers
from metalr.types import Episode

Draw = Callable[[np.random.Generator], Episode]  # random numbers -> one episode of numpy arrays; the same for the same


class Feed:
    """Episodes of one split by key: drawn by threads before they are needed, or at once where nobody asked before.

    What is drawn depends on the key alone, so that a run that is stopped and resumed sees the same episodes.
    """

    def __init__(self, draw: Draw, part: int, workers: int, ahead: int) -> None:
        """part: sets the splits' random numbers apart. ahead: the most episodes that are kept waiting."""
        if not callable(draw):
            raise ConfigError(f"tasks: expected a function of a numpy.random.Generator, got {draw!r:.80}")
        check_whole("workers", workers)
        check_whole("ahead", ahead, 0)
        self._draw, self._part, self._ahead = draw, part, ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="metalr-episodes")
        self._waiting: dict[bytes, Future[Episode]] = {}
        self._lock = threading.Lock()
        try:
            self.example = self._one(np.zeros(2, np.uint32))
        except MetalrError:
            raise
        except Exception as error:  # whatever a loader of the user's own raises; of later draws see host_failure
            raise DataError(
                f"tasks: a function that draws episodes on the host failed: {type(error).__name__}: {one_line(error)}"
            ) from error

    def prefetch(self, keys: np.ndarray) -> None:
        """Begin to draw the episodes of these keys, [n, words] uint32, in their order, as far as there is room."""
        for key in np.asarray(keys):
            with self._lock:
                if len(self._waiting) >= self._ahead:
                    return
                if key.tobytes() not in self._waiting:
                    self._waiting[key.tobytes()] = self._pool.submit(self._one, key)

    def take(self, keys: Any) -> Episode:
        """The episodes of keys [..., words]; leaves [..., examples, …]."""
        keys = np.asarray(keys)
        flat = keys.reshape(-1, keys.shape[-1])
        drawn = [self._taken(key) for key in flat]
        return jax.tree.map(lambda *v: np.stack(v).reshape(*keys.shape[:-1], *v[0].shape), *drawn)

    def _taken(self, key: np.ndarray) -> Episode:
        with self._lock:
            waiting = self._waiting.pop(key.tobytes(), None)
        return self._one(key) if waiting is None else waiting.result()

    def _one(self, key: np.ndarray) -> Episode:
        drawn = self._draw(np.random.default_rng([self._part, *key.tolist()]))
        if not isinstance(drawn, (tuple, list)) or len(drawn) != len(Episode._fields):
            raise DataError(f"tasks: expected a function that gives an Episode, got {type(drawn).__name__}")
        episode = jax.tree.map(functools.partial(as_numbers, what="tasks"), Episode(*drawn))
        if hasattr(self, "example"):
            for name, wanted, got in zip(Episode._fields, self.example, episode, strict=True):
                shapes = [[(v.shape, v.dtype) for v in jax.tree.leaves(tree)] for tree in (wanted, got)]
                if shapes[0] != shapes[1]:
                    raise DataError(
                        f"tasks: {name}: expected the same shapes and dtypes each time, {shapes[0]}, got {shapes[1]}"
                    )
        return episode


def host_failure(error: BaseException) -> DataError | None:
    """What a function that draws on the host raised, if that is what ended a compiled program: jax gives its text."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if "callback" not in str(error).lower() or not any("Traceback" in line for line in lines):
        return None
    cause = next((line for line in reversed(lines) if not line.startswith(" ") and ": " in line), lines[-1])
    return DataError(f"tasks: a function that draws episodes on the host failed: {cause.strip()}")


def sampler(feed: Feed) -> Callable[[jax.Array], Episode]:
    """key -> Episode, which compiled programs call back to the host for."""
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), feed.example)

    def sample(key: jax.Array) -> Episode:
        return jax.pure_callback(feed.take, shapes, jax.random.key_data(key), vmap_method="broadcast_all")

    return sample


def feeds(draws: Sequence[Draw], workers: int, ahead: int) -> list[Feed]:
    """A feed for each split."""
    return [Feed(draw, part, workers, ahead) for part, draw in enumerate(draws)]
