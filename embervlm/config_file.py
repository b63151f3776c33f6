"""Configs from YAML files and flags. An unknown key is an error; every problem is reported with its place."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from embervlm import run_dir
from embervlm.config import (
    ALIASES,
    COMPONENTS,
    REPOSITORY,
    ConfigError,
    Phase2Config,
    Phase3Config,
    TrainConfig,
    filled_in,
)

Config = TypeVar("Config")
CONFIG = "config.json"
_OF_A_RUN = (
    *("architectures", "dtype", "model_type", "transformers_version", "stage", "candidates"),
    *("longest_chain_steps", "longest_chain_tokens", "longest_answer_tokens"),
)
"""Keys of a checkpoint's configuration that say nothing about the shape of its model."""


def from_mapping(cls: type[Config], values: Any, where: str = "") -> Config:
    """A `cls` from parsed YAML. Every unknown key and wrong type in it is reported together, with its path."""
    problems: list[str] = []
    built = _build(cls, values, where, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return typing.cast(Config, built)


def _build(cls: Any, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{where or 'config'}: expected a mapping, found {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    kwargs = {}
    found_before = len(problems)
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            problems.append(f"{path}: unknown key{_advice(str(key), hints)}")
            continue
        kwargs[key] = _convert(hints[key], value, path, problems)
    required = (f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING)
    problems += [f"{where or 'config'}: {name} is missing" for name in required if name not in values]
    if len(problems) > found_before:
        return None
    try:
        return cls(**kwargs)
    except ConfigError as error:
        problems.append(f"{where}: {error}" if where else str(error))
        return None


def _advice(key: str, hints: Mapping[str, Any]) -> str:
    """Advice for a key that is not in `hints`: where it belongs, or which key was probably meant."""
    name = ALIASES.get(key, key)
    if name in COMPONENTS:
        return f"; it belongs under stage4.phase2.learning_rate_multipliers: {name}"
    if places := sorted(_places_of(TrainConfig, key), key=lambda place: (not place.startswith("stage4"), place)):
        return "; it belongs to " + " or ".join(place or "the top of the file" for place in places)
    close = difflib.get_close_matches(key, hints, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _places_of(cls: Any, key: str, where: str = "") -> list[str]:
    """Dotted paths of the sections of `cls` that have a setting called `key`."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        if name in getattr(cls, "does_nothing", ()):
            continue
        inner = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if inner is not None:
            found += _places_of(inner, key, f"{where}.{name}".lstrip("."))
        if name == key:
            found.append(where)
    return found


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, problems)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(arg for arg in typing.get_args(hint) if arg is not type(None)), value, path, problems)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(typing.get_args(hint)[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value))
    if origin in (Mapping, dict) and isinstance(value, Mapping):
        item_hint = typing.get_args(hint)[1]
        return {key: _convert(item_hint, item, f"{path}.{key}", problems) for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # YAML reads 1e-4 as a string
            if math.isfinite(number := float(value)):
                return number
    if hint in (int, str, bool) and type(value) is hint:
        return value
    wanted = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}.get(hint, str(hint))
    problems.append(f"{path}: expected {wanted}, found {value!r}")
    return None


class _Loader(yaml.SafeLoader):
    """Refuses a key that appears twice, of which YAML itself takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`, of which there may be several
                continue
            if (key := self.construct_object(key_node, deep=True)) in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"line {line}: {key} appears twice in one section; keep one of the two")
            seen.append(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError with file and line otherwise."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(values).__name__}")
    return values


def override(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings, in place."""
    *parents, last = dotted.split(".")
    for parent in parents:
        # a component may stand there by its other name
        key = next((key for key in values if ALIASES.get(key, key) == ALIASES.get(parent, parent)), parent)
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {parent} is {values!r} in the YAML, not a section with keys")
    component = ALIASES.get(last, last)
    for other in [key for key in values if ALIASES.get(key, key) == component]:
        del values[other]
    values[component] = value


MOVED = {
    "phase1": "stage4.phase1",
    "phase2": "stage4.phase2",
    "augmentation_strategies": "stage4.reasoning_augmentation.augmentation_strategies",
}
"""Blocks that the guide prints alone -> where they belong."""


def _move_blocks(values: dict[str, Any]) -> None:
    for block, home in MOVED.items():
        if block not in values:
            continue
        at: Any = values
        for part in home.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        if at is not None:
            raise ConfigError(f"{block}: appears at the top and in {home.rpartition('.')[0]}; keep one of them")
        override(values, home, values.pop(block))


def load_train_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None, flags: Mapping[str, str] | None = None
) -> TrainConfig:
    """The run in YAML file `path`; `overrides` (dotted key -> value) override it.

    Args:
        flags: Dotted key -> the flag that an override came from; an error names it, or else the file.
    """
    values = read_yaml(path)
    try:
        _move_blocks(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    given = {}
    for dotted, value in (overrides or {}).items():
        block, dot, rest = dotted.partition(".")
        given[f"{MOVED.get(block, block)}{dot}{rest}"] = ((flags or {}).get(dotted, dotted), value)
    problems = _problems(values, given)
    if not problems:
        return from_mapping(TrainConfig, _overridden(values, given))
    in_file = _problems(values, {})
    raise ConfigError("\n".join(f"{_origin(path, values, given, p, in_file)}: {p}" for p in problems))


Given = Mapping[str, tuple[str, Any]]
"""Dotted key -> the flag it came from, and the value."""


def _overridden(values: dict[str, Any], given: Given) -> dict[str, Any]:
    out = copy.deepcopy(values)
    for dotted, (_, value) in given.items():
        override(out, dotted, value)
    _fill_in_phase3(out)
    return out


PHASE3_RATE = 0.2
"""Of phase 2's learning rate, for a phase 3 that names none: the guide's model and one of 2M parameters learn at rates
that are forty times apart."""


def _fill_in_phase3(values: dict[str, Any]) -> None:
    """What a phase 3 does not name it takes from phase 2: a rate that fits the model, adapters, and what is frozen."""
    stage = values.get("stage4")
    phase3, phase2 = (stage.get(name) for name in ("phase3", "phase2")) if isinstance(stage, dict) else (None, None)
    if not isinstance(phase3, dict):
        return
    phase2 = phase2 if isinstance(phase2, dict) else {}
    if "learning_rate" not in phase3:
        rate = phase2.get("learning_rate")
        with suppress(TypeError, ValueError):  # phase 2's own check says what is wrong with it
            phase3["learning_rate"] = PHASE3_RATE * float(Phase2Config.learning_rate if rate is None else rate)
    if any(name in phase3 for name in ("freeze_backbone", "frozen_components", "trainable_components")):
        return
    before, own = (found.get("learning_rate_multipliers") or {} for found in (phase2, phase3))
    if not isinstance(before, dict) or not isinstance(own, dict):
        return
    own = {ALIASES.get(name, name): factor for name, factor in own.items()}
    frozen = {ALIASES.get(name, name): 0.0 for name, factor in before.items() if factor == 0}
    phase3["learning_rate_multipliers"] = {**frozen, **own}
    if "lora" not in phase3 and isinstance(lora := phase2.get("lora"), dict):
        factors = {**Phase3Config.default_multipliers, **frozen, **own}
        phase3["lora"] = {name: value for name, value in lora.items() if factors.get(ALIASES.get(name, name), 1)}


def _problems(values: dict[str, Any], given: Given) -> list[str]:
    try:
        from_mapping(TrainConfig, _overridden(values, given))
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _origin(path: str | Path, values: dict[str, Any], given: Given, problem: str, in_file: list[str]) -> str:
    """Where `problem` comes from: the file, the single flag that causes it, or flags and file together."""
    if problem in in_file or not given:
        return str(path)
    for dotted, (flag, value) in given.items():
        if problem in _problems(values, {dotted: (flag, value)}):
            return f"{flag} {value}"
    return f"{path} with {', '.join(flag for flag, _ in given.values())}"


def model_preset(name: str) -> dict[str, Any]:
    """The settings of an `EmberVLMConfig`, by preset name, YAML path, or checkpoint folder."""
    path = Path(name)
    if (path / CONFIG).is_file():
        return shape_of(path)
    if path.suffix not in (".yaml", ".yml"):
        presets = REPOSITORY / "configs" / "model"
        path = presets / f"{name}.yaml"
        if not path.exists():
            known = sorted(preset.stem for preset in presets.glob("*.yaml"))
            raise ConfigError(
                f"model: no preset {name!r}; known are {', '.join(known)}, or give a path to a YAML or a checkpoint"
            )
    values = read_yaml(path)
    for part in ("vision", "language"):
        settings = values.get(part)
        if isinstance(settings, dict) and isinstance(name_or_path := settings.get("name_or_path"), str):
            settings["name_or_path"] = filled_in(f"{path}: {part}.name_or_path", name_or_path)
    return values


def brings_tokenizer(language: Mapping[str, Any]) -> bool:
    """Whether a preset's language model has a tokenizer of its own; for others a run makes one from its data."""
    return bool(language.get("pretrained") or (language.get("name_or_path") and not language.get("config")))


def frozen_in_stage3(config: TrainConfig) -> tuple[str, ...]:
    """The components that Stage 3 leaves as they are because they are pretrained and nothing says otherwise."""
    stage3, preset = config.stage3, model_preset(config.model)
    trained = {ALIASES.get(name, name) for name in stage3.trainable_components} | stage3.named_multipliers
    if "all" in trained:
        return ()
    parts = {"vision_encoder": preset.get("vision"), "language_model": preset.get("language")}
    return tuple(name for name, part in parts.items() if name not in trained and part and part.get("pretrained"))


def pretrained_parts(config: TrainConfig) -> tuple[str, ...]:
    """The components that come from elsewhere with what they know: pretrained in the preset, or imported."""
    if brings_its_shape(config.model):
        return ("vision_encoder", "language_model")
    preset = model_preset(config.model)
    parts = {"vision_encoder": preset.get("vision"), "language_model": preset.get("language")}
    return tuple(name for name, part in parts.items() if isinstance(part, dict) and part.get("pretrained"))


def shape_of(checkpoint: Path) -> dict[str, Any]:
    """The settings of the model in `checkpoint`, without what belongs to its own run."""
    found = run_dir.read_object(checkpoint / CONFIG)
    if found.get("model_type") != "embervlm":
        raise ConfigError(
            f"model: {checkpoint} is no checkpoint of EmberVLM (its model_type is {found.get('model_type')!r}); try "
            f"`embervlm import-checkpoint {checkpoint} OUT`"
        )
    return {key: value for key, value in found.items() if key not in _OF_A_RUN}


def brings_its_shape(checkpoint: str | Path) -> bool:
    """Whether `checkpoint` was imported, or trained from one that was, and so fits no preset."""
    path = Path(checkpoint) / CONFIG
    return path.is_file() and bool(run_dir.read_object(path).get("imported_from"))
