"""Checkpoints of a run: everything that the next outer step needs, so that a resumed run ends with the same bits.

A checkpoint is a sealed folder `step_N` with state.safetensors and manifest.json. The newest KEEP that are whole stay.
A damaged one is refused by name, the one before it is used, and the next time that step comes it is written anew.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as tensor_bytes

from metalr.errors import ArtifactError, one_line
from metalr.storage import sealed
from metalr.trees import leaf_names, named_arrays, path_name

FORMAT, KEEP = 1, 2
TENSORS, MANIFEST = "state.safetensors", "manifest.json"
MAX_BYTES = 1 << 34


def save(folder: Path, step: int, tree: Any, facts: dict[str, Any]) -> Path:
    """Write step_N into a folder that exists, then remove all but the newest KEEP whole ones. `facts`: JSON values.

    Raises:
      ArtifactError: a value of the tree is not finite; nothing is written. StorageError: the disk refuses.
    """
    arrays = named_arrays(tree, "state")
    for name, value in arrays.items():
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise ArtifactError(f"{folder}: {name}: expected finite values at step {step}, so nothing is written")
    path = folder / f"step_{step:09d}"
    if not _is_whole(path):
        facts = {"format": FORMAT, "step": step, "facts": facts}
        sealed.write(path, {TENSORS: tensor_bytes(arrays)}, MANIFEST, facts)
    found = _newest_first(folder)
    others = [other for other in found if other != path and _is_whole(other)]
    for old in set(found) - {path, *others[: KEEP - 1]}:
        with contextlib.suppress(OSError):  # the manifest first: what is left of it is no checkpoint
            (old / MANIFEST).unlink()
            shutil.rmtree(old)
    return path


def _is_whole(path: Path) -> bool:
    """Whether the checkpoint is there, with the content that its manifest vouches for."""
    try:
        sealed.read_file(path, TENSORS, sealed.read_manifest(path, MANIFEST, FORMAT), MAX_BYTES)
    except ArtifactError:
        return False
    return True


def any_in(folder: Path) -> bool:
    """Whether there are checkpoints, whole or not."""
    return bool(_newest_first(folder))


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_" + "[0-9]" * 9), reverse=True)


def load(folder: Path, like: Any, report: Callable[[str], None]) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint that is whole, as (tree of numpy arrays, facts); None if there is none at all.

    Args:
      like: a tree of arrays or ShapeDtypeStructs with the structure to fill.
      report: called with a line for each damaged checkpoint that is passed over.

    Raises ArtifactError: there are checkpoints, and none is whole.
    """
    refused: ArtifactError | None = None
    for path in _newest_first(folder):
        try:
            return _load_one(path, like)
        except ArtifactError as error:
            refused = error
            report(f"checkpoint {path.name} is passed over: {error}")
    if refused is not None:
        raise ArtifactError(f"{folder}: no checkpoint is whole; the last reason: {refused}")
    return None


def shared(
    found: tuple[Any, dict[str, Any]] | None, like: Any, from_first_process: Callable[[bytes], bytes]
) -> tuple[Any, dict[str, Any]] | None:
    """What the first process of a run has loaded, in all of its processes; they need not see its folder.

    Args:
      found: what `load` gave; only the first process's counts.
      like: as in `load`.
      from_first_process: gives the first process's bytes in all processes.
    """
    content = b""
    if found is not None:
        content = json.dumps(found[1]).encode() + b"\n" + tensor_bytes(named_arrays(found[0], "state"))
    facts, _, tensors = from_first_process(content).partition(b"\n")
    if not facts:
        return None
    arrays = parse_tensors(tensors)
    leaves = [arrays[f"state/{name}"] for name in leaf_names(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), json.loads(facts)


def _load_one(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    facts = sealed.read_manifest(path, MANIFEST, FORMAT)
    try:
        tensors = parse_tensors(sealed.read_file(path, TENSORS, facts, MAX_BYTES))
    except SafetensorError as error:
        raise ArtifactError(f"{path / TENSORS}: not a safetensors file: {one_line(error)}") from error
    wanted = {
        f"state/{path_name(path)}": (leaf.shape, np.dtype(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    found = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ArtifactError(f"{path / TENSORS}: {wrong[0]}: expected {wanted.get(wrong[0])}, got {found.get(wrong[0])}")
    return jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in wanted]), facts["facts"]
