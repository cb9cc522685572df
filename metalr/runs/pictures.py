"""Pictures for loggers: what was learned as a heat map, and held-out tasks. Arrays [height, width, 3] of uint8."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CELL, NAMES, LINE = 36, 110, 16  # pixels: of a cell, of the names beside it, of a line of text
SCALE = 2  # of an image of a task
COLD, WARM = np.array([237, 244, 252]), np.array([11, 79, 138])  # the smallest and the largest rate
RIGHT, WRONG, GREY = (46, 125, 50), (198, 40, 40), (120, 120, 120)


def heat_map(values: Mapping[str, float | Sequence[float]], title: str) -> np.ndarray:
    """A row for each layer, a column for each step (one, if they share a number); darker is larger, on a log scale.

    Zero and negative numbers are red. values: as `metrics.jsonl` has them at a validation.
    """
    rates = {name: value for name, value in values.items() if ":" not in name}  # momentum and the like have their own
    rows = {name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in rates.items()}
    columns = max((len(row) for row in rows.values()), default=1)
    size = NAMES + CELL * columns + 8, 2 * LINE + CELL * len(rows) + 8
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), title, fill="black")
    known = np.concatenate([[], *(row[np.isfinite(row) & (row > 0)] for row in rows.values())])
    low, high = (np.log(known.min()), np.log(known.max())) if known.size else (0.0, 0.0)
    for i, (name, row) in enumerate(rows.items()):
        top = 2 * LINE + i * CELL
        draw.text((4, top + CELL // 2 - 6), name[:17], fill="black")
        for j, value in enumerate(row):
            left = NAMES + j * CELL
            positive = math.isfinite(value) and value > 0
            share = (np.log(value) - low) / max(high - low, 1e-9) if positive else 0.0
            color = tuple(int(v) for v in COLD + share * (WARM - COLD)) if positive else WRONG
            draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=color)
            draw.text((left + 2, top + CELL // 2 - 6), f"{value:.2g}", fill="white" if share > 0.5 else "black")
    for j in range(columns):
        draw.text((NAMES + j * CELL + 2, LINE), str(j + 1), fill=GREY)
    return np.asarray(sheet)


def task(facts: Mapping[str, Any], of: Mapping[str, Any]) -> np.ndarray:
    """A held-out task: its examples, and what is predicted before and after fine-tuning.

    Args:
      facts: one of the "tasks" of an examples.json, see metalr.runs.examples; of: the whole of it.
    """
    return _images(facts, of) if of["kind"] == "images" else _curve(facts)


def _images(facts: Mapping[str, Any], of: Mapping[str, Any]) -> np.ndarray:
    """Support images with their class; query images with the class predicted before > after, red where it is wrong."""
    height, width, _ = of["shape"]
    step = max(SCALE * width, 44) + 8, SCALE * height + LINE + 8
    query, support = facts["query"], facts["support"]
    across = max(1, min(12, max(len(support["y"]), len(query["y"]))))
    drawn = [(support, i, str(support["y"][i]), GREY) for i in range(len(support["y"]))]
    begin = -(-len(drawn) // across) * across  # the query set begins in a row of its own
    drawn += [(support, -1, "", GREY)] * (begin - len(drawn))
    for i, (y, before, after) in enumerate(zip(query["y"], query["before"], query["after"], strict=True)):
        drawn.append((query, i, f"{before} > {after}", RIGHT if after == y else WRONG))
    rows = -(-len(drawn) // across)
    sheet = Image.new("RGB", (across * step[0], LINE + rows * step[1]), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), f"the {facts['which']} task: learned from, then judged on (before > after)", fill="black")
    for number, (part, i, text, color) in enumerate(drawn):
        if i < 0:
            continue
        left, top = (number % across) * step[0] + 4, LINE + (number // across) * step[1]
        pixels = np.frombuffer(base64.b64decode(part["x"]), np.uint8).reshape(-1, *of["shape"])[i]
        picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        picture = picture.resize((SCALE * width, SCALE * height), Image.Resampling.NEAREST).convert("RGB")
        sheet.paste(picture, (left, top))
        draw.rectangle((left - 2, top - 2, left + SCALE * width + 1, top + SCALE * height + 1), outline=color, width=2)
        draw.text((left, top + SCALE * height + 2), text, fill=color)
    return np.asarray(sheet)


def _curve(facts: Mapping[str, Any], size: tuple[int, int] = (420, 260)) -> np.ndarray:
    """Points of the support set (grey) and the query set (green); predictions before (light) and after (dark)."""
    query, support = facts["query"], facts["support"]
    known = [v for v in (*support["y"], *query["y"], *query["before"], *query["after"]) if v is not None]
    inputs = [*support["x"], *query["x"]]
    low, high = (min(inputs), min(known)), (max(inputs), max(known))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), f"the {facts['which']} task", fill="black")

    def at(x: float, y: float) -> tuple[float, float]:
        share = [(v - a) / max(b - a, 1e-9) for v, a, b in zip((x, y), low, high, strict=True)]
        return 10 + share[0] * (size[0] - 20), size[1] - 10 - share[1] * (size[1] - 20 - LINE)

    order = np.argsort(query["x"], kind="stable").tolist()
    for name, color in (("before", tuple(COLD - 40)), ("after", tuple(WARM))):
        points = [at(query["x"][i], query[name][i]) for i in order if query[name][i] is not None]
        draw.line(points, fill=tuple(int(v) for v in color), width=2)
    for part, color in ((support, GREY), (query, RIGHT)):
        for x, y in zip(part["x"], part["y"], strict=True):
            across, up = at(x, y)
            draw.ellipse((across - 3, up - 3, across + 3, up + 3), fill=color)
    return np.asarray(sheet)
