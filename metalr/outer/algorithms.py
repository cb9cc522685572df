"""The algorithms: each is a row of choices, a column for every question; there are no subclasses."""

from __future__ import annotations

from typing import NamedTuple

from metalr.errors import ConfigError


class Algorithm(NamedTuple):
    """One row of choices.

    Attributes:
      granularity, per_step, adapts: as in RatesSpec.
      learned: whether the outer loop changes the rates (and all other inner hyperparameters).
      first_order: whether the meta-gradient treats inner gradients as constants.
      meta_gradient: "query" (of the query loss after adaptation), "reptile" (towards the adapted params), "implicit"
        (of the query loss, as if adaptation had ended in a minimum) or "joint" (of the loss with no adaptation).
      source: paper and place.
      predicted, decay, proximal: as in RatesSpec.
      multi_step: over which share of the outer steps the query loss after every inner step counts, fading into that
        after the last one (Antoniou et al. 2019, section 4, "multi-step loss").
      first_order_share: the share of the outer steps, at their start, that are first order ("derivative-order
        annealing", the same section).
      head_start: where the output layer starts: "learned", or a row of models.heads.HEAD_STARTS.
    """

    granularity: str
    per_step: bool
    learned: bool
    first_order: bool
    adapts: str
    meta_gradient: str
    source: str
    predicted: bool = False
    decay: float | None = None
    proximal: float | None = None
    multi_step: float = 0.0
    first_order_share: float = 0.0
    head_start: str = "learned"


ALGORITHMS = {
    "joint": Algorithm("shared", False, False, True, "all", "joint", "pre-training on all tasks, with no inner loop"),
    "maml": Algorithm("shared", False, False, False, "all", "query", "Finn et al. 2017, algorithm 2"),
    "fomaml": Algorithm("shared", False, False, True, "all", "query", "Finn et al. 2017, section 5.2"),
    "reptile": Algorithm("shared", False, False, True, "all", "reptile", "Nichol et al. 2018, algorithm 2"),
    "imaml": Algorithm(
        "shared", False, False, True, "all", "implicit", "Rajeswaran et al. 2019, algorithm 2", proximal=1.0
    ),
    "anil": Algorithm("shared", False, False, False, "head", "query", "Raghu et al. 2020, section 4"),
    "boil": Algorithm("shared", False, False, False, "body", "query", "Oh et al. 2021, section 3"),
    "meta_sgd": Algorithm("parameter", False, True, False, "all", "query", "Li et al. 2017, algorithm 1"),
    "meta_sgd_layer": Algorithm("layer", False, True, False, "all", "query", "Li et al. 2017, one rate per layer"),
    "lslr": Algorithm("tensor", True, True, False, "all", "query", "Antoniou et al. 2019, section 4"),
    "maml_pp": Algorithm(
        "tensor", True, True, False, "all", "query", "Antoniou et al. 2019, section 4", multi_step=0.15,
        first_order_share=0.3,
    ),
    "alfa": Algorithm(
        "layer", True, True, False, "all", "query", "Baik et al. 2020, algorithm 1", predicted=True, decay=1e-3
    ),
    "unicorn_maml": Algorithm(
        "shared", False, False, False, "all", "query", "Ye & Chao 2022, section 5", head_start="shared"
    ),
    "proto_maml": Algorithm(
        "shared", False, False, False, "all", "query", "Triantafillou et al. 2020, section 3", head_start="prototypes"
    ),
}  # fmt: skip


def algorithm_row(name: str) -> Algorithm:
    """The row of that name. Raises ConfigError for an unknown one."""
    if name not in ALGORITHMS:
        raise ConfigError(f"inner.algorithm: expected one of {tuple(ALGORITHMS)}, got {name!r}")
    return ALGORITHMS[name]
