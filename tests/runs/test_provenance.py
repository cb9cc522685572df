"""What a run says of its own making."""

import shlex
import sys

import pytest

from metalr.runs import provenance


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/metalr", "train", "--seed", "1"], "metalr train --seed 1"),
        (["/x/metalr/cli/__main__.py", "train"], "metalr train"),
        (["experiments/mine.py", "--seeds", "0", "1"], "python experiments/mine.py --seeds 0 1"),
        (["benchmarks/grid_search.py", "--only", "a, b"], "python benchmarks/grid_search.py --only 'a, b'"),
    ],
)  # fmt: skip
def test_the_command_can_be_typed_again(argv, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.command() == expected
    assert shlex.split(provenance.command())[-len(argv) + 1 :] == argv[1:] or len(argv) == 1
