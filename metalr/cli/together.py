"""`python -m metalr.cli.together CONFIG ...`: seeds of one setting as one program, as a sweep starts them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from metalr.cli import commands
from metalr.config.files import from_json
from metalr.storage import folders


def main(files: list[str]) -> None:
    """Meta-train with the settings of each file, which name their run folders; leave a report in each."""
    commands.start_jax()
    from metalr.report import page
    from metalr.runs import training

    configs = [from_json(json.loads(Path(file).read_text())) for file in files]
    for results in training.run_together(configs, name="seed"):
        page.write(Path(results["folder"]) / folders.REPORT, [Path(results["folder"])])


if __name__ == "__main__":
    commands.guard(lambda: main(sys.argv[1:]))
