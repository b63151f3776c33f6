"""The embedded domain as general code sees it, and the domains that a run can name."""

from __future__ import annotations

import random
from collections.abc import Mapping

from embervlm.config import ConfigError
from embervlm.data.domain import NO_DOMAIN, Domain, EditedChain
from embervlm.data.records import ReasoningRecord
from embervlm.robots import rules
from embervlm.robots.facts import FACT_DOMAINS, SceneFacts


def plant_mistake(record: ReasoningRecord, rng: random.Random) -> EditedChain | None:
    """The record's chain up to a derived step that says something else than follows, and changes the answer.

    Only for chains of the rule teacher, which knows what follows from the mistake.
    """
    scene, task = record.metadata.get("scene"), _task_of(record)
    if task is None or not isinstance(scene, Mapping) or set(scene) != set(FACT_DOMAINS):
        return None
    facts = SceneFacts(**scene)
    right = rules.teach(facts, task)
    if right.steps != record.steps:
        return None
    names = [name for name in rules.DERIVED_DOMAINS if name in right.claims and name != "need"]
    for name in rng.sample(names, len(names)):
        values = [value for value in rules.DERIVED_DOMAINS[name] if value != right.claims[name]]
        for value in rng.sample(values, len(values)):
            wrong = rules.teach(facts, task, {name: value})
            if wrong.answer and set(wrong.answer) != set(right.answer):
                first = next(i for i, step in enumerate(wrong.steps) if step != right.steps[i])
                if wrong.step_types[first] != "conclusion":
                    return EditedChain(steps=wrong.steps[: first + 1], answer=wrong.answer)
    return None


def _task_of(record: ReasoningRecord) -> rules.Task | None:
    kind, need = record.metadata.get("question_kind"), (record.metadata.get("facts") or {}).get("need")
    return next((task for task in rules.TASKS if (task.kind, task.need) == (kind, need)), None)


ROBOTS = Domain(name="robots", candidates=rules.ROBOT_ORDER, glossary=rules.glossary(), plant_mistake=plant_mistake)
DOMAINS = {domain.name: domain for domain in (ROBOTS, NO_DOMAIN)}


def domain_named(name: str) -> Domain:
    """ConfigError where there is none of this name."""
    if name not in DOMAINS:
        raise ConfigError(f"domain: {name!r} is not one of {', '.join(DOMAINS)}; own data have none")
    return DOMAINS[name]
