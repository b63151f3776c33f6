"""What users write in commands and YAML files stays as it is: `interface.txt` lists every flag and every key.

`python tests/test_interface.py` writes the list anew, for a change that is meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from embervlm import cli, select_best
from embervlm.cluster import CLUSTER_VARIABLE, ClusterRecipe
from embervlm.config import REPOSITORY, TrainConfig
from embervlm.run import train_flags

LIST = Path(__file__).with_name("interface.txt")


def flags_of(command: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """A line for each option of `parser` and, below it, of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield f"{command} {name}"
                yield from flags_of(f"{command} {name}", inner)
        elif not isinstance(action, argparse._HelpAction):
            yield f"{command} {flag_line(action)}"


def flag_line(action: argparse.Action) -> str:
    kind = action.type or (type(action.const) if action.nargs == 0 else str)
    parts = ["/".join(action.option_strings) or f"<{action.metavar or action.dest}>", getattr(kind, "__name__", kind)]
    if action.nargs == 0:
        parts.append(f"sets {action.const}")
    elif action.nargs:
        parts.append(f"several ({action.nargs})")
    if isinstance(action, argparse._AppendAction):
        parts.append("may be repeated")
    if action.choices:
        parts.append(f"one of {', '.join(map(str, action.choices))}")
    parts.append("required" if action.required else f"default {shown(action.default)}")
    return " | ".join(map(str, parts))


def keys_of(section: Any, where: str = "") -> Iterator[str]:
    """A line for each key of a config and of the sections in it, with its value where the YAML does not name it."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{where}{field.name}"
        hint = typing.get_type_hints(type(section))[field.name]
        inner = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if inner is None:
            own = field.default
            other = own is not dataclasses.MISSING and own != value
            yield f"{key} | {field.type} | default {shown(value)}" + (
                f", {shown(own)} where its section is given" if other else ""
            )
        elif isinstance(value, Mapping):
            yield f"{key} | a section for each name | default {shown(value)}"
            yield from keys_of(inner(), f"{key}.<name>.")  # type: ignore[operator]
        else:
            yield f"{key} | section" + (" | default None" if value is None else "")
            yield from keys_of(inner() if value is None else value, f"{key}.")  # type: ignore[operator]


def shown(value: Any) -> str:
    return repr(str(value) if isinstance(value, Path) else value).replace(str(REPOSITORY), "<repository>")


def interface() -> list[str]:
    from embervlm.model.config import EmberVLMConfig
    from embervlm.run import submit

    own = [one for one in dataclasses.fields(EmberVLMConfig) if one.name in EmberVLMConfig.__annotations__]
    lines = [
        *flags_of("launch/train.py", train_flags.parser()),
        *flags_of("launch/submit.py", submit.parser()),
        *flags_of("embervlm", cli.build_parser()),
        *flags_of("python -m embervlm.select_best", select_best.build_parser()),
        *(f"configs/training_stages.yaml: {line}" for line in keys_of(TrainConfig())),
        *(f"configs/cluster/: {field.name} | {field.type} | required" for field in dataclasses.fields(ClusterRecipe)),
        *(
            f"configs/model/: {one.name} | {one.type} | default "
            + ("{}" if one.default_factory is dict else shown(one.default))
            for one in own
        ),
    ]
    return sorted(lines)


def test_every_flag_and_yaml_key_is_as_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)
    found, listed = interface(), LIST.read_text(encoding="utf-8").splitlines()
    gone = [f"- {line}" for line in listed if line not in found]
    new = [f"+ {line}" for line in found if line not in listed]
    assert found == listed, (
        "\n".join(["flags or YAML keys that users write have changed:", *gone, *new])
        + f"\nIf that is meant: `python tests/test_interface.py` writes {LIST.name} anew; name the change in the commit"
    )


def test_a_flags_help_is_the_text_under_its_field() -> None:
    texts = {action.dest: action.help for action in train_flags.parser()._actions}
    kept = "Number of best evaluated checkpoints to keep in addition, by their weights"
    assert texts["keep_best"] == f"{kept} (default: as in --config)"
    assert texts["phase2_epochs"] == "Passes over the records (default: as in --config)"  # inherited by its class
    assert not [flag for flag in train_flags.FLAGS if not texts[flag]]


def test_a_yes_or_no_field_is_a_flag_without_a_value_that_leaves_the_yaml_alone() -> None:
    parse = train_flags.parser().parse_args
    assert parse([]).gradient_checkpointing is None and parse(["--gradient_checkpointing"]).gradient_checkpointing


if __name__ == "__main__":
    LIST.write_text("".join(f"{line}\n" for line in interface()), encoding="utf-8")
