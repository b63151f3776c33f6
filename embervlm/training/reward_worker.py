"""A process that computes rewards beside the drawing of chains: `python -m embervlm.training.reward_worker FD`.

It imports no torch. Whatever a user's function does (raise, print, hang, crash), the training is another process.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from embervlm.data.records import record_to_json
from embervlm.judge.rewards import rewards_of

OwnReward = Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], Sequence[float]]


def load(name: str) -> OwnReward:
    """The function of `module:function`; ValueError with the reason where there is none."""
    module_name, _, function_name = name.partition(":")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"module {module_name} cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(found, function_name, None)
    if not callable(function):
        raise ValueError(f"module {module_name} has no function {function_name}")
    return function  # type: ignore[no-any-return]


def serve(connection: Connection) -> None:
    """Answer each job with `("ok", rewards)` or `("error", part, what)`, until the other side is gone."""
    settings = connection.recv()
    own: dict[str, OwnReward] = {}
    while True:
        try:
            records, chains = connection.recv()
        except EOFError:
            return
        part = ""
        try:
            found = rewards_of(
                records, chains, settings["parts"], domains=settings["domains"], most_tokens=settings["most_tokens"]
            )
            for part in settings["own"]:
                if part not in own:
                    own[part] = load(part)
                found[part] = plain(own[part]([record_to_json(record) for record in records], chains))
            connection.send(("ok", found))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = str(error) if isinstance(error, ValueError) and where.filename == __file__ else None
            name = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)} line {where.lineno})"
            connection.send(("error", part, told or f"raised {name}"))


def plain(values: Any) -> list[float]:
    """`values` as numbers; ValueError names what is none."""
    try:
        listed = list(values)
    except TypeError:
        raise ValueError(f"returned {type(values).__name__}, not a list of numbers") from None
    for value in listed:
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise ValueError(f"returned {value!r} among its numbers") from None
    return [float(value) for value in listed]


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # where the user's module is
    serve(Connection(int(sys.argv[1])))
