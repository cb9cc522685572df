"""What `metalr export` writes is loaded back, without metalr where that is the promise, and gives the same."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file

import metalr
from metalr import Learner, cli, models, outer, trees
from metalr.errors import ConfigError, StorageError
from metalr.inner import OBJECTIVES, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.integrations.export import export
from metalr.models import conv4, mlp
from metalr.tasks import Standardisation

ALONE = """
import json, sys
import jax, jax.export, numpy as np
folder = sys.argv[1]
programs = {}
for name in ("adapt", "apply"):
    with open(f"{folder}/{name}.stablehlo", "rb") as file:
        programs[name] = jax.export.deserialize(bytearray(file.read()))
data = np.load(sys.argv[2])
fast = programs["adapt"].call(data["x"], data["y"])
np.save(sys.argv[3], programs["apply"].call(fast, data["query"]))
assert not any(name.startswith("metalr") for name in sys.modules)
"""


def made(path, model, objective="cross_entropy", standardisation=None, facts=None, **spec):
    spec = RatesSpec("layer", steps=3, initial=0.1, head=model.head, **spec)
    meta = outer.initial(model, spec, jax.random.key(0))
    learned = metalr.Learner(
        model,
        spec,
        meta.init,
        hyperparameters.actual(spec, meta.rates),
        facts or {},
        OBJECTIVES[objective],
        standardisation,
    )
    metalr.save(path, learned)
    return metalr.load(path)


def numbers(path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (50, 4)).astype(np.float32), rng.normal(10, 5, (50, 2)).astype(np.float32)
    return made(path, mlp(2, (4,), widths=(8,)), "squared_error", Standardisation.of(x, y, "both"))


LEARNERS = {
    "mlp": lambda path: made(path, mlp(3, (6, 6, 1), widths=(8,)), facts={"tasks": {"way": 3, "shot": 3}}),
    "mlp, minibatches of Adam": lambda path: made(
        path, mlp(3, (6, 6, 1), widths=(8,)), facts={"tasks": {"way": 3, "shot": 3}}, base="adam", batch_size=4, knots=2
    ),
    "conv4": lambda path: made(
        path, conv4(3, (10, 10, 1), channels=4, layers=2), facts={"tasks": {"way": 3, "shot": 3}}
    ),
    "numbers": numbers,
}


@pytest.mark.parametrize("name", LEARNERS)
def test_programs_run_without_metalr(name, tmp_path):
    learned = LEARNERS[name](tmp_path / "a")
    options = [] if name != "numbers" else ["--support", "9"]
    cli.main(["export", str(tmp_path / "a"), "--to", "stablehlo", "-o", str(tmp_path / "out"), *options])
    rng = np.random.default_rng(1)
    x, query = (rng.random((n, *learned.model.input_shape), np.float32) for n in (9, 17))
    y = rng.normal(size=(9, 2)).astype(np.float32) if name == "numbers" else (np.arange(9) % 3).astype(np.int32)
    np.savez(tmp_path / "data.npz", x=x, y=y, query=query)
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    subprocess.run(
        [sys.executable, script, tmp_path / "out", tmp_path / "data.npz", tmp_path / "logits.npy"],
        check=True,
        cwd=tmp_path,
    )
    expected = learned.apply(learned.adapt(x, y), query)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5, rtol=1e-5)
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (facts["support"], facts["steps"]) == (9, 3)


def test_a_hub_folder_has_a_card_and_is_read_by_metalr(tmp_path):
    learned = LEARNERS["mlp"](tmp_path / "a")
    out = export(str(tmp_path / "a"), "hub-folder", str(tmp_path / "out"))
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: metalr\npipeline_tag: image-classification\n")
    assert "# A metalr learner" in card
    again = metalr.load(out / "artifact")
    jax.tree.map(np.testing.assert_array_equal, again.init, learned.init)
    flat = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(flat["dense_0/kernel"], learned.init["dense_0"]["kernel"])
    export(tmp_path / "a", "torch", out)  # over itself: nothing of the former one stays
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.safetensors"]


def test_a_state_dict_has_the_layouts_of_torch(tmp_path):
    learned = LEARNERS["conv4"](tmp_path / "a")
    out = export(tmp_path / "a", "torch", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    kernel = np.asarray(learned.init["conv_0"]["kernel"])
    np.testing.assert_array_equal(tensors["conv_0.weight"], kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(tensors["head.weight"], np.asarray(learned.init["head"]["kernel"]).T)
    assert json.loads((out / "export.json").read_text())["rates"]["head"] == pytest.approx(0.1)
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "whoever may read one may read all"


def test_what_a_table_is_standardised_by_goes_with_its_network(tmp_path):
    learned = numbers(tmp_path / "a")
    for to, name in (("torch", "export.json"), ("hub-folder", "config.json")):
        facts = json.loads((export(tmp_path / "a", to, tmp_path / to) / name).read_text())["standardisation"]
        assert facts.keys() == {"x_mean", "x_deviation", "y_mean", "y_deviation"}
        np.testing.assert_allclose(facts["x_mean"], learned.standardisation.x_mean)
        np.testing.assert_allclose(facts["y_deviation"], learned.standardisation.y_deviation)


def test_the_support_set_is_as_large_as_in_training(tmp_path):
    """Of tables and tasks of your own too, where nothing says it but the artifact."""
    made(tmp_path / "a", mlp(2, (4,), widths=(8,)), "squared_error", facts={"support": 7})
    out = export(tmp_path / "a", "stablehlo", tmp_path / "out")
    assert json.loads((out / "export.json").read_text())["support"] == 7


def test_refusals(tmp_path):
    numbers(tmp_path / "a")
    with pytest.raises(ConfigError, match="to: expected one of"):
        export(tmp_path / "a", "coreml", tmp_path / "out")
    with pytest.raises(ConfigError, match="support: expected how many examples"):
        export(tmp_path / "a", "stablehlo", tmp_path / "out")
    with pytest.raises(ConfigError, match="support, steps: expected none with torch, got 3, None"):
        export(tmp_path / "a", "torch", tmp_path / "out", 3)
    with pytest.raises(ConfigError, match="support: expected at least 1, got 0"):
        export(tmp_path / "a", "stablehlo", tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("# Mine")
    with pytest.raises(ConfigError, match="found other files"):
        export(tmp_path / "a", "hub-folder", tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out: .*file: expected a new folder or an export to replace, found a file"):
        export(tmp_path / "a", "torch", tmp_path / "file")
    with pytest.raises(StorageError, match="cannot be written"):
        export(tmp_path / "a", "torch", tmp_path / "file" / "inside")
    Path(tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="found other files"):
        export(tmp_path / "a", "torch", tmp_path / "full")


def test_a_network_with_kernels_that_torch_has_no_layer_for_is_refused(tmp_path):
    made(tmp_path / "a", models.build("transformer", 3, (6, 6, 1), width=8, layers=1, attention_heads=2))
    with pytest.raises(ConfigError, match="expected dense and convolutional kernels with torch, got attention_0"):
        export(tmp_path / "a", "torch", tmp_path / "out")


def test_a_head_that_is_made_for_each_task_is_exported_as_it_is_made(tmp_path):
    model = models.build("mlp", 3, (6, 6, 1), widths=(8,), head_start="shared")
    learned = made(tmp_path / "a", model, facts={"tasks": {"way": 3, "shot": 2}})
    folder = export(tmp_path / "a", "stablehlo", tmp_path / "out")
    adapt, apply = (jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes())).call
                    for name in ("adapt", "apply"))  # fmt: skip
    x = np.random.default_rng(0).random((6, 6, 6, 1)).astype(np.float32)
    fast = adapt(x, np.arange(6, dtype=np.int32) % 3)
    np.testing.assert_allclose(apply(fast, x), learned.apply(learned.adapt(x, np.arange(6) % 3), x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the converter's
@pytest.mark.parametrize("kind", ["mlp", "conv4", "transformer"])
def test_onnx_runs_fine_tuned_params_elsewhere(tmp_path, kind):
    """jax2onnx and onnxruntime are not in the extra `test`: .ci/integrations installs them."""
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    settings = {"mlp": {"widths": (16,)}, "conv4": {"channels": 8, "norm": "instance"}, "transformer": {"width": 16}}
    model = models.build(kind, 3, (28, 28, 1), **settings[kind])
    spec = hyperparameters.RatesSpec(steps=2)
    meta = outer.initial(model, spec, jax.random.key(0))
    learned = Learner(model, spec, meta.init, hyperparameters.actual(spec, meta.rates), {})
    metalr.save(tmp_path / "a", learned)
    with jax.numpy_rank_promotion("allow"):  # the converter's own addition of a bias
        folder = export(tmp_path / "a", "onnx", tmp_path / "out")
    x = np.random.default_rng(0).random((7, 28, 28, 1)).astype(np.float32)
    fast = learned.adapt(x[:3], np.arange(3))
    session = runtime.InferenceSession(folder / "apply.onnx")
    params = {name.removeprefix("/"): value for name, value in trees.named_arrays(fast, "").items()}
    (outputs,) = session.run(None, params | {"x": x})
    np.testing.assert_allclose(outputs, learned.apply(fast, x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_takes_and_gives_numbers_in_their_own_units(tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    numbers(tmp_path / "a")
    learned, folder = metalr.load(tmp_path / "a"), export(tmp_path / "a", "onnx", tmp_path / "out")
    x = np.random.default_rng(0).normal(size=(5, *learned.model.input_shape)).astype(np.float32)
    params = {name.removeprefix("/"): value for name, value in trees.named_arrays(learned.init, "").items()}
    (outputs,) = runtime.InferenceSession(folder / "apply.onnx").run(None, params | {"x": x})
    np.testing.assert_allclose(outputs, learned.apply(learned.init, x), rtol=1e-4, atol=1e-4)
