"""What a run says of its own making."""

import shlex
import subprocess
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


def test_a_change_anywhere_in_the_package_is_said(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "metalr"
    (package / "outer").mkdir(parents=True)
    for name in ("__init__.py", "outer/loop.py"):
        (package / name).write_text("")

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=package, check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    commit = provenance.provenance()["commit"]
    assert len(commit) == 40
    (tmp_path / "checkout" / "notes.txt").write_text("beside the package")
    assert provenance.provenance()["commit"] == commit
    (package / "outer" / "loop.py").write_text("changed")
    assert provenance.provenance()["commit"] == f"{commit}+changes"
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    assert provenance.provenance()["commit"] == "not a checkout"
