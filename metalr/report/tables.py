"""Results as text for people. Reads results only; never trains."""

from __future__ import annotations

from typing import Any

import numpy as np


def plural(count: int, thing: str) -> str:
    """So many things: "1 step", "1,000 steps"."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def digits(value: float, count: int, sign: str = "") -> str:
    """A number with so many significant digits; a larger one whole, with no exponent: 0.5, 26, 410, 12,346."""
    text = f"{value:{sign}.{count}g}"
    return f"{value:{sign},.0f}" if abs(value) < 1e15 and (abs(value) >= 10**count or "e+" in text) else text


def shown(value: float | None, metric: str) -> str:
    """A score for people: accuracy in per cent, any other metric in its own unit."""
    if value is None:
        return "diverged"
    return f"{100 * value:.2f} %" if metric == "accuracy" else digits(value, 4)


def shown_interval(value: float | None, metric: str) -> str:
    """The half-width of an interval, in the same unit."""
    if value is None:
        return ""
    return f"± {100 * value:.2f}" if metric == "accuracy" else f"± {digits(value, 2)}"


def shown_difference(value: float | None, metric: str) -> str:
    """A difference of two scores, in the same unit."""
    if value is None:
        return ""
    return f"{100 * value:+.2f}" if metric == "accuracy" else digits(value, 3, "+")


def _metric(results: dict[str, Any]) -> str:
    return results.get("metric", {}).get("name", "accuracy")


def _direction(results: dict[str, Any]) -> list[str]:
    """A line that says so where less is better."""
    found = results.get("metric", {})
    return [f"{found['name']}: less is better"] if found.get("maximise") is False else []


def held_out(episodes: int, tasks: int | None) -> str:
    """How much a score rests on. tasks: how many different ones the episodes are of; None: as many as there are."""
    if tasks in (None, episodes):
        return f"{episodes} held-out tasks"
    return f"{episodes} episodes of {plural(tasks, 'held-out task')}"


def text(results: dict[str, Any]) -> str:
    """The final table of a run: method, accuracy with 95 % CI after k steps, cost of one task."""
    training = results["training"]
    episodes = results["config"]["evaluation"]["episodes"]
    lines = [
        "",
        f"{results['tasks']}, {held_out(episodes, results.get('held_out_tasks'))}, "
        f"data {results['data']['name']}" + (", transductive norm" if results["transductive"] else ""),
        "",
    ]
    if "comparison" in results:
        lines += table(results["comparison"], _metric(results))
        lines += [
            "",
            "A grid's best cell is chosen on these very test tasks, which flatters it.",
            "Cost: example-gradients that one new task needs (a grid's: the sum over its cells).",
        ]
    else:
        lines += curve_lines(results["curve"])
    lines += _direction(results)
    lines += [
        "",
        conclusion(results),
        *advice(results),
        "",
        f"meta-training {training['seconds'] + training['compile_seconds']:.0f} s with compilation and validation "
        f"({training['tasks_per_second_in_all']:.0f} tasks/s; {training['tasks_per_second']:.0f} once compiled), "
        f"in all {results['seconds']:.0f} s, peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"run folder {results['folder']}",
    ]
    return "\n".join(lines)


def conclusion(results: dict[str, Any]) -> str:
    """A run in a sentence or two: what a new task gets after how many steps, what a grid gets for how much more."""
    metric, curve = results["metric"]["name"], results["curve"]
    steps = results["config"]["inner"]["steps"]
    start, end = curve[0], next((p for p in curve if p["steps"] == steps), curve[-1])
    said = (
        f"After {plural(end['steps'], 'step')} on a new task, {metric} is {shown(end[metric], metric)} "
        f"{shown_interval(end['ci95'], metric)} (before: {shown(start[metric], metric)})."
    )
    rows = results.get("comparison") or []
    grid = next((r for r in rows if r["method"].startswith("random init + grid, best cell of all")), None)
    if grid is None:
        return said
    times = float(np.mean(grid["example_gradients"])) / float(np.mean(rows[0]["example_gradients"]))
    return (
        f"{said} The best of all cells of a grid search from a random init reaches {shown(grid[metric], metric)}, at "
        f"{times:,.0f} times the cost."
    )


def advice(results: dict[str, Any]) -> list[str]:
    """What meta-validation tasks say that a user would want to act on, in sentences: one a fact, or none."""
    training, config = results.get("training", {}), results["config"]
    metric, said = results["metric"]["name"], []
    if training.get("warm_start") and training.get("best_step") == 0 and len(training["validations"]) > 1:
        said.append(
            f"No outer step was better on meta-validation tasks than what it started from, {config['init']}, which was "
            "kept."
        )
        if config["outer"]["learns"] in ("both", "init"):  # an init, and not rates alone
            said.append(
                "An init that has seen the training tasks needs hardly a step there. Learn rates for it on other "
                "tasks, with an algorithm that learns rates: --outer.learns rates_of_init --outer.part validation"
                + " --outer.calibrate"
                * (config["objective"] == "cross_entropy")
            )
    scores = {int(steps): score for steps, score in (training.get("validated_steps") or {}).items()}
    finite = sorted(steps for steps, score in scores.items() if score is not None)
    if len(scores) > 1 and finite:
        best = (max if results["metric"].get("maximise", True) else min)(finite, key=lambda steps: scores[steps])
        longest = max(scores)
        if best != longest:
            said.append(
                f"On meta-validation tasks {metric} is {shown(scores[best], metric)} after {plural(best, 'step')} and "
                f"{shown(scores[longest], metric)} after {longest:,}: stop early, with "
                "learned.adapt(x, y, learned.best_steps())"
            )
    return said


def no_dearer(one: tuple[int | None, float], other: tuple[int | None, float]) -> bool:
    """Whether one method costs no more than another. Both: (steps that it may take, example-gradients).

    By the steps, where both have them: one that stopped early could have taken the rest too. A search has none.
    """
    if one[0] is not None and other[0] is not None:
        return one[0] <= other[0]
    return one[1] <= other[1] * 1.001


def contest_conclusion(results: dict[str, Any]) -> str:
    """A comparison in two sentences: the learned method at its longest, and the best of the others at no more cost."""
    metric, rows, maximise = _metric(results), results["rows"], results["metric"]["maximise"]
    own = [row for row in rows if row["method"] == rows[0]["method"]]
    best, seeds = own[-1], len(results["seeds"])
    stopped = best.get("chosen", {}).get("steps", best["steps"])
    steps = plural(stopped, "step")
    steps += f" (of at most {best['steps']:,})" * (stopped != best["steps"])
    said = (
        f"{best['method']}: {metric} {shown(best[metric], metric)} {shown_interval(best['ci95'], metric)} after "
        f"{steps}, {f'mean over {seeds} seeds' if seeds > 1 else 'one seed'}."
    )
    above = "learned_minus_this_at_the_end"  # on the very tasks of the other

    spent = best["steps"], best["example_gradients"]
    others = [
        row
        for row in rows
        if row not in own
        and no_dearer((row["steps"], row["example_gradients"]), spent)
        and (row.get(above) or [None])[0] is not None
    ]
    if not others:
        return said
    rival = (min if maximise else max)(others, key=lambda row: row[above][0])
    difference, ci95 = rival[above]
    return (
        f"{said} The best other one at no more cost is {rival['method']} with {shown(rival[metric], metric)}; learned "
        f"less this: {shown_difference(difference, metric)} {shown_interval(ci95, metric)}."
    )


def seeds_text(results: dict[str, Any]) -> str:
    """The table of an experiment over several seeds."""
    head = f"\n{results['name']}: means over seeds {results['seeds']}, split {results['split_sha256'][:12]}\n"
    return "\n".join([head, *(table(results["comparison"], _metric(results)) or curve_lines(results["curve"]))])


def study_text(results: dict[str, Any]) -> str:
    """The table of a study: a row a variant; then, if it has them, the horizons."""
    metric = next(
        (name.removesuffix("_of_seeds") for name in results["rows"][0] if name.endswith("_of_seeds")), "accuracy"
    )
    head = ("variant", "family", metric, "95 % CI", "lowest and highest seed", "seconds")
    rows: list[tuple[str, ...]] = [head]
    longer: list[tuple[str, ...]] = [("variant", "family", "steps", "method", metric, "95 % CI", "learned is above by")]
    for r in results["rows"]:
        seeds = " … ".join(shown(r[f"{which}_seed"], metric).removesuffix(" %") for which in ("lowest", "highest"))
        score = shown(r[metric], metric), shown_interval(r["ci95"], metric)
        rows.append((r["variant"], r["family"], *score, seeds, f"{r['seconds']:.0f}"))
        for h in r["horizons"]:
            less = shown_difference(h["learned_minus_this"], metric), shown_interval(h["difference_ci95"], metric)
            score = shown(h[metric], metric), shown_interval(h["ci95"], metric)
            longer.append((r["variant"], r["family"], str(h["horizon"]), h["method"], *score, " ".join(less)))
    lines = [f"\n{results['name']}: means over seeds {results['seeds']}\n", *aligned(rows, left=(0, 1))]
    return "\n".join([*lines, *(["", *aligned(longer, left=(0, 1, 3))] if len(longer) > 1 else [])])


def sweep_text(results: dict[str, Any]) -> str:
    """The table of a sweep: a row a combination, the best on meta-validation tasks first; then what to do with it."""
    rows = results["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["point"]))
    metric = next((row["metric"] for row in rows if "metric" in row), "accuracy")
    head = (*names, "seeds", f"validation {metric}", "95 % CI", f"test {metric}", "95 % CI", "seconds")
    ranked = rows if results["unranked"] else sorted(
        rows, key=lambda r: -r["sign"] * r["validation"] if "validation" in r else np.inf
    )  # fmt: skip
    body = []
    for row in ranked:
        cells = [plain(row["point"].get(name), " ") for name in names]
        done = len(row["seeds"]) - row["failed"]
        cells.append(f"{done}" if not row["failed"] else f"{done}, {row['failed']} failed")
        own = row.get("metric", metric)
        for part in ("validation", "test"):
            ci95 = row.get(f"{part}_ci95_over_seeds")
            cells += [shown(row[part], own), "" if ci95 is None else shown_interval(ci95, own)] if done else ["", ""]
        body.append((*cells, f"{row['seconds']:.0f}" if done else ""))
    lines = [*aligned([head, *body], left=tuple(range(len(names)))), ""]
    if any(row.get("validation_ci95_over_seeds") is not None for row in rows):
        lines.append("intervals are over seeds of meta-training")
    lines += [f"{name} failed: {error}" for name, error in results["failed"].items()]
    if results["unranked"]:
        lines += [
            f"no best one: {', '.join(results['unranked'])} change what a score means",
            f"report {results['folder']}/report.html",
        ]
    if results["best"] is not None:
        folder = results["folder"]
        setting = (
            ", ".join(f"{name} {plain(value, ' ')}" for name, value in results["best"]["point"].items()) or "the base"
        )
        lines += [
            f"best on meta-validation tasks: {setting}",
            f"run it again with: metalr train --config {folder}/best.json",
            f"report {folder}/report.html",
        ]
    return "\n".join(lines)


def plain(value: Any, between: str = ", ") -> str:
    """A setting or a fact as text: "" for None, numbers to six digits, a list's entries with `between` them."""
    if isinstance(value, list | tuple):
        return between.join(plain(one, between) for one in value)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]], metric: str = "accuracy") -> list[str]:
    """The comparison as aligned lines."""
    head = ("method", "steps", metric, "95 % CI", "cost a task", "cell")
    if not rows:
        return []
    body = [
        (
            row["method"],
            str(row["steps"]) if isinstance(row["steps"], int) else "/".join(map(str, row["steps"])),
            shown(row[metric], metric),
            shown_interval(row["ci95"], metric),
            f"{np.mean(row['example_gradients']):,.0f}",
            _cell(row["cell"]),
        )
        for row in rows
    ]
    return aligned([head, *body], left=(0, 5))


def _cell(cell: dict[str, Any] | list[dict[str, Any]]) -> str:
    """A grid's cell in words; "varies" where seeds chose differently."""
    if isinstance(cell, list):
        return "varies"
    return f"{cell['optimizer']} {cell['learning_rate']:g}, batch {cell['batch_size']}" if cell else ""


def learned_text(facts: dict[str, Any]) -> str:
    """What an artifact learned: hyperparameters over time, negative and dead shares, what no longer adapts."""
    rates, health, adapts = facts["rates"], facts["rates_health"], facts["adapts"]
    lines = [
        f"{facts['artifact']}: {facts['model']}, {facts['rule']}, trained for {plural(facts['steps'], 'step')}",
        "",
    ]
    rows: list[tuple[str, ...]] = [("hyperparameter", "start", "learned", "over time", "negative", "dead", "")]
    for name, value in rates.items():
        values = value if isinstance(value, list) else [value]
        shares = health.get(name, {})
        rows.append(
            (
                name,
                f"{facts['starts'].get(name, float('nan')):.4g}",
                f"{values[0]:.4g}" + (f" … {values[-1]:.4g}" if len(values) > 1 else ""),
                bars(values) if len(values) > 1 else "",
                *(f"{100 * shares[k]:.0f} %" if shares.get(k) else "" for k in ("negative", "dead")),
                "" if adapts.get(name, True) else "not adapted",
            )
        )
    lines += aligned(rows, left=(0, 3, 6))
    if facts["fixed"]:
        lines += ["", f"without a rate, so not adapted: {', '.join(facts['fixed'])}"]
    return "\n".join(lines)


def search_text(results: dict[str, Any]) -> str:
    """The outcome of a hyperparameter search."""
    rows = [(name, f"{value:.6g}") for name, value in results["best_params_"].items()]
    rows += [
        ("validation", shown(results["best_score_"], _metric(results))),
        ("test", shown(results["final_test_score"], _metric(results))),
        ("trials", f"{results['trials']:,}"),
        ("example-gradients", f"{results['example_gradients']:,}"),
        ("seconds", f"{results['seconds']:,.1f}"),
        ("all trials", results["cv_results_"]),
    ]
    return "\n".join([f"best of {results['searcher']} search", *(f"  {a.ljust(18)}{b}" for a, b in rows)])


def contest_text(results: dict[str, Any]) -> str:
    """The table of a comparison: every method at every cost, beside the learned method at no more cost."""
    metric = _metric(results)
    head = ("method", "steps", metric, "95 % CI", "learned - this", "95 % CI", "cost a task", "seconds")
    body = []
    for row in results["rows"]:
        difference = row.get("learned_minus_this_at_equal_cost")
        body.append(
            (
                row["method"],
                "" if row["steps"] is None else f"{row['steps']:,}",
                shown(row[metric], metric),
                shown_interval(row["ci95"], metric),
                *(
                    (shown_difference(difference[0], metric), shown_interval(difference[1], metric))
                    if difference
                    else ("", "")
                ),
                f"{row['example_gradients']:,}",
                f"{row['seconds']:.3f}",
            )
        )
    about = (
        f"{results['family']}, {results['regime']}: {held_out(results['tasks'], results.get('held_out_tasks'))}, "
        f"{results['searched_tasks']} of them searched; {results['data']}"
    )
    widths = results["config"].get("widths")
    if widths:
        about += (
            f"\nLearned rates on another network than they were learned on, an mlp of {', '.join(map(str, widths))}"
        )
    if results["config"].get("early_stopping"):
        about += "\nWhat was learned and what was tuned stop early, at steps chosen on meta-validation tasks"
    lines = [about, "", *aligned([head, *body], left=(0,)), *_direction(results), ""]
    return "\n".join([*lines, contest_conclusion(results)])


def bars(values: list[float]) -> str:
    """A row of blocks whose heights go from 0 to the largest |value|; at most 40."""
    picked = [abs(values[round(i * (len(values) - 1) / 39)]) for i in range(40)] if len(values) > 40 else values
    top = max(map(abs, picked)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * abs(v) / top))] for v in picked)


def curve_text(results: dict[str, Any]) -> str:
    """The adaptation curve of an evaluation."""
    about = held_out(results["episodes"], results.get("held_out_tasks"))
    head = f"{results['run']}: {about}, split {results['split_sha256'][:12]}"
    lines = [head, *curve_lines(results["curve"]), *_direction(results)]
    if "label_orders" in results:
        found = results["label_orders"]
        lines += [
            f"the order of its labels alone moves a task's accuracy by {100 * found['spread']:.2f} points (standard "
            f"deviation over {found['orders']} orders, mean over {found['episodes']} tasks)"
        ]
    return "\n".join(lines)


def curve_lines(curve: list[dict[str, Any]]) -> list[str]:
    """A curve as aligned lines: of accuracy in per cent, of any other metric in its own unit."""
    (metric,) = set(curve[0]) - {"steps", "ci95", "ci95_over_tasks", "lowest_seed", "highest_seed"}
    rows = [(str(r["steps"]), shown(r[metric], metric), shown_interval(r["ci95"], metric)) for r in curve]
    return aligned([("steps", metric, "95 % CI"), *rows], left=())


def aligned(rows: list[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    """Rows as lines of columns, those in `left` to the left."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
