"""The command line, and what a script in experiments/ calls. Imports jax only to run a command."""

from metalr.cli.commands import (
    COMPARISON,
    EXIT_ERROR,
    EXIT_PIPE,
    EXIT_STOPPED,
    Config,
    Json,
    adapt,
    compare,
    data,
    evaluate,
    guard,
    main,
    quickstart,
    show,
    start_jax,
)

__all__ = [
    "COMPARISON",
    "EXIT_ERROR",
    "EXIT_PIPE",
    "EXIT_STOPPED",
    "Config",
    "Json",
    "adapt",
    "compare",
    "data",
    "evaluate",
    "guard",
    "main",
    "quickstart",
    "show",
    "start_jax",
]
