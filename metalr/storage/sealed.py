"""Sealed folders: files beside a manifest that holds the sha256 of each and of itself; artifacts and checkpoints.

safetensors alone loads bit-flipped weights silently, so nothing is parsed before its hash is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from metalr.errors import ArtifactError, one_line
from metalr.storage import folders

MANIFEST_BYTES = 1 << 24


def write(path: Path, contents: dict[str, bytes], manifest: str, facts: dict[str, Any]) -> None:
    """Write a folder of `contents` and a manifest of `facts`, whole or not at all. Raises StorageError."""
    facts = facts | {"files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}}
    facts["sha256"] = _sha256_of(facts)
    folders.write_folder(path, contents | {manifest: json.dumps(facts, indent=1).encode()})


def _sha256_of(facts: dict[str, Any]) -> str:
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path, manifest: str, newest_format: int) -> dict[str, Any]:
    """The facts in a folder's manifest, checked against their own hash.

    Raises ArtifactError: missing, damaged, or of a newer format.
    """
    file = path / manifest
    if not file.is_file():
        raise ArtifactError(f"{path}: expected a folder with {manifest}, found none")
    try:
        facts = json.loads(_read(file, MANIFEST_BYTES))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: damaged: {one_line(error)}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise ArtifactError(f"{file}: damaged: expected an object with a format number")
    if facts["format"] > newest_format:
        raise ArtifactError(
            f"{path}: has format {facts['format']}, this metalr reads up to {newest_format}; upgrade metalr"
        )
    if facts.get("sha256") != _sha256_of(facts):
        raise ArtifactError(f"{file}: damaged: its content does not match its sha256")
    if not isinstance(facts.get("files"), dict):
        raise ArtifactError(f"{file}: damaged: expected an object of files")
    return facts


def read_file(path: Path, name: str, facts: dict[str, Any], limit: int) -> bytes:
    """The content of one file of the folder, which the manifest vouches for.

    Raises ArtifactError: not a regular file (links are not followed), too large, or changed.
    """
    content = _read(path / name, limit)
    if hashlib.sha256(content).hexdigest() != facts["files"].get(name):
        raise ArtifactError(f"{path / name}: damaged: its sha256 is not the one in the manifest")
    return content


def sha256(manifest: Path) -> str:
    """The hash of a sealed folder's manifest, which vouches for all of it; "" if there is none."""
    return hashlib.sha256(_read(manifest, MANIFEST_BYTES)).hexdigest() if manifest.is_file() else ""


def _read(file: Path, limit: int) -> bytes:
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as opened:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ArtifactError(f"{file}: expected a regular file")
            if found.st_size > limit:
                raise ArtifactError(f"{file}: expected at most {limit} bytes, got {found.st_size}")
            return opened.read(limit + 1)
    except OSError as error:
        raise ArtifactError(
            f"{file}: expected a regular file, cannot be read: {error.strerror or one_line(error)}"
        ) from error
