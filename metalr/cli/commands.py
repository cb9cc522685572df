"""The command line, `metalr --help`. Imports jax only to run a command."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import metalr
from metalr.cli import datasets, sweeps
from metalr.cli import runs as folders_of_runs
from metalr.config import QUICKSTART, CompareConfig, GridConfig, SearchConfig, TrainConfig
from metalr.config.files import read_config, read_settings, run_name
from metalr.errors import ConfigError, LostProcessError, MetalrError, StoppedError, one_line
from metalr.storage import folders

COMPARISON = CompareConfig()
EXIT_ERROR, EXIT_STOPPED = 2, 75  # 75: EX_TEMPFAIL, the run was saved and can go on
EXIT_PIPE = 141  # what a shell shows for a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a MetalrError becomes one line on stderr and exit code 2 (75: stopped by a signal, and saved)."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    given = list(sys.argv[1:] if argv is None else argv)
    if given == ["--version"]:
        guard(lambda: print(_versions()))
        return
    if given[:1] == ["data"]:
        guard(lambda: _dispatch(datasets.COMMANDS, "metalr data", datasets.ABOUT, given[1:]))
        return
    if given[:1] == ["sweep"]:
        guard(lambda: sweeps.sweep_command(given[1:]))
        return
    if given[:1] == ["runs"]:
        guard(lambda: _dispatch(folders_of_runs.COMMANDS, "metalr runs", folders_of_runs.ABOUT, given[1:]))
        return
    resumable = {"train": _train_command, "search": _search_command}
    made = {
        name: guard(functools.partial(make, given)) if given[:1] == [name] else make([])
        for name, make in resumable.items()
    }
    commands: dict[str, Callable[..., None]] = {
        "quickstart": quickstart,
        "train": made["train"],
        "evaluate": evaluate,
        "adapt": adapt,
        "predict": predict,
    }
    commands |= {
        "report": report,
        "show": show,
        "export": export,
        "search": made["search"],
        "compare": compare,
        "sweep": sweep,
        "runs": runs,
        "data": data,
    }
    if given[:1] and given[0] in commands:  # this one's parser alone: a mistyped flag is looked for in its flags only
        guard(lambda: tyro.cli(commands[given[0]], prog=f"metalr {given[0]}", args=given[1:]))
        return
    about = (
        "Meta-learn an initialization and the inner-loop learning rates; fine-tune without a search. "
        "`metalr --version` says which metalr this is."
    )
    guard(lambda: _dispatch(commands, "metalr", about, given))


def _versions() -> str:
    """metalr's version, and those of what it stands on. Imports none of them."""
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax"))
    return f"metalr {metalr.__version__} ({libraries}, Python {platform.python_version()})"


def _dispatch(commands: dict[str, Callable[..., None]], prog: str, about: str, argv: list[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=about, args=argv, sort_subcommands=False)


def data() -> None:
    """List the datasets; prepare, import or remove one: see `metalr data --help`."""


def runs() -> None:
    """List the runs of a folder; show, compare or remove some: see `metalr runs --help`."""


def sweep() -> None:
    """Run many settings, several at a time, and choose on meta-validation tasks: see `metalr sweep --help`."""


def guard(run: Callable[[], Any]) -> Any:
    """What `run` gives; a MetalrError becomes one line on stderr and an exit code, as the command line promises."""
    try:
        try:
            return run()
        finally:
            if sys.stdout is not None:  # closed
                sys.stdout.flush()  # here, where what it raises is caught
    except BrokenPipeError:  # the reader has seen enough, as `metalr train --help | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE)
    except LostProcessError as error:
        print(f"metalr: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_STOPPED)  # at a usual exit JAX waits for the process that is gone
    except StoppedError as error:
        print(f"metalr: {error}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except MetalrError as error:
        print(f"metalr: error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print("metalr: interrupted", file=sys.stderr)
        sys.exit(130)


def start_jax() -> None:
    """Settings of a program of its own, before JAX runs: a device a core, the compilation cache."""
    from metalr import data
    from metalr.outer import devices

    devices.use_all_cores()
    devices.use_compilation_cache(data.cache_dir() / "compiled")


Config = Annotated[TrainConfig, tyro.conf.arg(name="")]
Json = Annotated[bool, tyro.conf.arg(name="json")]


def quickstart(config: Config = QUICKSTART, json_: Json = False) -> None:
    """Train on the bundled MNIST subset, evaluate on held-out tasks, compare with a small grid search.

    Args:
      json_: print the results as JSON instead of a table.
    """
    _train(config, "quickstart", json_)


def _given(argv: list[str], flag: str) -> str | None:
    """The value of a flag, if it is given."""
    found = next((b for a, b in itertools.pairwise(argv) if a == flag), None)
    return next((a.partition("=")[2] for a in argv if a.startswith(f"{flag}=")), found)


def _default(argv: list[str], kind: Any) -> Any:
    """A command's default settings: those of the run to resume, or to run again, if there is one."""
    resumed, again = _given(argv, "--resume"), _given(argv, "--config") if kind is TrainConfig else None
    if resumed is not None and again is not None:
        raise ConfigError("config: expected --resume RUN or --config RUN, got both")
    if again is not None:
        return read_settings(Path(again))
    if resumed is None:
        return kind()
    config = read_config(Path(resumed), kind)
    out = _given(argv, "--out")
    if out is not None and Path(out).resolve() != Path(resumed).resolve():
        raise ConfigError(f"out: expected none beside --resume {resumed}, which goes on in that folder, got {out}")
    if config.model.own:
        raise ConfigError(f"resume: {resumed} has a network of your own; go on in Python: resume(folder, model=...)")
    return config


def _train_command(argv: list[str]) -> Callable[..., None]:
    default = _default(argv, TrainConfig)

    def train(
        config: Config = default,
        resume: Path | None = None,
        config_: Annotated[Path | None, tyro.conf.arg(name="config")] = None,
        coordinator: str | None = None,
        processes: int | None = None,
        process: int | None = None,
        json_: Json = False,
    ) -> None:
        """Meta-train and evaluate on held-out tasks; leave a run folder.

        Ctrl-C or SIGTERM saves at the next outer step (exit code 75); --resume goes on from there.

        Args:
          resume: a run folder: go on with that run, with its own settings.
          config_: a run folder or a config file: begin a new run with its settings, and what other flags change.
          coordinator: host:port of the first of several processes that train together; not needed under srun or mpirun.
          processes: how many there are.
          process: which one this is, from 0.
          json_: print the results as JSON instead of a table.
        """
        joined = {"COORDINATOR_ADDRESS": coordinator, "NUM_PROCESSES": processes, "PROCESS_ID": process}
        if coordinator is None and (processes, process) != (None, None):
            raise ConfigError(
                f"coordinator: expected host:port with processes {processes}, process {process}, got None"
            )
        os.environ.update({f"JAX_{name}": str(value) for name, value in joined.items() if value is not None})
        same_data = config_ is not None and config.data == default.data
        _train(config, run_name(config), json_, resume, config_ if same_data else None)

    return train


def _train(
    config: TrainConfig, name: str, as_json: bool, resume: Path | None = None, again: Path | None = None
) -> None:
    """again: the run (or its config file) whose data is meant, wherever it stands now."""
    folder = resume or config.out
    if folder is not None:
        folders.refuse_if_locked(folder)  # before the seconds that it takes to start
    start_jax()
    from metalr import report, runs
    from metalr.outer import processes
    from metalr.runs import progress

    begun = None if again is None else again if again.is_dir() else again.parent
    if begun is not None and folders.data_of(begun):
        from metalr.runs.sources import with_data_of

        config = with_data_of(config, begun)
    try:
        if (
            processes.join_processes()
        ):  # one of the others: works along (on with what the first one has), leaves nothing
            with tempfile.TemporaryDirectory() as temporary:
                config = dataclasses.replace(config, out=Path(temporary), overwrite=False)
                runs.run(config, name=name, reporter=progress.ConsoleReporter(quiet=True))
            return
        results = runs.run(config, name=name) if resume is None else runs.resume(resume, config)
    except (RuntimeError, ValueError) as error:
        if not processes.lost_process(error):
            raise
        raise LostProcessError(
            f"another process of this run is gone ({one_line(error)}); when all can start again, go on from the last "
            f"checkpoint with: metalr train --resume {shlex.quote(str(folder)) if folder else 'RUN'}"
        ) from error
    written = report.page.write(Path(results["folder"]) / folders.REPORT, [Path(results["folder"])])
    print(json.dumps(results, indent=1) if as_json else f"{report.text(results)}\nreport     {written}")


def evaluate(
    run: tyro.conf.Positional[Path],
    episodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    data: str | None = None,
    orders: int = 5,
    json_: Json = False,
) -> None:
    """Evaluate a run's artifact again on held-out tasks.

    Args:
      run: a run folder.
      episodes: number of meta-test tasks; default: as in the run.
      steps: length of the adaptation curve, over which a schedule with knots is stretched, as `metalr adapt` does;
        default: as in the run, with the schedule as trained, and held after its end.
      seed: seed of the tasks; default: as in the run.
      data: where the run's data is now, if it was moved; known by its content.
      orders: in how many orders of its labels 100 tasks are tried, where a task's labels are in random order: what the
        order alone does to accuracy; 0: none.
      json_: print JSON instead of a table.
    """
    start_jax()
    from metalr import report
    from metalr.learner import artifact
    from metalr.runs import evaluating, provenance
    from metalr.runs.setup import set_up
    from metalr.runs.sources import load

    config = read_config(run)
    if config.model.own:
        raise ConfigError(
            f"{run}: this run is of a network of your own, which the command line cannot build; its curve is in "
            f"results.json; in Python: metalr.load({str(run / 'artifact')!r}, model=...)"
        )
    given = {"episodes": episodes, "seed": seed}
    changed = {name: value for name, value in given.items() if value is not None}
    asked = dataclasses.replace(config.evaluation, **changed)
    # No grid here, so none of its limits; and nobody is told, so no logger has to be there.
    config = dataclasses.replace(config, evaluation=asked, grid=GridConfig(), loggers=())
    if orders < 0 or orders == 1:
        raise ConfigError(f"orders: expected 0, or at least 2, got {orders}")
    setup = set_up(config, None, load(config, run, data))
    length = config.curve_steps if steps is None else steps
    learner = artifact.load(run)
    if learner.facts.get("split_sha256") != setup.source.split_sha256:
        raise ConfigError(f"{run}: the data or splits differ from those of the run ({config.data})")
    curve, seconds = evaluating.held_out(learner, setup, asked.episodes, length, asked.seed, of_steps=steps)
    shown = {}
    if orders and setup.source.relabels:
        shown = {"label_orders": evaluating.label_orders(learner, setup, asked.seed, orders=orders)}
    results = {
        "run": str(run),
        "episodes": asked.episodes,
        "held_out_tasks": curve.different_tasks,
        "split_sha256": setup.source.split_sha256,
        "transductive": learner.model.transductive,
        "metric": {"name": learner.objective.choose_by, "maximise": learner.objective.maximise},
        "curve": evaluating.curve_rows(curve, learner.objective.choose_by),
        **shown,
        "seconds": round(seconds, 3),
        "provenance": provenance.provenance(),
    }
    print(json.dumps(results, indent=1) if json_ else report.curve_text(results))


def adapt(
    artifact: tyro.conf.Positional[Path],
    task: tyro.conf.Positional[Path],
    steps: int | None = None,
    out: Path | None = None,
    json_: Json = False,
) -> None:
    """Fine-tune a saved learner on one task and predict.

    Args:
      artifact: an artifact folder, or a run folder with one.
      task: an .npz with support_x, support_y, query_x and, to get a score, query_y; or, if the learner is of a table,
        a table with the same columns, whose rows without a target are predicted.
      steps: inner steps; default: as many as were trained.
      out: also write the fine-tuned params to this .safetensors file, for `metalr predict`.
      json_: print JSON.
    """
    start_jax()
    from metalr import report
    from metalr.learner import load
    from metalr.runs import predicting

    result = predicting.adapt(load(artifact), task, steps, out)
    if json_:
        print(json.dumps(result))
        return
    predictions = [_readable(prediction) for prediction in result["predictions"]]
    print("predictions", *(predictions or ["none, for no inputs were asked"]))
    for name in [name for name in result if name not in ("steps", "predictions", "params")]:
        print(f"{name:11} {result[name]:.4f} after {report.plural(result['steps'], 'step')}")
    if out is not None:
        print(f"params      {out}")


def _readable(prediction: Any) -> str:
    """A prediction for people, of several outputs in brackets; --json has all digits."""
    from metalr import report

    if isinstance(prediction, list):
        return f"[{', '.join(map(_readable, prediction))}]"
    return report.plain(prediction)


def predict(
    artifact: tyro.conf.Positional[Path],
    params: tyro.conf.Positional[Path],
    inputs: tyro.conf.Positional[Path],
    json_: Json = False,
) -> None:
    """Predict with params that `metalr adapt --out` wrote.

    Args:
      artifact: the artifact or run folder that they were fine-tuned from.
      params: the .safetensors file.
      inputs: an .npz with x (and support_x, for a network that normalises by the support set); or, if the
        learner is of a table, a table with the same columns.
      json_: print JSON.
    """
    start_jax()
    from metalr.learner import load
    from metalr.runs import predicting

    result = predicting.predict(load(artifact), params, inputs)
    if json_:
        print(json.dumps(result))
    else:
        print("\n".join(map(_readable, result["predictions"])))


def show(artifact: tyro.conf.Positional[Path], json_: Json = False) -> None:
    """Show what was learned: rates and other hyperparameters over steps, negative and dead ones, what does not adapt.

    Args:
      artifact: an artifact folder, or a run folder with one.
      json_: print JSON.
    """
    from metalr import report
    from metalr.learner import artifact as artifacts

    facts = {"artifact": str(artifacts.folder_of(artifact)), **artifacts.describe(artifacts.load_to_show(artifact))}
    print(json.dumps(facts, indent=1) if json_ else report.learned_text(facts))


def report(
    targets: tyro.conf.Positional[tuple[Path, ...]],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
) -> None:
    """Write runs and comparisons as one HTML page, which needs no network and no other file.

    Args:
      targets: run folders (side by side, whatever they differ in) and folders of comparisons.
      out: the file.
    """
    from metalr.report import page

    print(page.write(out, targets))


def export(
    run: tyro.conf.Positional[Path],
    to: Literal["stablehlo", "onnx", "torch", "hub-folder"],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("export"),
    support: int | None = None,
    steps: int | None = None,
) -> None:
    """Write what a run learned for programs without metalr.

    Args:
      run: a run or artifact folder.
      to: stablehlo: adapt and apply as programs that JAX alone runs; onnx: apply for ONNX runtimes; torch: the init
        as a state dict, with the learned rates; hub-folder: a model repository with its card (uploading it is yours).
      out: the folder.
      support: stablehlo: examples of the support set; default: as in training.
      steps: stablehlo: inner steps; default: as trained.
    """
    start_jax()
    from metalr.integrations import export as exporting

    print(exporting.export(run, to, out, support, steps))


def _search_command(argv: list[str]) -> Callable[..., None]:
    default = _default(argv, SearchConfig)

    def search(
        config: Annotated[SearchConfig, tyro.conf.arg(name="")] = default,
        resume: Path | None = None,
        json_: Json = False,
    ) -> None:
        """Search learning rate, batch size and epochs, for a dataset or one held-out task; leave all trials.

        Ctrl-C or SIGTERM stops at the next epoch (exit code 75); --resume goes on, with no trial lost or doubled.

        Args:
          resume: the folder of a search: go on with that one, with its own settings.
          json_: print the results as JSON instead of a table.
        """
        folder = resume or config.out
        if folder is not None:
            folders.refuse_if_locked(folder)
        start_jax()
        from metalr import report
        from metalr.runs import searching

        results = searching.run(config) if resume is None else searching.resume(resume, config)
        print(json.dumps(results, indent=1) if json_ else report.search_text(results))

    return search


def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (),
    config: Annotated[CompareConfig, tyro.conf.arg(name="")] = COMPARISON,
    pretrained: tuple[Path, ...] = (),
    choosing: tuple[Path, ...] = (),
    resume: Path | None = None,
    json_: Json = False,
) -> None:
    """Compare finished runs with searches, tuned and default rates, and other inits, on the same held-out tasks.

    Args:
      runs: run folders that differ in their seed only.
      pretrained: run folders of an init pre-trained jointly on the same tasks (metalr train --inner.algorithm joint).
      choosing: runs or sweeps that were tried before these settings were chosen; their cost is charged to break-even.
      resume: the folder of a comparison that was stopped: go on with that one, with its own settings.
      json_: print the results as JSON instead of a table.
    """
    if resume is not None and (runs or pretrained or choosing or config != COMPARISON):
        raise ConfigError(f"resume: expected no runs and no settings beside it ({resume} has its own), got some")
    start_jax()
    from metalr import report
    from metalr.runs import comparing

    results = (
        comparing.run(runs, config, pretrained=pretrained, choosing=choosing)
        if resume is None
        else comparing.resume(resume)
    )
    written = report.page.write(Path(results["folder"]) / folders.REPORT, [Path(results["folder"])])
    print(json.dumps(results, indent=1) if json_ else f"{report.contest_text(results)}\nreport {written}")
