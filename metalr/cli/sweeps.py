"""`metalr sweep`: a command line on which any setting of a run may have several values."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from metalr.config import SlurmConfig, SweepConfig, TrainConfig
from metalr.config.files import differences, kinds_of
from metalr.errors import ConfigError, MetalrError
from metalr.report.runs import flat

Config = Annotated[SweepConfig, tyro.conf.arg(name="")]
FIELDS = [field.name for field in dataclasses.fields(SweepConfig) if field.name != "slurm"]
FIELDS += [f"slurm.{field.name}" for field in dataclasses.fields(SlurmConfig)]
OWN = {f"--{name.replace('_', '-')}" for name in FIELDS}
OWN |= {"--resume", "--retry-failed", "--dry-run", "--json", "--help"}
BESIDE_RESUME = {"--resume", "--retry-failed", "--workers", "--json"}
RANGE = re.compile(r"^(.+?)\.\.(.+)$")


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The sweep's own arguments, and the others: flag -> the values after it. Raises ConfigError for one twice."""
    own: list[str] = []
    swept: dict[str, list[str]] = {}
    values = own
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if flag in OWN or flag in ("--no-json", "--no-overwrite", "--no-dry-run", "--no-retry-failed"):
                values = own
                values.append(word)
                continue
            if flag in swept:
                raise ConfigError(f"{flag}: expected it once, with all its values, got it twice")
            values = swept[flag] = [value] if equals else []
        else:
            values.append(word)
    return own, swept


def axis_of(flag: str, values: Sequence[str], base: TrainConfig) -> tuple[str, Any]:
    """The dotted name of a flag's setting, and its values (or its range) as the command line of a run reads them.

    A value of several words, such as the widths of an mlp, is quoted: --model.widths "64 64" 128.
    """
    from metalr.runs.sweeping import Range

    name = flag.removeprefix("--").replace("-", "_")
    name = f"table.{name.removeprefix('data.')}" if name.startswith("data.") else name
    kinds = kinds_of(name)
    if not kinds:
        known = [re.sub("^table", "data", setting).replace("_", "-") for setting in flat(TrainConfig().to_json())]
        near = difflib.get_close_matches(flag.removeprefix("--"), known, 1)
        raise ConfigError(f"{flag}: no such setting" + (f"; did you mean --{near[0]}?" if near else ""))
    if not values and bool in kinds:
        values = ["True"]  # as --grid.run alone
    if not values:
        raise ConfigError(f"{flag}: expected one or more values, got none")
    if len(values) == 1 and {int, float} & kinds and (found := RANGE.match(values[0])):
        return name, Range(*(_value(flag, name, value, base, kinds) for value in found.groups()))
    return name, [_value(flag, name, value, base, kinds) for value in values]


def _value(flag: str, name: str, text: str, base: TrainConfig, kinds: set[Any]) -> Any:
    """What `metalr train FLAG TEXT` makes of it. Raises ConfigError, with the parser's own words."""
    if bool in kinds:
        if text not in ("True", "False"):
            raise ConfigError(f"{flag}: expected True or False, got {text!r}")
        return text == "True"
    words, said = shlex.split(text) if tuple in kinds else [text], io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            made = tyro.cli(TrainConfig, default=base, args=[flag, *words], prog="metalr sweep", console_outputs=True)
    except SystemExit as error:
        lines = [re.sub(r"[│╭╮╰╯─]|-{3,}", " ", line).strip() for line in said.getvalue().splitlines()]
        raise ConfigError(f"{flag} {text}: {' '.join(line for line in lines if line)[:300]}") from error
    if name in (changed := differences(base, made)):
        return _plain(changed[name][1])
    value: Any = base
    for part in name.split("."):
        value = getattr(value, part)
    return _plain(value)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def sweep_command(argv: Sequence[str]) -> None:
    """Parse, and carry out."""
    own, swept = split(argv)

    def sweep(
        base: tyro.conf.Positional[Path | None] = None,
        config: Config = SweepConfig(),  # noqa: B008 - frozen
        resume: Path | None = None,
        retry_failed: bool = False,
        dry_run: bool = False,
        json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    ) -> None:
        """Run many settings, several at a time; choose the best on meta-validation tasks.

        Any setting of `metalr train` may have several values: --outer.init-rate 1e-3 3e-3 --model.widths "64 64" 128
        --seed 0 1 2. With --sampler random or tpe also ranges: --outer.init-rate 1e-4..1e-2. Each run leaves a folder
        of its own, as `metalr train` does. What does best is in best.json: metalr train --config SWEEP/best.json

        Args:
          base: what all runs share: a run folder, a config file, or a document of experiments/.
          resume: the folder of a sweep that was stopped or killed: go on with that one.
          retry_failed: with --resume: take up the runs that failed too, where they stood.
          dry_run: print which runs there would be, which of them would fail for settings that contradict each other,
            and the script of a job of Slurm; run nothing.
          json_: print the results as JSON instead of a table.
        """
        from metalr.report import tables
        from metalr.runs import sweeping

        if resume is not None:
            given = sorted({word.partition("=")[0] for word in own if word.startswith("--")} - BESIDE_RESUME)
            given += [*swept, *([] if base is None else [str(base)])]
            if given:
                raise ConfigError(
                    "resume: expected nothing beside it but --workers and --retry-failed "
                    f"({resume} has its own settings), got {given}"
                )
            workers = any(word.partition("=")[0] == "--workers" for word in own)
            results = sweeping.resume(resume, workers=config.workers if workers else None, retry_failed=retry_failed)
        elif retry_failed:
            raise ConfigError("retry_failed: expected it with --resume SWEEP alone")
        else:
            start = TrainConfig() if base is None else sweeping.base_of(base)
            axes = dict(axis_of(flag, values, start) for flag, values in swept.items())
            seeds = axes.pop("seed", [start.seed])
            if not isinstance(seeds, list):
                raise ConfigError(f"--seed: expected values, such as 0 1 2, got the range {seeds.low}..{seeds.high}")
            once = {name: axis[0] for name, axis in axes.items() if isinstance(axis, list) and len(axis) == 1}
            several = {name: axis for name, axis in axes.items() if name not in once}
            start = sweeping.changed(start, once)
            wanted = sweeping.Sweep(start, several, tuple(seeds))
            if dry_run:
                print(sweeping.plan(wanted, config))
                return
            results = sweeping.run(wanted, config)
        print(json.dumps(results, indent=1) if json_ else tables.sweep_text(results))
        if results["best"] is None and not results["unranked"]:
            raise MetalrError(f"all runs failed; see {results['folder']}/logs")

    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are the workers'
    tyro.cli(sweep, prog="metalr sweep", args=own)
