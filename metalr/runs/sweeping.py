"""`metalr sweep`: many runs of one setting, with some of its settings changed, several at a time.

The folder holds config.json, drawn.jsonl (a line for each combination, before it is run), runs/ (a run folder for each
run), logs/ (what each printed), sweep.jsonl (a line for each run that has ended), results.json and best.json (the
settings that did best on meta-validation tasks, for `metalr train --config`). Each run is a `metalr train` in a process
of its own, so that nothing of one can hurt another; what counts is in the run folders, so a sweep that was killed goes
on with nothing lost and nothing doubled. This process computes nothing: the devices are the workers'.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metalr.config import SlurmConfig, SweepConfig, TrainConfig
from metalr.config.files import check_literals, from_json, kinds_of, read_settings, settings_hash, with_settings
from metalr.errors import ConfigError, check_choices, check_seed, one_line
from metalr.evaluation import protocol
from metalr.report import page
from metalr.runs import launchers, loggers, setup, workers
from metalr.runs.job import Job, stoppable
from metalr.runs.progress import ConsoleReporter, Reporter
from metalr.runs.provenance import command, provenance
from metalr.runs.workers import LOGS, RUNS, Point, Trial
from metalr.search.searchers import import_optuna, trial_seed
from metalr.storage import folders

ENDED, DRAWN, BEST = "sweep.jsonl", "drawn.jsonl", "best.json"
FILES = {"config.json", ENDED, DRAWN, RUNS, LOGS, BEST, "results.json", *folders.OWN}
JOB = Job("sweep", frozenset(FILES))
SHOWN = 12  # runs in the report, the best first
REDRAWS = 100  # how often a combination that was drawn before is drawn anew
# Settings that change which validation tasks there are, or what is measured on them: such runs cannot be ranked.
UNRANKED = (
    "objective", "data", "tasks", "table", "inner.horizons", "outer.part", "evaluation.seed",
    "evaluation.validation_episodes",
)  # fmt: skip
OF_RUNS = ("seed", "out", "overwrite")  # settings that each run of a sweep has for itself


class Range(NamedTuple):
    """A setting that is drawn between two numbers, log-uniformly if both are above zero; whole numbers for some."""

    low: float
    high: float


Axis = list[Any] | Range


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
      base: the settings of all runs.
      axes: dotted name of a setting -> the values that it takes, or a Range.
      seeds: every combination is run for each.
    """

    base: TrainConfig
    axes: dict[str, Axis]
    seeds: tuple[int, ...] = (0,)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        axes = {k: {"low": v.low, "high": v.high} if isinstance(v, Range) else v for k, v in self.axes.items()}
        return {"base": self.base.to_json(), "axes": axes, "seeds": list(self.seeds)}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Sweep:
        """What `to_json` gave."""
        axes = {k: Range(**v) if isinstance(v, dict) else v for k, v in facts["axes"].items()}
        return cls(from_json(facts["base"]), axes, tuple(facts["seeds"]))

    def config(self, point: Point, seed: int) -> TrainConfig:
        """The settings of one run. Raises ConfigError for a setting that there is not, or a value of a wrong kind."""
        return changed(self.base, point | {"seed": seed, "out": None, "overwrite": False})


def changed(base: TrainConfig, point: Point) -> TrainConfig:
    """Settings with some of them changed. Raises ConfigError for one that there is not, or a value of a wrong kind."""
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in point.items()}
    found = with_settings(base, plain)
    checked = from_json(found.to_json())
    check_literals(checked)
    return checked


def name_of(point: Point, seed: int, config: TrainConfig) -> str:
    """Of a run's folder: what it changes, its seed, and a hash of all its settings."""
    parts = [f"{name.rpartition('.')[2]}={_short(value)}" for name, value in point.items()]
    text = re.sub(r"[^\w.=,+-]+", "_", ",".join([*parts, f"seed={seed}"]))[:80]
    return f"{text}-{settings_hash(config)}"


def run(sweep: Sweep, config: SweepConfig = SweepConfig(), *, reporter: Reporter | None = None) -> dict[str, Any]:  # noqa: B008
    """Carry out a sweep in a new folder; its results, with a row for each combination.

    Raises:
      ConfigError: settings that there are not, or that contradict each other. StoppedError: a signal; runs were saved.
    """
    return JOB.begin(
        config,
        "sweep",
        lambda: _check(sweep, config),
        lambda _, folder: _carry_out(sweep, config, folder, reporter or ConsoleReporter()),
        lambda _: {"sweep": sweep.to_json(), "config": config.to_json()},
    )


def resume(
    folder: Path, *, workers: int | None = None, retry_failed: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Go on with a sweep that was stopped or killed. Runs that ended are kept, runs that were cut off go on.

    Args:
      workers: how many runs at a time from now on; default: as before.
      retry_failed: take up the runs that failed too, where they stood (a disk that was full, say, has room again); then
        a finished sweep may be taken up.

    Raises:
      ConfigError: no sweep, a finished one, one in use, or retry_failed where no run has failed.
    """
    sweep, config = JOB.stored(
        folder, lambda stored: (Sweep.from_json(stored["sweep"]), from_json(stored["config"], SweepConfig))
    )
    if not retry_failed:
        JOB.refuse_finished(folder, "runs that failed may be tried again: --retry-failed")
    ended = folders.read_rows(folder / ENDED)
    good = [row for row in ended if row["status"] != "failed"]
    if retry_failed and len(good) == len(ended):
        raise ConfigError(f"retry_failed: {folder}: expected a run that failed, found none")
    config = config if workers is None else dataclasses.replace(config, workers=workers)

    def carry_out(_: None, folder: Path) -> dict[str, Any]:
        folders.write_json(folder / "config.json", {"sweep": sweep.to_json(), "config": config.to_json()})
        if retry_failed:
            folders.clear(folder, {"results.json", BEST, folders.REPORT})
            folders.write_file(folder / ENDED, "".join(json.dumps(row) + "\n" for row in good).encode())
        return _carry_out(sweep, config, folder, reporter or ConsoleReporter())

    return JOB.go_on(folder, lambda: _check(sweep, config), carry_out)


def _check(sweep: Sweep, config: SweepConfig) -> None:
    """Raises ConfigError for what cannot work, before anything is written."""
    from_json(config.to_json(), SweepConfig)  # the types, as in a config file
    check_literals(config)
    check_choices("seed", sweep.seeds)
    if not sweep.axes and len(sweep.seeds) < 2 and config.launcher == "local":
        raise ConfigError("sweep: expected a setting with values, or several seeds, got neither")
    for name in ("workers", "attempts", "trials", "timeout"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name}: expected more than 0, got {value}")
    if (config.trials is None) != (config.sampler == "grid"):
        expected = "None with grid, which takes all combinations" if config.sampler == "grid" else "a number"
        raise ConfigError(f"trials: expected {expected}, got {config.trials}")
    if config.sampler == "tpe":
        import_optuna()
        if unranked := unranked_by(sweep):
            raise ConfigError(
                f"sampler: expected grid or random with {unranked}, which change what a score means, got tpe"
            )
    if config.seeds_together and (len(sweep.seeds) < 2 or config.slurm.processes * config.slurm.nodes > 1):
        raise ConfigError("seeds_together: expected several seeds, and one process for them")
    if config.seeds_together:
        loggers.check_side_by_side(sweep.base.loggers)
    if len(config.devices) > config.workers:
        raise ConfigError(
            f"workers: expected at least {len(config.devices)}, as there are devices, got {config.workers}"
        )
    if config.launcher == "slurm":
        launchers.import_submitit()
        for name in ("nodes", "processes", "minutes"):
            if getattr(config.slurm, name) < 1:
                raise ConfigError(f"slurm.{name}: expected at least 1, got {getattr(config.slurm, name)}")
        for name in ("devices", "timeout"):
            if getattr(config, name):
                raise ConfigError(
                    f"{name}: expected none with --launcher slurm, which has --slurm.gpus and --slurm.minutes, got "
                    f"{getattr(config, name)}"
                )
    elif config.slurm != SlurmConfig():
        raise ConfigError(f"slurm: expected nothing of it without --launcher slurm, got {config.slurm}")
    check_seed("sampler_seed", config.sampler_seed)
    for name, axis in sweep.axes.items():
        if name in OF_RUNS:
            raise ConfigError(f"axes: expected settings that runs share, got {name!r}; seeds are given as `seeds`")
        if isinstance(axis, Range):
            if config.sampler == "grid":
                raise ConfigError(f"{name}: expected values with --sampler grid, got the range {_short(axis)}")
            if not axis.low < axis.high:
                raise ConfigError(f"{name}: expected a range LOW..HIGH with LOW < HIGH, got {_short(axis)}")
        else:
            check_choices(name, [json.dumps(value) for value in axis])
        for value in axis:  # of a range: its ends
            sweep.config({name: value}, sweep.seeds[0])


def unranked_by(sweep: Sweep) -> list[str]:
    """The swept settings that make scores on meta-validation tasks incomparable."""
    return [name for name in sweep.axes if any(name == one or name.startswith(f"{one}.") for one in UNRANKED)]


def _short(value: Any) -> str:
    if isinstance(value, Range):
        return f"{value.low:g}..{value.high:g}"
    if isinstance(value, list | tuple):
        return "x".join(_short(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _points(
    sweep: Sweep, config: SweepConfig, told: Callable[[], list[tuple[Point, float]]], before: Sequence[Point] = ()
) -> Iterator[Point]:
    """The combinations after those drawn `before`, each once; fewer than asked for if there are no others.

    told: the scores on meta-validation tasks so far, which tpe goes by.
    """
    if config.sampler == "grid":
        values = [axis for axis in sweep.axes.values() if isinstance(axis, list)]
        every = (dict(zip(sweep.axes, one, strict=True)) for one in itertools.product(*values))
        yield from itertools.islice(every, len(before), None)
        return
    seen = {json.dumps(point) for point in before}
    for number in range(len(before), config.trials or 0):
        for again in range(REDRAWS):
            # TPE likes what it knows: where it asks for that once more, the next ones are at random.
            asked = config.sampler == "tpe" and again == 0
            point = _asked(sweep, number, config, told()) if asked else _drawn(sweep.axes, number, again, config)
            if json.dumps(point) not in seen:
                break
        else:
            return
        seen.add(json.dumps(point))
        yield point


def _drawn(axes: dict[str, Axis], number: int, again: int, config: SweepConfig) -> Point:
    """A combination at random; it depends on the seed, its number and how often it was drawn alone."""
    draw = np.random.default_rng([config.sampler_seed, number, again])

    def one(name: str, axis: Axis) -> Any:
        if not isinstance(axis, Range):
            return axis[int(draw.integers(len(axis)))]
        low, high = axis.low, axis.high
        share = draw.uniform()
        value = float(low * (high / low) ** share) if low > 0 else float(low + share * (high - low))
        return round(value) if int in kinds_of(name) else value

    return {name: one(name, axis) for name, axis in axes.items()}


def _asked(sweep: Sweep, number: int, config: SweepConfig, told: Sequence[tuple[Point, float]]) -> Point:
    """A combination that Optuna's TPE asks for, given the scores so far, its own seed for every number."""
    optuna = import_optuna()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        of = optuna.distributions
        spaces: dict[str, Any] = {}
        for name, axis in sweep.axes.items():
            if not isinstance(axis, Range):
                spaces[name] = of.CategoricalDistribution([json.dumps(value) for value in axis])
            elif int in kinds_of(name):
                spaces[name] = of.IntDistribution(int(axis.low), int(axis.high), log=axis.low > 0)
            else:
                spaces[name] = of.FloatDistribution(axis.low, axis.high, log=axis.low > 0)
        sampler = optuna.samplers.TPESampler(seed=trial_seed(config.sampler_seed, number))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for point, score in told:
            params = {k: v if isinstance(sweep.axes[k], Range) else json.dumps(v) for k, v in point.items()}
            study.add_trial(optuna.trial.create_trial(value=score, params=params, distributions=spaces))
        params = study.ask(spaces).params
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {k: v if isinstance(sweep.axes[k], Range) else json.loads(v) for k, v in params.items()}


def _trials(
    sweep: Sweep, config: SweepConfig, file: Path, told: Callable[[], list[tuple[Point, float]]]
) -> Iterator[Trial]:
    """The runs: those drawn before the sweep was stopped, by the names they have, then new ones, written down first."""
    numbers = itertools.count()

    def of(row: dict[str, Any]) -> Iterator[Trial]:
        for seed, name in zip(sweep.seeds, row["names"], strict=True):
            yield Trial(next(numbers), name, row["point"], seed, sweep.config(row["point"], seed))

    known = folders.read_rows(file)
    for row in known:
        yield from of(row)
    for point in _points(sweep, config, told, [row["point"] for row in known]):
        names = [name_of(point, seed, sweep.config(point, seed)) for seed in sweep.seeds]
        folders.append_rows(file, [{"point": point, "names": names}])
        yield from of({"point": point, "names": names})


def _carry_out(sweep: Sweep, config: SweepConfig, folder: Path, reporter: Reporter) -> dict[str, Any]:
    began = time.perf_counter()
    for name in (RUNS, LOGS):
        folders.make(folder / name)
    launchers.cancel_left(folder / LOGS)
    ended = {row["name"]: row for row in folders.read_rows(folder / ENDED)}
    combinations = config.trials or math.prod(len(list(axis)) for axis in sweep.axes.values())
    total = len(sweep.seeds) * combinations
    rows: list[tuple[Trial, dict[str, Any]]] = []

    def told() -> list[tuple[Point, float]]:
        whole = [row for row in _rows_of(rows) if not row["failed"] and len(row["seeds"]) == len(sweep.seeds)]
        return [(row["point"], row["sign"] * row["validation"]) for row in whole]

    trials = _trials(sweep, config, folder / DRAWN, told)
    text = f"stopped; runs were saved; go on with: metalr sweep --resume {folder}"
    with stoppable(text) as between, reporter.bar("runs", total, 0) as advance:

        def end(trial: Trial, row: dict[str, Any]) -> None:
            rows.append((trial, row))
            advance(1, f"{trial.name}: {_words(row)}")

        carrier = workers.Carrier(trials, len(sweep.seeds), config, folder, ended, reporter.line)
        for trial, row in carrier.rows(between):
            if trial.name not in ended:
                ended[trial.name] = row
                folders.append_rows(folder / ENDED, [row])
            end(trial, row)
    return _finish(sweep, config, folder, rows, time.perf_counter() - began)


def _words(row: dict[str, Any]) -> str:
    if row["status"] == "failed":
        return row["error"]
    return f"validation {row['metric']} {row['validation']:.4g}"


def _rows_of(rows: Sequence[tuple[Trial, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each combination: means over its seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _, row in sorted(rows, key=lambda pair: pair[0].number):
        found.setdefault(json.dumps(row["point"]), []).append(row)
    table = []
    for same in found.values():
        good = [row for row in same if row["status"] == "finished"]
        facts: dict[str, Any] = {"point": same[0]["point"], "seeds": [row["seed"] for row in same]}
        facts |= {"failed": len(same) - len(good), "runs": [row["name"] for row in same]}
        if good:
            facts |= {"metric": good[0]["metric"], "sign": 1 if good[0]["maximise"] else -1}
            for part in ("validation", "test"):
                values = np.array([row[part] for row in good], np.float64)
                facts[part] = protocol.rounded(values.mean())
                facts[f"{part}_ci95_over_seeds"] = (
                    protocol.rounded(float(protocol.half_width(values))) if len(values) > 1 else None
                )
            facts["seconds"] = round(sum(row["seconds"] for row in good), 1)
            facts["example_gradients"] = sum(row["example_gradients"] for row in good)
        table.append(facts)
    return table


def _finish(
    sweep: Sweep, config: SweepConfig, folder: Path, rows: Sequence[tuple[Trial, dict[str, Any]]], seconds: float
) -> dict[str, Any]:
    """The results of all runs: a row for each combination, the best settings, a report."""
    table = _rows_of(rows)
    whole = [row for row in table if row["failed"] == 0] or [row for row in table if "validation" in row]
    unranked = unranked_by(sweep)
    ranked = whole if unranked else sorted(whole, key=lambda row: -row["sign"] * row["validation"])
    results: dict[str, Any] = {
        "command": command(),
        "sweep": sweep.to_json(),
        "config": config.to_json(),
        "provenance": provenance(),
        "rows": table,
        "best": ranked[0] if ranked and not unranked else None,
        "unranked": unranked,
        "example_gradients": sum(row.get("example_gradients", 0) for row in table),
        "failed": {row["name"]: row["error"] for _, row in rows if row["status"] == "failed"},
        "seconds": round(seconds, 1),
    }
    if results["best"] is not None:
        folders.write_json(folder / BEST, sweep.config(ranked[0]["point"], sweep.seeds[0]).to_json())
    folders.write_json(folder / "results.json", results)
    if ranked:
        shown = [folder / RUNS / name for row in ranked for name in row["runs"]]
        finished = [path for path in shown if (path / "results.json").is_file()]
        page.write(folder / folders.REPORT, finished[:SHOWN])
    return results | {"folder": str(folder)}


def plan(sweep: Sweep, config: SweepConfig) -> str:
    """What a sweep would do, in words: its runs (of tpe those of the first combination), and the script of a job.

    A run whose settings contradict each other is told why it would fail. Whether they fit the network, the data and
    other seeds beside them is not looked at.
    Raises ConfigError as `run`. Writes nothing.
    """
    _check(sweep, config)
    points = [*itertools.islice(_points(sweep, config, list), None if config.sampler != "tpe" else 1)]
    names = []
    for point in points:
        for seed in sweep.seeds:
            one = sweep.config(point, seed)
            names.append(name_of(point, seed, one))
            try:
                setup.check_settings(one)
            except ConfigError as error:
                names[-1] += f"\n  would fail: {one_line(error)}"
    total = len(names) if config.sampler != "tpe" else (config.trials or 0) * len(sweep.seeds)
    together = len(sweep.seeds) if config.seeds_together else 1
    jobs = total // together
    how = f" in {jobs} programs of {together} seeds" if config.seeds_together else ""
    lines = [*names, f"{total} runs{how}, {config.workers} at a time"]
    if config.launcher == "slurm":
        folder = (config.out or Path("runs") / "sweep") / LOGS / launchers.SLURM
        lines += ["", launchers.script(config, folder, jobs)]
    return "\n".join(lines)


def base_of(path: Path) -> TrainConfig:
    """The settings to sweep around: of a run folder, a config file, or a document of experiments/ with a CONFIG.

    Raises ConfigError for anything else.
    """
    if path.suffix == ".py" and path.is_file():
        scope: dict[str, Any] = {"__name__": "document", "__file__": str(path)}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        config = scope.get("CONFIG")
        if not isinstance(config, TrainConfig):
            raise ConfigError(
                f"{path}: expected a document with CONFIG = TrainConfig(...), found {type(config).__name__}"
            )
        return dataclasses.replace(config, out=None, overwrite=False)
    return read_settings(path)
