"""What the dataclasses of `config` check their fields with, and the error that names a bad one."""

from __future__ import annotations

import math
from typing import Any

from embervlm.errors import UserError
from embervlm.paths import PathError, expanded


class ConfigError(UserError):
    """A setting that cannot be used; the message names it and says what to write instead."""


def require(holds: bool, message: str) -> None:
    """ConfigError with `message` unless `holds`."""
    if not holds:
        raise ConfigError(message)


def bounded(config: Any, *names: str, least: float, most: float = math.inf) -> None:
    """ConfigError if a field of `config` is outside [least, most]; None means not set."""
    for name in names:
        if (value := getattr(config, name)) is not None and not least <= value <= most:
            below = "is negative" if least == 0 else f"is less than {least:g}"
            raise ConfigError(f"{name}: {value} {f'is not in [{least:g}, {most:g}]' if most < math.inf else below}")


def filled_in(name: str, path: str) -> str:
    """`path` with `~` and `$NAME` expanded; ConfigError that names `name` if this is not possible."""
    try:
        return expanded(path)
    except PathError as error:
        raise ConfigError(f"{name}: {error}") from None


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ConfigError if `value` is none of `choices`."""
    require(value in choices, f"{name}: {value!r} is not one of {', '.join(choices)}")
