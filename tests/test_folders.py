"""Durable files and the lock: old or new, nothing in between, one run at a time."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from metalr import folders
from metalr.errors import LockedError, MetalrError, StorageError


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


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    for name in (".a.json.12.part", ".mine", "b"):
        (tmp_path / name).write_text("")
    (tmp_path / ".c-tmp-xyz").mkdir()
    folders.sweep(tmp_path)
    assert names(tmp_path) == [".mine", "b"]


HOLD = """
import sys, time
from pathlib import Path
from metalr import folders
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
