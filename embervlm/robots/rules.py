"""The embedded teacher: from the facts of a scene and a task to a chain of steps and the suitable robots.

The rules are few and serial on purpose. Place and load give the pace, pace and distance the trip time, trip time and
sky the time of arrival, the arrival gives daylight, tide and ground, and those decide for each robot. Each step only
needs what the picture shows or an earlier step has said, and it names a condition before its value, so that a small
model can learn every step on its own; the whole map from picture to answer is hard to learn without the steps in
between. The hours of a trip are counted down in words, because a small model is slow to learn sums modulo a day.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

from embervlm.robots.facts import DISTANCES, FACT_DOMAINS, LOADS, PLACES, SKIES, SceneFacts

DRONE, UNDERWATER, HUMANOID, WHEELS, LEGS = (
    "Drone",
    "Underwater Robot",
    "Humanoid",
    "Robot with Wheels",
    "Robot with Legs",
)

KINDS = {"now": "simple", "walk": "medium", "haul": "complex"}
"""Question kind -> complexity. now: at this place and hour; walk: at the flag; haul: at the flag, with the load."""

JOBS = {
    "carry": "payload",
    "deliver": "payload",
    "repair": "hands",
    "unlock": "hands",
    "inspect": "camera",
    "film": "camera",
}
"""Job -> what a robot needs for it."""

TRIPS = ("six hours", "twelve hours", "eighteen hours", "one day")
"""Trip times: one, two, three, four quarters of a day. Farther flags take one more each, and a slow pace one more."""
LONGEST_WALK = 2
"""Quarters of a day that the Humanoid's battery lasts."""

_OBJECTS = {
    "carry": "the load",
    "deliver": "the load",
    "repair": "the pump",
    "unlock": "the gate",
    "inspect": "the site",
    "film": "the site",
}

DAYLIGHT_AT = {"dawn": "present", "noon": "present", "dusk": "gone", "night": "gone"}
TIDE_AT = {"dawn": "high", "noon": "low", "dusk": "high", "night": "low"}
"""The tide turns every six hours."""
TIDAL_PLACES = ("flooded tunnel", "open water", "cliff")
SLOW_PLACES = ("stairs", "rubble", "cliff", "crowd")
"""Where the pace is slow, with or without a load; a heavy load is slow everywhere."""
WEATHER_CYCLE = ("clear", "wind", "rain", "fog")
"""Fronts pass in this order, one every twelve hours."""
FIRM_GROUND = {
    HUMANOID: {"firm", "steps", "crowded"},
    WHEELS: {"firm"},
    LEGS: {"firm", "steps", "soft", "broken", "shallow water"},
    UNDERWATER: {"deep water"},
}
"""Robot -> ground it can work on. The Drone does not touch the ground."""

DERIVED_DOMAINS: dict[str, tuple[str, ...]] = {
    "need": ("payload", "hands", "camera"),
    "pace": ("quick", "slow"),
    "trip": TRIPS,
    "arrival": SKIES,
    "forecast": WEATHER_CYCLE,
    "daylight": ("present", "gone"),
    "tide": ("high", "low"),
    "ground": ("firm", "steps", "slippery", "soft", "broken", "crowded", "steep", "deep water", "shallow water"),
}
VERDICTS = ("suited", "unsuited")


def claim_domains() -> dict[str, tuple[str, ...]]:
    """Everything a chain of this teacher can claim: name -> possible values."""
    return {**FACT_DOMAINS, **DERIVED_DOMAINS, **{robot: VERDICTS for robot in ROBOT_ORDER}}


ROBOT_ORDER = (DRONE, UNDERWATER, HUMANOID, WHEELS, LEGS)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked about a scene."""

    kind: str
    """One of `KINDS`."""
    job: str
    """One of `JOBS`."""

    @property
    def need(self) -> str:
        return JOBS[self.job]

    @property
    def takes_load(self) -> bool:
        return self.kind == "haul" or self.need == "payload"

    @property
    def instruction(self) -> str:
        work = f"{self.job} {_OBJECTS[self.job]}"
        if self.kind == "now":
            return f"{work.capitalize()} here and now. Which robots are suited?"
        if self.kind == "walk":
            return f"Leave the load here, go to the flag and {work}. Which robots are suited?"
        if self.need == "payload":
            return f"{work.capitalize()} to the flag. Which robots are suited?"
        return f"Take the load to the flag and {work} there. Which robots are suited?"


TASKS = tuple(
    Task(kind=kind, job=job) for kind in KINDS for job, need in JOBS.items() if (kind, need) != ("walk", "payload")
)


@dataclass(frozen=True, kw_only=True)
class TaughtChain:
    """A chain with everything that is known about it. `steps`, `step_types` and `seen` are parallel."""

    steps: tuple[str, ...]
    """Text of each step without its number; the last starts with 'Conclusion: '."""
    step_types: tuple[str, ...]
    """The Stage 4 guide's step types."""
    seen: tuple[tuple[str, ...], ...]
    """Facts of the picture that each step reads off it (what its attention should rest on)."""
    claims: dict[str, str]
    """Every fact and derived value, and each robot's verdict."""
    answer: tuple[str, ...]
    """Suitable robots, in `ROBOT_ORDER`; may be empty: then the scene is no question for this task."""


def ground_at(place: str, weather: str, hour: str) -> str:
    """What a robot stands on at `place` in `weather` at `hour`."""
    tide, wet, frost = TIDE_AT[hour], weather == "rain", hour == "night"
    if place == "warehouse":  # under a roof; the day shift works until noon
        return "crowded" if hour in ("dawn", "noon") else "firm"
    if place == "stairs":
        return "slippery" if wet or frost else "steps"
    if place == "flooded tunnel":  # rain runs into it
        return "deep water" if wet or tide == "high" else "shallow water"
    if place == "rubble":
        return "slippery" if wet or frost else "broken"
    if place == "cliff":  # the sea comes up to its foot
        return "deep water" if tide == "high" else "steep"
    if place == "open water":
        return "deep water" if tide == "high" else "shallow water"
    if place == "field":  # dew at dawn
        return "soft" if wet or hour == "dawn" else "firm"
    return "crowded" if hour in ("noon", "dusk") and not wet else "firm"  # rain sends a crowd home


def pace_of(place: str, load: str | None) -> str:
    """`slow` or `quick` at `place`, with `load` on the way (None where it is left behind)."""
    return "slow" if place in SLOW_PLACES or load == "heavy" else "quick"


def quarters_of(flag: str, pace: str) -> int:
    """Trip time to a `flag`, in quarters of a day."""
    return 1 + DISTANCES.index(flag) + (pace == "slow")


def countdown(sky: str, quarters: int) -> str:
    """How a trip of `quarters` of a day that begins under `sky` goes by, in words; each part follows from the last."""
    left = (f"{TRIPS[quarters - passed - 1]} at {arrival_after(sky, passed)}" for passed in range(quarters))
    return f"To go: {', '.join(left)}."


def arrival_after(sky: str, quarters: int) -> str:
    """Time of day `quarters` of a day after `sky`."""
    return SKIES[(SKIES.index(sky) + quarters) % len(SKIES)]


def forecast_after(weather: str, quarters: int) -> str:
    """Weather `quarters` of a day later."""
    return WEATHER_CYCLE[(WEATHER_CYCLE.index(weather) + quarters // 2) % len(WEATHER_CYCLE)]


def derive(facts: SceneFacts, task: Task, instead: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """All that follows from the picture and the task, except the verdicts. Claim name -> value.

    Args:
        instead: derived values to go on from, whatever the rules say: what would follow from a mistake.
    """
    claims = {**facts.as_dict(), "need": task.need}

    def settle(name: str, value: str) -> str:
        claims[name] = instead.get(name, value)
        return claims[name]

    hour, weather = facts.sky, facts.weather
    if task.kind != "now":
        pace = settle("pace", pace_of(facts.place, facts.load if task.kind == "haul" else None))
        quarters = 1 + TRIPS.index(settle("trip", TRIPS[quarters_of(facts.flag, pace) - 1]))
        hour = settle("arrival", arrival_after(hour, quarters))
        weather = settle("forecast", forecast_after(weather, quarters))
    settle("daylight", DAYLIGHT_AT[hour])
    if facts.place in TIDAL_PLACES:
        settle("tide", TIDE_AT[hour])
    settle("ground", ground_at(facts.place, weather, hour))
    return claims


def conditions_of(robot: str, claims: dict[str, str], task: Task) -> list[tuple[str, bool]]:
    """The claims that decide for `robot`, each with whether it is met, in the order in which a step names them."""
    on_ground = ("ground", claims["ground"] in FIRM_GROUND.get(robot, ()))
    if robot == DRONE:  # rain and wind ground it; flies by sight, limited payload, no hands
        weather = "weather" if task.kind == "now" else "forecast"
        checks = [(weather, claims[weather] in ("clear", "fog")), ("daylight", claims["daylight"] == "present")]
        if task.takes_load:
            checks.append(("load", claims["load"] == "light"))
        return [*checks, ("need", task.need != "hands")]
    if robot == UNDERWATER:
        return [on_ground]
    if robot == HUMANOID:  # high power consumption; no heavy loads
        trip = [("trip", claims["trip"] in TRIPS[:LONGEST_WALK])] if "trip" in claims else []
        return [on_ground, *trip, *([("load", claims["load"] != "heavy")] if task.takes_load else [])]
    if robot == WHEELS:
        return [on_ground, ("need", task.need != "hands")]
    if task.need == "hands":  # limited manipulation: with legs only by daylight
        return [on_ground, ("need", True), ("daylight", claims["daylight"] == "present")]
    return [on_ground, ("need", True)]


def teach(facts: SceneFacts, task: Task, instead: Mapping[str, str] = MappingProxyType({})) -> TaughtChain:
    """The chain for `task` in the scene, its claims and the suitable robots; for `instead` see `derive`."""
    claims = derive(facts, task, instead)
    verdicts: list[str] = []
    answer: list[str] = []
    for robot in ROBOT_ORDER:
        checks = conditions_of(robot, claims, task)
        suited = all(met for _, met in checks)
        claims[robot] = VERDICTS[0 if suited else 1]
        if suited:
            answer.append(robot)
        named = ", ".join(f"{name} is {claims[name]}" for name, _ in checks)
        verdicts.append(f"{named[0].upper()}{named[1:]}: {robot} is {claims[robot]}.")

    now = task.kind == "now"
    hour, weather = ("sky", "weather") if now else ("arrival", "forecast")
    tide = f", tide is {claims['tide']}" if "tide" in claims else ""
    need = f"The need is {task.need}."
    ground = (
        f"The place is {facts.place}, {weather} is {claims[weather]}, {hour} is {claims[hour]}{tide}, "
        f"so the ground is {claims['ground']}."
    )
    P, C, S = "problem_analysis", "constraint_checking", "solution_selection"
    steps: list[tuple[str, str, tuple[str, ...]]]
    if now:
        load, load_seen = (f" The load is {facts.load}.", ("load",)) if task.takes_load else ("", ())
        steps = [
            (P, f"{need}{load} The sky is {facts.sky}, so the daylight is {claims['daylight']}.", ("sky", *load_seen)),
            (C, ground, ("place", "weather")),
            (S, " ".join(verdicts), ()),
        ]
    else:
        load, load_seen = (f", load is {facts.load}", ("load",)) if task.kind == "haul" else ("", ())
        trip = claims["trip"]
        steps = [
            (P, f"{need} The place is {facts.place}{load}, so the pace is {claims['pace']}.", ("place", *load_seen)),
            (C, f"The flag is {facts.flag}, pace is {claims['pace']}, so the trip is {trip}.", ("flag",)),
            (
                C,
                f"The sky is {facts.sky}. {countdown(facts.sky, TRIPS.index(trip) + 1)} So the arrival is "
                f"{claims['arrival']}, daylight is {claims['daylight']}. The weather is {facts.weather}, after {trip} "
                f"the forecast is {claims['forecast']}.",
                ("sky", "weather"),
            ),
            (C, ground, ("place",)),
        ]
        grouped = [" ".join(verdicts)] if task.kind == "walk" else verdicts
        steps += [(S, verdict, ()) for verdict in grouped]
    steps.append(("conclusion", f"Conclusion: {', '.join(answer)}.", ()))
    types, texts, seen = zip(*steps)
    return TaughtChain(steps=texts, step_types=types, seen=seen, claims=claims, answer=tuple(answer))


def caption(facts: SceneFacts) -> str:
    """What the picture shows, in the words of the chains."""
    return (
        f"The place is {facts.place}, weather is {facts.weather}, sky is {facts.sky}. "
        f"The load is {facts.load} and the flag is {facts.flag}."
    )


def glossary() -> tuple[str, ...]:
    """Every rule as a sentence of its own. Stage 3 reads these, so that it knows the words before it reasons."""
    lines = [f"Who can {job} {_OBJECTS[job]}? The need is {need}." for job, need in JOBS.items()]
    for place, load in product(PLACES, (None, *LOADS)):
        with_load = f", load is {load}" if load else ""
        lines.append(f"The place is {place}{with_load}, so the pace is {pace_of(place, load)}.")
    for flag, pace in product(DISTANCES, ("quick", "slow")):
        lines.append(f"The flag is {flag}, pace is {pace}, so the trip is {TRIPS[quarters_of(flag, pace) - 1]}.")
    for sky, quarters in product(SKIES, range(1, len(TRIPS) + 1)):
        arrival = arrival_after(sky, quarters)
        lines.append(
            f"The sky is {sky}. {countdown(sky, quarters)} So the arrival is {arrival}, "
            f"daylight is {DAYLIGHT_AT[arrival]}."
        )
    for weather, (quarters, trip) in product(WEATHER_CYCLE, enumerate(TRIPS, 1)):
        lines.append(f"The weather is {weather}, after {trip} the forecast is {forecast_after(weather, quarters)}.")
    for place, weather, hour in product(PLACES, WEATHER_CYCLE, SKIES):
        tide = f", tide is {TIDE_AT[hour]}" if place in TIDAL_PLACES else ""
        ground = ground_at(place, weather, hour)
        lines.append(
            f"The place is {place}, forecast is {weather}, arrival is {hour}{tide}, so the ground is {ground}."
        )
    for robot, grounds in FIRM_GROUND.items():
        for ground in DERIVED_DOMAINS["ground"]:
            lines.append(f"Ground is {ground}: {robot} is {VERDICTS[0 if ground in grounds else 1]}.")
    lines.append("Weather is clear, daylight is present, load is light, need is camera: Drone is suited.")
    lines.append("Forecast is rain: Drone is unsuited. Daylight is gone: Drone is unsuited.")
    lines.append("Conclusion: Drone, Underwater Robot, Humanoid, Robot with Wheels, Robot with Legs.")
    return tuple(lines)
