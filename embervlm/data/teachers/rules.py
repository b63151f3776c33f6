"""The embedded teacher: from the facts of a scene and a task to a chain of steps and the suitable robots.

The rules are few and serial on purpose. A load and a distance give a trip time, a trip time and the sky give the time
of arrival, the arrival gives light, tide and ground, and those decide for each robot. Each step only needs what the
picture shows or an earlier step has said, and it names a condition before its value, so that a small model can learn
every step on its own; the whole map from picture to answer is hard to learn without the steps in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from embervlm.data.scenes.facts import DISTANCES, FACT_DOMAINS, LOADS, PLACES, SKIES, SceneFacts

DRONE, UNDERWATER, HUMANOID, WHEELS, LEGS = (
    "Drone", "Underwater Robot", "Humanoid", "Robot with Wheels", "Robot with Legs",
)  # fmt: skip

KINDS = {"now": "simple", "walk": "medium", "haul": "complex"}
"""Question kind -> complexity. now: at this place and hour; walk: at the flag; haul: at the flag, with the load."""

JOBS = {
    "carry": "payload", "deliver": "payload", "repair": "hands", "unlock": "hands", "inspect": "camera",
    "film": "camera",
}  # fmt: skip
"""Job -> what a robot needs for it."""

TRIPS = ("one hour", "six hours", "twelve hours", "eighteen hours", "one day", "thirty hours")
"""Trip time in quarters of a day: one for each step up in distance and in load, and one for a slow pace."""

_OBJECTS = {
    "carry": "the load", "deliver": "the load", "repair": "the pump", "unlock": "the gate", "inspect": "the site",
    "film": "the site",
}  # fmt: skip

LIGHT_AT = {"dawn": "day", "noon": "day", "dusk": "dark", "night": "dark"}
TIDE_AT = {"dawn": "high", "noon": "low", "dusk": "high", "night": "low"}
"""The tide turns every six hours."""
TIDAL_PLACES = ("flooded tunnel", "open water", "cliff")
SLOW_PLACES = ("stairs", "rubble", "cliff", "crowd")
"""Where every trip takes six hours more."""
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
    "job": tuple(JOBS),
    "need": ("payload", "hands", "camera"),
    "pace": ("quick", "slow"),
    "trip": TRIPS,
    "arrival": SKIES,
    "forecast": WEATHER_CYCLE,
    "light": ("day", "dark"),
    "tide": ("high", "low"),
    "ground": (
        "firm", "steps", "slippery", "soft", "broken", "crowded", "steep", "deep water", "shallow water",
    ),
}  # fmt: skip
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


def arrival_after(sky: str, quarters: int) -> str:
    """Time of day `quarters` of a day after `sky`."""
    return SKIES[(SKIES.index(sky) + quarters) % len(SKIES)]


def forecast_after(weather: str, quarters: int) -> str:
    """Weather `quarters` of a day later."""
    return WEATHER_CYCLE[(WEATHER_CYCLE.index(weather) + quarters // 2) % len(WEATHER_CYCLE)]


def derive(facts: SceneFacts, task: Task) -> dict[str, str]:
    """All that follows from the picture and the task, except the verdicts. Claim name -> value."""
    claims = {**facts.as_dict(), "job": task.job, "need": task.need}
    hour, weather = facts.sky, facts.weather
    if task.kind != "now":
        slow = facts.place in SLOW_PLACES
        quarters = DISTANCES.index(facts.flag) + slow + (LOADS.index(facts.load) if task.kind == "haul" else 0)
        hour, weather = arrival_after(hour, quarters), forecast_after(weather, quarters)
        claims |= {"pace": "slow" if slow else "quick", "trip": TRIPS[quarters], "arrival": hour, "forecast": weather}
    claims["light"] = LIGHT_AT[hour]
    if facts.place in TIDAL_PLACES:
        claims["tide"] = TIDE_AT[hour]
    return claims | {"ground": ground_at(facts.place, weather, hour)}


def conditions_of(robot: str, claims: dict[str, str], task: Task) -> list[tuple[str, bool]]:
    """The claims that decide for `robot`, each with whether it is met, in the order in which a step names them."""
    on_ground = ("ground", claims["ground"] in FIRM_GROUND.get(robot, ()))
    if robot == DRONE:  # rain and wind ground it; flies by sight, limited payload, no hands
        weather = "weather" if task.kind == "now" else "forecast"
        checks = [(weather, claims[weather] in ("clear", "fog")), ("light", claims["light"] == "day")]
        if task.takes_load:
            checks.append(("load", claims["load"] == "light"))
        return [*checks, ("need", task.need != "hands")]
    if robot == UNDERWATER:
        return [on_ground]
    if robot == HUMANOID:  # high power consumption
        trip = [("trip", TRIPS.index(claims["trip"]) <= 3)] if "trip" in claims else []
        return [on_ground, *trip]
    if robot == WHEELS:
        return [on_ground, ("need", task.need != "hands")]
    if task.need == "hands":  # limited manipulation: with legs only by daylight
        return [on_ground, ("need", True), ("light", claims["light"] == "day")]
    return [on_ground, ("need", True)]


def teach(facts: SceneFacts, task: Task) -> TaughtChain:
    """The chain for `task` in the scene, its claims and the suitable robots."""
    claims = derive(facts, task)
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
    job = f"The job is {task.job}, so the need is {task.need}."
    ground = (
        f"The place is {facts.place}, {weather} is {claims[weather]}, {hour} is {claims[hour]}{tide}, "
        f"so the ground is {claims['ground']}."
    )
    P, C, S = "problem_analysis", "constraint_checking", "solution_selection"
    steps: list[tuple[str, str, tuple[str, ...]]]
    if now:
        load, load_seen = (f" The load is {facts.load}.", ("load",)) if task.takes_load else ("", ())
        steps = [
            (P, f"{job}{load} The sky is {facts.sky}, so the light is {claims['light']}.", ("sky", *load_seen)),
            (C, ground, ("place", "weather")),
            (S, " ".join(verdicts), ()),
        ]
    else:
        load, load_seen = (f"load is {facts.load}, ", ("load",)) if task.kind == "haul" else ("", ())
        steps = [
            (P, f"{job} The place is {facts.place}, so the pace is {claims['pace']}.", ("place",)),
            (
                C,
                f"The {load}flag is {facts.flag}, pace is {claims['pace']}, so the trip is {claims['trip']}.",
                (*load_seen, "flag"),
            ),
            (
                C,
                f"The sky is {facts.sky}, after {claims['trip']} the arrival is {claims['arrival']}, so the light is "
                f"{claims['light']}. The weather is {facts.weather}, after {claims['trip']} the forecast is "
                f"{claims['forecast']}.",
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
    lines = [f"The job is {job}, so the need is {need}." for job, need in JOBS.items()]
    lines += [f"The place is {p}, so the pace is {'slow' if p in SLOW_PLACES else 'quick'}." for p in PLACES]
    for (far, flag), (slow, pace) in product(enumerate(DISTANCES), enumerate(("quick", "slow"))):
        lines.append(f"The flag is {flag}, pace is {pace}, so the trip is {TRIPS[far + slow]}.")
        for heavy, load in enumerate(LOADS):
            trip = TRIPS[far + slow + heavy]
            lines.append(f"The load is {load}, flag is {flag}, pace is {pace}, so the trip is {trip}.")
    for quarters, trip in enumerate(TRIPS):
        for sky in SKIES:
            arrival = arrival_after(sky, quarters)
            lines.append(
                f"The sky is {sky}, after {trip} the arrival is {arrival}, so the light is {LIGHT_AT[arrival]}."
            )
        for weather in WEATHER_CYCLE:
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
    lines.append("Weather is clear, light is day, load is light, need is camera: Drone is suited.")
    lines.append("Forecast is rain: Drone is unsuited. Light is dark: Drone is unsuited.")
    lines.append("Conclusion: Drone, Underwater Robot, Humanoid, Robot with Wheels, Robot with Legs.")
    return tuple(lines)
