"""The figures of docs/evidence.md and the tables of docs/evidence_tables.md, from results/grid_search.json.

    python benchmarks/evidence.py

Draws docs/figures/CASE.svg for every case that the page has a place for (<!-- table: CASE -->), and fills in its table.
"""

from __future__ import annotations

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
LEAST = {
    "rotated, full data, several horizons": 0.88,
    "rotated 10-way 5-shot, several horizons": 0.86,
    "scaled 10-way 5-shot, several horizons": 0.945,
    "relabeled 10-way 5-shot, several horizons": 0.4,
    "rotated 10-way 1-shot, trained with 5, several horizons": 0.8,
    "rotated 10-way 20-shot, trained with 5, several horizons": 0.86,
}  # drawn from there
DRAWN = (  # of the methods that take one run a task; searches are points beside them
    "learned init + learned rates", "random init + learned rates", "pre-trained init, no search (momo_adam)",
    "pre-trained init, no search (Adam 0.001)", "pre-trained init + one tuned rate",
    "random init, no search (momo_adam)",
    "random init, no search (Adam 0.001)",
)  # fmt: skip


def file_name(case: str) -> str:
    return re.sub(r"\W+", "_", case).strip("_")


def rows_of(case: str) -> list[dict[str, Any]]:
    return [row for row in json.loads(RESULTS.read_text())["rows"] if row["case"] == case]


def above(series: Series, least: float) -> Series:
    """The part of a line where methods are close, which the rest would press into one line."""
    kept = [i for i, y in enumerate(series.y) if y >= least]
    x, y, low, high = ([values[i] for i in kept] for values in (series.x, series.y, series.low, series.high))
    return series._replace(x=x, y=y, low=[max(value, least) for value in low], high=high)


def drawing(case: str, rows: list[dict[str, Any]]) -> str:
    """Accuracy against cost as one SVG file, with its legend, for light and dark pages alike."""
    series = {s.name: s for s in page.against_cost(rows, "accuracy")}
    least = LEAST.get(case, 0.0)
    chosen = [above(series[name], least) for name in DRAWN if name in series]
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


def filled(text: str) -> str:
    """The page with its tables as the results have them."""
    return PLACE.sub(lambda found: f"{found.group(1)}\n{table(rows_of(found.group(2)))}\n{found.group(3)}", text)


def drawings(text: str) -> dict[Path, str]:
    """The files of the page's figures, and what they hold."""
    cases = [found.group(2) for found in PLACE.finditer(text)]
    return {ROOT / "docs" / "figures" / f"{file_name(case)}.svg": drawing(case, rows_of(case)) for case in cases}


def main() -> None:
    text = PAGE.read_text()
    PAGE.write_text(filled(text))
    for path, content in drawings(text).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        print(path)


if __name__ == "__main__":
    main()
