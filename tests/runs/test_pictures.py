"""Pictures for loggers: drawn from what runs have in their files."""

import base64

import numpy as np
import pytest

from metalr.runs import pictures


def test_a_larger_rate_is_darker_and_a_dead_one_is_red():
    rates = {"dense_0": [0.001, 0.1], "head": [0.01, 0.0], "head:momentum": 0.9}
    image = pictures.heat_map(rates, "rates")
    assert image.dtype == np.uint8
    corner = 4  # inside a cell, above its number

    def cell(row, column):
        return image[2 * pictures.LINE + row * pictures.CELL + corner, pictures.NAMES + column * pictures.CELL + corner]

    assert tuple(cell(0, 0)) == tuple(pictures.COLD)
    assert tuple(cell(0, 1)) == tuple(pictures.WARM)
    assert cell(0, 0).sum() > cell(1, 0).sum() > cell(0, 1).sum()
    assert tuple(cell(1, 1)) == pictures.WRONG
    assert image.shape[0] == 2 * pictures.LINE + 2 * pictures.CELL + 8


@pytest.mark.parametrize("rates", [{"all": 0.1}, {"all": [None, float("nan")]}, {}])
def test_rates_that_are_one_number_or_diverged_are_drawn_too(rates):
    assert pictures.heat_map(rates, "rates").ndim == 3


def test_a_query_image_has_a_frame_that_says_whether_it_is_right():
    pixels = np.full((2, 4, 4, 1), 255, np.uint8)
    x = base64.b64encode(pixels.tobytes()).decode()
    whole = {"kind": "images", "shape": [4, 4, 1]}
    query = {"size": 2, "x": x, "y": [0, 1], "before": [1, 0], "after": [0, 0]}
    image = pictures.task({"which": "best", "support": {"size": 2, "x": x, "y": [0, 1]}, "query": query}, whole)
    colors = {tuple(color) for color in image.reshape(-1, 3)}
    assert {pictures.RIGHT, pictures.WRONG, pictures.GREY} <= colors


def test_a_task_of_numbers_is_drawn_as_curves():
    query = {"x": [0.0, 1.0, 0.5], "y": [1.0, 2.0, 0.0], "before": [0.0, None, 0.0], "after": [1.0, 2.0, 0.1]}
    image = pictures.task({"which": "worst", "support": {"x": [0.2], "y": [1.0]}, "query": query}, {"kind": "curves"})
    colors = {tuple(color) for color in image.reshape(-1, 3)}
    assert {pictures.GREY, pictures.RIGHT, tuple(pictures.WARM)} <= colors
