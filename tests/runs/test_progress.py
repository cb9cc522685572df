"""Progress in a log: ten lines, and a time that is left from what was done, without compilation."""

import pytest

from metalr.runs import progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (40, "40 s"), (89, "89 s"), (700, "12 min"), (5399, "90 min"), (12600, "3.5 h")]
)
def test_durations_in_words(seconds, text):
    assert progress.duration(seconds) == text


def test_a_log_says_how_long_it_will_take(capsys, monkeypatch):
    clock = iter([100.0] + [100.0 + 10 * i for i in range(1, 20)])  # compilation was before the first advance
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress.ConsoleReporter().bar("training", 20) as advance:
        for _ in range(20):
            advance(1, "loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "training 1/20  loss 1.0"
    assert lines[1] == "training 2/20  loss 1.0  about 3 min left"  # 18 steps of 10 s
    assert lines[-2] == "training 18/20  loss 1.0  about 20 s left"
    assert lines[-1] == "training 20/20  loss 1.0"


def test_a_log_that_goes_on_counts_its_own_time_only(capsys):
    with progress.ConsoleReporter().bar("training", 20, 15) as advance:
        for _ in range(5):
            advance(1, "")
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["16/20", "18/20", "20/20"]
