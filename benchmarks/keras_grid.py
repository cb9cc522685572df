"""The reference grid of 27 cells on the full MNIST: metalr's search beside the same grid in Keras.

    python benchmarks/keras_grid.py [--data NAME] [--epochs N] [--full] [--json]

Grid: batch size 32, 64, 128 x 10, 20, 30 epochs x learning rate 0.001, 0.01, 0.1; Adam; MLP 784-128-ReLU-dropout
0.2-10; 20 % of the training images validate. metalr: `metalr search grid`, everything it does, compilation included,
run before and after Keras. Keras: `model.fit` as its tutorials show it (`validation_split`, which validates after every
epoch), and with one validation a cell, as metalr has it; by default one fit a batch size is timed, of N epochs after a
first one that is left out (it compiles), scaled to the grid; --full runs all 27 cells. Beside them, in JAX, the same
cells one at a time, timed likewise. Needs the extra `bench` (with TensorFlow) and MNIST prepared (`metalr data prepare
mnist`); `--data mnist12k` is the bundled subset.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from metalr.outer import devices

devices.use_all_cores()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import jax
import keras
import measure
import numpy as np

from metalr import data, models
from metalr.config import SearchConfig, SpaceConfig
from metalr.runs import searching
from metalr.runs.progress import ConsoleReporter
from metalr.search import (
    fit,
)
from metalr.types import Episode

SPACE = SpaceConfig()
CHECKED = 1e-3, 128, 10  # the cell whose accuracy both must agree on


def ours(name: str) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the whole search, and its trials."""
    with tempfile.TemporaryDirectory() as root:
        config = SearchConfig(searcher="grid", data=name, out=Path(root) / "search")
        began = time.perf_counter()
        searching.run(config, reporter=ConsoleReporter(quiet=True))
        seconds = time.perf_counter() - began
        return seconds, [json.loads(line) for line in (config.out / "trials.jsonl").read_text().splitlines()]


def network(rate: float) -> Any:
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((784,)), layers.Dense(128, "relu"), layers.Dropout(0.2), layers.Dense(10, "softmax")]
    )
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class InKeras(NamedTuple):
    """Keras's grid: all its seconds, warm ones an epoch by batch size, those of a fit beside its epochs; accuracy."""

    seconds: float
    epoch: dict[int, float]
    beside: float
    accuracy: float


def in_keras(x: np.ndarray, y: np.ndarray, epochs: int, every_epoch: bool, full: bool) -> InKeras:
    """The grid in Keras. every_epoch: validate after each, as `validation_split` does, or once a cell, as metalr does.

    The accuracy is that of CHECKED.
    """
    split = len(x) - len(x) // 5

    def fit_once(batch_size: int, rate: float, epochs: int) -> tuple[list[float], float, float]:
        ends = [time.perf_counter()]
        each = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
        model, how = network(rate), {"batch_size": batch_size, "verbose": 0}
        if every_epoch:
            history = model.fit(x, y, epochs=epochs, validation_split=0.2, callbacks=[each], **how)
            return np.diff(ends).tolist(), 0.0, history.history["val_accuracy"][-1]
        model.fit(x[:split], y[:split], epochs=epochs, callbacks=[each], **how)
        began = time.perf_counter()
        _, accuracy = model.evaluate(x[split:], y[split:], **how)
        return np.diff(ends).tolist(), time.perf_counter() - began, accuracy

    _, _, accuracy = fit_once(CHECKED[1], CHECKED[0], CHECKED[2])
    if full:
        began = time.perf_counter()
        for size in SPACE.batch_sizes:
            for rate in SPACE.learning_rates:
                for count in SPACE.epochs:
                    fit_once(size, rate, count)
        return InKeras(time.perf_counter() - began, {}, 0.0, accuracy)
    warm, beside = {}, []
    for size in SPACE.batch_sizes:
        seconds, validation, _ = fit_once(size, SPACE.learning_rates[0], epochs + 1)
        warm[size] = float(np.median(seconds[1:]))
        beside.append(max(seconds[0] - warm[size], 0.0) + validation)
    runs, once = sum(SPACE.epochs) * len(SPACE.learning_rates), float(np.median(beside))
    return InKeras(sum(s * runs for s in warm.values()) + SPACE.cells * once, warm, once, accuracy)


def one_at_a_time(arrays: fit.Arrays, epochs: int) -> tuple[float, dict[int, float]]:
    """The same cells in a plain JAX loop: a jit-compiled epoch for one rate on one device, warm; scaled alike."""
    model = models.mlp(10, dropout=0.2)
    key = jax.random.key(0)
    init = model.init(key)
    rates = np.array(SPACE.learning_rates[:1], np.float32)
    warm, programs = {}, fit.make_programs(model, "adam")
    for size in SPACE.batch_sizes:
        program, ends = programs(size), []
        carry = program.start(init, rates)
        for number in range(epochs + 2):
            carry = program.epoch(carry, arrays.train_x, arrays.train_y, rates, key, np.int32(number))
            jax.block_until_ready(carry)
            ends.append(time.perf_counter())
        warm[size] = float(np.median(np.diff(ends)))
    return sum(s * sum(SPACE.epochs) * len(SPACE.learning_rates) for s in warm.values()), warm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each Keras fit")
    parser.add_argument("--full", action="store_true", help="run all 27 cells in Keras: about 45 minutes")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    dataset = data.load(options.data)
    images = dataset.train_images.reshape(len(dataset.train_images), -1).astype(np.float32) / 255
    before, trials = ours(options.data)
    theirs = {
        how: in_keras(images, dataset.train_labels, options.epochs, how == "validated every epoch", options.full)
        for how in ("validated every epoch", "validated once a cell")
    }
    whole: Any = dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels
    arrays = jax.tree.map(jax.numpy.asarray, fit.hold_out(Episode(*whole), by_class=True))
    alone, alone_warm = one_at_a_time(arrays, options.epochs)
    after, _ = ours(options.data)
    seconds = (before + after) / 2
    checked = next(t for t in trials if (t["learning_rate"], t["batch_size"], t["epochs"]) == CHECKED)
    own = float(np.mean(checked["validation"]))
    for how, keras_grid in theirs.items():
        if abs(own - keras_grid.accuracy) > 0.01:
            raise SystemExit(f"cell {CHECKED}: validation accuracy {own:.4f} here, {keras_grid.accuracy:.4f}, {how}")
    title = f"Keras {keras.__version__}, {keras.backend.backend()}"
    measured = [
        ("metalr search grid, with compilation", seconds, {}, own, {"runs": [before, after]}),
        *(
            (f"{title}, {how}", k.seconds, k.epoch, k.accuracy, {"beside_epochs": k.beside})
            for how, k in theirs.items()
        ),
        ("JAX, one cell at a time, one core, without compilation", alone, alone_warm, None, {}),
    ]
    rows = [
        {
            "system": system,
            "seconds": all_of_it,
            "cells": SPACE.cells,
            "seconds_an_epoch": {str(size): round(value, 3) for size, value in each.items()},
            "measured": "whole grid" if each == {} else f"{options.epochs} epochs a batch size, scaled",
            "accuracy_of_one_cell": score,
            "times_metalr": round(all_of_it / seconds, 2),
            **more,
        }
        for system, all_of_it, each, score, more in measured
    ]
    print(json.dumps(rows, indent=1) if options.json else "\n".join(map(str, rows)))
    measure.save("keras_grid", rows, data=str(dataset))


if __name__ == "__main__":
    main()
