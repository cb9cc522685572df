"""Rebuild mnist12k.npz from the four IDX files: python metalr/data/bundled/build.py IDX_DIR.

The first 1,000 images of each digit of MNIST's training set and the first 200 of each digit of its test
set, each in MNIST's own order.
"""

import sys
from pathlib import Path

import numpy as np

from metalr.data import sources


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the first `count` examples of every label."""
    return np.sort(np.concatenate([np.flatnonzero(labels == digit)[:count] for digit in range(10)]))


if __name__ == "__main__":
    full = sources.read_mnist(Path(sys.argv[1]))
    train, test = first_of_each(full.train_labels, 1000), first_of_each(full.test_labels, 200)
    np.savez_compressed(
        Path(__file__).parent / "mnist12k.npz",
        train_images=full.train_images[train, ..., 0],
        train_labels=full.train_labels[train].astype(np.uint8),
        test_images=full.test_images[test, ..., 0],
        test_labels=full.test_labels[test].astype(np.uint8),
    )
