"""How much of a step's attention lies on each known thing in the picture: what makes a picture of it worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embervlm.boxes import Grid, covered
from embervlm.report.recorded import Sample

MAX_THINGS = 8
UNKNOWN = "What is where in this picture is not recorded, so nothing says how much of it lies on a thing."


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Things at the same place, which are one to look at."""

    kinds: list[str]
    label: str
    """What is there, as the data call it."""
    areas: list[list[float]]
    """Left, top, right and bottom of each, in [0, 1]."""

    @property
    def name(self) -> str:
        return ", ".join(self.kinds)


def things_in(sample: Sample) -> list[Thing]:
    """The first kinds of things with a box."""
    found: dict[str, Thing] = {}
    for box in sample.boxes:
        if box["kind"] in found or len(found) < MAX_THINGS:
            found.setdefault(box["kind"], Thing(kinds=[box["kind"]], label=box["label"], areas=[]))
            found[box["kind"]].areas.append(box["box"])
    merged: list[Thing] = []
    for thing in found.values():
        if same := next((other for other in merged if other.areas == thing.areas), None):
            same.kinds.extend(thing.kinds)
        else:
            merged.append(thing)
    return merged


def is_measured(sample: Sample) -> bool:
    """Whether its attention can be shown together with what lies where it looks."""
    return bool(sample.attention and sample.attention.steps and sample.boxes)


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Of a sample's steps, how much of the attention lies on each thing."""

    names: list[str]
    covered: list[float]
    """Share of the picture that each thing covers, as an evaluation counts it: by visual tokens."""
    shares: list[list[float]]
    """`[steps][things]`, each in [0, 1]; things may overlap."""
    reads: list[list[int]]
    """Of each step, places of the things that it reads, where that is known."""

    def in_words(self, step: int) -> str:
        """The share on what the step reads; of a step that reads nothing, on the thing where most of it lies."""
        if step >= len(self.shares) or not self.names:
            return ""
        shares, reads = self.shares[step], self.reads[step]
        told = [
            f"{shares[place]:.0%} on {self.names[place]} ({self.covered[place]:.0%} of the picture)"
            for place in reads or [max(range(len(shares)), key=shares.__getitem__)]
        ]
        return ("" if reads else "most, ") + ", ".join(told)


def looks_of(sample: Sample, most_steps: int) -> Looks:
    """Empty where the sample is not measured."""
    if not is_measured(sample) or sample.attention is None:
        return Looks(names=[], covered=[], shares=[], reads=[])
    things, steps = things_in(sample), sample.attention.steps[:most_steps]
    masks = [covered(thing.areas, Grid(*sample.attention.grid)) for thing in things]
    read = [set(step) for step in sample.looked_at[: len(steps)]]
    read += [set()] * (len(steps) - len(read))
    return Looks(
        names=[thing.name for thing in things],
        covered=[float(mask.mean()) for mask in masks],
        shares=[[_inside(step, mask) for mask in masks] for step in steps],
        reads=[[place for place, thing in enumerate(things) if kinds & set(thing.kinds)] for kinds in read],
    )


def _inside(shares: Sequence[float], mask: Any) -> float:
    """The rounded shares of a step do not quite sum to 1."""
    return float(sum(share for share, inside in zip(shares, mask) if inside) / (sum(shares) or 1.0))
