"""CLEVR: questions with a functional program, whose functions become the steps."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from embervlm.curate.formats.shared import ANALYSIS, CHECKING, Source, chain_of
from embervlm.data.record_fields import quote
from embervlm.data.records import DataError, file_values

ATTRIBUTES = ("size", "color", "material", "shape")
_PLACES = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}
_YES_NO = ("yes", "no")


def clevr(at: Source) -> list[dict[str, Any]]:
    """Johnson et al. 2017, arXiv 1612.06890: `CLEVR_*_questions.json` with `question`, `answer`, `program`, ...

    A step for each function of the program, in words. Where `scenes/CLEVR_<split>_scenes.json` is found beside
    `questions/`, or below the image root, the program is run on the scene: each step also says its result, and the
    scene's things are the caption. Without it the steps say what to look for, and not what is there.
    """
    question, answer = at.text("question"), at.text("answer")
    name, split = at.text("image_filename"), at.split()
    nodes = _nodes(at)
    if at.problems:
        return []
    scene = _scene(at, split, name)
    try:
        run = _Run(scene)
        steps = [run.step(*node) for node in nodes]
    except _Stuck as error:
        at.report(f"program: {error}; correct it, or drop the record")
        return []
    if scene is not None and (result := getattr(run.results[-1], "text", "")) != answer:
        at.report(
            f"answer: is {quote(answer)}, but the program gives {quote(result) or 'things'} for the scene; correct one"
        )
        return []
    used = "question answer program image image_filename split"
    about = {"split": split, "caption": _caption(scene) if scene else None, "candidates": _candidates(nodes, answer)}
    metadata = at.metadata(used, source="clevr", **{key: item for key, item in about.items() if item})
    parts = [
        (ANALYSIS if node[0] in ("scene", "unique") or "filter" in node[0] else CHECKING, step)
        for node, step in zip(nodes, steps)
    ]
    picture = at.first_there(os.path.join("images", str(split), name), name)
    identity = at.value.get("question_index", at.number)
    return [
        {"id": f"clevr-{split or ''}-{identity}", "instruction": question, "answer": answer, "image": picture}
        | chain_of(parts, answer, metadata)
    ]


Node = tuple[str, list[int], list[str]]
"""Function, the nodes that it takes, and its words."""


def _nodes(at: Source) -> list[Node]:
    """The program; [] where it is reported. CLEVR's generator calls a function `type` and its words `side_inputs`."""
    program = at.value.get("program")
    if not isinstance(program, list) or not program:
        at.report("program: is missing or no list (test sets have none); give the functions, or drop the record")
        return []
    nodes = []
    for place, node in enumerate(program):
        node = node if isinstance(node, dict) else {}
        name = node.get("function", node.get("type"))
        inputs, words = node.get("inputs", []), node.get("value_inputs", node.get("side_inputs", []))
        if (
            not isinstance(name, str)
            or not isinstance(inputs, list)
            or not all(type(number) is int and 0 <= number < place for number in inputs)
            or not isinstance(words, list)
            or not all(isinstance(word, str) for word in words)
        ):
            at.report(f"program[{place}]: is not {{function, inputs: earlier nodes, value_inputs: words}}; correct it")
            return []
        nodes.append((name, inputs, words))
    return nodes


# ---- programs


class _Stuck(Exception):
    """What keeps a program from being run."""


@dataclass(frozen=True, kw_only=True)
class _Things:
    """A description of some of the things, and which of the scene's they are; none where there is no scene."""

    words: Mapping[str, str] = field(default_factory=dict)
    """Attribute -> value."""
    where: str = ""
    which: frozenset[int] = frozenset()
    one: bool = False

    def __str__(self) -> str:
        noun = self.words.get("shape", "thing") + ("" if self.one else "s")
        named = [self.words[name] for name in ATTRIBUTES[:-1] if name in self.words]
        return " ".join([*named, noun, *([self.where] if self.where else [])])


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A number, an attribute or yes or no; "" where there is no scene."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.name


class _Run:
    """Runs a program node by node, in words; on a scene where one is given."""

    def __init__(self, scene: Mapping[str, Any] | None) -> None:
        self.known = scene is not None
        self.objects: list[Mapping[str, str]] = scene["objects"] if scene else []
        self._relationships = scene["relationships"] if scene else {}
        self.results: list[Any] = []
        """Of each node: things, or a value."""

    def step(self, name: str, inputs: Sequence[int], words: Sequence[str]) -> str:
        """What the node does, as a sentence; its result is the last of `results`."""
        verb, _, attribute = name.partition("_")
        act = _ACTS.get(name) or _ACTS.get(verb)
        if act is None or (verb in ("filter", "same", "query") and attribute not in ATTRIBUTES):
            raise _Stuck(f"{quote(name)} is no function of CLEVR")
        given = [self.results[number] for number in inputs]
        try:
            result, text = act(self, attribute, *given, *words)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise _Stuck(f"{name} does not fit what it is given") from error
        self.results.append(result)
        if not self.known:
            return f"{text}."
        if isinstance(result, _Value):
            return f"{text}: {result.text}."
        num = len(result.which)
        return f"{text}." if result.one else f"{text}: there {'is' if num == 1 else 'are'} {num}."

    def of(self, thing: _Things, attribute: str) -> str:
        """An attribute of the one thing."""
        if not self.known:
            return ""
        (index,) = thing.which
        return self.objects[index][attribute]

    def related(self, thing: _Things, relation: str) -> frozenset[int]:
        if not self.known:
            return frozenset()
        (index,) = thing.which
        return frozenset(self._relationships[relation][index])


Acted = tuple["_Things | _Value", str]
"""Result, and what was done."""


def _all(run: _Run, _: str) -> Acted:
    return _Things(which=frozenset(range(len(run.objects)))), "Look at all things"


def _filter(run: _Run, attribute: str, things: _Things, value: str) -> Acted:
    kept = frozenset(index for index in things.which if run.objects[index][attribute] == value)
    found = _Things(words={**things.words, attribute: value}, where=things.where, which=kept)
    return found, f"Find the {found}"


def _unique(run: _Run, _: str, things: _Things) -> Acted:
    one = replace(things, one=True)
    if not run.known:
        return one, f"There is one {one}"
    shown = _Things(words={name: run.of(one, name) for name in ATTRIBUTES}, one=True)
    return one, f"The {one} is a {shown}"


def _relate(run: _Run, _: str, thing: _Things, relation: str) -> Acted:
    found = _Things(where=f"{_PLACES[relation]} the {thing}", which=run.related(thing, relation))
    return found, f"Look at the {found}"


def _same(run: _Run, attribute: str, thing: _Things) -> Acted:
    wanted = run.of(thing, attribute)
    others = {index for index, other in enumerate(run.objects) if other[attribute] == wanted} - thing.which
    found = _Things(where=f"of the same {attribute} as the {thing}", which=frozenset(others))
    return found, f"Find the other {found}"


def _both(run: _Run, _: str, first: _Things, second: _Things) -> Acted:
    which = first.which & second.which
    return _Things(
        where=f"among the {first} and the {second}", which=which
    ), f"Keep those among the {first} and the {second}"


def _either(run: _Run, _: str, first: _Things, second: _Things) -> Acted:
    which = first.which | second.which
    return _Things(where=f"among the {first} or the {second}", which=which), f"Take the {first} and the {second}"


def _count(run: _Run, _: str, things: _Things) -> Acted:
    return _Value(name=f"the number of {things}", text=str(len(things.which))), f"Count the {things}"


def _exist(run: _Run, _: str, things: _Things) -> Acted:
    return _Value(name="it", text=_YES_NO[not things.which]), f"Check whether there are {things}"


def _query(run: _Run, attribute: str, thing: _Things) -> Acted:
    name = f"the {attribute} of the {thing}"
    return _Value(name=name, text=run.of(thing, attribute)), f"Read {name}"


def _compare(run: _Run, question: str, holds: Callable[[str, str], bool], first: _Value, second: _Value) -> Acted:
    text = question.format(first=first, second=second)
    if not run.known:
        return _Value(name="it", text=""), text
    result = _YES_NO[not holds(first.text, second.text)]
    return _Value(name="it", text=result), f"{text}, given {first.text} and {second.text}"


def _equal(run: _Run, _: str, first: _Value, second: _Value) -> Acted:
    return _compare(run, "Check whether {first} equals {second}", operator.eq, first, second)


def _less(run: _Run, _: str, first: _Value, second: _Value) -> Acted:
    return _compare(run, "Check whether {first} is less than {second}", lambda a, b: int(a) < int(b), first, second)


def _greater(run: _Run, _: str, first: _Value, second: _Value) -> Acted:
    return _compare(run, "Check whether {first} is more than {second}", lambda a, b: int(a) > int(b), first, second)


_ACTS: dict[str, Callable[..., Acted]] = {
    "scene": _all,
    "filter": _filter,
    "unique": _unique,
    "relate": _relate,
    "same": _same,
    "intersect": _both,
    "union": _either,
    "count": _count,
    "exist": _exist,
    "query": _query,
    "equal": _equal,
    "less_than": _less,
    "greater_than": _greater,
}
"""Function, or its first word where an attribute follows -> what it does with the run, that attribute, the results of
its inputs and its words."""

_VALUES = {
    "count": tuple(map(str, range(11))),
    "color": ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
    "material": ("rubber", "metal"),
    "shape": ("cube", "sphere", "cylinder"),
    "size": ("small", "large"),
}
"""Of CLEVR's `metadata.json`."""


def _candidates(nodes: Sequence[Node], answer: str) -> list[str]:
    """What the last function may give; [] where that is not known, as for other worlds of CLEVR's kind."""
    name = nodes[-1][0]
    values = _VALUES.get(name.removeprefix("query_"), _YES_NO)
    return list(values) if answer in values else []


# ---- scenes


def _caption(scene: Mapping[str, Any]) -> str:
    """Every thing of the scene, from left to right."""
    ordered = sorted(scene["objects"], key=lambda thing: thing["across"])
    return ", ".join(" ".join(str(thing[name]) for name in ATTRIBUTES) for thing in ordered) + "."


def _scene(at: Source, split: Any, name: str) -> Mapping[str, Any] | None:
    """The scene of a picture; None where there is no file of scenes. A picture that it lacks is reported."""
    file = f"CLEVR_{split}_scenes.json"
    folders = (os.path.join(at.folder, "..", "scenes"), os.path.join(at.image_root, "scenes"), at.folder)
    path = next((path for folder in folders if os.path.isfile(path := os.path.join(folder, file))), None)
    if path is None:
        return None
    scenes = _scenes(os.path.realpath(path))
    if name not in scenes:
        at.report(f"image_filename: {quote(name)} is not in {path}; correct it, or take the file of scenes away")
        return None
    return scenes[name]


@lru_cache(maxsize=1)
def _scenes(path: str) -> dict[str, dict[str, Any]]:
    """Picture -> `objects` and `relationships`."""
    problems: list[str] = []
    scenes = {}
    for number, scene in file_values(Path(path), problems, inside="scenes"):
        try:
            things = [
                {name: str(thing[name]) for name in ATTRIBUTES} | {"across": float(thing["pixel_coords"][0])}
                for thing in scene["objects"]
            ]
            related = {name: [list(map(int, row)) for row in scene["relationships"][name]] for name in _PLACES}
            scenes[scene["image_filename"]] = {"objects": things, "relationships": related}
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            wanted = "image_filename, objects with their attributes and pixel_coords, relationships"
            problems.append(f"{path} record {number}: is no scene of CLEVR; give {wanted} ({error!r})")
    if problems:
        raise DataError.of(problems)
    return scenes
