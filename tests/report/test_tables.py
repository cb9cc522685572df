import pytest

from metalr.report import tables


@pytest.mark.parametrize(
    ("value", "count", "expected"),
    [(0.0, 2, "0"), (0.51234, 2, "0.51"), (26.3, 2, "26"), (406.19, 2, "406"), (99.7, 2, "100"), (9.97, 2, "10"),
     (12345.6, 4, "12,346"),
     (-919.8, 4, "-919.8"), (1e-7, 2, "1e-07"), (3e20, 4, "3e+20"), (float("inf"), 2, "inf")],
)  # fmt: skip
def test_large_numbers_have_no_exponent(value, count, expected):
    assert tables.digits(value, count) == expected


def test_scores_of_any_metric_are_read_at_once():
    assert (tables.shown(919.78, "mse"), tables.shown_interval(406.19, "mse")) == ("919.8", "± 406")
    assert tables.shown_difference(1234.5, "mse") == "+1,234"
    assert (tables.shown(0.77771, "accuracy"), tables.shown_interval(0.003, "accuracy")) == ("77.77 %", "± 0.30")
    assert (tables.shown(None, "mse"), tables.shown_interval(None, "mse")) == ("diverged", "")


def of(scores, maximise=True, metric="accuracy", best_step=5, learns="both", objective="cross_entropy"):
    """Results with what advice reads."""
    return {
        "metric": {"name": metric, "maximise": maximise},
        "config": {"init": "runs/joint", "outer": {"learns": learns}, "objective": objective},
        "training": {
            "warm_start": {"folder": "runs/joint"}, "best_step": best_step, "validations": [[0, 0.5, 1], [5, 0.4, 2]],
            "validated_steps": scores,
        },
    }  # fmt: skip


def test_advice_is_given_where_validation_calls_for_it():
    assert tables.advice(of({"5": 0.5})) == []
    assert tables.advice(of({"1": 0.5, "50": 0.6})) == []
    (early,) = tables.advice(of({"1": 0.7, "50": 0.6}))
    assert "accuracy is 70.00 % after 1 step and 60.00 % after 50: stop early" in early
    assert "mse is 3 after 1 step" in tables.advice(of({"1": 3.0, "50": 4.0}, False, "mse"))[0]
    assert tables.advice(of({"1": 4.0, "50": 3.0}, False, "mse")) == []
    assert "after 1 step and diverged after 50" in tables.advice(of({"1": 0.7, "50": None}))[0]
    start, what_to_do = tables.advice(of({"5": 0.5}, best_step=0))
    assert start.endswith("than what it started from, runs/joint, which was kept.")
    assert what_to_do.endswith("--outer.learns rates_of_init --outer.part validation --outer.calibrate")
    for metric, objective in ("mse", "squared_error"), ("accuracy", "binary_cross_entropy"):  # of classes alone
        found = tables.advice(of({"5": 0.5}, metric == "accuracy", metric, 0, objective=objective))
        assert found[1].endswith("--outer.part validation")
    for learns in "rates", "rates_of_init":  # no init was learned
        assert tables.advice(of({"5": 0.5}, best_step=0, learns=learns)) == [start]
