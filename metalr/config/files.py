"""Configs out of JSON, checked, and what differs between two of them. Imports no jax."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from metalr.config.settings import TrainConfig
from metalr.errors import ConfigError, one_line


def from_json(facts: dict[str, Any], kind: Any = TrainConfig) -> Any:
    """The config of that kind that `to_json` gave. Raises ConfigError for unknown fields or values of a wrong kind."""

    def build(kind: Any, given: Any, prefix: str) -> Any:
        if not isinstance(given, dict):
            raise ConfigError(f"{prefix.rstrip('.') or 'config'}: expected an object of settings, got {given!r}")
        names, hints = [field.name for field in dataclasses.fields(kind)], get_type_hints(kind)
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1, 0.5)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {names}"
                raise ConfigError(f"{prefix}{name}: no such setting; {hint}")
            kinds = get_args(hints[name])
            if value is None and type(None) in kinds:
                values[name] = None
            elif Path in kinds and isinstance(value, str):
                values[name] = Path(value)
            else:
                values[name] = convert(getattr(kind(), name), value, f"{prefix}{name}", kinds)
        return kind(**values)

    def convert(default: Any, value: Any, name: str, kinds: tuple[Any, ...] = ()) -> Any:
        if dataclasses.is_dataclass(default):
            return build(type(default), value, f"{name}.")
        if isinstance(default, tuple):
            if not isinstance(value, list):
                raise ConfigError(f"{name}: expected a list, got {value!r}")
            like = default[0] if default else get_args(kinds[0])[0] if get_origin(kinds[0]) is Literal else kinds[0]()
            return tuple(convert(like, each, name) for each in value)
        wanted = type(default)
        if default is None:  # then the annotation says what else it may be
            wanted = next((k for k in kinds if k in (bool, int, float, str)), object)
        fitting = (int, float) if wanted is float else wanted
        if not isinstance(value, fitting) or (wanted is not object and isinstance(value, bool) != (wanted is bool)):
            raise ConfigError(f"{name}: expected {wanted.__name__}, got {value!r}")
        return value

    return build(kind, facts, "")


def check_literals(config: Any, prefix: str = "") -> None:
    """Raises ConfigError for a setting whose value is not one of its choices: the command line refuses it by itself."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint, name = getattr(config, field.name), hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_literals(value, f"{name}.")
        parts = (hint, *get_args(hint))
        choices = [each for part in parts if get_origin(part) is Literal for each in get_args(part)]
        values = value if get_origin(hint) is tuple else (value,)
        if choices and not set(values) <= {*choices} and not (value is None and type(None) in parts):
            raise ConfigError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def read_settings(path: Path) -> Any:
    """The settings of a run, for another one: of a run folder, or of a config file. Raises ConfigError."""
    if path.is_file():
        try:
            found = from_json(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path}: not the config of a run: {one_line(error)}") from error
    else:
        found = read_config(path)
    if found.model.own:
        raise ConfigError(f"config: {path} has a network of your own, which the command line cannot build")
    return dataclasses.replace(found, out=None, overwrite=False)


def read_config(folder: Path, kind: Any = TrainConfig) -> Any:
    """The config of a run folder. Raises ConfigError: there is none, or it is damaged."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder}: expected a run folder with config.json, found none")
    try:
        return from_json(json.loads(file.read_text()), kind)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: not the config of a run: {one_line(error)}") from error


def kinds_of(name: str) -> set[Any]:
    """The types that a setting of a run may have, by its dotted name; empty for one that there is not."""
    kind: Any = TrainConfig
    for part in name.split("."):
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = hints.get(part)
    return {get_origin(one) or one for one in (kind, *get_args(kind)) if one is not None}


def with_settings(config: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """A config with settings changed, by dotted name ("outer.init_rate"). Raises ConfigError for an unknown one."""
    for name, value in values.items():
        first, _, rest = name.partition(".")
        known = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else ()
        if first not in known:
            raise ConfigError(f"{prefix}{name}: no such setting")
        changed = with_settings(getattr(config, first), {rest: value}, f"{prefix}{first}.") if rest else value
        config = dataclasses.replace(config, **{first: changed})
    return config


def differences(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ, by dotted name: (value in a, value in b)."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(a):
        one, other, name = getattr(a, field.name), getattr(b, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(one):
            found |= differences(one, other, f"{name}.")
        elif one != other:
            found[name] = (one, other)
    return found


def settings_hash(config: TrainConfig) -> str:
    """Eight hex digits that tell runs of different settings apart; where it stands, runs and logs is none of them."""
    settings = dataclasses.replace(config, out=None, overwrite=False, loggers=()).to_json()
    del settings["mesh"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def run_name(config: TrainConfig) -> str:
    """What a run's folder is called if nobody says: data, tasks, algorithm, seed, and the hash of its settings."""
    data = Path(config.data).stem
    tasks = data if config.table.task_column else f"{data}-{config.tasks.family}"
    return f"{tasks}-{config.inner.algorithm}-seed{config.seed}-{settings_hash(config)}"
