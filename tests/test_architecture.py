"""The packages of ARCHITECTURE.md: each says its job, and imports only from those above it."""

import ast
import re
from pathlib import Path
from typing import get_args, get_type_hints

import metalr
from metalr import config, models, tasks
from metalr.inner import hyperparameters
from metalr.models import heads
from metalr.outer import algorithms
from metalr.runs import setup

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "metalr"
FACE = "`metalr`"  # the public face, which everything may import from and which imports on first use only


def rows():
    """Rows of the table, from the top: each a list of packages or modules that stand side by side."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    return [re.findall(r"`(\w+)`", cell) for cell in re.findall(r"^\| (`[^|]+) \|", text, re.M) if cell.strip() != FACE]


def places():
    """Packages and modules right in metalr/, by name."""
    found = {path.parent.name: list(path.parent.rglob("*.py")) for path in PACKAGE.glob("*/__init__.py")}
    return found | {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "metalr":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metalr."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("metalr."))


def test_every_package_is_in_the_table():
    named = [name for row in rows() for name in row]
    assert sorted(named) == sorted(places())
    assert len(named) == len(set(named))


def test_imports_go_up_only():
    level = {name: number for number, row in enumerate(rows()) for name in row}
    for name, files in places().items():
        for path in files:
            for other in set(imported(path)) - {name}:
                assert level[other] < level[name], (
                    f"{path.relative_to(ROOT)} imports {other}, which stands below {name}"
                )


def test_every_package_says_its_job_in_one_line():
    for path in PACKAGE.glob("*/__init__.py"):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc, path
        assert len(doc.splitlines()) == 1, path


def test_the_public_face_is_what_it_says():
    for name in metalr.__all__:
        assert getattr(metalr, name) is not None


def test_only_runs_and_the_command_line_know_the_config():
    for name, files in places().items():
        if name not in ("runs", "integrations", "cli", "config"):
            assert not any("config" in imported(path) for path in files), name


def test_choices_on_the_command_line_are_those_of_the_tables():
    def choices(kind, name):
        options = get_args(get_type_hints(kind)[name])
        return {v for option in options for v in (get_args(option) or (option,)) if isinstance(v, str)}

    assert choices(config.TaskConfig, "family") == set(tasks.FAMILIES)
    assert choices(config.ModelConfig, "name") == set(models.MODELS)
    assert choices(config.ModelConfig, "norm") == set(models.NORMS)
    assert choices(config.ModelConfig, "cell") == set(models.CELLS)
    assert choices(config.InnerConfig, "algorithm") == set(algorithms.ALGORITHMS)
    assert choices(config.InnerConfig, "granularity") == set(hyperparameters.GRANULARITIES)
    assert choices(config.InnerConfig, "adapts") == set(hyperparameters.ADAPTS)
    assert choices(config.InnerConfig, "extend") == set(hyperparameters.EXTENDS)
    assert choices(config.InnerConfig, "derivative") == {"auto", *setup.DERIVATIVES}
    assert choices(config.InnerConfig, "head_start") == {"learned", *heads.HEAD_STARTS}
    assert choices(config.TableConfig, "standardise") == {"auto", *tasks.standardisation.CHOICES}
