"""The embedded teacher: from the facts of a scene and a task to a chain of steps and the suitable robots.

The rules are few and serial on purpose. A load and a distance give a trip time, a trip time and the sky give the time
of arrival, the arrival gives light, tide and ground, and those decide for each robot. Each step only needs what the
picture shows or an earlier step has said, and it names a condition before its value, so that a small model can learn
every step on its own; the whole map from picture to answer is hard to learn without the steps in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from embervlm.data.scenes.facts import DISTANCES, FACT_DOMAINS, LOADS, SKIES, SceneFacts

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

TRIPS = ("one hour", "six hours", "twelve hours", "eighteen hours", "one day")
"""Trip time by the sum of the distance's and the load's place in their order; each place costs a quarter of a day."""

_OBJECTS = {
    "carry": "the load", "deliver": "the load", "repair": "the pump", "unlock": "the gate", "inspect": "the site",
    "film": "the site",
}  # fmt: skip

LIGHT_AT = {"dawn": "day", "noon": "day", "dusk": "dark", "night": "dark"}
TIDE_AT = {"dawn": "high", "noon": "low", "dusk": "high", "night": "low"}
"""The tide turns every six hours."""
TIDAL_PLACES = ("flooded tunnel", "open water")
FIRM_GROUND = {
    HUMANOID: {"firm", "steps", "crowded"},
    WHEELS: {"firm"},
    LEGS: {"firm", "steps", "slippery", "soft", "broken", "shallow water"},
    UNDERWATER: {"deep water"},
}
"""Robot -> ground it can work on. The Drone does not touch the ground."""

DERIVED_DOMAINS: dict[str, tuple[str, ...]] = {
    "job": tuple(JOBS),
    "need": ("payload", "hands", "camera"),
    "trip": TRIPS,
    "arrival": SKIES,
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
    """What a robot stands on at `hour`."""
    if place in ("stairs", "field") and weather == "rain":
        return "slippery" if place == "stairs" else "soft"
    if place == "flooded tunnel":
        return "deep water" if TIDE_AT[hour] == "high" else "shallow water"
    if place == "crowd":
        return "crowded" if hour in ("noon", "dusk") else "firm"
    return {
        "warehouse": "firm", "stairs": "steps", "rubble": "broken", "cliff": "steep", "open water": "deep water",
        "field": "firm",
    }[place]  # fmt: skip


def derive(facts: SceneFacts, task: Task) -> dict[str, str]:
    """All that follows from the picture and the task, except the verdicts. Claim name -> value."""
    claims = {**facts.as_dict(), "job": task.job, "need": task.need}
    hour = facts.sky
    if task.kind != "now":
        quarters = DISTANCES.index(facts.flag) + (LOADS.index(facts.load) if task.kind == "haul" else 0)
        hour = SKIES[(SKIES.index(facts.sky) + quarters) % len(SKIES)]
        claims |= {"trip": TRIPS[quarters], "arrival": hour}
    claims["light"] = LIGHT_AT[hour]
    if facts.place in TIDAL_PLACES:
        claims["tide"] = TIDE_AT[hour]
    return claims | {"ground": ground_at(facts.place, facts.weather, hour)}


def conditions_of(robot: str, claims: dict[str, str], task: Task) -> list[tuple[str, bool]]:
    """The claims that decide for `robot`, each with whether it is met, in the order in which a step names them."""
    on_ground = ("ground", claims["ground"] in FIRM_GROUND.get(robot, ()))
    if robot == DRONE:  # weather dependent, flies by sight, limited payload, no hands
        checks = [("weather", claims["weather"] == "clear"), ("light", claims["light"] == "day")]
        if task.takes_load:
            checks.append(("load", claims["load"] == "light"))
        return [*checks, ("need", task.need != "hands")]
    if robot == UNDERWATER:
        return [on_ground]
    if robot == HUMANOID:  # high power consumption
        trip = [("trip", TRIPS.index(claims["trip"]) <= 2)] if "trip" in claims else []
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
        verdicts.append(f"{robot}: {named}, so {robot} is {claims[robot]}.")

    hour = "sky" if task.kind == "now" else "arrival"
    tide = f", tide is {claims['tide']}" if "tide" in claims else ""
    job = f"The job is {task.job}, so the need is {task.need}."
    place = f"The place is {facts.place}."
    ground = (
        f"The place is {facts.place}, weather is {facts.weather}, {hour} is {claims[hour]}{tide}, "
        f"so the ground is {claims['ground']}."
    )
    load = f" The load is {facts.load}." if task.takes_load and task.kind != "haul" else ""
    load_seen = ("load",) if load else ()
    ground_seen = ("place", "weather")
    P, C, S = "problem_analysis", "constraint_checking", "solution_selection"
    steps: list[tuple[str, str, tuple[str, ...]]]
    if task.kind == "now":
        steps = [
            (P, f"{job}{load} The sky is {facts.sky}, so the light is {claims['light']}.", ("sky", *load_seen)),
            (C, ground, ground_seen),
            (S, " ".join(verdicts), ()),
        ]
    else:
        trip = f"the flag is {facts.flag}, so the trip is {claims['trip']}."
        arrive = (
            f"The sky is {facts.sky}, after {claims['trip']} the arrival is {claims['arrival']}, "
            f"so the light is {claims['light']}."
        )
        if task.kind == "walk":
            steps = [
                (P, f"{job} {trip[0].upper()}{trip[1:]}", ("flag",)),
                (C, arrive, ("sky",)),
                (C, ground, ground_seen),
                (S, " ".join(verdicts[:2]), ()),
                (S, " ".join(verdicts[2:]), ()),
            ]
        else:
            steps = [
                (P, f"{job} {place}", ("place",)),
                (C, f"The load is {facts.load} and {trip}", ("load", "flag")),
                (C, arrive, ("sky",)),
                (C, ground, ground_seen),
                *((S, verdict, ()) for verdict in verdicts),
            ]
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
    for flag in DISTANCES:
        lines.append(f"The flag is {flag}, so the trip is {TRIPS[DISTANCES.index(flag)]}.")
        for load in LOADS:
            trip = TRIPS[DISTANCES.index(flag) + LOADS.index(load)]
            lines.append(f"The load is {load} and the flag is {flag}, so the trip is {trip}.")
    for sky in SKIES:
        lines.append(f"The sky is {sky}, so the light is {LIGHT_AT[sky]}. The tide is {TIDE_AT[sky]}.")
        for quarters, trip in enumerate(TRIPS):
            arrival = SKIES[(SKIES.index(sky) + quarters) % len(SKIES)]
            lines.append(
                f"The sky is {sky}, after {trip} the arrival is {arrival}, so the light is {LIGHT_AT[arrival]}."
            )
    for robot, grounds in FIRM_GROUND.items():
        for ground in DERIVED_DOMAINS["ground"]:
            lines.append(f"{robot}: ground is {ground}, so {robot} is {VERDICTS[0 if ground in grounds else 1]}.")
    lines.append("Drone: weather is clear, light is day, load is light, need is camera, so Drone is suited.")
    lines.append("Drone: weather is rain, so Drone is unsuited. Drone: light is dark, so Drone is unsuited.")
    lines.append("Conclusion: Drone, Underwater Robot, Humanoid, Robot with Wheels, Robot with Legs.")
    return tuple(lines)
