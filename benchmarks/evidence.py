"""The figures and tables of docs/evidence.md, docs/evidence_tables.md and README, from results/grid_search.json.

    python benchmarks/evidence.py

Draws docs/figures/CASE.svg for every case that docs/evidence_tables.md has a place for (<!-- table: CASE -->), and
fills in its table; the summary (<!-- summary -->) of README and docs/evidence.md; and the table of all cases in which
what is tuned stops early (<!-- early stopping -->).
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from metalr.report import figures, page
from metalr.report.figures import Series

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "evidence_tables.md"
RESULTS = ROOT / "benchmarks" / "results" / "grid_search.json"
PLACE = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- end -->)", re.S)
SUMMARISED = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
SUMMARY_PLACE = re.compile(r"(<!-- summary -->\n).*?(<!-- end -->)", re.S)
EARLY_PLACE = re.compile(r"(<!-- early stopping -->\n).*?(<!-- end -->)", re.S)
SUMMARY = {  # case -> what README calls it, and the numbers of steps that it shows
    "rotated, full data, several horizons": ("rotated, 7,000 images", (11, 436, 4360)),
    "permuted, full data, several horizons": ("pixels permuted, 7,000 images", (11, 436, 4360)),
    "rotated 10-way 5-shot, several horizons": ("rotated", (1, 50)),
    "relabeled 10-way 5-shot, several horizons": ("labels in another order", (1, 50)),
    "rotated 10-way 5-shot, label noise 0.4, several horizons": ("rotated, 40 % of the labels random", (1, 50)),
    "permuted 10-way 10-shot, several horizons": ("pixels permuted, 100 images", (1, 50)),
    "mixed 10-way 5-shot, several horizons": ("rotated, permuted or relabeled", (1, 50)),
    "scaled 10-way 5-shot, several horizons": ("inputs of another scale", (1, 50)),
    "rotated 10-way 5-shot, 8 hidden layers, several horizons": ("rotated, 8 hidden layers", (1, 50)),
    "rotated 10-way 5-shot, GRU, several horizons": ("rotated, a GRU", (1, 50)),
    "Fashion-MNIST, rotated 10-way 5-shot, several horizons": ("Fashion-MNIST, rotated", (1, 50)),
    "Fashion-MNIST, rotated 10-way 5-shot, rates of the pre-trained init": (
        "the same, rates alone, of the pre-trained init",
        (1, 50),
    ),
}
LEAST = {
    "rotated, full data, several horizons": 0.88,
    "permuted, full data, several horizons": 0.84,
    "rotated 10-way 5-shot, several horizons": 0.86,
    "scaled 10-way 5-shot, several horizons": 0.945,
    "rotated 10-way 5-shot, GRU, several horizons": 0.6,
    "relabeled 10-way 5-shot, several horizons": 0.4,
    "mixed 10-way 5-shot, several horizons": 0.4,
    "rates alone, two layers of 64": 0.4,
    "rates alone, two layers of 64, longer": 0.88,
    "rates alone, one layer of 256": 0.6,
    "rates alone, two layers of 256": 0.6,
    "rates alone, four layers of 128": 0.5,
    "rotated 10-way 1-shot, trained with 5, several horizons": 0.8,
    "rotated 10-way 20-shot, trained with 5, several horizons": 0.86,
    "rotated 10-way 1-shot, trained with 1, 5 and 20": 0.8,
    "rotated 10-way 5-shot, trained with 1, 5 and 20": 0.86,
    "rotated 10-way 20-shot, trained with 1, 5 and 20": 0.86,
}  # drawn from there
DRAWN = (  # of the methods that take one run a task; searches are points beside them
    "learned init + learned rates", "random init + learned rates", "pre-trained init, no search (momo_adam)",
    "pre-trained init, no search (Adam 0.001)", "pre-trained init + one tuned rate",
    "random init, no search (momo_adam)",
    "random init, no search (Adam 0.001)",
)  # fmt: skip


ALONE = (  # where rates were learned without an init
    "random init + learned rates", "random init + one tuned rate", "random init, no search (momo_adam)",
    "random init, no search (schedule_free_sgd)", "random init, no search (prodigy)",
    "random init, no search (adam_cosine)", "random init, no search (Adam 0.001)",
)  # fmt: skip


def file_name(case: str) -> str:
    return re.sub(r"\W+", "_", case).strip("_")


@functools.cache
def measured() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["rows"]


def rows_of(case: str) -> list[dict[str, Any]]:
    return [row for row in measured() if row["case"] == case]


def above(series: Series, least: float) -> Series:
    """The part of a line where methods are close, which the rest would press into one line."""
    kept = [i for i, y in enumerate(series.y) if y >= least]
    x, y, low, high = ([values[i] for i in kept] for values in (series.x, series.y, series.low, series.high))
    return series._replace(x=x, y=y, low=[max(value, least) for value in low], high=high)


def drawing(case: str, rows: list[dict[str, Any]]) -> str:
    """Accuracy against cost as one SVG file, with its legend, for light and dark pages alike."""
    series = {s.name: s for s in page.against_cost(rows, "accuracy")}
    least = LEAST.get(case, 0.0)
    drawn = ALONE if case.startswith("rates alone") else DRAWN
    chosen = [above(series[name], least) for name in drawn if name in series]
    searches = [
        r
        for r in rows
        if r["accuracy"] >= least and r["steps"] is None and r["method"].endswith("trained again on all")
    ]
    if searches:
        searches.sort(key=lambda r: r["example_gradients"])
        x, y = [r["example_gradients"] for r in searches], [r["accuracy"] for r in searches]
        chosen.append(Series("searches of each task's own, trained again on all", x, y, points=True))
    return figures.standalone(
        case, f"Accuracy against the cost of one task: {case}.", chosen, x_label="example-gradients of one new task",
        y_label=f"accuracy, from {100 * least:.0f} % up" if least else "accuracy", log_x=True, percent=True,
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, as a table: accuracy, what the learned method is above it by at no more cost, cost."""
    lines = [
        "| method | steps | accuracy | tasks | thousands of example-gradients | learned - this, at no more cost |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = row.get("learned_minus_this_at_equal_cost")
        less = (
            ""
            if not difference or difference == [0.0, 0.0]
            else f"{100 * difference[0]:+.1f} ± {100 * difference[1]:.1f}"
        )
        steps = "" if row["steps"] is None else f"{row['steps']:,}"
        score = f"{100 * row['accuracy']:.1f} ± {100 * row['ci95']:.1f}"
        cost = f"{row['example_gradients'] / 1000:,.1f}"
        lines.append(f"| {row['method']} | {steps} | {score} | {row['tasks']} | {cost} | {less} |")
    return "\n".join(lines) + "\n"


def rival(row: dict[str, Any]) -> str:
    """A rival's accuracy, and what the learned method is above it by at no more cost."""
    difference, ci95 = (100 * value for value in row["learned_minus_this_at_equal_cost"])
    return f"{100 * row['accuracy']:.1f} ({difference:+.1f} ± {ci95:.1f})"


def best_search(rows: list[dict[str, Any]], init: str) -> str:
    """The most accurate of what a task's own searches end with from such an init; "" if there is none."""
    ends = [
        row for row in rows
        if row["steps"] is None and row["method"].startswith(f"{init} init") and "on the test part" not in row["method"]
    ]  # fmt: skip
    return rival(max(ends, key=lambda row: row["accuracy"])) if ends else ""


def without_searches(at: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """The learned method, one tuned rate from the pre-trained init, and the best optimizer without a rate.

    at: method -> its row at one number of steps.
    """
    learned = at["learned init + learned rates"]
    free = [row for method, row in at.items() if "no search" in method and "Adam" not in method]
    best = max(free, key=lambda row: row["accuracy"])
    start, optimizer = re.fullmatch(r"(.*) init, no search \((.*)\)", best["method"]).groups()
    return (
        f"{100 * learned['accuracy']:.1f} ± {100 * learned['ci95']:.1f}",
        rival(at["pre-trained init + one tuned rate"]),
        f"{rival(best)} {optimizer}, {start}",
    )


def early_stopping() -> str:
    """A row for each case and length, with early stopping: the learned method, where it stops, its closest rivals."""
    lines = [
        "| tasks | at most so many steps | learned init + rates | it stops after | pre-trained init, one tuned rate "
        "| random init, one tuned rate | best optimizer without a rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, (name, _) in SUMMARY.items():
        rows = rows_of(f"{case.removesuffix('several horizons')}early stopping")
        lengths = sorted({row["steps"] for row in rows})
        for steps in lengths:
            at = {row["method"]: row for row in rows if row["steps"] == steps}
            learned, *rivals = without_searches(at)
            stops = at["learned init + learned rates"]["chosen"]["steps"]
            rivals.insert(1, rival(at["random init + one tuned rate"]))
            cells = [name if steps == lengths[0] else "", str(steps), learned, str(stops), *rivals]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary() -> str:
    """A row for each case and length: the learned method, and the best rival of each kind."""
    lines = [
        "| tasks | steps | learned init + rates | pre-trained init, one tuned rate | best optimizer without a rate "
        "| best search, random init | best search, pre-trained init |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, (name, lengths) in SUMMARY.items():
        rows = rows_of(case)
        for steps in lengths if rows else ():
            cells = [
                name if steps == lengths[0] else "",
                f"{steps:,}",
                *without_searches({row["method"]: row for row in rows if row["steps"] == steps}),
                *(best_search(rows, init) if steps == lengths[-1] else "" for init in ("random", "pre-trained")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summarised(text: str) -> str:
    """A page with its summary as the results have it."""
    return SUMMARY_PLACE.sub(lambda found: f"{found.group(1)}\n{summary()}\n{found.group(2)}", text)


def filled(text: str) -> str:
    """The page with its tables as the results have them."""
    text = EARLY_PLACE.sub(lambda found: f"{found.group(1)}\n{early_stopping()}\n{found.group(2)}", text)
    return PLACE.sub(lambda found: f"{found.group(1)}\n{table(rows_of(found.group(2)))}\n{found.group(3)}", text)


def drawings(text: str) -> dict[Path, str]:
    """The files of the page's figures, and what they hold."""
    cases = [found.group(2) for found in PLACE.finditer(text)]
    return {ROOT / "docs" / "figures" / f"{file_name(case)}.svg": drawing(case, rows_of(case)) for case in cases}


def main() -> None:
    text = PAGE.read_text()
    PAGE.write_text(filled(text))
    for path in SUMMARISED:
        path.write_text(summarised(path.read_text()))
    for path, content in drawings(text).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        print(path)


if __name__ == "__main__":
    main()
