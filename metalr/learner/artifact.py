"""What meta-training leaves behind: the folder of a Learner, which anyone can check, read and reuse.

A folder holds learner.safetensors (init and actual rates), README.md (a short model card) and metalr.json (format
version, model, rates, tasks, versions, sha256 of every file and of its own content). Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as tensor_bytes

import metalr
from metalr import models, trees
from metalr.errors import ArtifactError, ConfigError, one_line
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, OBJECTIVES, Objective
from metalr.learner.learner import Learner, described
from metalr.models import Model
from metalr.storage import folders, sealed
from metalr.tasks import Standardisation
from metalr.types import Rates

FORMAT = 2  # 2: hyperparameters beside rates, schedules; 1 is read too
TENSORS, FACTS, CARD = "learner.safetensors", "metalr.json", "README.md"
MAX_BYTES = {TENSORS: 1 << 32, FACTS: sealed.MANIFEST_BYTES, CARD: 1 << 24}


def save(path: Path | str, learner: Learner, *, overwrite: bool = False) -> Path:
    """Write an artifact folder, whole or not at all; returns its path.

    Raises:
      ArtifactError: the folder exists (and not overwrite), or a value is not finite. StorageError: it cannot be
        written.
    """
    if not isinstance(learner, Learner):
        raise ArtifactError(f"save: expected a path, then a Learner, got a {type(learner).__name__} as the second")
    path = Path(path).resolve()
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path}: exists already; pass another path, or overwrite=True")
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= set(MAX_BYTES)):
        raise ArtifactError(f"{path}: expected an artifact folder to overwrite, got something else")
    tensors = trees.named_arrays(learner.init, "init") | {
        f"rates/{group}": np.asarray(value, order="C") for group, value in learner.rates.items()
    }
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ArtifactError(f"{name}: expected finite values, got {int((~np.isfinite(value)).sum())} others")
    if learner.standardisation is not None:
        tensors |= learner.standardisation.named()
    contents = {TENSORS: tensor_bytes(tensors)}
    facts = {
        "format": FORMAT,
        "model": {
            "name": learner.model.name,
            "way": learner.model.way,
            "input_shape": None if learner.model.input_shape is None else list(learner.model.input_shape),
            "head": learner.model.head,
            "settings": learner.model.settings,
            "transductive": learner.model.transductive,
        },
        "objective": learner.objective.name,
        "preprocessing": "uint8 / 255, or float 0..1 as it is; shape [n, height, width, channels]; no centring"
        if learner.classifies_images
        else "none: inputs as the sampler gave them"
        if learner.standardisation is None
        else f"inputs (and targets, if there) less mean, over deviation: standardisation/* in {TENSORS}",
        "rates": dataclasses.asdict(learner.spec),
        "inner_steps": learner.spec.steps,
        "facts": learner.facts,
        "versions": {"metalr": metalr.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }
    contents[CARD] = _card(learner, facts).encode()
    folders.make(path.parent, parents=True)
    sealed.write(path, contents, FACTS, facts)
    return path


def to_files(learner: Learner) -> dict[str, bytes]:
    """The content of each file of an artifact folder. Raises ArtifactError as `save`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(Path(temporary) / "artifact", learner)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def from_files(files: Mapping[str, bytes]) -> Learner:
    """What `to_files` gave. Raises ArtifactError as `load`."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in MAX_BYTES:
            (Path(temporary) / name).write_bytes(files.get(name, b""))
        return load(temporary)


def describe(learner: Learner) -> dict[str, Any]:
    """What was learned, as plain JSON values: for `metalr show` and the model card.

    Keys: model, rule, steps, rates and starts (name -> mean, or a list over time; and where training began),
    rates_health, adapts (rate's name -> whether any of it is alive), fixed (tensors without a rate), facts.
    """
    spec, rates = learner.spec, learner.rates
    begun = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, learner.init))
    starts = {name: float(np.ravel(value)[0]) for name, value in hyperparameters.summary(spec, begun).items()}
    health = hyperparameters.health(spec, rates)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(learner.init)]
    time = f"{spec.knots} knots over any number of steps" if spec.knots else "per step" if spec.per_step else "constant"
    parts = [f"one rate per {spec.granularity}" if spec.granularity != "shared" else "one shared rate", time, spec.base]
    parts += [f"minibatches of {spec.batch_size}"] * (spec.batch_size is not None)
    return {
        "model": learner.model.name,
        "rule": ", ".join([*parts, "positive" if spec.positive else "signed"] + ["predicted"] * spec.predicted),
        "steps": spec.steps,
        "rates": hyperparameters.summary(spec, rates),
        "starts": starts,
        "rates_health": health,
        "adapts": {name: shares["dead"] < 1 for name, shares in health.items()},
        "fixed": [trees.path_name(path) for path in paths if hyperparameters.group_of(spec, path) is None],
        "facts": learner.facts,
    }


def _card(learner: Learner, facts: dict[str, Any]) -> str:
    means = {name: np.atleast_1d(v) for name, v in hyperparameters.summary(learner.spec, learner.rates).items()}
    rows = "\n".join(f"| {name} | {', '.join(f'{value:.3g}' for value in each)} |" for name, each in means.items())
    shared = "one for all tensors" if learner.spec.granularity == "shared" else f"per {learner.spec.granularity}"
    norm = "Predictions depend on the other images of the batch (transductive).\n" if learner.model.transductive else ""
    if learner.standardisation is not None:
        norm += "It was trained on standardised numbers; `adapt` and `apply` take and give numbers in your own units.\n"
    start, views = (learner.model.settings.get(name) for name in ("head_start", "views"))
    if start:
        seen = f", of each support image and {views} distorted copies of it" if views else ""
        norm += f"The output layer is made for each task, for any number of classes ({start}){seen}.\n"
    alone, answers = learner.rates_alone, "logits" if learner.objective.targets == "classes" else "outputs"
    init = "a random initialization that was not learned" if alone else "a meta-learned initialization"
    return (
        f"# A metalr learner\n\nA network, {facts['model']['name']} ({', '.join(described(learner.model))}): {init} "
        f"and meta-learned inner-loop learning rates ({shared}), "
        f"trained for {learner.spec.steps} step{'s' * (learner.spec.steps != 1)}.\n{norm}\n"
        '```python\nimport metalr\nlearned = metalr.load("this/folder")\n'
        f"fast = learned.adapt(support_x, support_y)\n{answers} = learned.apply(fast, query_x)\n```\n\n"
        f"| group | learning rate (mean; over the steps) |\n|---|---|\n{rows}\n\n"
        f"Trained on:\n\n```json\n{json.dumps(learner.facts, indent=1)}\n```\n"
    )


def folder_of(path: Path | str) -> Path:
    """The artifact folder that is meant by it or by its run folder.

    Raises ArtifactError for the folder of a run that has not got as far.
    """
    path = Path(path)
    if (path / FACTS).exists() or not (path / "config.json").is_file():
        return path
    if not (path / "artifact" / FACTS).is_file():
        raise ArtifactError(
            f"{path}: expected a finished run, found one without an artifact; go on with: metalr train --resume "
            f"{shlex.quote(str(path))} (tasks or a network of your own: metalr.meta_train(..., resume=True))"
        )
    return path / "artifact"


def load(path: Path | str, model: Model | None = None, objective: Objective | None = None) -> Learner:
    """Read an artifact after checking its hashes, names, shapes, dtypes and values.

    Args:
      path: an artifact folder, or a run folder with one.
      model: needed for a custom model only, built as it was for training.
      objective: needed for an objective of your own only.

    Raises:
      ArtifactError: missing, damaged, of a newer format, or not fitting the model or the objective. ConfigError: no
        path.
    """
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"path: expected the path of an artifact or a run folder, got {path!r:.80}")
    return _load(folder_of(path), model, objective)


def load_to_show(path: Path | str) -> Learner:
    """As `load`, but of a custom model too, without its code: it can be looked at, not applied."""
    return _load(folder_of(path), None, None, without_code=True)


def _without_code(path: Path, facts: dict[str, Any], info: dict[str, Any]) -> Model:
    """A custom model that is known by its params only."""
    try:
        tensors = parse_tensors(sealed.read_file(path, TENSORS, facts, MAX_BYTES[TENSORS]))
    except SafetensorError as error:
        raise ArtifactError(f"{path / TENSORS}: not a safetensors file: {one_line(error)}") from error
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        kind, *parts = name.split("/")
        if kind == "init":
            at = tree
            for part in parts[:-1]:
                at = at.setdefault(part, {})
            at[parts[-1]] = value

    def refuse(*_: Any, **__: Any) -> Any:
        raise ArtifactError(f"{path}: holds a custom model; to apply it: metalr.load(path, model=...)")

    shape = None if info["input_shape"] is None else tuple(info["input_shape"])
    settings: dict[str, Any] = {"input_shape": shape, "way": info["way"], "head": info["head"]}
    # A model of your own may take any rate of dropout: what it can do is not asked here.
    return Model(info["name"], lambda _: jax.tree.map(jnp.asarray, tree), refuse, **settings, learned_dropout=True)


def _objective_of(path: Path, name: str, given: Objective | None, without_code: bool) -> Objective:
    """The objective that an artifact was trained with. Raises ArtifactError for another, or none."""
    if given is not None:
        if given.name != name:
            raise ArtifactError(f"{path}: expected the objective {name!r}, got {given.name!r}")
        return given
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if without_code:
        return Objective(name, lambda outputs, targets: jnp.full((), jnp.nan))
    raise ArtifactError(
        f"{path}: has an objective of your own, {name!r}; pass it: metalr.load(path, ..., objective=...)"
    )


def _load(path: Path, model: Model | None, objective: Objective | None, *, without_code: bool = False) -> Learner:
    facts = sealed.read_manifest(path, FACTS, FORMAT)
    objective = _objective_of(path, facts.get("objective", CROSS_ENTROPY.name), objective, without_code)
    try:
        info = facts["model"]
        if model is None and info["name"] not in models.MODELS:
            if not without_code:
                raise ArtifactError(f"{path}: holds a custom model; pass it: metalr.load(path, model=...)")
            model = _without_code(path, facts, info)
        if model is None:
            model = models.build(info["name"], info["way"], tuple(info["input_shape"]), **info["settings"])
        spec = RatesSpec(**facts["rates"])
        expected = jax.eval_shape(model.init, jax.random.key(0))
        raw = jax.eval_shape(functools.partial(hyperparameters.initial_raw, spec), expected)
        if spec.dropout is not None and not model.learned_dropout:
            raise ArtifactError(f"{path / FACTS}: expected no dropout rate for the model {info['name']!r}")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{path / FACTS}: does not describe a learner: {one_line(error)}") from error
    shape = None if model.input_shape is None else list(model.input_shape)
    if (shape, model.way) != (info["input_shape"], info["way"]):
        raise ArtifactError(
            f"{path}: expected a model of input_shape {info['input_shape']} and way {info['way']}, got {shape} and "
            f"{model.way}"
        )
    if model.name == info["name"] and model.settings != info["settings"]:
        raise ArtifactError(f"{path}: expected model settings {info['settings']}, got {model.settings}")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((expected, raw)))
    try:
        tensors = parse_tensors(sealed.read_file(path, TENSORS, facts, min(size + (1 << 20), MAX_BYTES[TENSORS])))
    except SafetensorError as error:
        raise ArtifactError(f"{path / TENSORS}: not a safetensors file: {one_line(error)}") from error
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    own = {name: tensors.pop(name) for name in [n for n in tensors if n.startswith("standardisation/")]}
    try:
        standardisation = Standardisation.from_named(own)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path / TENSORS}: not a standardisation: {one_line(error)}") from error
    if any(not np.isfinite(value).all() or not np.issubdtype(value.dtype, np.floating) for value in own.values()):
        raise ArtifactError(f"{path / TENSORS}: standardisation: expected finite numbers only")
    if standardisation is not None:
        objective = objective.in_units(standardisation.outputs)
    wanted = {f"init/{trees.path_name(p)}": leaf for p, leaf in leaves} | {f"rates/{g}": v for g, v in raw.items()}
    if set(wanted) != set(tensors):
        missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
        raise ArtifactError(f"{path / TENSORS}: expected the model's tensors; missing {missing}, unexpected {extra}")
    for name, want in wanted.items():
        got = tensors[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ArtifactError(
                f"{path / TENSORS}: {name}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
            )
        if not np.isfinite(got).all():
            raise ArtifactError(f"{path / TENSORS}: {name}: expected finite values only")
    arrays = [jnp.asarray(tensors[f"init/{trees.path_name(p)}"]) for p, _ in leaves]
    init = jax.tree.unflatten(jax.tree.structure(expected), arrays)
    rates = Rates({group: jnp.asarray(tensors[f"rates/{group}"]) for group in raw})
    sealed.read_file(path, CARD, facts, MAX_BYTES[CARD])
    return Learner(model, spec, init, rates, facts.get("facts", {}), objective, standardisation)
