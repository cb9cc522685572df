"""What is searched: the small grid on held-out tasks, and the space of a search of one task. Imports no jax."""

from __future__ import annotations

import dataclasses
import math

from metalr.errors import ConfigError, check_choices


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """The small grid that the result is compared with, on the same held-out tasks."""

    run: bool = False
    """Run it."""
    learning_rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    """Learning rates."""
    steps: tuple[int, ...] = (1, 5, 20)
    """Inner steps; snapshots of one trajectory."""
    batch_sizes: tuple[int, ...] = (10, 1000)
    """Minibatch sizes; those above the support set's size mean all of it."""
    optimizers: tuple[str, ...] = ("adam", "sgd")
    """Inner optimizers."""

    def check(self) -> None:
        """Raises ConfigError for a grid that is empty or contradictory; the optimizers' names are not looked at."""
        for name in ("learning_rates", "steps", "batch_sizes", "optimizers"):
            check_choices(f"grid.{name}", getattr(self, name))
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ConfigError(f"grid.learning_rates: expected positive numbers, got {self.learning_rates}")
        if min(self.steps) < 1 or min(self.batch_sizes) < 1:
            raise ConfigError(f"grid.steps, grid.batch_sizes: expected 1 or more, got {self.steps}, {self.batch_sizes}")


@dataclasses.dataclass(frozen=True)
class SpaceConfig:
    """What is searched; the defaults are the reference grid of 27 cells.

    The grid takes every combination; the other searchers draw the learning rate log-uniformly between the smallest and
    the largest, and the others from the list. ASHA always aims at the most epochs, and stops most runs before.
    """

    learning_rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    """Learning rates; all but the grid draw log-uniformly between the smallest and the largest."""
    epochs: tuple[int, ...] = (10, 20, 30)
    """Epochs over the training part."""
    batch_sizes: tuple[int, ...] = (32, 64, 128)
    """Minibatch sizes."""

    def check(self) -> None:
        """Raises ConfigError if it is empty or contradictory."""
        for name, values in dataclasses.asdict(self).items():
            check_choices(f"space.{name}", values)
            if not all(0 < value < math.inf for value in values):
                raise ConfigError(f"space.{name}: expected positive numbers, got {values}")

    @property
    def cells(self) -> int:
        """How many combinations there are."""
        return len(self.learning_rates) * len(self.epochs) * len(self.batch_sizes)

    def fitting(self, support: int) -> SpaceConfig:
        """The space for `support` training examples: batches above that become the whole set, each size once."""
        sizes = tuple(dict.fromkeys(min(size, support) for size in self.batch_sizes))
        return dataclasses.replace(self, batch_sizes=sizes)

    def nearest(self, batch_size: int) -> int:
        """The batch size of this space that another one, of a task with more or fewer examples, stands for."""
        return min((size for size in self.batch_sizes if size >= batch_size), default=max(self.batch_sizes))
