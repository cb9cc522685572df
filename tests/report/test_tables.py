import pytest

from metalr.report import tables


@pytest.mark.parametrize(
    ("value", "count", "expected"),
    [(0.0, 2, "0"), (0.51234, 2, "0.51"), (26.3, 2, "26"), (406.19, 2, "406"), (12345.6, 4, "12,346"),
     (-919.8, 4, "-919.8"), (1e-7, 2, "1e-07"), (3e20, 4, "3e+20"), (float("inf"), 2, "inf")],
)  # fmt: skip
def test_large_numbers_have_no_exponent(value, count, expected):
    assert tables.digits(value, count) == expected


def test_scores_of_any_metric_are_read_at_once():
    assert (tables.shown(919.78, "mse"), tables.shown_interval(406.19, "mse")) == ("919.8", "± 406")
    assert tables.shown_difference(1234.5, "mse") == "+1,234"
    assert (tables.shown(0.77771, "accuracy"), tables.shown_interval(0.003, "accuracy")) == ("77.77 %", "± 0.30")
    assert (tables.shown(None, "mse"), tables.shown_interval(None, "mse")) == ("diverged", "")
