"""The runs in a folder: which there are, how they stand, and in what they differ. Reads files; imports no jax."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metalr.errors import ConfigError
from metalr.report.tables import aligned, plain, shown, shown_interval
from metalr.storage import folders

DEPTH = 3  # folders below the one that is listed
KINDS = {
    "trials.jsonl": "search",
    "searches.jsonl": "comparison",
    "sweep.jsonl": "sweep",
}  # a file that only this kind has
BEGUN = {"runs": "comparison", "sweep": "sweep", "searcher": "search"}  # a setting that only this kind has
SKIPPED = {"artifact", "checkpoints"}
WEIGHTS = "model.safetensors"  # beside a config.json: the folder of a model repository (export --to hub-folder)
FILES = {"config.json", "metrics.jsonl", "grid.jsonl", "cv_results.csv", "results.json"}
SWEPT = {"runs", "logs", "best.json", "drawn.jsonl"}  # what a sweep has besides
OF_RUNS = (FILES | set(KINDS)) - {"config.json"}
WRITTEN = SKIPPED | FILES | set(KINDS) | folders.OWN
Settings = dict[str, Any]  # dotted name -> value


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, search, comparison or sweep.

    Attributes:
      status: "running", "finished", "failed" (with an error that is written down) or "stopped".
      metric, score, ci95, steps: what a finished run found on held-out tasks after so many inner steps, or None.
      done: outer steps of a run that is not finished, or None.
      began: seconds since the epoch; bytes: of all its files; config: its settings as they are stored.
    """

    folder: Path
    kind: str
    status: str
    metric: str | None
    score: float | None
    ci95: float | None
    steps: int | None
    done: int | None
    began: float
    bytes: int
    config: dict[str, Any]

    @functools.cached_property
    def settings(self) -> Settings:
        """All settings by dotted name."""
        return flat(self.config)

    def setting(self, name: str) -> Any:
        """The setting of that dotted name; None if there is none."""
        found: Any = self.config
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found


class _Seen(NamedTuple):
    """A folder that holds a run: its names, the bytes of all files in it and below, when config.json was written."""

    folder: str
    names: set[str]
    bytes: int
    began: float


def find(root: Path) -> list[Run]:
    """The runs in a folder and in the folders below it, oldest first. Raises ConfigError if there is no such folder."""
    if not root.is_dir():
        raise ConfigError(f"{root}: expected a folder with runs, found none")
    seen = sorted(_scan(str(root), DEPTH)[1], key=lambda one: (one.began, one.folder))
    collecting = gc.isenabled()
    gc.disable()  # 10,000 documents stay, and looking through them again and again is a tenth of the time
    try:
        return [_run(one) for one in seen]
    finally:
        if collecting:
            gc.enable()


def _scan(folder: str, depth: int) -> tuple[int, list[_Seen]]:
    """The bytes in a folder, and the runs in it and so many folders below, each folder looked at once; -1: no runs."""
    names, total, began, found = set[str](), 0, None, []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            names.add(name)
            if entry.is_dir(follow_symlinks=False):
                inside = depth > 0 and name not in SKIPPED and not name.startswith(".")
                size, below = _scan(entry.path, depth - 1 if inside else -1)
                total += size
                found += below
                continue
            facts = entry.stat(follow_symlinks=False)
            total += facts.st_size
            if name == "config.json":
                began = facts.st_mtime
    other = WEIGHTS in names and not names & OF_RUNS
    if depth >= 0 and began is not None and not other:
        found.append(_Seen(folder, names, total, began))
    return total, found


def read(folder: Path) -> Run:
    """How a run stands. Raises ConfigError for a folder that holds none."""
    found = _scan(str(folder), 0)[1] if folder.is_dir() else []
    if not found:
        raise ConfigError(f"{folder}: expected a run with config.json, found none; see: metalr runs list")
    return _run(found[0])


def _run(seen: _Seen) -> Run:
    folder, names = seen.folder, seen.names
    results = _json(f"{folder}/results.json") if "results.json" in names else None
    of_run = _of_a_run(results)  # its results hold its settings too: one file less to read
    config = results["config"] if results and of_run else _json(f"{folder}/config.json") or {}
    kind = next((kind for name, kind in KINDS.items() if name in names), None)
    if kind is None and not of_run:  # none of its own files is there, or it needs none
        kind = next((kind for name, kind in BEGUN.items() if name in config), None)
    kind = kind or "run"
    if folders.LOCK in names and folders.holder(Path(folder)) is not None:
        status = "running"
    elif results is not None:
        status = "finished"
    else:
        status = "failed" if folders.FAILED in names else "stopped"
    metric, score, ci95, steps = _found(results or {})
    done = None if results is not None or kind != "run" else _last_step(Path(folder) / "metrics.jsonl")
    own = _used(config.get("config", config), results or {})
    rest = metric, score, ci95, steps, done, seen.began, seen.bytes, own
    return Run(Path(folder), kind, status, *rest)


def _of_a_run(results: Any) -> bool:
    """Whether results.json is that of a run, and not some other program's."""
    try:
        return bool(results["curve"]) and isinstance(results["config"]["inner"]["steps"], int)
    except (KeyError, TypeError):
        return False


def _used(config: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run goes by: those of images, or of a table, or of neither with tasks given in Python."""
    of_table = bool((config.get("table") or {}).get("task_column"))
    source = results.get("data")  # of a comparison a sentence
    given = isinstance(source, dict) and source.get("source") == folders.OWN_TASKS
    unused = {"tasks" if of_table else "table", *(["tasks"] if given else [])}
    return {name: value for name, value in config.items() if name not in unused}


def newest(root: Path, name: str) -> Run:
    """The newest run of a name, numbered or not (NAME, NAME-2). Raises ConfigError if there is none."""
    named = [r for r in find(root) if r.folder.name == name or _unnumbered(r.folder.name) == name]
    if not named:
        raise ConfigError(f"{name}: expected a run of that name in {root}, found none; see: metalr runs list {root}")
    return named[-1]


def _unnumbered(name: str) -> str:
    begin, _, number = name.rpartition("-")
    return begin if number.isdigit() else name


def not_its_own(run: Run) -> list[str]:
    """Names in a run's folder that no run, search or comparison writes."""
    cut_off = {path.name for path in folders.leftovers(run.folder)}
    own = WRITTEN | cut_off | (SWEPT if run.kind == "sweep" else set())
    return sorted(path.name for path in run.folder.iterdir() if path.name not in own)


def _found(results: dict[str, Any]) -> tuple[str | None, float | None, float | None, int | None]:
    metric = results.get("metric", {}).get("name", "accuracy")
    if _of_a_run(results):
        trained = results["config"]["inner"]["steps"]
        point = next((p for p in results["curve"] if p["steps"] == trained), results["curve"][-1])
        return metric, point.get(metric), point.get("ci95"), point["steps"]
    if "final_test_score" in results:
        return metric, results["final_test_score"], None, None
    if "best" in results:
        row = results["best"] or {}
        return row.get("metric"), row.get("test"), row.get("test_ci95_over_seeds"), None
    if results.get("rows"):
        row = [row for row in results["rows"] if row["method"] == results["rows"][0]["method"]][-1]  # the longest
        return metric, row.get(metric), row.get("ci95"), row.get("steps")
    return None, None, None, None


def _last_step(file: Path) -> int:
    """Outer steps that are logged, by the end of the file alone."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # a line that is being written, or cut by where reading began
        if isinstance(found, dict) and "step" in found:
            return int(found["step"]) + ("loss" in found)
    return 0


def _json(file: Path | str) -> dict[str, Any] | None:
    try:
        with open(file, "rb") as content:
            found = json.loads(content.read())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def facts(run: Run) -> dict[str, Any]:
    """A run as JSON values, its settings by dotted name."""
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name != "config"}
    return values | {"folder": str(run.folder), "settings": run.settings}


def flat(config: dict[str, Any], prefix: str = "") -> Settings:
    """Settings by dotted name."""
    found: Settings = {}

    def add(config: dict[str, Any], prefix: str) -> None:
        for name, value in config.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    add(config, prefix)
    return found


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which these runs differ, without where they stand."""
    if not runs:
        return []
    return [name for name in _differing([run.config for run in runs]) if name not in ("out", "overwrite")]


def _differing(configs: list[dict[str, Any]], prefix: str = "") -> Iterator[str]:
    """Dotted names; sections that are the same everywhere are not looked into."""
    for name in dict.fromkeys(itertools.chain.from_iterable(configs)):
        values = [config.get(name) for config in configs]
        if values.count(values[0]) == len(values):
            continue
        if any(isinstance(value, dict) for value in values):
            yield from _differing([v if isinstance(v, dict) else {} for v in values], f"{prefix}{name}.")
        else:
            yield prefix + name


def listing(runs: Sequence[Run], most: int = 6) -> str:
    """A line a run: how it stands, what it found, and the settings in which the runs differ.

    most: how many of these settings get a column; the rest are counted.
    """
    if not runs:
        return "no runs"
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.kind, []).append(run)
    now, parts = time.time(), []
    for kind, same in kinds.items():
        names = differing(same)
        head = (kind, "status", "found", "95 % CI", "age", "size", *(name for name in names[:most]))
        rows = [head]
        for run in same:
            score = shown(run.score, run.metric) if run.metric and run.score is not None else ""
            if run.done is not None and run.setting("outer.steps") is not None:
                score = f"{run.done}/{run.setting('outer.steps')}"
            interval = shown_interval(run.ci95, run.metric) if run.metric and run.ci95 is not None else ""
            about = run.status, score, interval, age(now - run.began), size(run.bytes)
            rows.append((str(run.folder), *about, *(plain(run.setting(name)) for name in names[:most])))
        left = (0, 1, *range(6, len(head)))
        parts.append("\n".join(aligned(rows, left=left)))
        if len(names) > most:
            parts.append(f"they also differ in {', '.join(names[most:])}")
    return "\n\n".join(parts)


def age(seconds: float) -> str:
    """Seconds in words: "3 min", "5 h", "12 d"."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def comparison(runs: Sequence[Run]) -> str:
    """The settings in which runs differ and what they found, a column a run."""
    names = differing(runs)
    rows: list[tuple[str, ...]] = [("", *(str(run.folder) for run in runs)), ("status", *(run.status for run in runs))]
    for metric in dict.fromkeys(run.metric for run in runs if run.metric and run.score is not None):
        found = [
            f"{shown(run.score, metric)} {shown_interval(run.ci95, metric)}".strip()
            if run.score is not None and run.metric == metric
            else ""
            for run in runs
        ]
        rows.append((metric, *found))
    rows += [(name, *(plain(run.setting(name)) for run in runs)) for name in names]
    lines = aligned(rows, left=tuple(range(len(runs) + 1)))
    return "\n".join(lines + ([] if names or len(runs) < 2 else ["", "their settings are the same"]))


def details(run: Run, defaults: Settings) -> dict[str, Any]:
    """All that `metalr runs show` says, as JSON values. defaults: the settings that need no mention."""
    made = _json(run.folder / folders.MADE) or {}
    results = _json(run.folder / "results.json") or {}
    data = _json(run.folder / "data.json") or {}
    failed = _json(run.folder / folders.FAILED) or {}
    facts: dict[str, Any] = {
        "folder": str(run.folder),
        "kind": run.kind,
        "status": run.status,
        "outer_steps_done": run.done,
        "error": failed.get("error"),
        run.metric or "score": run.score,
        "ci95": run.ci95,
        "after_steps": run.steps,
        "command": made.get("command", results.get("command")),
        **{k: v for k, v in (made or results.get("provenance", {})).items() if k != "command"},
        "data_sha256": data.get("sha256"),
        "bytes": run.bytes,
        "settings": {n: v for n, v in run.settings.items() if defaults.get(n, v) != v or n not in defaults},
    }
    return {name: value for name, value in facts.items() if value is not None}


def in_words(name: str, value: Any) -> str:
    """One of the `details` for people."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return size(value) if name == "bytes" else plain(value)


def details_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    rows: list[tuple[str, ...]] = []
    for name, value in facts.items():
        if name == "settings":
            continue
        rows.append((name.replace("_", " "), in_words(name, value)))
    lines = aligned(rows, left=(0, 1))
    changed: list[tuple[str, ...]] = [(name, plain(value)) for name, value in facts["settings"].items()]
    return "\n".join([*lines, "", "settings that differ from the defaults:", *aligned(changed, left=(0, 1))])
