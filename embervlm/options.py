"""Flags made from the fields of dataclasses, so name, type, default and help of an option are defined in one place."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import typing
from functools import lru_cache
from typing import Any


def add_flag(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    section: type,
    key: str,
    *,
    flag: str = "",
    **changed: Any,
) -> argparse.Action:
    """`--<key>` for a field of the dataclass `section`: its type, its default, its docstring as help.

    Args:
        key: Name of the field; with dots, a field in a section of `section`.
        flag: Another name for the flag; its value is still called `key`.
        changed: Arguments of `add_argument` that replace the field's.
    """
    *sections, name = key.split(".")
    for part in sections:
        section = plain_type(typing.get_type_hints(section)[part])
    field = section.__dataclass_fields__[name]  # type: ignore[attr-defined]
    kind = plain_type(typing.get_type_hints(section)[name])
    default = None if field.default is dataclasses.MISSING else field.default
    settings = {"default": default, "help": docstrings_of(section).get(name), "dest": key}
    settings |= {"action": "store_true"} if kind is bool else {"type": kind}
    return parser.add_argument(f"--{flag or name}", **{**settings, **changed})


def plain_type(hint: Any) -> Any:
    """`int` for `int | None`."""
    return next((inner for inner in typing.get_args(hint) if inner is not type(None)), hint)


@lru_cache
def docstrings_of(section: type) -> dict[str, str]:
    """Field -> the text under it in the source of the dataclass, or of the class from which the field is inherited."""
    out: dict[str, str] = {}
    for cls in reversed(section.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                words = str(text.value.value).replace("%", "%%").split()
                out[ast.unparse(field.target)] = " ".join(words)
    return out


def chosen(options: dict[str, Any], section: type) -> dict[str, Any]:
    """The values in `options` that are fields of `section`; they are removed from `options`."""
    return {name: options.pop(name) for name in section.__dataclass_fields__ if name in options}  # type: ignore[attr-defined]
