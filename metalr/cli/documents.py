"""What a script in experiments/ calls: its config or its variants, with overrides from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import tyro

from metalr.cli.commands import Config, guard, start_jax
from metalr.config import GridConfig, TrainConfig


def experiment(config: TrainConfig, name: str, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Run an experiment document: its config with overrides from the command line, once a seed.

    As it stands, its results go to results/NAME.json and the first seed's artifact to artifacts/NAME, both beside the
    calling script. With any override they go to runs/NAME, so that published results stay what they say they are.
    """
    document, document_seeds = config, seeds

    def main(config: Config = document, seeds: tuple[int, ...] = document_seeds, folder: Path | None = None) -> None:
        """Run the experiment.

        Args:
          seeds: seeds of meta-training, each reported.
          folder: where results/ and artifacts/ go; default: beside the script, or runs/NAME if anything is overridden.
        """
        if folder is None:
            as_it_stands = (config, seeds) == (document, document_seeds)
            folder = Path(sys.argv[0]).parent if as_it_stands else Path("runs") / name
        start_jax()
        from metalr import report
        from metalr.runs.studies import run_seeds

        results = run_seeds(config, name, seeds, folder)
        print(report.seeds_text(results))

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    guard(lambda: tyro.cli(main, description=sys.modules["__main__"].__doc__))


def study(variants: dict[str, TrainConfig], name: str, seeds: tuple[int, ...] = (0, 1, 2), **options: Any) -> None:
    """Run a study document: variants of a config, once a seed; options as studies.run_study takes them.

    With the document's seeds, the results go to results/NAME.json beside the calling script; otherwise to runs/NAME.
    """
    document = seeds

    def main(seeds: tuple[int, ...] = document) -> None:
        """Run the study.

        Args:
          seeds: seeds of meta-training, each reported.
        """
        start_jax()
        from metalr import report
        from metalr.runs.studies import run_study

        if "grid" in options:
            options["grid"] = GridConfig(**options["grid"])
        folder = Path(sys.argv[0]).parent if seeds == document else Path("runs") / name
        print(report.study_text(run_study(variants, name, seeds, folder, **options)))

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    guard(lambda: tyro.cli(main, description=sys.modules["__main__"].__doc__))
