"""`metalr export`: what was learned as files for programs without metalr.

`stablehlo`: adapt and apply as serialized programs, which JAX alone runs (jax.export). `onnx`: apply for ONNX runtimes.
`torch`: a state dict in the layouts of PyTorch. `hub-folder`: the folder of a model repository, with its card;
uploading it is yours to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as tensor_bytes

from metalr import trees
from metalr.errors import ConfigError, one_line
from metalr.learner import Learner, load
from metalr.learner.artifact import CARD, folder_of
from metalr.learner.learner import FEW_IMAGES_A_CLASS
from metalr.outer import devices
from metalr.storage import folders

PLATFORMS = ("cpu", "cuda", "tpu")
CARD_HEAD = "library_name: metalr"
FILES = {
    "adapt.stablehlo",
    "apply.stablehlo",
    "apply.onnx",
    "export.json",
    "model.safetensors",
    "README.md",
    "config.json",
    "artifact",
}


def stablehlo(learned: Learner, source: Path, out: Path, support: int, steps: int) -> None:
    """Write adapt.stablehlo, (support_x, support_y) -> params, and apply.stablehlo, (params, x [n, …]) -> outputs.

    `jax.export.deserialize(content).call(...)` runs them on a CPU, GPU or TPU; metalr is not needed. The apply of a
    transductive network takes at least two images a class.

    Args:
      support: examples of the support set; the program has no other size.
      steps: inner steps of adapt.
    """
    shape, classes = learned.model.input_shape, learned.objective.targets == "classes"
    if shape is None:
        raise ConfigError(f"{source}: expected a network whose inputs have one known shape")
    x = jax.ShapeDtypeStruct((support, *shape), jnp.float32)
    outputs = jax.eval_shape(learned.model.apply, _fine_tuned(learned), x).shape[1:]
    y = jax.ShapeDtypeStruct((support,) if classes else (support, *outputs), jnp.int32 if classes else jnp.float32)
    few = FEW_IMAGES_A_CLASS * learned.model.classes if learned.model.transductive else 1
    (n,) = jax.export.symbolic_shape("n", constraints=[f"n >= {few}"])
    query = jax.ShapeDtypeStruct((n, *shape), jnp.float32)

    def adapt(x: Any, y: Any) -> Any:
        return learned.adapt(x, y, steps)

    params = jax.eval_shape(adapt, x, y)
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "adapt": (adapt, (x, y)), "apply": (learned.apply, (params, query)),
    }  # fmt: skip
    for name, (function, arguments) in programs.items():
        try:
            with devices.every_platform(True):
                made = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
        except Exception as error:  # what a network's operations make of a size that is not known
            raise ConfigError(f"{source}: {name} cannot be exported: {one_line(error)[:300]}") from error
        folders.write_file(out / f"{name}.stablehlo", bytes(made.serialize()))
    inputs = "float 0..1" if learned.classifies_images else "numbers in their own units"
    folders.write_json(
        out / "export.json",
        {"support": support, "steps": steps, "input_shape": list(shape), "inputs": inputs, "platforms": PLATFORMS}
        | {
            "targets": learned.objective.targets,
            "support_y": list(y.shape),
            "params": trees.leaf_shapes(params),
            "jax": jax.__version__,
        },
    )


def onnx(learned: Learner, source: Path, out: Path) -> None:
    """Write apply.onnx, (params by name, x [n, …]) -> outputs; params are those that `metalr adapt --out` keeps.

    ONNX has no gradients, so a fine-tune itself is not in it. Raises ConfigError where jax2onnx is missing, or cannot.
    """
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise ConfigError("to: expected jax2onnx for onnx; pip install 'metalr[onnx]'") from error
    shape = learned.model.input_shape
    if shape is None or learned.model.uses_support:
        raise ConfigError(f"{source}: expected a network whose inputs have one known shape, and are all that it sees")
    start = _fine_tuned(learned)
    named, tree = trees.leaf_shapes(start), jax.tree.structure(start)
    own = learned.standardisation

    def apply(*given: Any) -> Any:
        *leaves, x = given
        outputs = learned.model.apply(jax.tree.unflatten(tree, leaves), x if own is None else own.inputs(x))
        return outputs if own is None else own.outputs(outputs)

    inputs = [*(leaf.shape for leaf in jax.tree.leaves(start)), ("n", *shape)]
    try:
        made = to_onnx(
            apply, inputs, model_name=learned.model.name, input_names=[*named, "x"], output_names=["outputs"]
        )
    except Exception as error:  # what a network's operations are to a converter
        raise ConfigError(f"{source}: apply cannot be exported: {one_line(error)[:300]}") from error
    folders.write_file(out / "apply.onnx", made.SerializeToString())
    folders.write_json(
        out / "export.json",
        {"input_shape": list(shape), "params": named},
    )


def torch(learned: Learner, source: Path, out: Path) -> None:
    """Write model.safetensors, the init as a PyTorch state dict, and export.json, the learned hyperparameters.

    Names and layouts are those of `metalr.integrations.torch.Learned.module()`, with "weight" and "bias".
    "standardisation": where training standardised, the network takes (x - x_mean) / x_deviation and gives
    (y - y_mean) / y_deviation.
    """
    tensors = {}
    for name, value in _init(learned).items():
        *layers, last = name.split("/")
        if last == "kernel" and value.ndim not in (2, 4):
            raise ConfigError(
                f"{source}: expected dense and convolutional kernels with torch, got {name} {value.shape}"
            )
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim] if last == "kernel" else tuple(range(value.ndim))
        own = {"kernel": "weight", "scale": "weight"}.get(last, last)
        tensors[".".join([*layers, own])] = np.ascontiguousarray(value.transpose(axes))
    folders.write_file(out / "model.safetensors", tensor_bytes(tensors, {"format": "pt"}))
    rates = {name: np.asarray(value).tolist() for name, value in learned.rates.items()}
    facts = {"rates": rates, "rates_spec": learned.spec.__dict__, "steps": learned.spec.steps}
    facts["standardisation"] = _standardisation(learned)
    folders.write_json(out / "export.json", facts | {"model": learned.model.name, "settings": learned.model.settings})


def hub_folder(learned: Learner, source: Path, out: Path) -> None:
    """Write README.md (the card, with the fields that model hubs read), config.json, model.safetensors and artifact/.

    `metalr.load(folder)` reads it; model.safetensors is the init for everybody else.
    """
    card = (source / CARD).read_text()
    kind = "image-classification" if learned.classifies_images else "tabular-" + (
        "regression" if learned.objective.targets == "numbers" else "classification"
    )  # fmt: skip
    head = [
        "---",
        CARD_HEAD,
        f"pipeline_tag: {kind}",
        "tags:",
        "- meta-learning",
        "- jax",
        "- flax",
        "---",
        "",
    ]
    folders.write_file(out / "README.md", "\n".join([*head, card]).encode())
    folders.write_json(
        out / "config.json",
        {"model_type": learned.model.name, "library": "metalr", "settings": learned.model.settings}
        | {"input_shape": learned.model.input_shape, "outputs": learned.model.way, "facts": learned.facts}
        | {"standardisation": _standardisation(learned)},
    )
    folders.write_file(out / "model.safetensors", tensor_bytes(_init(learned)))
    shutil.copytree(source, out / "artifact", dirs_exist_ok=True)


FORMATS = ("stablehlo", "onnx", "torch", "hub-folder")


def export(run: Path | str, to: str, out: Path | str, support: int | None = None, steps: int | None = None) -> Path:
    """Write what a run learned to a folder, in one of FORMATS; the folder.

    Args:
      run: a run or artifact folder.
      out: a new folder, or an export to replace.
      support: stablehlo: examples of the support set; default: as in training.
      steps: stablehlo: inner steps; default: as trained.

    Raises:
      ConfigError: no such format, settings that the format does not use, a folder with other files, or a network that
        cannot be exported. ArtifactError: nothing was learned there. StorageError: it cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"to: expected one of {FORMATS}, got {to!r}")
    if to != "stablehlo" and (support, steps) != (None, None):
        raise ConfigError(f"support, steps: expected none with {to}, got {support}, {steps}")
    learned, source, out = load(run), folder_of(run), Path(out)
    if support is not None and support < 1:
        raise ConfigError(f"support: expected at least 1, got {support}")
    folders.check_replaceable("out", out, FILES, what="an export")
    if out.is_dir() and any(out.iterdir()) and not is_export(out):
        raise ConfigError(f"out: {out}: expected a new folder or an export to replace, found other files")
    own = support_of(learned) if support is None else support
    if to == "stablehlo" and own is None:
        raise ConfigError(f"support: expected how many examples a support set has, which {run} does not say")

    def fill(folder: Path) -> None:
        if to == "torch":
            torch(learned, source, folder)
        elif to == "onnx":
            onnx(learned, source, folder)
        elif to == "hub-folder":
            hub_folder(learned, source, folder)
        else:
            assert own is not None
            stablehlo(learned, source, folder, own, learned.spec.steps if steps is None else steps)

    folders.make(out.parent, parents=True)
    folders.build_folder(out, fill)
    return out


def is_export(out: Path) -> bool:
    """Whether a folder holds an export and nothing else: one may be replaced."""
    names = {path.name for path in out.iterdir()}
    card = out / "README.md"
    of_hub = card.is_file() and CARD_HEAD in card.read_text(errors="replace")
    return names <= FILES and ("export.json" in names or of_hub)


def _fine_tuned(learned: Learner) -> Any:
    """The shapes of fine-tuned params: the init's, with as many outputs as a head is made for."""
    shape, way = learned.model.input_shape, learned.model.way or 1
    assert shape is not None
    x, y = jax.ShapeDtypeStruct((way, *shape), jnp.float32), jax.ShapeDtypeStruct((way,), jnp.int32)
    return jax.eval_shape(lambda x, y: learned.model.begin(learned.init, x, y), x, y)


def _init(learned: Learner) -> dict[str, np.ndarray]:
    return {name.removeprefix("/"): value for name, value in trees.named_arrays(learned.init, "").items()}


def _standardisation(learned: Learner) -> dict[str, Any]:
    """Means and deviations by name, as lists: {} if training did not standardise."""
    own = {} if learned.standardisation is None else learned.standardisation.named()
    return {name.removeprefix("standardisation/"): value.tolist() for name, value in own.items()}


def support_of(learned: Learner) -> int | None:
    """Examples of a support set in training, where the artifact says so."""
    if "support" in learned.facts:
        return int(learned.facts["support"])
    tasks = learned.facts.get("tasks", {})  # of an older version
    return int(tasks["way"] * tasks["shot"]) if {"way", "shot"} <= set(tasks) else None
