"""Fine-tuning on a file's task, and predicting from it."""

import jax
import numpy as np
import pytest

from metalr import Learner, models, outer
from metalr.errors import ConfigError, DataError
from metalr.inner import OBJECTIVES, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.runs import predicting


def learner(way=1, shape=(2,), objective="squared_error", **facts):
    model = models.mlp(way, shape, widths=(4,))
    spec = RatesSpec(steps=2, initial=0.1, head=model.head)
    meta = outer.initial(model, spec, jax.random.key(0))
    rates = hyperparameters.actual(spec, meta.rates)
    return Learner(model, spec, meta.init, rates, facts, OBJECTIVES[objective])


def test_a_fine_tune_that_diverged_predicts_nothing(tmp_path):
    x, y = np.full((4, 2), 1e30, np.float32), np.ones((4, 1), np.float32)
    np.savez(tmp_path / "task.npz", support_x=x, support_y=y, query_x=x)
    with pytest.raises(DataError, match=r"expected finite outputs, got others for 4 of 4 examples, number 0 first"):
        predicting.adapt(learner(), tmp_path / "task.npz", out=tmp_path / "fast.safetensors")
    assert not (tmp_path / "fast.safetensors").exists()


@pytest.mark.parametrize(
    ("family", "labels", "outputs"),
    [
        ("rotated", [3, 7], (3, 7)),
        ("rotated", ["3", "7"], (3, 7)),  # as a file of names has digits
        ("rotated", ["cat", "dog"], (0, 1)),
        ("digits", [3, 7], (0, 1)),
    ],
)
def test_outputs_keep_their_meaning_where_they_have_one(family, labels, outputs, tmp_path):
    learned = learner(10, (4, 4, 1), "cross_entropy", tasks={"family": family})
    x = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "task.npz", support_x=x, support_y=np.array(labels), query_x=x)
    task = predicting.read_task(learned, tmp_path / "task.npz")
    assert task.classes.outputs == outputs
    assert task.support_y.tolist() == list(outputs)


def test_a_file_with_nothing_to_predict_for_is_there_for_its_params(tmp_path):
    x, path = np.ones((4, 2), np.float32), tmp_path / "task.npz"
    np.savez(path, support_x=x, support_y=np.ones((4, 1), np.float32), query_x=x[:0])
    with pytest.raises(DataError, match="expected inputs in query_x to predict for, or --out"):
        predicting.adapt(learner(), path)
    found = predicting.adapt(learner(), path, out=tmp_path / "fast.safetensors")
    assert found["predictions"] == []
    assert (tmp_path / "fast.safetensors").exists()


def test_labels_of_a_binary_table_are_its_classes(tmp_path):
    table = {"classes": ["2", "10"], "features": ["a", "b"], "target": ["y"]}
    learned = learner(1, (2,), "binary_cross_entropy", table=table)
    x = np.ones((4, 2), np.float32)
    np.savez(tmp_path / "task.npz", support_x=x, support_y=np.array([2, 10, 2, 10]), query_x=x, query_y=np.full(4, 10))
    task = predicting.read_task(learned, tmp_path / "task.npz")
    assert (task.support_y.tolist(), task.query_y.tolist()) == ([0, 1, 0, 1], [1] * 4)
    np.savez(tmp_path / "other.npz", support_x=x, support_y=np.array([0, 1, 0, 1]), query_x=x)
    with pytest.raises(ConfigError, match=r"support_y: expected one of the classes \['2', '10'\], got '0'"):
        predicting.read_task(learned, tmp_path / "other.npz")


def test_a_table_in_another_format_and_one_without_the_target_are_told_apart(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = {"classes": [], "features": ["a", "b"], "target": ["y", "z"]}
    learned = learner(2, table=table)
    frame = pandas.DataFrame({"a": [1.0, 2.0], "b": [1.0, 2.0], "y": [1.0, 2.0]})
    frame.to_csv(tmp_path / "task.csv", index=False)
    with pytest.raises(DataError, match=r"expected rows with a target \(y, z\) .* got none; it has no column 'z'"):
        predicting.adapt(learned, tmp_path / "task.csv")
    frame.to_csv(tmp_path / "task.tsv", index=False)
    with pytest.raises(ConfigError, match=r"expected a table \(.csv, .parquet\) or an .npz"):
        predicting.adapt(learned, tmp_path / "task.tsv")
