"""The HTML report: whole, alone, in numbers too, and without a scroll bar on a phone."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from metalr.config import TrainConfig
from metalr.errors import ConfigError
from metalr.report import examples, figures, page

ALONE = {"meta", "img"}


class Balanced(html.parser.HTMLParser):
    """Fails where tags do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.count = [], {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def made(folder, metric="accuracy", grid=True, status="finished", **settings):
    folder.mkdir(parents=True)
    config = TrainConfig().to_json() | settings
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": i, "loss": 2 / (i + 1), metric: 0.5} for i in range(700)]
    lines += [{"step": 350, f"validation_{metric}": 0.6}, {"step": 700, f"validation_{metric}": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = [{"steps": n, metric: 0.1 + 0.15 * n, "ci95": 0.01} for n in range(6)]
    rows = [
        {"method": "learned init + learned rates", "steps": 5, metric: 0.85, "ci95": 0.01, "example_gradients": 250},
        {"method": "random init + grid, best cell of all", "steps": 20, metric: 0.7, "ci95": 0.02,
         "example_gradients": 10000},
        {"method": "<b>diverged & gone</b>", "steps": 1, metric: None, "ci95": None, "example_gradients": 10},
    ]  # fmt: skip
    results = {
        "config": config, "curve": curve, "tasks": "tasks",
        "metric": {"name": metric, "maximise": metric == "accuracy"},
        "rates": {"dense_0": [0.1, 0.2, -0.3], "head": [0.4, 0.5, 0.6], "momentum:head": 0.9},
        "rates_health": {"dense_0": {"negative": 0.33, "dead": 0.0}},
    }  # fmt: skip
    if status == "finished":
        (folder / "results.json").write_text(json.dumps(results | ({"comparison": rows} if grid else {})))
    return folder


def test_a_page_of_two_runs_holds_all_numbers_and_nothing_from_elsewhere(tmp_path):
    one, other = made(tmp_path / "one"), made(tmp_path / "other", grid=False, seed=3)
    text = page.page([one, other])
    parsed = Balanced()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.count["svg"] == text.count("<desc>") == parsed.count["details"] - 2  # two more hold all settings
    assert len(text) < 200_000
    assert not re.search(r"(src|href)=|url\(|@import|https?:", text)
    assert "After 5 steps on a new task, accuracy is 85.00 % ± 1.00 (before: 10.00 %)" in text
    assert "reaches 70.00 %, at 40 times the cost" in text
    assert "<td>seed</td><td>0</td><td>3</td>" in text
    assert "&lt;b&gt;diverged &amp; gone&lt;/b&gt;" in text
    assert "33 % of its rates are negative" in text
    assert "<td>momentum:head</td><td>0.9</td>" in text
    assert "metalr train --config" in text


def test_a_metric_that_is_an_error_and_a_run_that_is_not_finished(tmp_path):
    error, stopped = made(tmp_path / "error", "mse"), made(tmp_path / "stopped", status="stopped")
    text = page.page([error, stopped])
    assert "mse is 0.85 ± 0.01" in text
    assert "is stopped: it has no results yet" in text
    both = page.page([error, made(tmp_path / "classes")])
    assert {title for title in ("mse over inner steps", "accuracy over inner steps") if title in both} == {
        "mse over inner steps",
        "accuracy over inner steps",
    }
    with pytest.raises(ConfigError, match="expected one or more run folders"):
        page.page([])
    with pytest.raises(ConfigError, match=r"expected a run with config.json"):
        page.page([tmp_path])


def test_of_one_task_there_is_no_interval(tmp_path):
    """A table with one shop to test on: its episodes are of one task, and no width is known."""
    folder = made(tmp_path / "one", grid=False)
    results = json.loads((folder / "results.json").read_text())
    results |= {"held_out_tasks": 1, "curve": [point | {"ci95": None} for point in results["curve"]]}
    (folder / "results.json").write_text(json.dumps(results))
    text = page.page([folder])
    assert "600 episodes of 1 held-out task: tasks. Of one task there is no interval." in text
    assert "±" not in text
    assert "<polygon" not in text


def test_ticks_are_round_and_inside():
    assert figures.ticks(0.03, 0.97) == [0.2, 0.4, 0.6, 0.8]
    assert figures.ticks(0, 1500) == [0, 500, 1000, 1500]
    assert figures.ticks(2, 2) == [2]
    assert [figures.number(v) for v in (0.5, 2500, 1234, 250_000.5)] == ["0.5", "2.5 k", "1,234", "250,000.5"]
    assert figures.log_ticks(3, 3000) == [10, 100, 1000]
    assert figures.log_ticks(20, 80) == [20, 80]


def test_a_drawing_may_have_more_series_than_colours():
    series = [figures.Series(f"method {i}", [1, 2], [0.1 * i, 0.2]) for i in range(12)]
    drawn = figures.standalone("t", "d", series, x_label="x", y_label="y")
    assert drawn.count("<rect") == 1 + 12
    assert "method 11" in drawn
    assert "var(--c" not in drawn


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_nothing_scrolls_sideways_and_nothing_is_said_on_the_console(tmp_path, width):
    text = page.page([made(tmp_path / "one"), made(tmp_path / "two", seed=1)])
    probe = "<script>document.title=document.documentElement.scrollWidth+' of '+innerWidth</script></body>"
    (tmp_path / "page.html").write_text(text.replace("</body>", probe))
    call = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    wide, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", call.stdout).groups())
    assert wide <= window
    assert "CONSOLE" not in call.stderr


def test_a_report_imports_no_jax(tmp_path):
    made(tmp_path / "one")
    script = (
        "import sys; from metalr import cli; cli.main(['report', sys.argv[1], '-o', sys.argv[2]]); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "one"), str(tmp_path / "r.html")], check=True)
    assert (tmp_path / "r.html").stat().st_size < 1 << 20


def pictured(which, after):
    """One task of two 4 x 3 images, whose class is 1."""
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3, 1)
    images = {"size": 50, "x": base64.b64encode(pixels.tobytes()).decode(), "y": [1, 1]}
    task = {"which": which, "score": 0.5, "support": images, "query": images | {"before": [0, 0], "after": after}}
    return {"kind": "images", "shape": [4, 3, 1], "steps": 1, "metric": "accuracy", "tasks": [task]}


def test_held_out_tasks_are_pictured_with_what_was_predicted(tmp_path):
    folder = made(tmp_path / "run")
    (folder / "examples.json").write_text(json.dumps(pictured("worst", [1, 2])))
    text = page.page([folder])
    Balanced().feed(text)
    assert "run: the worst task, accuracy 50.00 % after 1 step<" in text
    assert "Learned from 50 images, of which these are 2, each with its class." in text
    assert text.count('class="wrong"') == 1
    assert 'alt="class 1, predicted 0 before and 2 after"' in text
    image = pytest.importorskip("PIL.Image")
    found = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(found) == 4
    again = image.open(io.BytesIO(base64.b64decode(found[1])))
    np.testing.assert_array_equal(np.asarray(again), np.arange(12, 24).reshape(4, 3))
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(examples.png(colours)))), colours)


def test_curves_are_drawn_before_and_after(tmp_path):
    folder = made(tmp_path / "run", metric="mse", grid=False)
    points = {"size": 2, "x": [1.0, -1.0], "y": [2.0, 3.0]}
    task = {"which": "median", "score": 0.25, "support": points}
    task["query"] = points | {"before": [0.0, 0.5], "after": [2.5, 3.5]}
    facts = {"kind": "curves", "steps": 5, "metric": "mse", "tasks": [task]}
    (folder / "examples.json").write_text(json.dumps(facts))
    text = page.page([folder])
    Balanced().feed(text)
    assert "run: the median task, mse 0.25 after 5 steps" in text
    assert "predicted after" in text
    assert "<td>-1</td><td>3.5</td><td>0.5</td><td>3</td><td>3</td>" in text  # sorted by input


def test_a_grid_is_a_heat_map_and_rates_have_a_path(tmp_path):
    folder = made(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    cell = {"init": "random", "optimizer": "adam", "batch_size": 5}
    results["grid"] = {
        "cells": [
            cell | {"learning_rate": rate, "steps": steps, "accuracy": None if rate == 1 and steps == 5 else rate / 10}
            for rate in (0.1, 1) for steps in (1, 5)
        ] + [cell | {"batch_size": 32, "learning_rate": 0.1, "steps": 1, "accuracy": 0.5}]
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    with (folder / "metrics.jsonl").open("a") as log:
        for step, rate in ((350, 0.1), (700, 0.3)):
            log.write(json.dumps({"step": step, "rates": {"dense_0": [rate, rate + 0.2], "momentum:head": 0.9}}) + "\n")
    text = page.page([folder])
    Balanced().feed(text)
    assert "run: grid search from the random init, adam" in text
    assert "rate 0.1, 1 step: 50.00 %" in text, "the best of its batch sizes"
    assert "rate 0.1, 5 steps: 1.00 %" in text
    assert "<td>rate 1</td><td>10.00 %</td><td>diverged</td>" in text
    assert "learning rates over meta-training" in text
    assert "<td>350</td><td>0.2</td>" in text
    assert "<td>700</td><td>0.4</td>" in text


def test_of_a_very_long_run_every_nth_step_is_read_and_every_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_LINES", 200)
    text = page.page([made(tmp_path / "run")])  # 702 lines
    assert "loss, means over 4 steps, of which one in 4 is read" in text
    assert "<td>350</td><td>60.00</td>" in text
    assert len(page._metrics(tmp_path / "run" / "metrics.jsonl")[0]) == 177


def test_a_task_that_diverged_does_not_end_its_report(tmp_path):
    folder = made(tmp_path / "run", metric="mse", grid=False)
    points = {"size": 2, "x": [1.0, -1.0], "y": [2.0, 3.0]}
    task = {"which": "worst", "score": None, "support": points}
    task["query"] = points | {"before": [0.0, 0.5], "after": [None, None]}
    (folder / "examples.json").write_text(json.dumps({"kind": "curves", "steps": 5, "metric": "mse", "tasks": [task]}))
    text = page.page([folder])
    Balanced().feed(text)
    assert "run: the worst task" in text
    assert "<td>diverged</td>" in text


def test_a_sweep_is_the_page_of_its_finished_runs(tmp_path):
    made(tmp_path / "sweep" / "runs" / "one")
    made(tmp_path / "sweep" / "runs" / "two", status="stopped")
    (tmp_path / "sweep" / "config.json").write_text(json.dumps({"sweep": {}, "config": {}}))
    (tmp_path / "sweep" / "sweep.jsonl").write_text("")
    text = page.page([tmp_path / "sweep"])
    assert "<b>one</b>" in text
    assert "two" not in text
    (tmp_path / "sweep" / "runs" / "one" / "results.json").unlink()
    with pytest.raises(ConfigError, match="expected a sweep with finished runs, found none"):
        page.page([tmp_path / "sweep"])


def test_of_errors_the_darker_cell_is_the_worse_and_numbers_below_zero_have_a_colour():
    drawn = figures.heat_map("t", "d", [("a", [-3.0, -1.0])], columns="step", linear=True)
    assert re.findall(r'opacity="([-\d.]+)"', drawn) == ["0.12", "1.00"]
    assert "var(--c1)" not in drawn


def test_a_file_that_is_no_report_is_not_overwritten(tmp_path):
    made(tmp_path / "run")
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"mine.csv: expected a new file, or a report to replace, found another one"):
        page.write(tmp_path / "mine.csv", [tmp_path / "run"])
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    for _ in range(2):
        page.write(tmp_path / "report.html", [tmp_path / "run"])
