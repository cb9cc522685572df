"""Files that survive a crash: written whole or not at all; and one run at a time in a folder.

Everything goes to a temporary name, is flushed to the disk, and only then takes its real name, so that a reader sees
the old or the new, whatever happens in between. Imports no jax, so that a run that cannot start says so at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NoReturn

from metalr.errors import ConfigError, LockedError, StorageError, one_line

try:
    import fcntl
except ImportError:  # Windows, where msvcrt locks bytes instead
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
DATA = "data.json"  # which data a run folder was begun with
FAILED, MADE = "failed.json", "provenance.json"  # the error that ended a job; by what it was begun
REPORT = "report.html"
LOGGERS = "loggers.json"  # what loggers go on with
EXAMPLES = "examples.json"  # a few held-out tasks, for the report
OWN = {LOCK, DATA, FAILED, MADE, REPORT, EXAMPLES, LOGGERS, "tensorboard", "wandb"}
LOCKED_BYTE = 1 << 30  # on Windows a locked byte cannot be read, so it is one after the end of the file
UMASK = os.umask(0)  # what new files and folders are not to allow; it cannot be read without setting it
os.umask(UMASK)
OLD = "-old"  # the end of the name that a replaced folder has for a moment, where two cannot change places


def refuse(path: Path, error: OSError, needed: int | None = None) -> NoReturn:
    """Raise StorageError for an OSError: the path, the reason, and for a full disk the bytes needed and free."""
    text = f"{path}: cannot be written: {error.strerror or one_line(error)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            place = next(p for p in (path, *path.parents) if p.exists())
            wanted = "" if needed is None else f"needed {needed:,} bytes, "
            text += f"; {wanted}{shutil.disk_usage(place).free:,} free; make room, or choose another folder"
    raise StorageError(text) from error


def make(path: Path, *, parents: bool = False) -> None:
    """Make a folder, or find it there. Raises StorageError."""
    try:
        path.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        refuse(path, error)


def check_free(folder: Path | None, files: AbstractSet[str], *, overwrite: bool, locked: bool = False) -> None:
    """Raises ConfigError if `folder` cannot become a run's: it is a file, in use, or holds something already.

    Args:
      folder: None is free.
      files: what a run of this kind leaves; with overwrite the folder may hold those, and nothing else.
      locked: this process holds its lock.
    """
    try:
        if folder is None or not folder.exists():
            return
        if not folder.is_dir():
            raise ConfigError(f"out: {folder}: expected a folder, found a file")
        if not locked:
            refuse_if_locked(folder)
        names = {path.name for path in folder.iterdir()} - {LOCK} - {path.name for path in leftovers(folder)}
    except OSError as error:
        raise ConfigError(f"out: {folder}: cannot be used: {one_line(error)}") from error
    if names and not overwrite:
        raise ConfigError(
            f"out: {folder}: exists and is not empty; choose another, pass --overwrite, or go on with --resume {folder}"
        )
    if names and not ("config.json" in names and names <= files):
        raise ConfigError(f"out: {folder}: expected a run to overwrite, found other files: {sorted(names - files)}")
    for inside in (folder / "runs").glob("*"):  # of a sweep that was killed, whose runs go on by themselves
        refuse_if_locked(inside)


def check_replaceable(
    setting: str, path: Path, files: AbstractSet[str], *, what: str, marker: str = "", overwrite: bool = True
) -> None:
    """Raises ConfigError unless `path` is free, an empty folder, or (with overwrite) holds nothing but `files`.

    setting, what: what messages call the path, and a folder of that kind. marker: a file that each of them has.
    """
    try:
        if not path.exists():
            return
        if not path.is_dir():
            raise ConfigError(f"{setting}: {path}: expected a new folder or {what} to replace, found a file")
        names = {inside.name for inside in path.iterdir()}
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: cannot be used: {one_line(error)}") from error
    if names - files or (names and marker and marker not in names):
        raise ConfigError(
            f"{setting}: {path}: expected a new folder or {what} to replace, found other files: "
            f"{sorted(names - files or names)[:5]}"
        )
    if names and not overwrite:
        raise ConfigError(f"{setting}: {path}: exists already; choose another folder, or pass overwrite=True")


def claim(folder: Path | None, name: str) -> Path:
    """Make a run's folder, or find it there; None: runs/NAME, numbered if taken. Raises StorageError."""
    path, count = folder or Path("runs") / name, 2
    try:
        while True:
            try:
                path.mkdir(parents=True, exist_ok=folder is not None)
                return path
            except FileExistsError:
                path, count = Path("runs") / f"{name}-{count}", count + 1
    except OSError as error:
        refuse(path, error)


def clear(folder: Path, files: AbstractSet[str]) -> None:
    """Remove what an earlier run of this kind left, but not the lock. Call it with the lock held."""
    sweep(folder)
    for old in files - {LOCK}:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(folder / old) if (folder / old).is_dir() else (folder / old).unlink()


def _write_flushed(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises StorageError; nothing is left behind then."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.unlink(missing_ok=True)
            _write_flushed(part, content)
            os.replace(part, path)
            _flush_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
    except OSError as error:
        refuse(path, error, len(content))


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all. Raises StorageError."""
    write_file(path, json.dumps(value, indent=1).encode() + b"\n")


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Write a folder of files whole or not at all, in the order given (a manifest last); replaces one that exists.

    The folder that it goes into must exist: if it vanished during a run, nobody wants it back with one file in it.

    Raises StorageError; nothing is left behind then, and a folder that was there stays.
    """

    def fill(part: Path) -> None:
        for name, content in files.items():
            _write_flushed(part / name, content)

    build_folder(path, fill, sum(map(len, files.values())))


def build_folder(path: Path, fill: Callable[[Path], None], needed: int | None = None) -> None:
    """Make the folder `path` of what `fill(folder)` writes, whole or not at all; replaces one that exists.

    At every moment, that of a crash too, `path` is the old folder or the new one. Where the operating system cannot
    exchange two names (Windows, some network file systems), a crash may leave the old one under a temporary name, from
    which `sweep` brings it back.

    needed: bytes, for what a full disk is told.

    Raises StorageError; nothing is left behind then, and a folder that was there stays.
    """
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}-tmp-", dir=path.parent))
        try:
            fill(part)
            part.chmod(0o777 & ~UMASK)  # as mkdir makes one; mkdtemp leaves it to its owner alone
            _flush_folder(part)
            _put_in_place(part, path)
            _flush_folder(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        refuse(path, error, needed)


def _put_in_place(part: Path, path: Path) -> None:
    """Give a finished folder its name, in exchange for one that has it. Raises OSError."""
    if not path.exists():
        os.rename(part, path)
    elif not _exchange(part, path):
        old = part.with_name(f"{part.name}{OLD}")
        os.rename(path, old)
        try:
            os.rename(part, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old)


@functools.cache
def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    """The system call that lets two names change places in one step, where there is one."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            here = -100  # AT_FDCWD; the 2 below is RENAME_EXCHANGE
            return lambda a, b: library.renameat2(here, a, here, b, 2)
        if sys.platform == "darwin":
            return lambda a, b: library.renamex_np(a, b, 2)  # RENAME_SWAP
    return None


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    call = _exchange_call()
    return call is not None and call(os.fsencode(a), os.fsencode(b)) == 0


def leftovers(folder: Path) -> list[Path]:
    """What a killed process left half-written in `folder`."""
    return [*folder.glob(".*.part"), *folder.glob(".*-tmp-*")]


def sweep(folder: Path) -> None:
    """Remove the leftovers; bring back a folder that was about to be replaced. Call it with the lock held."""
    for leftover in leftovers(folder):
        with contextlib.suppress(OSError):
            replaced = folder / leftover.name[1:].rpartition("-tmp-")[0]
            if leftover.name.endswith(OLD) and not replaced.exists():
                os.rename(leftover, replaced)
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def append_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a file of JSON lines and flush it to the disk; a line that a kill cut off is ended first.

    Raises StorageError.
    """
    try:
        with file.open("a+b") as log:
            torn = False
            if end := log.tell():
                log.seek(end - 1)
                torn = log.read(1) != b"\n"
            log.write((b"\n" if torn else b"") + "".join(json.dumps(row) + "\n" for row in rows).encode())
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        refuse(file, error)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without lines that a kill cut off; none if there is no file."""
    return rows_of(file.read_bytes().splitlines() if file.is_file() else ())


def rows_of(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The rows of JSON lines, without those that a kill cut off."""
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def place(path: Path | str, folder: Path) -> dict[str, str]:
    """Where something stands that `folder` refers to, in all ways that may still hold when either is moved."""
    absolute = os.path.abspath(os.path.expanduser(path))
    try:
        relative = os.path.relpath(absolute, os.path.abspath(folder))
    except ValueError:  # another drive of Windows
        relative = absolute
    return {"given": str(path), "absolute": absolute, "from_folder": relative}


def places(recorded: dict[str, Any], folder: Path) -> list[str]:
    """Where to look for what `place` recorded, without repetition."""
    found = [recorded.get("given"), recorded.get("absolute")]
    if "from_folder" in recorded:
        found.append(os.path.normpath(os.path.join(os.path.abspath(folder), recorded["from_folder"])))
    return list(dict.fromkeys(str(each) for each in found if each))


OWN_TASKS = "tasks given in Python"  # in place of the name of data


def remember_data(folder: Path, name: str, sha256: str) -> None:
    """Write down which data a run folder was begun with, and where that stands; once."""
    if not (folder / DATA).is_file():
        where = place(name, folder) if name.lower().endswith((".npz", ".csv", ".parquet")) else {"given": name}
        write_json(folder / DATA, {"sha256": sha256} | where)


def data_of(folder: Path) -> dict[str, Any]:
    """What `remember_data` wrote; empty if it never did."""
    file = folder / DATA
    return _facts(file.read_bytes()) if file.is_file() else {}


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the lock of `folder`: {"pid", "host"}; None if nobody does."""
    try:
        with (folder / LOCK).open("rb") as file:
            free = _lock(file.fileno(), shared=True)
            facts = _facts(file.read())
            if not free:
                return facts
            elsewhere = facts.get("host", socket.gethostname()) != socket.gethostname()
            return facts if elsewhere else None
    except OSError:
        return None


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file until it is closed, without waiting; False if somebody else holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            import msvcrt

            windows: Any = msvcrt  # its functions are in its type on Windows only
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            windows.locking(descriptor, windows.LK_NBLCK, 1)
            if shared:  # only asked: a reader must not keep the next run out
                windows.locking(descriptor, windows.LK_UNLCK, 1)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    finally:
        if fcntl is None:
            os.lseek(descriptor, 0, os.SEEK_SET)
    return True


def refuse_if_locked(folder: Path) -> None:
    """Raises LockedError if another run holds `folder`; takes no lock."""
    found = holder(folder)
    if found is not None:
        _raise_locked(folder, found)


def _raise_locked(folder: Path, facts: dict[str, Any]) -> NoReturn:
    host = facts.get("host", "an unknown host")
    hint = "" if host == socket.gethostname() else f", or delete {folder / LOCK} if that run is gone"
    raise LockedError(
        f"out: {folder}: in use by the run with pid {facts.get('pid', '?')} on {host}; choose another folder, or wait "
        f"for it{hint}"
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`. The kernel lets go of it when the process ends, however that happens.

    The file says who holds it; what a killed run of this host left in it is taken over.

    Raises LockedError if another run holds it; StorageError if the folder cannot be written.
    """
    while True:
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            refuse(folder / LOCK, error)
        if not _lock(descriptor):
            facts = _facts(os.read(descriptor, 4096))
            os.close(descriptor)
            _raise_locked(folder, facts)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == (folder / LOCK).stat().st_ino:
                break  # and not the file that an ending run has just removed
        os.close(descriptor)
    try:
        found = _facts(os.read(descriptor, 4096))
        if found.get("host", socket.gethostname()) != socket.gethostname():
            _raise_locked(folder, found)  # a network folder whose locks may not reach us
        facts = {"pid": os.getpid(), "host": socket.gethostname()}
        try:
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps(facts).encode())
        except OSError as error:
            refuse(folder / LOCK, error)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def taken(folder: Path | None, name: str, files: AbstractSet[str], *, overwrite: bool) -> Iterator[Path]:
    """A folder for a new run, locked and cleared of what `files` an earlier run left: see claim, locked, clear.

    Call check_free before, when nothing has been made yet; here it is asked again with the lock held.
    """
    path = claim(folder, name)
    with locked(path):
        check_free(path, files, overwrite=overwrite, locked=True)  # somebody may have been faster
        clear(path, files)
        yield path


def _facts(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
