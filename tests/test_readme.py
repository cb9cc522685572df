"""README's snippet runs, its numbers are those of the committed results, and the committed artifacts load."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import metalr
from metalr import data
from metalr.config.files import differences, from_json
from metalr.evaluation import protocol
from metalr.outer.algorithms import ALGORITHMS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ALL = {path.stem: json.loads(path.read_text()) for path in (ROOT / "experiments" / "results").glob("*.json")}
RESULTS = {name: results for name, results in ALL.items() if results.get("comparison")}
STUDIES = {name: results for name, results in ALL.items() if "rows" in results}
OMNIGLOT = {name: results for name, results in ALL.items() if name.startswith("omniglot_")}


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def snippet(part):
    """The first one with these words."""
    return next(text for text in SNIPPETS if part in text)


def test_snippet_of_a_network_of_your_own_runs():
    scope = {}
    exec(snippet("class Net(nn.Module)").replace("steps=500", "steps=2, meta_batch=2"), scope)
    assert scope["learned"].model is scope["model"]
    assert scope["results"]["training"]["outer_steps"] == 2


def test_a_table_of_your_own_in_ten_lines():
    scope = {}
    ten = snippet("metalr.meta_train(tasks, model")
    assert len([line for line in ten.splitlines() if line]) <= 10
    with jax.numpy_rank_promotion("allow"):  # as users have it
        exec(ten.replace("outer_steps=300", "outer_steps=40"), scope)
        x, y, learned = scope["x"], scope["y"], scope["learned"]
        before, after = (
            float(np.mean((np.asarray(learned.apply(params, x[10:30]))[:, 0] - y[10:30]) ** 2))
            for params in (learned.init, scope["fast"])
        )
    assert after < before


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text()
    missing = [
        name for name in metalr.__all__ if f"metalr.{name}" not in page and name not in ("__version__", "MetalrError")
    ]
    assert not missing
    assert ".. automodule:: metalr.errors" in page


def test_the_page_of_your_own_tasks_runs_from_top_to_bottom():
    page = (ROOT / "docs" / "own_tasks.md").read_text()
    scope = {}
    with jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(block.replace("outer_steps=500", "outer_steps=40"), scope)
    assert scope["curve"].mean[5] < scope["curve"].mean[0]
    assert scope["predicted"].shape == (20, 1)


def test_the_tutorial_runs_and_prints_what_was_printed(tmp_path):
    page = (ROOT / "docs" / "tutorial.md").read_text()
    assert re.findall(r"```text\n(.*?)\n```", page, re.S) == ALL["tutorial"]["printed"]
    scope = {}
    with jax.numpy_rank_promotion("allow"):  # as users have it
        for block in re.findall(r"```python\n(.*?)```", page, re.S):
            short = block.replace("outer_steps=400", "outer_steps=20, meta_batch=4").replace(
                "episodes=200", "episodes=10"
            )
            exec(short, scope)
    assert Path("runs/tutorial/report.html").is_file()
    assert scope["curve"].tasks.shape == (10, 11)


def test_the_page_of_a_network_that_is_there_already_runs(tmp_path):
    page = (ROOT / "docs" / "your_network.md").read_text()
    scope = {}
    with jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(block.replace("outer_steps=300", "outer_steps=10"), scope)
    assert scope["learned"].facts["tasks"]


def test_the_page_of_your_own_loop_runs_in_jax():
    page = (ROOT / "docs" / "own_loop.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    scope = {}
    with jax.numpy_rank_promotion("allow"):
        for block in blocks[:3]:  # the last is run by tests/integrations/test_torch.py
            exec(block.replace("outer_steps=500", "outer_steps=40"), scope)
    assert scope["params"]["head"]["kernel"].shape == (40, 1)


def algorithms() -> str:
    """The table of docs/choosing.md: a row for each algorithm."""
    lines = [
        "| algorithm | a rate for each | rates learned | second order | more | from |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in ALGORITHMS.items():
        per = "network" if row.granularity == "shared" else row.granularity
        more = {"head": "adapts the output layer alone", "body": "adapts all but the output layer"}.get(row.adapts, "")
        gradient = {
            "reptile": "moves towards the fine-tuned params",
            "implicit": "as if fine-tuning had ended in a minimum",
        }
        notes = [
            more,
            gradient.get(row.meta_gradient, ""),
            "rates predicted from the task" * row.predicted,
            "multi-step loss, then derivative-order annealing" * bool(row.multi_step),
            "" if row.head_start == "learned" else f"output layer made for each task ({row.head_start})",
        ]
        cells = [
            f"`{name}`",
            "none" if row.meta_gradient == "joint" else f"{per} and step" if row.per_step else per,
            "yes" if row.learned else "no",
            "no" if row.first_order else "yes",
            "; ".join(note for note in notes if note),
            row.source,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_guide_has_every_algorithm_as_it_is():
    text = (ROOT / "docs" / "choosing.md").read_text()
    assert re.search(r"<!-- algorithms -->\n\n(.*?)\n\n<!-- end -->", text, re.S).group(1) == algorithms()


def test_the_citation_is_of_this_version():
    citation = ROOT / "CITATION.cff"
    if citation.is_file():  # not where only the installed package is tested
        assert f"\nversion: {metalr.__version__}\n" in citation.read_text()


def test_snippet_runs():
    first = snippet("metalr.load(")
    images, labels = data.bundled().test_images[..., 0], data.bundled().test_labels
    rows = np.concatenate([np.flatnonzero(labels == digit)[:20] for digit in range(10)])
    support = np.arange(len(rows)) % 20 < 5
    scope = {
        "support_x": images[rows[support]], "support_y": labels[rows[support]], "query_x": images[rows[~support]],
    }  # fmt: skip
    path = ROOT / "experiments" / "artifacts" / "mnist_rotated_10way_5shot"
    exec(first.replace('"runs/quickstart"', repr(str(path))), scope)
    assert scope["logits"].shape == (150, 10)
    assert np.mean(np.asarray(scope["logits"]).argmax(-1) == labels[rows[~support]]) > 0.5


def test_numbers_are_those_of_the_results_files():
    """Each experiment's row: name | learned | best random cell | best cell from the learned init."""
    rows = re.findall(r"^\| \[`(\w+)`\][^|]*\|(.*)\|$", (ROOT / "docs" / "measured.md").read_text(), re.M)
    assert {name for name, _ in rows} == set(RESULTS)
    for name, cells in rows:
        comparison = {(r["method"], r["steps"]): r for r in RESULTS[name]["comparison"]}
        shown = [tuple(map(float, pair)) for pair in re.findall(r"(\d+\.\d) ± (\d+\.\d)", cells)]
        methods = [
            "learned init + learned rates", "random init + grid, best cell at 5 steps",
            "random init + grid, best cell of all", "learned init + grid, best cell at 5 steps",
            "learned init + grid, best cell of all",
        ]  # fmt: skip
        for method, (accuracy, ci95) in zip(methods, shown, strict=True):
            row = next(r for (m, steps), r in comparison.items() if m == method and (steps == 5 or "all" in m))
            assert (accuracy, ci95) == (round(100 * row["accuracy"], 1), round(100 * row["ci95"], 1)), (name, method)


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_committed_artifacts_load_and_match_their_results(name):
    path = ROOT / "experiments" / "artifacts" / name
    learned = metalr.load(path)
    assert learned.facts["split_sha256"] == RESULTS[name]["split_sha256"]
    assert sum(f.stat().st_size for f in path.iterdir()) < 2**20
    assert RESULTS[name]["provenance"]["commit"]
    assert len(RESULTS[name]["seeds"]) == 3


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_experiment_documents_expect_what_was_measured(name):
    row = next(r for r in RESULTS[name]["comparison"] if r["method"] == "learned init + learned rates")
    text = (ROOT / "experiments" / f"{name}.py").read_text()
    assert f"Expected: {100 * row['accuracy']:.1f} ± {100 * row['ci95']:.1f} % after 5 steps" in text


def test_numbers_of_the_studies_are_those_of_their_results():
    """Rows of docs/choosing.md and docs/long.md: study | variant | … | accuracy ± ci."""
    text = "".join((ROOT / "docs" / page).read_text() for page in ("choosing.md", "long.md"))
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (\d+\.\d) ± (\d+\.\d) \|", text, re.M)
    shown = {(study, variant): (float(a), float(ci)) for study, variant, a, ci in rows if study not in OMNIGLOT}
    measured = {
        (name, row["variant"]): (round(100 * row["accuracy"], 1), round(100 * row["ci95"], 1))
        for name, results in STUDIES.items()
        for row in results["rows"]
        if not row.get("horizons")
    }
    assert shown == measured
    assert all((ROOT / "experiments" / f"{name}.py").is_file() for name in STUDIES)


def test_numbers_of_longer_training_are_those_of_their_results():
    text = (ROOT / "docs" / "long.md").read_text()
    for line in ALL["evolution"]["lines"]:
        scores, difference = (
            [f"{100 * line[name]:{sign}.1f} ± {100 * line[f'{name}_ci95']:.1f}" for name in names]
            for names, sign in ((("derivatives", "then_evolution"), ""), (("difference",), "+"))
        )
        assert f"| {line['steps']:,} | {' | '.join(scores + difference)} |" in text


def test_numbers_of_long_fine_tunes_are_those_of_their_results():
    rows = re.findall(
        r"^\| ([^|]+) \| (\d+) \| ([^|]+) \| (\d+\.\d) ± (\d+\.\d) \|", (ROOT / "docs" / "long.md").read_text(), re.M
    )
    shown = {(variant, int(steps), method): (float(a), float(ci)) for variant, steps, method, a, ci in rows}
    measured = {
        (row["variant"], at["horizon"], at["method"]): (round(100 * at["accuracy"], 1), round(100 * at["ci95"], 1))
        for results in STUDIES.values()
        for row in results["rows"]
        for at in row.get("horizons", ())
    }
    assert shown == measured


@pytest.mark.parametrize("name", sorted(OMNIGLOT))
def test_omniglot_artifacts_adapt_and_match_the_docs(name):
    results, page = OMNIGLOT[name], (ROOT / "docs" / "choosing.md").read_text()
    made = from_json(results["runs"][0]["config"])
    document = runpy.run_path(str(ROOT / "experiments" / "omniglot.py"))["CONFIGS"][name.removeprefix("omniglot_")]
    assert differences(dataclasses.replace(made, out=None), document) == {}
    for what, views in (f"`{name}`", 32), (f"`{name}`, no views", 0):
        of_views = [j for j in results["judged"] if j["views"] == views]
        assert [(j["way"], j["shot"]) for j in of_views] == [(20, 1), (5, 1), (5, 5)]
        shown = [f"{100 * j['accuracy']:.1f} ± {100 * j['ci95']:.1f}" for j in of_views]
        assert f"| {what} | {' | '.join(shown)} |" in page
    path = ROOT / "experiments" / "artifacts" / name
    learned = metalr.load(path)
    assert learned.model.settings["views"] == 32
    assert learned.facts["split_sha256"] == results["split_sha256"]
    assert sum(f.stat().st_size for f in path.iterdir()) < 10**6
    for way in (5, 20):
        images = np.random.default_rng(0).integers(0, 256, (2 * way, 28, 28), dtype=np.uint8)
        fast = learned.adapt(images[:way], np.arange(way))
        assert learned.apply(fast, images).shape == (2 * way, way)


def test_numbers_of_tasks_seen_are_those_of_its_results():
    lines = ALL["tasks_seen"]["lines"]
    shown = re.findall(
        r"^\| (\d+) \| ([\d,]+) \| (\d+\.\d) ± (\d+\.\d) \|", (ROOT / "docs" / "scaling.md").read_text(), re.M
    )
    expected = [
        (str(r["channels"]), f"{r['tasks']:,}", f"{100 * r['accuracy']:.1f}", f"{100 * r['ci95']:.1f}") for r in lines
    ]
    assert shown == expected
    assert {r["of"] for r in lines} == {"", *(f"{name}.json" for name in OMNIGLOT)}


def test_numbers_of_the_comparison_are_those_of_its_results():
    """Rows of docs/measured.md."""

    def cells(row):
        paired = row.get("learned_minus_this_at_equal_cost")
        if row["method"] == "learned init + learned rates":
            paired = None
        return [
            f"`{row['case']}`",
            row["method"],
            "" if row["steps"] is None else str(row["steps"]),
            f"{100 * row['accuracy']:.1f} ± {100 * row['ci95']:.1f}",
            str(row["tasks"]),
            f"{row['example_gradients'] / 1000:,.1f}",
            f"{100 * paired[0]:+.1f} ± {100 * paired[1]:.1f}" if paired else "",
        ]

    measured = json.loads((ROOT / "benchmarks" / "results" / "grid_search.json").read_text())["rows"]
    cases = {row["case"] for row in measured}
    expected = [cells(row) for row in measured]
    shown = [[cell.strip() for cell in line[1:-1].split("|")]
             for line in (ROOT / "docs" / "measured.md").read_text().splitlines()
             if line.startswith("| `") and line.split("`")[1] in cases]  # fmt: skip
    assert [row for row in shown if row not in expected] == []
    newer = set(re.findall(r"<!-- table: (.*) -->", (ROOT / "docs" / "evidence_tables.md").read_text()))
    early = {case for case in cases if case.endswith(", early stopping")}  # in one table, see below
    assert {row[0].strip("`") for row in shown} == cases - newer - early


def test_tables_and_figures_of_the_evidence_page_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence

    text = evidence.PAGE.read_text()
    assert evidence.filled(text) == text
    early = evidence.EARLY_PLACE.search(text).group()
    for case in {row["case"] for row in evidence.measured() if row["case"].endswith(", early stopping")}:
        name, _ = evidence.SUMMARY[case.replace("early stopping", "several horizons")]
        assert f"| {name} |" in early
    for path in evidence.SUMMARISED:
        page = path.read_text()
        assert evidence.SUMMARY_PLACE.search(page)
        assert evidence.summarised(page) == page
    for path, content in evidence.drawings(text).items():
        assert path.read_text() == content
        assert f"figures/{path.name}" in text


def test_numbers_of_the_benchmarks_are_those_of_their_results():
    text = (ROOT / "benchmarks" / "README.md").read_text()

    def rows(name):
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]

    ours = {row["workload"]: row for row in rows("throughput") if row["system"] == "metalr"}
    shown = re.findall(r"^\| (\w+) \| (\d+) \| (\d+\.\d) \(", text, re.M)
    assert {name: (int(rate), float(ratio)) for name, rate, ratio in shown} == {
        name: (round(row["tasks_per_second"]), round(row["ratio_to_best_peer"], 1)) for name, row in ours.items()
    }
    for row in rows("keras_grid"):
        assert f"| {row['system']} ({row['measured']}) | {row['seconds']:.0f} | {row['times_metalr']:.1f} |" in text
    for row in rows("faults"):
        assert f"| {row['fault']} | {row['n']:,} | {row['failures']} |" in text


def test_numbers_of_your_own_tasks_are_those_of_their_results():
    """Tables of docs/own_tasks.md: the sine curves (a column for each number of steps), and the turbines."""
    page = (ROOT / "docs" / "own_tasks.md").read_text()
    measured = {}
    for row in ALL["sinusoid"]["lines"]:
        measured.setdefault(row["method"], {})[row["steps"]] = f"{row['mse']:.2f} ± {row['ci95']:.2f}"
    for method, at in measured.items():
        assert f"| {method} | {at[1]} | {at[5]} | {at[10]} |" in page
    for row in ALL["turbines"]["lines"]:
        error, difference = (
            f"{1000 * row[name]:{sign}.2f} ± {1000 * row[f'{name}_ci95']:.2f}"
            for name, sign in (("mse", ""), ("minus_learned", "+"))
        )
        assert f"| {row['method']} | {error} | {difference} |" in page
    assert len(ALL["sinusoid"]["seeds"]) == len(ALL["turbines"]["seeds"]) == 5


def test_numbers_of_the_norms_are_those_of_their_results():
    text = (ROOT / "docs" / "choosing.md").read_text()
    for row in ALL["statistics_of_norms"]["lines"]:
        shown = f"{100 * row['accuracy']:.1f} ± {100 * row['ci95']:.1f}"
        assert re.search(rf"^\| {row['norm']} \| {row['queries']} \| {re.escape(shown)} \|", text, re.M)


def test_numbers_of_bfloat16_are_those_of_their_results():
    """The differences; the rows are a study's."""
    text = (ROOT / "docs" / "choosing.md").read_text()
    of = {row["variant"]: 100 * np.array(row["accuracy_of_seeds"]) for row in ALL["precision"]["rows"]}
    for network, name in (("mlp", "an MLP"), ("conv4", "a conv net")):
        found = of[f"{network} bfloat16"] - of[f"{network} float32"]
        assert f"{found.mean():+.1f} ± {float(protocol.half_width(found)):.1f}" in text, name
