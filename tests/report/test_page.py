"""The HTML report: whole, alone, in numbers too, and without a scroll bar on a phone."""

import html.parser
import json
import re
import shutil
import subprocess
import sys

import pytest

from metalr.config import TrainConfig
from metalr.errors import ConfigError
from metalr.report import figures, page

ALONE = {"meta"}


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
    with pytest.raises(ConfigError, match="expected one or more run folders"):
        page.page([])
    with pytest.raises(ConfigError, match=r"expected a run with config.json"):
        page.page([tmp_path])


def test_ticks_are_round_and_inside():
    assert figures.ticks(0.03, 0.97) == [0.2, 0.4, 0.6, 0.8]
    assert figures.ticks(0, 1500) == [0, 500, 1000, 1500]
    assert figures.ticks(2, 2) == [2]
    assert figures.log_ticks(3, 3000) == [10, 100, 1000]
    assert figures.log_ticks(20, 80) == [20, 80]


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
