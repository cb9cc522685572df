"""Fine-tuned params in one .safetensors file: tensors under their path names, the names of classes, and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as tensor_bytes

from metalr.errors import ArtifactError, ConfigError, one_line
from metalr.storage import folders
from metalr.trees import named_arrays
from metalr.types import Params

KIND = "metalr params"


class ClassNames(NamedTuple):
    """The classes of a support set. names: what they are called; outputs: which output of the network each one is."""

    names: tuple[Any, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of_outputs(cls, names: Iterable[Any]) -> ClassNames:
        """Names of the outputs 0, 1, …; numpy's scalars become Python's."""
        plain = tuple(name.item() if isinstance(name, np.generic) else name for name in names)
        return cls(plain, tuple(range(len(plain))))


def write(path: Path | str, params: Params, classes: ClassNames | None, meaning: str) -> None:
    """Write params, whole or not at all, in place of such a file or of none.

    meaning: a hash of what inputs and outputs stand for.

    Raises ConfigError where another kind of file is there, and StorageError if it cannot be written.
    """
    path = Path(path)
    if path.exists() and not _is_ours(path):
        raise ConfigError(f"{path}: expected a new file, or one of fine-tuned params to replace, found another one")
    tensors = {name.partition("/")[2]: value for name, value in named_arrays(params, "params").items()}
    text = json.dumps(None if classes is None else classes._asdict())
    facts = {"kind": KIND, "classes": text, "meaning": meaning, "sha256": _sha256(tensors, text + meaning)}
    folders.make(path.parent, parents=True)
    folders.write_file(path, tensor_bytes(tensors, facts))


def read(path: Path | str, meaning: str) -> dict[str, np.ndarray]:
    """The tensors by name.

    Raises ArtifactError: no such file, another kind of file, a damaged one, or one written with another `meaning`.
    """
    tensors, _, written = _read(Path(path))
    if written != meaning:
        raise ArtifactError(
            f"{path}: expected params that this learner fine-tuned, got those of one with another objective, other "
            "columns or another standardisation; take the run that wrote them"
        )
    return tensors


def read_classes(path: Path | str) -> ClassNames | None:
    """The classes that were written with params; None where outputs are no classes. Raises as `read`."""
    facts = json.loads(_read(Path(path))[1])
    return None if facts is None else ClassNames(tuple(facts["names"]), tuple(facts["outputs"]))


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="numpy") as file:
            return (file.metadata() or {}).get("kind") == KIND
    except (SafetensorError, OSError):
        return False


def _read(path: Path) -> tuple[dict[str, np.ndarray], str, str]:
    """Tensors, names of classes, and the meaning that was written."""
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a file of fine-tuned params, found none")
    try:
        with safe_open(str(path), framework="numpy") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a .safetensors file: {one_line(error)}") from error
    if facts.get("kind") != KIND:
        raise ArtifactError(
            f"{path}: expected params that `save_params` or `metalr adapt --out` wrote, got another file"
        )
    if facts.get("sha256") != _sha256(tensors, facts.get("classes", "") + facts.get("meaning", "")):
        raise ArtifactError(f"{path}: damaged: its content is not the one that was written")
    return tensors, facts["classes"], facts["meaning"]


def _sha256(tensors: dict[str, np.ndarray], classes: str) -> str:
    digest = hashlib.sha256(classes.encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
