"""Where the numbers of a run go while it runs, beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, trackio.

A logger is an object with `log` and `close`, and `picture` if it takes pictures. `LOGGERS` has those of libraries, each
an extra that is imported when it is asked for. metrics.jsonl has everything anyway: a logger that fails is left out,
and the run goes on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from metalr.errors import ConfigError, one_line
from metalr.storage import folders

PROJECT = "metalr"


class Logger(Protocol):
    """Takes the numbers of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after so many outer steps: the means over the last dispatch, or those of a validation."""
        ...

    def close(self) -> None:
        """The run is over, or stopped."""
        ...

    # A logger may also have picture(step, name, image), image [height, width, 3] uint8: the rates at each validation,
    # and held-out tasks at the end.


class Log(NamedTuple):
    """What a run hands its numbers and pictures to.

    Attributes:
      numbers: (outer steps so far, values by name, in sections or lists).
      picture: (outer steps so far, name, a function that draws it: [height, width, 3] uint8).
    """

    numbers: Callable[[int, Mapping[str, Any]], None] = lambda step, values: None
    picture: Callable[[int, str, Callable[[], np.ndarray]], None] = lambda step, name, draw: None


class TensorBoard:
    """Event files in the run folder, written without TensorFlow: tensorboard --logdir RUN."""

    def __init__(self, folder: Path, settings: dict[str, Any], identity: str | None) -> None:
        self.writer = _import("tensorboard").SummaryWriter(str(folder / "tensorboard"))
        self.identity = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self.writer.add_image(name, image, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _OfRun:
    """What loggers share whose library gives a run with log and finish."""

    run: Any
    library: Any

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self.run.log({name: self.library.Image(image)}, step=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class WandB(_OfRun):
    """A run of Weights & Biases, which a resumed run goes on with."""

    def __init__(self, folder: Path, settings: dict[str, Any], identity: str | None) -> None:
        own = {"id": identity, "resume": "allow"} if identity else {}
        self.library = _import("wandb")
        self.run = self.library.init(project=PROJECT, name=folder.name, dir=str(folder), config=settings, **own)
        self.identity = str(self.run.id)


class MLflow:
    """A run of MLflow, which a resumed run goes on with; where it goes says MLflow's own MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, settings: dict[str, Any], identity: str | None) -> None:
        self.mlflow = _import("mlflow")
        if identity is None:
            self.mlflow.set_experiment(PROJECT)
            self.run = self.mlflow.start_run(run_name=folder.name)
            try:
                self.mlflow.log_params({name: str(value)[:500] for name, value in settings.items()})
            except Exception:
                self.mlflow.end_run("FAILED")  # else the next run of this process could not begin
                raise
        else:
            self.run = self.mlflow.start_run(run_id=identity)
        self.identity = str(self.run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self.mlflow.log_image(image, key=name.replace("/", "_"), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class Trackio(_OfRun):
    """A run of trackio, in its local database: trackio show."""

    def __init__(self, folder: Path, settings: dict[str, Any], identity: str | None) -> None:
        self.identity = identity or f"{folder.name}-{uuid.uuid4().hex[:8]}"  # trackio goes on with any run of that name
        self.library = _import("trackio")
        self.run = self.library.init(project=PROJECT, name=self.identity, config=settings, resume="allow")


LOGGERS: dict[str, Callable[[Path, dict[str, Any], str | None], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
ONE_AT_A_TIME = ("wandb", "mlflow")  # their libraries know one open run a process
MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


def _import(name: str) -> Any:
    """The library of a logger, which the extra of its name installs."""
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise ConfigError(f"loggers: expected {MODULES[name]} for {name}; pip install 'metalr[{name}]'") from error


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for a logger whose library is not installed."""
    for name in names:
        _import(name)


def check_side_by_side(names: Sequence[str]) -> None:
    """Raises ConfigError for a logger that cannot take the numbers of several runs of one process."""
    one_at_a_time = [name for name in names if name in ONE_AT_A_TIME]
    if one_at_a_time:
        raise ConfigError(
            f"loggers: expected none of {ONE_AT_A_TIME} with seeds that run together, because they take one run a "
            f"process, got {one_at_a_time}"
        )


@contextlib.contextmanager
def opened(
    names: Sequence[str],
    given: Sequence[Logger],
    folder: Path,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> Iterator[Log]:
    """Gives a Log, which hands the numbers among the values to all loggers, and pictures to those that take them.

    Args:
      names: rows of LOGGERS; given: loggers of the user's own.
      settings: of the run, by dotted name.
      say: where it is said that a logger failed and is left out from then on.
    """
    file = folder / folders.LOGGERS
    kept = json.loads(file.read_text()) if file.is_file() else {}
    open_now: dict[str, Logger] = {f"{type(one).__name__} {i}": one for i, one in enumerate(given, 1)}

    def attempt(name: str, what: Callable[..., Any], *given: Any) -> Any:
        try:
            return what(*given)
        except Exception as error:  # of somebody else's service: no reason to lose a run
            open_now.pop(name, None)
            return say(f"logger {name} failed and is left out from here on: {type(error).__name__}: {one_line(error)}")

    for name in names:
        made = attempt(name, LOGGERS[name], folder, settings, kept.get(name))
        if made is not None:
            open_now[name] = made
            if made.identity is not None:
                kept[name] = made.identity
    if kept:
        folders.write_json(file, kept)

    def log(step: int, values: Mapping[str, Any]) -> None:
        if open_now:
            numbers = dict(_numbers(values))
            for name, logger in list(open_now.items()):
                attempt(name, logger.log, step, numbers)

    def picture(step: int, name: str, draw: Callable[[], np.ndarray]) -> None:
        drawn = functools.cache(draw)
        for key, logger in list(open_now.items()):
            if hasattr(logger, "picture"):
                attempt(key, lambda taker=logger.picture: taker(step, name, drawn()))

    try:
        yield Log(log, picture)
    finally:
        for name, logger in list(open_now.items()):
            attempt(name, logger.close)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by name: a section's with its name in front, a list's with their place behind."""
    for name, value in values.items():
        whole = prefix + str(name).replace(":", "/")
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{whole}/")
        elif isinstance(value, list):
            yield from _numbers({str(i + 1): one for i, one in enumerate(value)}, f"{whole}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield whole, float(value)
