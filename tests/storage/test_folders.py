"""Durable files and the lock: old or new, nothing in between, one run at a time."""

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from metalr.errors import LockedError, MetalrError, StorageError
from metalr.storage import folders


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failing_disk_leaves_the_old_and_no_trace(call, there, tmp_path, monkeypatch):
    file, folder = tmp_path / "a.json", tmp_path / "b"
    if there:
        folders.write_file(file, b"old")
        folders.write_folder(folder, {"x": b"old"})
    before = names(tmp_path)

    real = os.open

    def fail(*args, **kwargs):
        if call == "open" and not args[1] & os.O_CREAT:
            return real(*args, **kwargs)  # reading, and removing folders, still work
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    if call == "rename":  # one fault for whatever gives things their names
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    with pytest.raises(StorageError, match=r"a.json: cannot be written: No space.*needed 3 bytes, [\d,]+ free"):
        folders.write_file(file, b"new")
    with pytest.raises(StorageError, match=r"/b: cannot be written: .*needed 6 bytes, [\d,]+ free; make room"):
        folders.write_folder(folder, {"x": b"new", "y": b"new"})
    monkeypatch.undo()
    assert names(tmp_path) == before
    if there:
        assert (file.read_bytes(), (folder / "x").read_bytes()) == (b"old", b"old")


def test_files_and_folders_are_replaced(tmp_path):
    for content in (b"1", b"22"):
        folders.write_file(tmp_path / "a", content)
        folders.write_folder(tmp_path / "b", {"x": content})
        assert ((tmp_path / "a").read_bytes(), (tmp_path / "b" / "x").read_bytes()) == (content, content)
    assert names(tmp_path) == ["a", "b", "x"]


@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
def test_whoever_may_read_new_files_may_read_these(tmp_path):
    (tmp_path / "mine").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    folders.write_file(tmp_path / "file", b"1")
    folders.write_folder(tmp_path / "whole", {"file": b"1"})
    mode = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert mode[tmp_path / "file"] == mode[tmp_path / "whole" / "file"] == mode[tmp_path / "mine"]
    assert mode[tmp_path / "whole"] == mode[tmp_path / "folder"]


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    for name in (".a.json.12.part", ".mine", "b"):
        (tmp_path / name).write_text("")
    (tmp_path / ".c-tmp-xyz").mkdir()
    folders.sweep(tmp_path)
    assert names(tmp_path) == [".mine", "b"]


CRASH = """
import os, sys
from pathlib import Path
from metalr.storage import folders

exchange, at, after = sys.argv[2] == "exchange", int(sys.argv[3]), sys.argv[4] == "after"
calls = 0

def hooked(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at and not after:
            os._exit(9)
        result = real(*args, **kwargs)
        if calls == at:
            os._exit(9)
        return result
    return call

folder = Path(sys.argv[1])
folders.write_folder(folder / "b", {"x": b"old", "y": b"old"})
if not exchange:
    folders._exchange = lambda a, b: False
folders._exchange = hooked(folders._exchange)
for name in ("open", "write", "fsync", "rename", "rmdir", "unlink"):
    setattr(os, name, hooked(getattr(os, name)))
folders.write_folder(folder / "b", {"x": b"new", "y": b"new"})
"""


@pytest.mark.parametrize("form", ["exchange", "renames"])
def test_overwriting_a_folder_leaves_the_old_or_the_new_at_every_crash(form, tmp_path):
    """Where two names can be exchanged, at once; elsewhere after the sweep that the next run begins with."""
    seen, at = set(), 0
    while True:
        at += 1
        codes = []
        for when in ("before", "after"):
            root = tmp_path / f"{at}-{when}"
            root.mkdir()
            call = [sys.executable, "-c", CRASH, str(root), form, str(at), when]
            codes.append(subprocess.run(call, check=False).returncode)
            if form == "renames":
                folders.sweep(root)
            found = {path.name: path.read_bytes() for path in (root / "b").iterdir()}
            assert found in ({"x": b"old", "y": b"old"}, {"x": b"new", "y": b"new"}), (at, when)
            seen.add(found["x"])
            folders.sweep(root)
            assert names(root) == ["b", "x", "y"]
        if codes == [0, 0]:
            break
        assert codes == [9, 9]
    assert at > 10
    assert seen == {b"old", b"new"}


def test_a_folder_about_to_be_replaced_comes_back(tmp_path):
    (tmp_path / ".run-tmp-x-tmp-abc-old").mkdir()
    (tmp_path / ".run-tmp-x-tmp-abc-old" / "x").write_text("old")
    (tmp_path / ".run-tmp-x-tmp-abc").mkdir()
    folders.sweep(tmp_path)
    assert names(tmp_path) == ["run-tmp-x", "x"]


def test_no_lock_of_unix_is_needed_to_import_and_load(tmp_path):
    """As on Windows, as far as that can be tried here."""
    code = """
import sys
sys.modules["fcntl"] = sys.modules["resource"] = None
import metalr, metalr.cli
from metalr.runs import provenance
assert provenance.peak_memory() == 0
metalr.load(sys.argv[1])
"""
    golden = sorted((Path(__file__).parents[1] / "golden").glob("*/metalr.json"))[0].parent
    subprocess.run([sys.executable, "-c", code, str(golden)], check=True)


HOLD = """
import sys, time
from pathlib import Path
from metalr.storage import folders
with folders.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_holder_at_a_time_and_a_killed_one_lets_go(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for refused in (lambda: folders.refuse_if_locked(tmp_path), lambda: folders.locked(tmp_path).__enter__()):
            with pytest.raises(LockedError, match=f"in use by the run with pid {other.pid} on {socket.gethostname()}"):
                refused()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / "lock").exists()
    folders.refuse_if_locked(tmp_path)
    with folders.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def test_another_hosts_lock_is_not_taken_over(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    for refused in (lambda: folders.refuse_if_locked(tmp_path), lambda: folders.locked(tmp_path).__enter__()):
        with pytest.raises(LockedError, match="pid 1 on elsewhere.*delete .*lock if that run is gone"):
            refused()


def test_errors_are_metalr_errors(tmp_path):
    with pytest.raises(MetalrError, match="cannot be written"), folders.locked(tmp_path / "nowhere"):
        pass
