"""Shared data: a small synthetic dataset that a tiny network can learn, and isolated caches."""

import gc
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Most of the time is compilation: the first flag halves that, the second halves it again. METALR_TEST_OPTIMIZED=1
# leaves XLA's own defaults, as programs have them: .ci/run runs the tests marked "numerical" once more with those.
# The workers of pytest-xdist have the flags of the process that started them.
if os.environ.get("METALR_TEST_OPTIMIZED") != "1" and "PYTEST_XDIST_WORKER" not in os.environ:
    for flag in "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false":
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        # XLA ends the process for a flag that it does not know, or no longer.
        known = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={**os.environ, "XLA_FLAGS": flags},
            capture_output=True,
        )
        if known.returncode == 0:
            os.environ["XLA_FLAGS"] = flags

import jax
import numpy as np
import pytest

from metalr import data

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Programs that several tests compile alike are compiled once, for all workers and their processes.

    With JAX_COMPILATION_CACHE_DIR also for all runs of the tests with it, as .ci/run has several.
    """
    own = str(tmp_path_factory.getbasetemp().parent / "compiled")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or own
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """A file's programs are dropped after it: those of all files would use up the memory maps of a process."""
    yield
    gc.collect()
    jax.clear_caches()


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test reads or writes the user's caches or run folders."""
    monkeypatch.setenv("METALR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def blobs() -> data.Dataset:
    """10 classes of 8x8 images: a prototype each, plus noise; 60 train and 30 test images a class."""
    rng = np.random.default_rng(0)
    prototypes = rng.random((10, 8, 8))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.tile(np.arange(10), count)
        noisy = np.clip(prototypes[labels] + 0.15 * rng.standard_normal((len(labels), 8, 8)), 0, 1)
        return np.round(255 * noisy).astype(np.uint8), labels

    (train_x, train_y), (test_x, test_y) = draw(60), draw(30)
    return data.from_arrays(train_x, train_y, test_images=test_x, test_labels=test_y, name="blobs")


@pytest.fixture
def blobs_npz(blobs, tmp_path):
    """The same as a file."""
    path = tmp_path / "blobs.npz"
    arrays = {part: getattr(blobs, part) for part in data.PARTS}
    np.savez(path, images=arrays.pop("train_images"), labels=arrays.pop("train_labels"), **arrays)
    return path


@pytest.fixture
def few_rates(monkeypatch):
    """A comparison's tuned rate is one of two, of Adam: each optimizer, init and length is a program of its own."""
    from metalr.comparison import rivals

    monkeypatch.setattr(rivals, "TUNED", {"adam": (1e-3, 1e-2)})
    monkeypatch.setattr(rivals, "WIDENINGS", 0)
