"""The page's lines for Keras, against the real library: the same logits as metalr's own fine-tune."""

import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
pytest.importorskip("keras")

import metalr

ROOT = Path(__file__).parents[2]


def test_five_steps_in_keras_give_the_same_logits():
    if os.environ["KERAS_BACKEND"] != "jax":
        pytest.skip("Keras is used with another backend here")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_loop.md").read_text(), re.S)
    block = next(block for block in blocks if "import jax, keras" in block)
    run = ROOT / "experiments" / "artifacts" / "mnist_rotated_10way_5shot"
    rng = np.random.default_rng(0)
    x, query = (rng.random((n, 28, 28, 1), np.float32) for n in (50, 20))
    y = (np.arange(50) % 10).astype(np.int32)
    scope = {"x": x, "y": y}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(block.replace('"runs/quickstart"', repr(str(run))), scope)
        found = scope["net"].predict(query, verbose=0)
    learned = metalr.load(run)
    np.testing.assert_allclose(found, learned.apply(learned.adapt(x, y), query), atol=1e-4)
