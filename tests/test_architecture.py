"""The layer table of ARCHITECTURE.md holds: each module imports only from rows above its own, and no file is long."""

import ast
import re
from pathlib import Path
from typing import get_args

from metalr import algorithms, config, models, outer, rates, tasks

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in (ROOT / "metalr").glob("*.py") if path.stem != "__init__"}


def layers():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)`", names)}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "metalr":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metalr."):
            yield node.module.split(".")[1]


def test_every_module_is_in_the_table():
    assert set(layers()) == set(MODULES)


def test_imports_go_up_only():
    table = layers()
    for name, path in MODULES.items():
        for other in imported(path):
            assert table[other] < table[name], f"{name} (layer {table[name]}) imports {other} (layer {table[other]})"


def test_no_file_is_long():
    files = [p for folder in ("metalr", "experiments", "benchmarks", "tests") for p in (ROOT / folder).glob("*.py")]
    long = {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_choices_on_the_command_line_are_those_of_the_tables():
    def choices(kind, name):
        return {v for v in get_args(kind.__dataclass_fields__[name].type) or literal(kind, name) if isinstance(v, str)}

    def literal(kind, name):
        from typing import get_type_hints

        hint = get_type_hints(kind)[name]
        options = get_args(hint)
        return [v for option in options for v in (get_args(option) or (option,))]

    assert choices(config.TaskConfig, "family") == set(tasks.FAMILIES)
    assert choices(config.ModelConfig, "name") == set(models.MODELS)
    assert choices(config.ModelConfig, "norm") == set(models.NORMS)
    assert choices(config.ModelConfig, "cell") == set(models.CELLS)
    assert choices(config.InnerConfig, "algorithm") == set(algorithms.ALGORITHMS)
    assert choices(config.InnerConfig, "granularity") == set(rates.GRANULARITIES)
    assert choices(config.InnerConfig, "adapts") == set(rates.ADAPTS)
    assert choices(config.InnerConfig, "extend") == set(rates.EXTENDS)
    assert choices(config.InnerConfig, "base") == set(rates.BASES)
    assert choices(config.InnerConfig, "derivative") == {"auto", *outer.DERIVATIVES}
