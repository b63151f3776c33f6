"""docs/configuration.md: every key of the YAML files, from the dataclasses that read them.

embervlm describe --config_reference > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embervlm.cluster import ClusterRecipe
from embervlm.config import REPOSITORY, TrainConfig
from embervlm.model.config import EmberVLMConfig
from embervlm.options import docstrings_of

_HEAD = """# Configuration reference

Every key of the YAML files, made from the dataclasses that read them by `embervlm describe --config_reference`; a test
fails where it is stale. An unknown key is an error that names the closest known one. `default` is what counts where the
YAML does not name the key; the shipped files in `configs/` set many of them. On the command line most keys have a flag
(`embervlm train --help`), and `--set stage4.phase2.learning_rate=3e-5` reaches every one.

The files: [a run](#a-run) (`--config`, as `configs/training_stages.yaml`), [a model](#a-model) (`--model`, as those in
`configs/model/`), [the nodes of a cluster](#the-nodes-of-a-cluster) (`--cluster`, as those in `configs/cluster/`).
"""


def reference() -> str:
    """The whole document."""
    parts = [_HEAD, "## A run\n", *_sections(TrainConfig(), "")]
    parts += ["## A model\n", _table(_model_rows()), "## The nodes of a cluster\n", _table(_rows(ClusterRecipe))]
    return "\n".join(parts).rstrip() + "\n"


def _sections(section: Any, where: str) -> Iterator[str]:
    """The table of a section, then those of the sections in it."""
    yield _table(_rows(type(section), section))
    for field in dataclasses.fields(section):
        hint = typing.get_type_hints(type(section))[field.name]
        inner = _inner(hint)
        if inner is None:
            continue
        value, key = getattr(section, field.name), f"{where}{field.name}"
        several = isinstance(value, Mapping)
        yield f"### `{key}{'.<component>' if several else ''}`\n"
        yield from _sections(inner() if value is None or several else value, f"{key}.")


def _inner(hint: Any) -> Any:
    """The dataclass in a type, if there is one."""
    return next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)


Row = tuple[str, str, str, str]
"""Key, type, default, meaning."""


def _rows(cls: Any, values: Any = None) -> list[Row]:
    texts, hints, out = docstrings_of(cls), typing.get_type_hints(cls), list[Row]()
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        text = texts.get(field.name, "").replace("%%", "%")
        if _inner(hints[field.name]) is not None:
            kind, default = "section", "none" if values is not None and getattr(values, field.name) is None else ""
            text = text or "See its own table."
        else:
            kind = str(field.type)
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            default = "required" if required and values is None else _shown(getattr(values, field.name, field.default))
        out.append((field.name, kind, default, text))
    return out


def _model_rows() -> list[Row]:
    texts = docstrings_of(EmberVLMConfig)
    own = [one for one in dataclasses.fields(EmberVLMConfig) if one.name in EmberVLMConfig.__annotations__]
    return [
        (
            one.name,
            str(one.type),
            "{}" if one.default_factory is dict else _shown(one.default),
            texts.get(one.name, "").replace("%%", "%"),
        )
        for one in own
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) or "{}"
    if isinstance(value, (tuple, list, frozenset)):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value).replace(str(REPOSITORY), "<repository>") if isinstance(value, (str, Path)) else f"{value:g}"


def _table(rows: list[Row]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, text in rows:
        cells = [f"`{key}`", f"`{kind}`", f"`{default}`" if default else "", text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])
