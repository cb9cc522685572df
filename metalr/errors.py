"""The errors that metalr raises on purpose. Each message names the thing, what was expected, what came."""

from collections.abc import Collection
from numbers import Integral


class MetalrError(Exception):
    """Base of every error that metalr raises; its text is one line fit to show to a person."""


class ConfigError(MetalrError, ValueError):
    """A setting, argument or combination of them is not one that can work."""


class DataError(MetalrError, ValueError):
    """Data is missing, damaged, or of the wrong shape, dtype or range."""


class ArtifactError(MetalrError):
    """A saved learner is missing, damaged, or of a kind that this version cannot read."""


class StorageError(MetalrError):
    """A file or folder cannot be written: a full disk, missing rights, a folder that vanished."""


class LockedError(ConfigError):
    """Another run is using the folder."""


class StoppedError(MetalrError):
    """A signal asked the run to stop; it was saved and can be resumed."""


class LostProcessError(StoppedError):
    """Another process of a run is gone; what was saved can be resumed."""


class MetalrWarning(UserWarning):
    """Something that works and is probably not what was meant."""


def check_choices(setting: str, values: Collection[object], *, empty: bool = False) -> None:
    """Raises ConfigError if a setting that lists what to try has no value (unless `empty` may be), or one twice."""
    if not values and not empty:
        raise ConfigError(f"{setting}: expected at least one value, got none")
    if len(set(values)) < len(values):
        raise ConfigError(f"{setting}: expected different values, got {values}")


def check_whole(setting: str, value: object, least: int = 1, note: str = "") -> None:
    """Raises ConfigError unless a setting is a whole number of at least `least`; note: what else it may be."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{setting}: expected a whole number of at least {least}{note}, got {value!r}")
    if int(value) < least:
        raise ConfigError(f"{setting}: expected at least {least}{note}, got {value}")


def check_seed(setting: str, value: object) -> None:
    """Raises ConfigError unless a seed is one that random keys tell apart: they hold 32 bits of it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**32:
        raise ConfigError(f"{setting}: expected 0 <= seed < 2^32, got {value!r}")


def one_line(error: BaseException) -> str:
    """The error's own text as one line, for messages that pass on somebody else's error."""
    return " ".join(str(error).split()) or type(error).__name__
