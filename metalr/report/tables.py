"""Results as text for people. Reads results only; never trains."""

from __future__ import annotations

from typing import Any

import numpy as np


def text(results: dict[str, Any]) -> str:
    """The final table of a run: method, accuracy with 95 % CI after k steps, cost of one task."""
    training = results["training"]
    episodes = results["config"]["evaluation"]["episodes"]
    lines = [
        "",
        f"{results['tasks']}, {episodes} held-out tasks, "
        f"data {results['data']['name']}" + (", transductive norm" if results["transductive"] else ""),
        "",
    ]
    if "comparison" in results:
        lines += table(results["comparison"])
        lines += [
            "",
            "A grid's best cell is chosen on these very test tasks, which flatters it.",
            "Cost: example-gradients that one new task needs (a grid's: the sum over its cells).",
        ]
    else:
        lines += curve_lines(results["curve"])
    lines += [
        "",
        f"meta-training {training['seconds']:.0f} s with compilation and validation "
        f"({training['tasks_per_second_in_all']:.0f} tasks/s; {training['tasks_per_second']:.0f} once compiled), "
        f"in all {results['seconds']:.0f} s, peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"run folder {results['folder']}",
    ]
    return "\n".join(lines)


def seeds_text(results: dict[str, Any]) -> str:
    """The table of an experiment over several seeds."""
    head = f"\n{results['name']}: means over seeds {results['seeds']}, split {results['split_sha256'][:12]}\n"
    return "\n".join([head, *(table(results["comparison"]) or curve_lines(results["curve"]))])


def study_text(results: dict[str, Any]) -> str:
    """The table of a study: a row a variant; then, if it has them, the horizons."""
    head = ("variant", "family", "accuracy", "95 % CI", "lowest and highest seed", "seconds")
    rows: list[tuple[str, ...]] = [head]
    longer: list[tuple[str, ...]] = [
        ("variant", "family", "steps", "method", "accuracy", "95 % CI", "learned is above by")
    ]
    for r in results["rows"]:
        shown = f"{100 * r['accuracy']:.2f} %", f"± {100 * r['ci95']:.2f}"
        seeds = f"{100 * r['lowest_seed']:.2f} … {100 * r['highest_seed']:.2f}"
        rows.append((r["variant"], r["family"], *shown, seeds, f"{r['seconds']:.0f}"))
        for h in r["horizons"]:
            difference = f"{100 * h['learned_minus_this']:+.2f} ± {100 * h['difference_ci95']:.2f}"
            shown = f"{100 * h['accuracy']:.2f} %", f"± {100 * h['ci95']:.2f}"
            longer.append((r["variant"], r["family"], str(h["horizon"]), h["method"], *shown, difference))
    lines = [f"\n{results['name']}: means over seeds {results['seeds']}\n", *_aligned(rows, left=(0, 1))]
    return "\n".join([*lines, *(["", *_aligned(longer, left=(0, 1, 3))] if len(longer) > 1 else [])])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The comparison as aligned lines."""
    head = ("method", "steps", "accuracy", "95 % CI", "cost a task", "cell")
    if not rows:
        return []
    body = [
        (
            row["method"],
            str(row["steps"]) if isinstance(row["steps"], int) else "/".join(map(str, row["steps"])),
            f"{100 * row['accuracy']:.2f} %",
            f"± {100 * row['ci95']:.2f}",
            f"{np.mean(row['example_gradients']):,.0f}",
            _cell(row["cell"]),
        )
        for row in rows
    ]
    return _aligned([head, *body], left=(0, 5))


def _cell(cell: dict[str, Any] | list[dict[str, Any]]) -> str:
    """A grid's cell in words; "varies" where seeds chose differently."""
    if isinstance(cell, list):
        return "varies"
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in cell.values())


def learned_text(facts: dict[str, Any]) -> str:
    """What an artifact learned: hyperparameters over time, negative and dead shares, what no longer adapts."""
    rates, health, adapts = facts["rates"], facts["rates_health"], facts["adapts"]
    lines = [f"{facts['artifact']}: {facts['model']}, {facts['rule']}, trained for {facts['steps']} steps", ""]
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
    lines += _aligned(rows, left=(0, 3, 6))
    if facts["fixed"]:
        lines += ["", f"without a rate, so not adapted: {', '.join(facts['fixed'])}"]
    return "\n".join(lines)


def search_text(results: dict[str, Any]) -> str:
    """The outcome of a hyperparameter search."""
    rows = [(name, f"{value:.6g}") for name, value in results["best_params_"].items()]
    rows += [
        ("validation", f"{100 * results['best_score_']:.2f} %"),
        ("test", f"{100 * results['final_test_score']:.2f} %"),
        ("trials", f"{results['trials']:,}"),
        ("example-gradients", f"{results['example_gradients']:,}"),
        ("seconds", f"{results['seconds']:,.1f}"),
        ("all trials", results["cv_results_"]),
    ]
    return "\n".join([f"best of {results['searcher']} search", *(f"  {a.ljust(18)}{b}" for a, b in rows)])


def contest_text(results: dict[str, Any]) -> str:
    """The table of a comparison: every method at every cost, beside the learned method at no more cost."""
    head = ("method", "steps", "accuracy", "95 % CI", "learned - this", "95 % CI", "cost a task", "seconds")
    body = []
    for row in results["rows"]:
        difference = row.get("learned_minus_this_at_equal_cost")
        body.append(
            (
                row["method"],
                "" if row["steps"] is None else f"{row['steps']:,}",
                f"{100 * row['accuracy']:.2f} %",
                f"± {100 * row['ci95']:.2f}",
                *((f"{100 * difference[0]:+.2f}", f"± {100 * difference[1]:.2f}") if difference else ("", "")),
                f"{row['example_gradients']:,}",
                f"{row['seconds']:.3f}",
            )
        )
    about = (
        f"{results['family']}, {results['regime']}: {results['tasks']} held-out tasks, {results['searched_tasks']} of "
        f"them searched; {results['data']}"
    )
    return "\n".join([about, "", *_aligned([head, *body], left=(0,))])


def bars(values: list[float]) -> str:
    """A row of blocks whose heights go from 0 to the largest |value|; at most 40."""
    picked = [abs(values[round(i * (len(values) - 1) / 39)]) for i in range(40)] if len(values) > 40 else values
    top = max(map(abs, picked)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * abs(v) / top))] for v in picked)


def curve_text(results: dict[str, Any]) -> str:
    """The adaptation curve of an evaluation."""
    head = f"{results['run']}: {results['episodes']} held-out tasks, split {results['split_sha256'][:12]}"
    return "\n".join([head, *curve_lines(results["curve"])])


def curve_lines(curve: list[dict[str, Any]]) -> list[str]:
    """A curve as aligned lines: of accuracy in per cent, of any other metric in its own unit."""
    (metric,) = set(curve[0]) - {"steps", "ci95", "ci95_over_tasks", "lowest_seed", "highest_seed"}
    if metric == "accuracy":
        rows = [(str(r["steps"]), f"{100 * r[metric]:.2f} %", f"± {100 * r['ci95']:.2f}") for r in curve]
    else:
        rows = [(str(r["steps"]), f"{r[metric]:.4g}", f"± {r['ci95']:.2g}") for r in curve]
    return _aligned([("steps", metric, "95 % CI"), *rows], left=())


def _aligned(rows: list[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
