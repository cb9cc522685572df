"""Networks as two pure functions, `init(key) -> params` and `apply(params, x) -> outputs`."""

from metalr.models.conv4 import NORMS, conv4
from metalr.models.flax import DTYPES, from_linen, from_nnx
from metalr.models.heads import HEAD_STARTS
from metalr.models.mlp import MOST_LAYERS, mlp
from metalr.models.model import (
    CUSTOM,
    Apply,
    Model,
    WithSupport,
    check_dtypes,
    from_function,
    predict,
    starting_from,
    unit,
)
from metalr.models.registry import LEARNED_HEAD, MODELS, build
from metalr.models.rnn import CELLS, rnn
from metalr.models.transformer import transformer

__all__ = [
    "CELLS",
    "CUSTOM",
    "DTYPES",
    "HEAD_STARTS",
    "LEARNED_HEAD",
    "MODELS",
    "MOST_LAYERS",
    "NORMS",
    "Apply",
    "Model",
    "WithSupport",
    "build",
    "check_dtypes",
    "conv4",
    "from_function",
    "from_linen",
    "from_nnx",
    "mlp",
    "predict",
    "rnn",
    "starting_from",
    "transformer",
    "unit",
]
