"""Results for people, as text and as one HTML page. Reads files only; never trains."""

from metalr.report import page
from metalr.report.tables import (
    bars,
    contest_text,
    curve_lines,
    curve_text,
    learned_text,
    plain,
    plural,
    search_text,
    seeds_text,
    shown,
    study_text,
    table,
    text,
)

__all__ = [
    "bars",
    "contest_text",
    "curve_lines",
    "curve_text",
    "learned_text",
    "page",
    "plain",
    "plural",
    "search_text",
    "seeds_text",
    "shown",
    "study_text",
    "table",
    "text",
]
