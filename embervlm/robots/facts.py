"""What a scene shows: the facts a picture is drawn from, and the ground truth of the drawing.

Every fact can be seen in the picture; nothing else about a scene matters to an answer. What follows from the facts
(trip time, tide, ground, ...) is the business of `embervlm.robots.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product

PLACES = ("warehouse", "stairs", "flooded tunnel", "rubble", "cliff", "open water", "field", "crowd")
WEATHERS = ("clear", "rain", "wind", "fog")
SKIES = ("dawn", "noon", "dusk", "night")
LOADS = ("light", "medium", "heavy")
DISTANCES = ("near", "middle", "far")

FACT_DOMAINS: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "weather": WEATHERS,
    "sky": SKIES,
    "load": LOADS,
    "flag": DISTANCES,
}
"""Fact name -> its possible values, in the order of `SceneFacts`."""


@dataclass(frozen=True, kw_only=True)
class SceneFacts:
    """The facts one picture is drawn from. Two scenes with equal facts differ in drawing only."""

    place: str
    """Where it is; one of `PLACES`."""
    weather: str
    """Weather outside; one of `WEATHERS`."""
    sky: str
    """Time of day as the sky shows it; one of `SKIES`."""
    load: str
    """How heavy the load beside the start is; one of `LOADS`."""
    flag: str
    """How far away the goal flag stands; one of `DISTANCES`."""

    def __post_init__(self) -> None:
        for name, domain in FACT_DOMAINS.items():
            if (value := getattr(self, name)) not in domain:
                raise ValueError(f"scene fact {name}={value!r} is not one of {', '.join(domain)}")

    def as_dict(self) -> dict[str, str]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def key(self) -> str:
        """Name of this combination of facts; splits are made over it, so a test combination was never trained on."""
        return "|".join(self.as_dict().values())


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One thing in the picture, with the part of the picture it covers."""

    kind: str
    """A fact name (`place`, `weather`, `sky`, `load`, `flag`) or `clutter`."""
    label: str
    """For a fact its value, for clutter what it is."""
    box: tuple[float, float, float, float]
    """(left, top, right, bottom), each in [0, 1] of the picture's width or height."""


def all_facts() -> Iterator[SceneFacts]:
    """Every combination of facts, in a fixed order."""
    for values in product(*FACT_DOMAINS.values()):
        yield SceneFacts(**dict(zip(FACT_DOMAINS, values)))
