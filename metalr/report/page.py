"""`metalr report`: runs and comparisons as one HTML file that needs nothing else. Reads files only; imports no jax."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metalr.errors import ConfigError
from metalr.report import examples
from metalr.report import runs as listed
from metalr.report.figures import Series, chart, heat_map, number, table
from metalr.report.tables import advice, conclusion, contest_conclusion, held_out, plain, shown, shown_interval
from metalr.storage import folders

DOCTYPE = "<!doctype html>"
MOST_POINTS = 300  # of a line over outer steps
MOST_LINES = 100_000  # of steps that are read

STYLE = """
:root{--ink:#1d1f23;--soft:#5c6470;--paper:#fff;--line:#dfe3e8;--card:#f6f7f9;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#7a6a00;--c7:#444}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a3abb6;--paper:#15171a;--line:#343a42;--card:#1e2125;
--c0:#4ea8de;--c1:#ff8c42;--c2:#3ecfa0;--c3:#e39ac4;--c4:#f2bc4a;--c5:#8fd0f5;--c6:#d8c84a;--c7:#c8c8c8}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:860px;margin:0 auto;padding:24px 16px 64px}h1{font-size:1.5rem;margin:0 0 .2em}
h2{margin:2.2em 0 .4em;font-size:1.2rem}h3{margin:0 0 .2em;font-size:1rem}.answer{font-size:1.2rem;margin:.4em 0 1em}
.soft,.axis{color:var(--soft)}.axis{margin:0;font-size:.85rem}figure{margin:1.2em 0;padding:14px;background:var(--card);
border-radius:8px}svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:13px}
svg text.on-dark{fill:var(--paper)}svg text.on-light{fill:var(--ink)}svg .grid{stroke:var(--line)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:.4em 0;padding:0;font-size:.9rem}
@media (max-width:600px){svg text{font-size:20px}}
.key{display:inline-block;border:2px solid;width:12px;height:12px;border-radius:3px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;margin:.5em 0}
th,td{padding:3px 10px 3px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
summary{cursor:pointer;color:var(--soft);font-size:.9rem}code{overflow-wrap:anywhere}
"""


def write(path: Path, targets: Sequence[Path]) -> Path:
    """Write a report of runs and comparisons; its path.

    Raises:
      ConfigError: no folder, or one that holds neither a run nor a comparison; a file that is no report at that place.
        StorageError: it cannot be written.
    """
    if path.is_file() and path.stat().st_size and not path.read_bytes().startswith(DOCTYPE.encode()):
        raise ConfigError(f"{path}: expected a new file, or a report to replace, found another one")
    folders.make(path.parent, parents=True)
    folders.write_file(path, page(targets).encode())
    return path


def page(targets: Sequence[Path]) -> str:
    """The HTML of a report. Raises ConfigError as `write`."""
    if not targets:
        raise ConfigError("targets: expected one or more run folders, got none")
    found = [one for folder in targets for one in _expanded(listed.read(folder))]
    searches = [str(run.folder) for run in found if run.kind == "search"]
    if searches:
        raise ConfigError(
            f"targets: expected runs and comparisons, got a search: {searches[0]}; see its cv_results.csv"
        )
    runs = [run for run in found if run.kind == "run"]
    parts = []
    if runs:
        parts += _runs(runs)
    for run in found:
        if run.kind == "comparison":
            parts += _comparison(run)
    title = "metalr: " + ", ".join(run.folder.name for run in found)
    return (
        f'{DOCTYPE}<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{examples.STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )


def _expanded(run: listed.Run) -> list[listed.Run]:
    """A sweep as its finished runs. Raises ConfigError if none is."""
    if run.kind != "sweep":
        return [run]
    of_sweep = [one for one in listed.find(run.folder / "runs") if one.status == "finished"]
    if not of_sweep:
        raise ConfigError(f"targets: {run.folder}: expected a sweep with finished runs, found none")
    return of_sweep


def _results(run: listed.Run) -> dict[str, Any] | None:
    file = run.folder / "results.json"
    return json.loads(file.read_text()) if run.status == "finished" and file.is_file() else None


def _runs(runs: Sequence[listed.Run]) -> list[str]:
    finished = [(run, results) for run in runs if (results := _results(run)) is not None]
    parts = [_answer(run, results) for run, results in finished]
    for run in runs:
        if run.status != "finished":
            parts.append(f"<p>{_code(run.folder)} is {run.status}: it has no results yet.</p>")
    if len(runs) > 1:
        parts.append("<h2>In what they differ</h2>" + _differences(runs))
    names = _names([run for run, _ in finished])
    if finished:
        parts.append("<h2>On new tasks</h2>")
        named = [(name, results) for name, (_, results) in zip(names, finished, strict=True)]
        for metric in dict.fromkeys(results["metric"]["name"] for _, results in named):
            parts += _on_new_tasks(metric, [one for one in named if one[1]["metric"]["name"] == metric])
        looked_at = [(name, _shown(run)) for name, (run, _) in zip(names, finished, strict=True)]
        pictured = [part for name, facts in looked_at if facts for part in examples.parts(name, facts)]
        if pictured:
            parts += ["<h2>Some of these tasks</h2>", *pictured]
        parts.append("<h2>What was learned</h2>")
        parts += [_rates(name, results) for name, results in zip(names, (r for _, r in finished), strict=True)]
    parts.append("<h2>Meta-training</h2>")
    parts += [_training(name, run) for name, run in zip(_names(runs), runs, strict=True)]
    parts.append("<h2>What was run</h2>")
    parts += [_made(run) for run in runs]
    return parts


def _on_new_tasks(metric: str, named: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The curves of runs that have one metric, and what each was compared with. named: (name, results)."""
    drawn = chart(
        f"{metric} over inner steps", f"{metric} on held-out tasks after each inner step, with 95 % intervals.",
        [_curve(name, results) for name, results in named], x_label="inner steps",
        y_label=f"{metric}, mean over held-out tasks, 95 % interval", percent=metric == "accuracy",
    )  # fmt: skip
    parts = [drawn]
    for name, results in named:
        if results.get("comparison"):
            parts.append(_methods(f"{name}: beside a grid search on the same tasks", results["comparison"], metric))
            parts += _grid(name, results.get("grid", {}).get("cells", []), metric, results["metric"]["maximise"])
    return parts


def _names(runs: Sequence[listed.Run]) -> list[str]:
    short = [run.folder.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _code(text: Any) -> str:
    return f"<code>{html.escape(str(text))}</code>"


def _answer(run: listed.Run, results: dict[str, Any]) -> str:
    """The first sentence: what a new task gets after how many steps, and what a grid search gets for how much more."""
    text = f"<b>{html.escape(run.folder.name)}</b>: {html.escape(conclusion(results))}"
    about = held_out(results["config"]["evaluation"]["episodes"], results.get("held_out_tasks"))
    steps = results["config"]["inner"]["steps"]
    known = any(point["ci95"] is not None for point in results["curve"] if point["steps"] in (0, steps))
    interval = "The intervals are over tasks, of this one run." if known else "Of one task there is no interval."
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in advice(results))
    soft = f'<p class="soft">{about}: {html.escape(results["tasks"])}. {interval}</p>'
    return f'<p class="answer">{text}</p>{said}{soft}'


def _differences(runs: Sequence[listed.Run]) -> str:
    names = listed.differing(runs)
    if not names:
        return "<p>Their settings are the same.</p>"
    rows = [[name, *(plain(run.setting(name)) for run in runs)] for name in names]
    return table(["setting", *_names(runs)], rows)


def _curve(name: str, results: dict[str, Any]) -> Series:
    metric = results["metric"]["name"]
    points = [p for p in results["curve"] if p[metric] is not None]
    return _with_band(name, [(p["steps"], p[metric], p["ci95"]) for p in points])


def _methods(title: str, rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Score against cost, a colour a method, and all rows as a table."""
    drawn = against_cost(rows, metric)
    head = ["method", "steps", metric, "95 %", "cost of a task"]
    body = [
        [r["method"], plain(r["steps"]), shown(r[metric], metric), shown_interval(r["ci95"], metric),
         number(float(np.mean(r["example_gradients"])))]
        for r in rows
    ]  # fmt: skip
    return (
        chart(
            title, f"{metric} of each method against what it costs to fine-tune one task, in example-gradients.", drawn,
            x_label="cost of one task, example-gradients (one forward and backward pass of one example)",
            y_label=metric, log_x=True, percent=metric == "accuracy",
        )
        + table(head, body)
    )  # fmt: skip


def against_cost(rows: Sequence[dict[str, Any]], metric: str) -> list[Series]:
    """A line for each method of a comparison, score against cost, with its 95 % intervals as a band."""
    series: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in rows:
        if row[metric] is not None:
            cost = float(np.mean(row["example_gradients"]))
            series.setdefault(row["method"], []).append((cost, row[metric], row["ci95"]))
    return [
        _with_band(name, sorted(found, key=lambda point: point[:2]))._replace(points=len(found) == 1)
        for name, found in series.items()
    ]


def _with_band(name: str, points: Sequence[tuple[float, float, float | None]]) -> Series:
    """(x, y, half-width of the interval) as a line with its band; without one where an interval is not known."""
    line = Series(name, [x for x, _, _ in points], [y for _, y, _ in points])
    band = [(y - width, y + width) for _, y, width in points if width is not None]
    if len(band) < len(points):
        return line
    return line._replace(low=[low for low, _ in band], high=[high for _, high in band])


def _shown(run: listed.Run) -> dict[str, Any] | None:
    """The held-out tasks that a run left to be looked at, if it did."""
    file = run.folder / folders.EXAMPLES
    return json.loads(file.read_text()) if file.is_file() else None


def _grid(name: str, cells: Sequence[dict[str, Any]], metric: str, maximise: bool) -> list[str]:
    """A heat map for each init and optimizer of a grid: the best of its batch sizes, learning rate by steps."""
    maps = []
    better = max if maximise else min
    for init, optimizer in dict.fromkeys((cell["init"], cell["optimizer"]) for cell in cells):
        own = [cell for cell in cells if (cell["init"], cell["optimizer"]) == (init, optimizer)]
        rates, lengths = (sorted({cell[key] for cell in own}) for key in ("learning_rate", "steps"))

        def best(rate: float, steps: int, own: Sequence[dict[str, Any]] = own) -> float:
            at = [c[metric] for c in own if (c["learning_rate"], c["steps"]) == (rate, steps) and c[metric] is not None]
            return better(at, default=math.nan)

        maps.append(
            heat_map(
                f"{name}: grid search from the {init} init, {optimizer}",
                f"{metric} of each learning rate (rows) after each number of steps (columns), on the same tasks. "
                f"Darker is {'better' if maximise else 'worse'}.",
                [(f"rate {rate:g}", [best(rate, steps) for steps in lengths]) for rate in rates],
                columns=[f"{steps} step{'' if steps == 1 else 's'}" for steps in lengths],
                linear=maximise,  # of errors, one that nearly diverged would make all others look alike
                text=lambda value: shown(value, metric),
            )
        )
    return maps


def _path(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Learned rates over meta-training, a line for each group: the mean over its steps or knots."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for group, value in row.get("rates", {}).items():
            numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int | float)]
            if ":" not in group and numbers:
                found.setdefault(group, []).append((row["step"], float(np.mean(numbers))))
    lines = [Series(group, [x for x, _ in at], [y for _, y in at]) for group, at in found.items()]
    if not any(len(set(line.y)) > 1 for line in lines):
        return ""
    return chart(
        f"{name}: learning rates over meta-training", "The mean learning rate of each group of parameters.", lines,
        x_label="outer steps", y_label="learning rate, mean over steps",
    )  # fmt: skip


def _rates(name: str, results: dict[str, Any]) -> str:
    """Learned rates, a row a group and a column a step; what is negative or dead is said."""
    named = results.get("rates_health", results["rates"])  # rates alone, which other hyperparameters stand beside
    rates = {k: v if isinstance(v, list) else [v] for k, v in results["rates"].items() if k in named}
    others = {k: v for k, v in results["rates"].items() if k not in named}
    longest = max((len(v) for v in rates.values()), default=0)
    rows = [(k, v) for k, v in rates.items() if len(v) == longest]
    columns = "knot" if results["config"]["inner"]["knots"] else "step"
    drawn = heat_map(
        f"{name}: learning rates",
        "A row for each group of parameters; the darker, the larger the rate.",
        rows,
        columns=columns,
    )
    health = results.get("rates_health", {})
    said = [
        f"{_code(group)}: {100 * share:.0f} % of its rates are {what}"
        for group, shares in health.items()
        for what, share in (("negative", shares["negative"]), ("dead (hardly adapt)", shares["dead"]))
        if share
    ]
    text = f"<p>{'; '.join(said)}.</p>" if said else ""
    if others:
        text += table(
            ["also learned", "value"],
            [[k, plain(v)] for k, v in others.items()],
        )
    return drawn + text


def _metrics(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics.jsonl: all validations, and every n-th step; and n, which is 1 up to MOST_LINES."""
    if not file.is_file():
        return [], 1
    with file.open("rb") as lines:
        every = max(1, math.ceil(sum(1 for _ in lines) / MOST_LINES))
        lines.seek(0)
        chosen = [line for i, line in enumerate(lines) if i % every == 0 or b'"validation_' in line]
    return folders.rows_of(chosen), every


def _training(name: str, run: listed.Run) -> str:
    """Loss and validation over outer steps."""
    rows, every = _metrics(run.folder / "metrics.jsonl")
    steps = [row for row in rows if row.get("loss") is not None]
    validations = [
        (row["step"], k, v) for row in rows for k, v in row.items() if k.startswith("validation_") and v is not None
    ]
    if not steps:
        return f"<p>{_code(run.folder)} has no steps yet.</p>"
    size = max(1, math.ceil(len(steps) / MOST_POINTS))
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    loss = Series("loss", [g[-1]["step"] + 1 for g in groups], [float(np.mean([r["loss"] for r in g])) for g in groups])
    label = f"loss, means over {size * every} steps" if size * every > 1 else "loss"
    label += f", of which one in {every} is read" if every > 1 else ""
    drawn = chart(
        f"{name}: loss of meta-training", "Loss on query sets of meta-training tasks over outer steps.", [loss],
        x_label="outer steps", y_label=label,
    )  # fmt: skip
    if validations:
        metric = validations[0][1].removeprefix("validation_")
        found = Series(f"validation {metric}", [s for s, _, _ in validations], [v for _, _, v in validations])
        drawn += chart(
            f"{name}: validation", f"{metric} on meta-validation tasks over outer steps; the best is kept.", [found],
            x_label="outer steps", y_label=metric, percent=metric == "accuracy",
        )  # fmt: skip
    return drawn + _path(name, rows)


def _again(run: listed.Run) -> str:
    given = folders.data_of(run.folder).get("given") == folders.OWN_TASKS
    if given or run.setting("model.name") == "custom":
        return f"{_code('metalr.meta_train')} with the same tasks, network and settings, which are in Python"
    return _code(f"metalr train --config {run.folder}")


def _made(run: listed.Run) -> str:
    facts = listed.details(run, {})
    settings = facts.pop("settings")
    again = f"<p>Again: {_again(run)}</p>" if run.kind == "run" else ""
    known = [[name.replace("_", " "), plain(listed.in_words(name, value))] for name, value in facts.items()]
    every = table(["setting", "value"], [[k, plain(v)] for k, v in settings.items()])
    return (
        f"<h3>{html.escape(str(run.folder))}</h3>{table(['', ''], known)}{again}"
        f"<details><summary>All settings</summary>{every}</details>"
    )


def _comparison(run: listed.Run) -> list[str]:
    results = _results(run)
    if results is None:
        return [f"<p>{_code(run.folder)} is {run.status}: it has no results yet.</p>"]
    metric, rows = results.get("metric", {}).get("name", "accuracy"), results["rows"]
    text = html.escape(contest_conclusion(results))
    ends = [
        [c["method"], plain(c["steps"]), shown(c.get(metric), metric), number(c["learned_reaches_it_with"]),
         "" if c.get("break_even_tasks") is None else f"{c['break_even_tasks']:,}"]
        for c in results["conclusions"]
        if c["learned_reaches_it_with"] is not None
    ]  # fmt: skip
    tasks = f"{held_out(results['tasks'], results.get('held_out_tasks'))}, {results['searched_tasks']} searched"
    about = f"{results['family']}, {results['regime']}: {tasks}."
    head = ["method", "steps", metric, "the learned method reaches it at", "paid back after tasks"]
    return [
        f"<h2>Comparison {html.escape(run.folder.name)}</h2>",
        f'<p class="answer">{text}</p><p class="soft">{html.escape(about)}</p>',
        _methods("Score against the cost of one task", rows, metric),
        "<h3>Who is reached, at what cost</h3>"
        + (table(head, ends) if ends else "<p>The learned method reaches none.</p>"),
        _made(run),
    ]
