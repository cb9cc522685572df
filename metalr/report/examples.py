"""The part of a report that shows held-out tasks themselves: pictures or curves, before and after fine-tuning."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from typing import Any

import numpy as np

from metalr.report.figures import Series, chart
from metalr.report.tables import shown

STYLE = """
.pictures{display:flex;flex-wrap:wrap;gap:6px;margin:.3em 0 .8em}
.pictures div{text-align:center;font-size:.78rem;line-height:1.25;color:var(--soft)}
.pictures img{display:block;width:52px;image-rendering:pixelated;border:3px solid transparent;border-radius:4px}
.pictures .wrong img{border-color:var(--c1)}
"""


def parts(name: str, facts: dict[str, Any]) -> list[str]:
    """A figure for each task of an examples.json, which metalr.runs.examples describes."""
    make = _pictures if facts["kind"] == "images" else _curve
    return [make(name, task, facts) for task in facts["tasks"]]


def _title(name: str, task: dict[str, Any], facts: dict[str, Any]) -> str:
    steps = f"{facts['steps']} step{'' if facts['steps'] == 1 else 's'}"
    return f"{name}: the {task['which']} task, {facts['metric']} {shown(task['score'], facts['metric'])} after {steps}"


def _curve(name: str, task: dict[str, Any], facts: dict[str, Any]) -> str:
    """What a network of one number predicts, as a line, and the points."""
    query, support = task["query"], task["support"]
    order = np.argsort(query["x"], kind="stable").tolist()

    def line(label: str, values: list[float | None], points: bool = False) -> Series:
        known = [math.nan if values[i] is None else values[i] for i in order]  # None: it diverged
        return Series(label, [query["x"][i] for i in order], known, points=points)

    return chart(
        _title(name, task, facts), "Predictions before and after fine-tuning, and the points of the task.",
        [
            line("predicted after", query["after"]), line("predicted before", query["before"]),
            Series("support set: learned from", support["x"], support["y"], points=True),
            line("query set: judged on", query["y"], points=True),
        ],
        x_label="input", y_label="target",
    )  # fmt: skip


def _pictures(name: str, task: dict[str, Any], facts: dict[str, Any]) -> str:
    support, query = task["support"], task["query"]
    learned_from = [
        _picture(pixels, f"class {y}", str(y))
        for pixels, y in zip(_images(support["x"], facts["shape"]), support["y"], strict=True)
    ]
    judged = [
        _picture(
            pixels, f"class {y}, predicted {before} before and {after} after", f"{y}: {before} → {after}", after != y
        )
        for pixels, y, before, after in zip(
            _images(query["x"], facts["shape"]), query["y"], query["before"], query["after"], strict=True
        )
    ]
    return (
        f"<figure><h3>{html.escape(_title(name, task, facts))}</h3>"
        f'<p class="axis">Learned from {_some(support)}, each with its class.</p>'
        f'<div class="pictures">{"".join(learned_from)}</div>'
        f'<p class="axis">Judged on {_some(query)}. Below each: its class, what was predicted before → after. A frame '
        "marks what is wrong after.</p>"
        f'<div class="pictures">{"".join(judged)}</div></figure>'
    )


def _some(part: dict[str, Any]) -> str:
    shown, size = len(part["y"]), part["size"]
    return f"{size} images" if shown == size else f"{size} images, of which these are {shown}"


def _picture(pixels: np.ndarray, said: str, caption: str, wrong: bool = False) -> str:
    data = base64.b64encode(png(pixels)).decode()
    kind = ' class="wrong"' if wrong else ""
    image = f'<img alt="{html.escape(said)}" src="data:image/png;base64,{data}"/>'
    return f"<div{kind}>{image}{html.escape(caption)}</div>"


def _images(encoded: str, shape: list[int]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(encoded), np.uint8).reshape(-1, *shape)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of [height, width, 1 or 3] uint8 (ISO/IEC 15948): reports need no imaging library."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter 0: as they are
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
