"""Rivals: runs of fixed rates, one after the other and side by side."""

import jax
import numpy as np
import pytest

from metalr import inner, models, tasks
from metalr.comparison import rivals
from metalr.evaluation import protocol


def test_fixed_rates_side_by_side_give_what_each_alone_gives(blobs, monkeypatch):
    """As on accelerators, where all rates are one dispatch."""
    sampler = tasks.make_sampler(tasks.make_splits(blobs, "relabeled").test, 10, 2, 3)
    keys = protocol.episode_keys(0, 4)
    model = models.mlp(10, (8, 8, 1), widths=(16,))
    field = rivals.Field(sampler, sampler, keys, keys, support=20, train=16, lengths=(1, 4), batch_size=5)
    rates, init = [0.003, 0.03, 0.1], model.init(jax.random.key(0))
    alone = rivals.baselines(model, field)("adam", False, False)(init, rates)
    monkeypatch.setattr(rivals.devices, "at_once", lambda values: [list(values)])
    together = rivals.baselines(model, field)("adam", False, False)(init, rates)
    assert alone.shape == together.shape == (3, 4, 2)
    np.testing.assert_allclose(alone, together, atol=0.034)  # one prediction of 30 may round over
    assert not np.allclose(alone[0], alone[2])
    by_length = rivals.baselines(model, field)("adam_cosine", False, False)(init, rates)
    assert by_length.shape == (3, 4, 2)


@pytest.mark.parametrize(("objective", "best"), [("cross_entropy", [1, 1, 7, 7]), ("squared_error", [1, 3, 3, 9])])
def test_early_stopping_takes_the_shortest_of_the_best_so_far(objective, best):
    """Accuracy is the higher the better, a squared error the lower."""
    lengths, validation = (1, 3, 7, 9), [0.5, 0.4, 0.6, 0.3]
    keys = protocol.episode_keys(0, 2)
    field = rivals.Field(
        ((), None), ((), None), keys, keys, 8, 6, lengths, 8, inner.OBJECTIVES[objective], early_stopping=True
    )
    rows = [rivals.Scores("x", n, np.full((1, 2), n / 10), 8.0 * n, 8.0 * n, 0.0, None) for n in lengths]
    found = rivals._stopped_early(rows, validation, field)
    assert [row.steps for row in found] == list(lengths)  # what it may take
    assert [row.chosen["steps"] for row in found] == best
    assert [row.mean for row in found] == [n / 10 for n in best]
    assert [row.example_gradients for row in found] == [8.0 * n for n in best]
