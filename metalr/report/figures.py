"""Line charts, scatter charts and heat maps as inline SVG, each with its numbers as a table below it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from metalr.report.tables import digits

WIDTH, HEIGHT = 640, 340  # of the drawing; it scales with the page
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 46
# As many as the style sheet has, --c0 … --c7, of Okabe & Ito, which most colour-blind people tell apart. Those beyond
# are hollow and dashed.
COLORS = 8
FIXED = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a6a00", "#444444")  # those, in files


class Series(NamedTuple):
    """One line or set of points. low, high: the band around y, if there is one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    points: bool = False  # marks only, no line


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two others."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * base for base in (1, 2, 5, 10) if power * base >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers, or both ends where there are none."""
    powers = [10.0**p for p in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]
    return powers if len(powers) > 1 else [low, high]


def number(value: float) -> str:
    """A number of an axis or a table."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M" if abs(value) < 1e9 else f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value / 1000:g} k" if value % 100 == 0 else f"{value:,.7g}"
    return f"{value:.4g}"


def chart(
    title: str,
    description: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    percent: bool = False,
) -> str:
    """A figure with one or more lines; its legend is below the drawing, its numbers in a table below that.

    Args:
      title: what it shows; description: what is seen in it, for those who cannot see it.
      percent: y is a share, shown in per cent.
    """
    xs = [x for s in series for x in s.x if not log_x or x > 0]
    ys = [y for s in series for y in (*s.y, *s.low, *s.high) if math.isfinite(y)]
    if not xs or not ys:
        return f"<figure><h3>{html.escape(title)}</h3><p>Nothing to show.</p></figure>"
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    margin = 0.06 * (y_high - y_low or abs(y_high) or 1)
    y_low, y_high = y_low - margin, y_high + margin
    if percent:
        y_low, y_high = max(y_low, 0.0), min(y_high, 1.0)
    if x_high == x_low:
        x_low, x_high = (x_low / 2, x_high * 2) if log_x else (x_low - 1, x_high + 1)

    def across(x: float) -> float:
        share = (math.log(x / x_low) / math.log(x_high / x_low)) if log_x else (x - x_low) / (x_high - x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ticks(y_low, y_high):
        text = f"{100 * y:.3g} %" if percent else number(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{text}</text>')
    for x in log_ticks(x_low, x_high) if log_x else ticks(x_low, x_high):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(x)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    for i, s in enumerate(series):
        color = f"var(--c{i % COLORS})"
        shown = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y) and (not log_x or x > 0)]
        if s.low and len(s.x) > 1:
            band = [*zip(s.x, s.high, strict=True), *reversed(list(zip(s.x, s.low, strict=True)))]
            path = " ".join(
                f"{across(x):.1f},{up(y):.1f}" for x, y in band if math.isfinite(y) and (not log_x or x > 0)
            )
            parts.append(f'<polygon points="{path}" fill="{color}" opacity="0.18"/>')
        if not s.points:
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in shown)
            dashed = ' stroke-dasharray="6 4"' if i >= COLORS else ""
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.2"{dashed}/>')
        if s.points or len(shown) <= 12:
            fill = color if i < COLORS else "none"
            mark = f'r="4" fill="{fill}" stroke="{color}" stroke-width="1.6"'
            parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" {mark}/>' for x, y in shown]
    keys = "".join(
        f'<li><span class="key" style="border-color:var(--c{i % COLORS})'
        f"{';background:var(--c' + str(i) + ')' if i < COLORS else ''}"
        f'"></span>{html.escape(s.name)}</li>'
        for i, s in enumerate(series)
    )
    head = [x_label, *(s.name for s in series)]
    at = sorted({x for s in series for x in s.x})
    rows = [[number(x), *(_cell(s, x, percent) for s in series)] for x in at]
    return figure(title, description, f"{y_label}", parts, f'<ul class="legend">{keys}</ul>', table(head, rows))


def standalone(title: str, description: str, series: Sequence[Series], **labels: Any) -> str:
    """The drawing of `chart` as one SVG file, with its legend, for light and dark pages. labels: as of `chart`."""
    found = re.search(r"<svg[^>]*>(.*?)</svg>", chart(title, description, series, **labels), re.S)
    assert found is not None
    inside = found.group(1)
    for i, color in enumerate(FIXED):
        inside = inside.replace(f"var(--c{i})", color)
    fills = [
        f'fill="{FIXED[i]}"' if i < COLORS else f'fill="none" stroke="{FIXED[i % COLORS]}"' for i in range(len(series))
    ]
    keys = [
        f'<rect x="{LEFT}" y="{HEIGHT + 8 + 20 * i}" width="12" height="12" rx="3" {fills[i]}/>'
        f'<text x="{LEFT + 20}" y="{HEIGHT + 19 + 20 * i}">{html.escape(s.name)}</text>'
        for i, s in enumerate(series)
    ]
    height = HEIGHT + 20 * len(series) + 16
    style = "text{font:13px system-ui,sans-serif;fill:#444}.grid{stroke:#ddd}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{inside}{"".join(keys)}</svg>\n'
    )


def _cell(series: Series, x: float, percent: bool) -> str:
    if x not in series.x:
        return ""
    i = list(series.x).index(x)
    value, scale = series.y[i], 100 if percent else 1
    if not math.isfinite(value):
        return "diverged"
    text = f"{scale * value:.2f}" if percent else number(value)
    return text + (f" ± {digits(scale * (series.high[i] - value), 2)}" if series.high else "")


def heat_map(
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    *,
    columns: str | Sequence[str],
    linear: bool = False,
    text: Callable[[float], str] = lambda value: f"{value:.3g}",
) -> str:
    """A colour for each number: darker is larger; negative numbers are in another one.

    Args:
      rows: (name, numbers), as many numbers in each; what is not finite is left out.
      columns: what a column is, to be numbered, or the name of each.
      linear: colours go with the numbers; else with their logarithms.
      text: of a number.
    """
    values = [abs(v) for _, found in rows for v in found if v and math.isfinite(v)]
    if not values:
        return ""

    def position(value: float) -> float:
        return value if linear else math.log(abs(value))

    if linear:
        values = [v for _, found in rows for v in found if math.isfinite(v)]
    high = position(max(values))
    low = position(min(values)) if linear else min(position(min(values)), high - math.log(10))  # alike: look alike
    count, left = max(len(found) for _, found in rows), 150
    heads = [f"{columns} {j + 1}" for j in range(count)] if isinstance(columns, str) else list(columns)
    height, width = 30, (WIDTH - left - RIGHT) / count
    parts = []
    for i, (name, found) in enumerate(rows):
        y = i * height + 4
        parts.append(f'<text x="{left - 8}" y="{y + 19}" text-anchor="end">{html.escape(name)}</text>')
        for j, value in enumerate(found):
            if not math.isfinite(value):
                continue
            share = (position(value) - low) / ((high - low) or 1.0) if value or linear else 0.0
            color = "var(--c1)" if value < 0 and not linear else "var(--c0)"
            x, opacity = left + j * width, 0.12 + 0.88 * share
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="{height - 3}" fill="{color}" '
                f'opacity="{opacity:.2f}"><title>{html.escape(f"{name}, {heads[j]}: {text(value)}")}</title></rect>'
            )
            if width >= 44:
                shade = "on-dark" if share > 0.55 else "on-light"
                parts.append(
                    f'<text class="{shade}" x="{x + width / 2 - 1:.1f}" y="{y + 18}" text-anchor="middle">'
                    f"{html.escape(text(value))}</text>"
                )
    total = len(rows) * height + 8
    if not isinstance(columns, str):
        total += 20
        parts += [
            f'<text x="{left + (j + 0.5) * width:.1f}" y="{total - 6}" text-anchor="middle">{html.escape(head)}</text>'
            for j, head in enumerate(heads)
        ]
    head = ["", *heads] if count > 1 else ["", "value"]
    numbers = [[name, *(text(v) if math.isfinite(v) else "diverged" for v in found)] for name, found in rows]
    return figure(title, description, "", parts, "", table(head, numbers), height=total)


def figure(
    title: str, description: str, label: str, parts: list[str], legend: str, below: str, height: int = HEIGHT
) -> str:
    """A drawing with its title, description, legend, and the numbers in a table that opens."""
    said = f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>"
    axis = f'<p class="axis">{html.escape(label)}</p>' if label else ""
    return (
        f'<figure><h3>{html.escape(title)}</h3>{axis}<svg viewBox="0 0 {WIDTH} {height}" role="img">{said}'
        f"{''.join(parts)}</svg>{legend}<details><summary>The numbers</summary>{below}</details></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as an HTML table that scrolls on its own where the page is narrow."""
    top = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
