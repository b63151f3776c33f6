"""Does each way of damaging a chain lower the score it is aimed at? Pairs of an untouched and a damaged chain.

    python benchmarks/perturbations.py --tasks_file single_robot_selection.json

Sets: `scenes`, the rule teacher's chains for scenes that were not trained on; `tasks`, chains about the tasks of others
(`--tasks_file`, the format of robot_selection.json), one half to fit on; `everyday`, hand-written chains about anything
but robots' scenes (tests/data/everyday_chains.jsonl), nothing fitted; `unseen`, a dozen more of that kind, written when
most of the metrics were finished; `independent`, 80 more by somebody who did not know them. What each was used for is
told in docs/results.md. Each as in an evaluation, where facts and gold chain are known, and with less: the facts alone,
nothing fitted, no facts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from embervlm.curate.paraphrase import RuleParaphraser  # noqa: E402
from embervlm.data.negatives import contradict  # noqa: E402
from embervlm.judge.metrics import ChainScorer  # noqa: E402
from embervlm.judge.reading import ChainContext  # noqa: E402
from embervlm.robots.facts import all_facts  # noqa: E402
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS  # noqa: E402
from embervlm.robots.rules import TASKS, claim_domains, teach  # noqa: E402
from embervlm.robots.tasks import read_tasks  # noqa: E402
from embervlm.words.claims import ClaimReader, is_conclusion  # noqa: E402

EVERYDAY = REPOSITORY / "tests" / "data" / "everyday_chains.jsonl"
UNSEEN = REPOSITORY / "tests" / "data" / "unseen_chains.jsonl"
INDEPENDENT = REPOSITORY / "tests" / "data" / "independent_chains.jsonl"
SETS = ("scenes", "tasks", "everyday", "unseen", "independent")
CONSISTENCY, COMPLETENESS, FLOW = "reasoning_consistency", "step_completeness", "logical_flow_score"
SCORES = (CONSISTENCY, COMPLETENESS, FLOW)
FILLERS = (
    "Let us think about this carefully.",
    "This is an interesting question.",
    "There are many things to consider here.",
    "It is always good to be careful.",
    "Let me take a deep breath and go on.",
    "The weather was nice last weekend.",
    "Many people enjoy music in their free time.",
    "As we all know, life is full of surprises.",
)
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|can|will|must|may|could|should|would|has to|have to|does|do)\b(?! not\b)(?!n't)", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A chain that deserves good marks, and what the perturbations need to know of it."""

    steps: tuple[str, ...]
    context: ChainContext
    needed: tuple[int, ...]
    """Steps that the conclusion needs."""
    other_answers: tuple[str, ...]
    """What a wrong conclusion can name."""
    paraphrases: Mapping[int, str] = field(default_factory=dict)
    wrong_facts: Mapping[int, str] = field(default_factory=dict)
    reader: ClaimReader = field(default_factory=lambda: ClaimReader.of({}))
    domains: Mapping[str, Sequence[str]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    """For making mistakes; `context.facts` are what the score is told."""

    @property
    def body(self) -> list[int]:
        return [index for index, step in enumerate(self.steps) if not is_conclusion(step)]


Damaged = tuple[list[str], ChainContext]
Damage = Callable[[Chain, random.Random, Sequence[Chain]], "Damaged | None"]


def _with_step(chain: Chain, place: int, step: str) -> Damaged:
    return [*chain.steps[:place], step, *chain.steps[place:]], chain.context


def _later(chain: Chain, index: int, rng: random.Random) -> int:
    return rng.randint(index + 1, max(chain.body) + 1)


def repeat(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    index = rng.choice(chain.body)
    return _with_step(chain, _later(chain, index, rng), chain.steps[index])


def renumbered(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    index = rng.choice(chain.body)
    place = _later(chain, index, rng)
    form = rng.choice((f"Step {place + 1}: {{}}", f"{place + 1}. {{}}", "Next, {}", "- {}"))
    return _with_step(chain, place, form.format(chain.steps[index]))


def reworded(chain: Chain, rng: random.Random) -> tuple[int, str] | None:
    """A step and the same in other words."""
    if chain.paraphrases:
        return rng.choice(sorted(chain.paraphrases.items()))
    paraphraser = RuleParaphraser(chain.reader)
    for _ in range(8):
        index = rng.choice(chain.body)
        text = paraphraser.rewrite(chain.steps[index], rng)
        if text != chain.steps[index]:
            return index, text
    return None


def paraphrased_repeat(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    found = reworded(chain, rng)
    return None if found is None else _with_step(chain, _later(chain, found[0], rng), found[1])


def shuffle(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    for _try in range(10):
        steps = rng.sample(chain.steps, len(chain.steps))
        if steps != list(chain.steps):
            return steps, chain.context
    return None


def swap(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    i, j = sorted(rng.sample(range(len(chain.steps)), 2))
    steps = list(chain.steps)
    steps[i], steps[j] = steps[j], steps[i]
    return steps, chain.context


def remove(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    index = rng.choice(chain.needed)
    return [*chain.steps[:index], *chain.steps[index + 1 :]], chain.context


def negated(step: str, rng: random.Random) -> str:
    """The opposite of one statement of a step."""
    places = list(_AUXILIARY.finditer(step))
    if not places:
        return f"It is not true that {step[0].lower()}{step[1:]}"
    chosen = rng.choice(places)
    if chosen[0].lower() in ("has to", "have to", "does", "do"):
        return f"It is not true that {step[0].lower()}{step[1:]}"
    return f"{step[: chosen.end()]} not{step[chosen.end() :]}"


def negate(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    index = rng.choice(chain.needed)
    steps = list(chain.steps)
    steps[index] = negated(steps[index], rng)
    return steps, chain.context


def wrong_fact(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    steps = list(chain.steps)
    if chain.wrong_facts:
        index, text = rng.choice(sorted(chain.wrong_facts.items()))
        steps[index] = text
        return steps, chain.context
    for index in rng.sample(chain.body, len(chain.body)):
        wrong = contradict(steps[index], chain.facts, ClaimReader.of(chain.domains), rng)
        if wrong != steps[index]:
            steps[index] = wrong
            return steps, chain.context
    return None


def filler(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    return _with_step(chain, rng.randint(0, len(chain.steps) - 1), rng.choice(FILLERS))


def wrong_conclusion(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    wrong = rng.choice(chain.other_answers)
    answer = (
        frozenset(part.strip() for part in wrong.split(",")) if len(chain.context.answer) > 1 else frozenset({wrong})
    )
    context = dataclasses.replace(chain.context, answer=answer)
    return [*chain.steps[:-1], f"Conclusion: {wrong}."], context


def empty(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    return rng.choice([[], [""], ["Conclusion:"]]), dataclasses.replace(chain.context, answer=frozenset())


def other_chain(chain: Chain, rng: random.Random, everyone: Sequence[Chain]) -> Damaged | None:
    for _ in range(20):
        other = rng.choice(everyone)
        if other.steps != chain.steps and other.context.instruction != chain.context.instruction:
            return list(other.steps), dataclasses.replace(chain.context, answer=other.context.answer)
    return None


def harmless_paraphrase(chain: Chain, rng: random.Random, _: Sequence[Chain]) -> Damaged | None:
    found = reworded(chain, rng)
    if found is None:
        return None
    steps = list(chain.steps)
    steps[found[0]] = found[1]
    return steps, chain.context


DAMAGES: dict[str, tuple[Damage, str]] = {
    "repeat one step": (repeat, CONSISTENCY),
    "repeat it renumbered": (renumbered, CONSISTENCY),
    "paraphrased repeat": (paraphrased_repeat, CONSISTENCY),
    "shuffle": (shuffle, FLOW),
    "swap two steps": (swap, FLOW),
    "remove a needed step": (remove, COMPLETENESS),
    "negate a step": (negate, CONSISTENCY),
    "planted wrong fact": (wrong_fact, CONSISTENCY),
    "filler": (filler, CONSISTENCY),
    "wrong conclusion": (wrong_conclusion, FLOW),
    "empty": (empty, CONSISTENCY),
    "another question's chain": (other_chain, CONSISTENCY),
}
"""Name -> how the chain is damaged, and the score that must fall."""


# ---- the sets


def scene_chains(*, held_out: bool, number: int, seed: int = 0) -> list[Chain]:
    """The rule teacher's chains; every fifth combination of facts is held out."""
    scenes = [facts for place, facts in enumerate(all_facts()) if (place % 5 == 0) == held_out]
    rng = random.Random(seed)
    out: list[Chain] = []
    domains = claim_domains()
    while len(out) < number:
        facts, task = rng.choice(scenes), rng.choice(TASKS)
        taught = teach(facts, task)
        if not taught.answer:
            continue
        context = ChainContext(
            instruction=task.instruction,
            facts=taught.claims,
            domains=domains,
            reference_steps=taught.steps,
            step_types=taught.step_types,
            answer=frozenset(taught.answer),
            gold_answer=frozenset(taught.answer),
            candidates=frozenset(ROBOTS),
        )
        out.append(
            Chain(
                steps=taught.steps,
                context=context,
                needed=tuple(range(len(taught.steps) - 1)),
                other_answers=tuple(name for name in ROBOTS if (name,) != taught.answer),
                reader=ClaimReader.of(domains),
                domains=domains,
                facts=taught.claims,
            )
        )
    return out


SKILLS = {
    "Drone": ("flies over any ground and reaches high places", "carries hardly any payload"),
    "Underwater Robot": ("dives and works below the surface", "cannot leave the water"),
    "Humanoid": ("handles tools and moves among people", "walks slowly and drains its battery"),
    "Robot with Wheels": ("drives fast and carries a good payload", "needs flat ground"),
    "Robot with Legs": ("walks over rough ground and stairs", "has no hands to manipulate things"),
}


def task_chains(path: Path) -> list[Chain]:
    """Chains in plain words about tasks that others wrote, one for each."""
    out = []
    seen = set()
    for task, answer in read_tasks(json.loads(path.read_text(encoding="utf-8")), path):
        if task in seen:
            continue
        seen.add(task)
        rng = random.Random(task)
        lowered = task[0].lower() + task[1:].rstrip(".")
        others = [name for name in ROBOTS if name not in answer]
        against = rng.sample(others, min(2, len(others)))
        goal = rng.choice(("The task is to {}.", "We are asked to {}.", "The goal here is to {}.")).format(lowered)
        steps = [goal]
        words = [word for word in re.findall(r"[a-z]{5,}", lowered) if word not in ("using", "where", "which", "their")]
        about = " ".join(words[-2:]) or lowered
        steps.append(f"Whoever does this has to deal with {about} and keep at it until the job is done.")
        paraphrases = {1: f"Dealing with {about} until the work is finished is what the robot has to manage."}
        wrong_facts = {}
        for name in against:
            good, bad = SKILLS[name]
            paraphrases[len(steps)] = f"As the {name} {bad}, it is not the one for this, although it {good}."
            wrong_facts[len(steps)] = (
                f"The {name} {good}, and it is not true that it {bad}, so it does not fit this job."
            )
            steps.append(f"The {name} {good}, but it {bad}, so it does not fit this job.")
        for name in answer:
            paraphrases[len(steps)] = f"For {about}, the {name} is a good match because it {SKILLS[name][0]}."
            steps.append(f"The {name} {SKILLS[name][0]}, so it is well suited for {about}.")
        steps.append(f"Conclusion: {', '.join(answer)}.")
        context = ChainContext(
            instruction=f"Task: {task} Which robot is suited: {', '.join(ROBOTS)}?",
            answer=frozenset(answer),
            gold_answer=frozenset(answer),
            candidates=frozenset(ROBOTS),
            statements=tuple(f"The {name} {part}." for name in ROBOTS for part in SKILLS[name]),
            reference_steps=tuple(steps),
        )
        out.append(
            Chain(
                steps=tuple(steps),
                context=context,
                needed=tuple(range(len(steps) - 1)),
                other_answers=tuple(others),
                paraphrases=paraphrases,
                wrong_facts=wrong_facts,
            )
        )
    return out


def everyday_chains(path: Path = EVERYDAY) -> list[Chain]:
    """Hand-written chains, each with one step in other words and one with a mistake."""
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        facts = row["facts"] if isinstance(row["facts"], dict) else {}
        statements = row["facts"] if isinstance(row["facts"], list) else ()
        context = ChainContext(
            instruction=row["instruction"],
            facts=facts,
            statements=statements,
            answer=frozenset({row["answer"]}),
            gold_answer=frozenset({row["gold_answer"]}),
            reference_steps=tuple(row["steps"]),
        )
        out.append(
            Chain(
                steps=tuple(row["steps"]),
                context=context,
                needed=tuple(row["needed"]),
                other_answers=(row["wrong_answer"],),
                paraphrases=dict([row["paraphrase"]]),
                wrong_facts=dict([row["wrong_fact"]]),
            )
        )
    return out


def told(chains: Sequence[Chain], *, facts: bool, reference: bool, domains: bool = True) -> list[Chain]:
    """The same chains, of which the score is told less."""
    out = []
    for chain in chains:
        context = chain.context
        if not facts:
            context = dataclasses.replace(context, facts={}, statements=())
        if not reference:
            context = dataclasses.replace(context, reference_steps=(), step_types=())
        if not domains:
            context = dataclasses.replace(context, domains={})
        out.append(dataclasses.replace(chain, context=context))
    return out


# ---- the table


@dataclass(frozen=True)
class Row:
    name: str
    aimed_at: str
    num_pairs: int
    lowered: float
    """Share of the pairs in which the score it is aimed at falls."""
    mean_change: Mapping[str, float]
    misses: list[dict[str, Any]]


def measure(
    chains: Sequence[Chain], scorer: ChainScorer, *, pairs: int = 500, seed: int = 0, only: Sequence[str] = ()
) -> list[Row]:
    """One row for each damage, and the harmless paraphrase last."""
    rows = []
    untouched: dict[int, dict[str, Any]] = {}
    for name, (damage, aimed_at) in {**DAMAGES, "harmless paraphrase": (harmless_paraphrase, "")}.items():
        if only and name not in only:
            continue
        rng = random.Random(f"{seed} {name}")
        order = rng.sample(range(len(chains)), len(chains))
        found: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
        misses = []
        for attempt in range(4 * pairs):
            if len(found) == pairs:
                break
            index = order[attempt % len(order)]
            chain = chains[index]
            made = damage(chain, rng, chains)
            if made is None:
                continue
            before = untouched.get(index) or untouched.setdefault(index, scorer.score(chain.steps, chain.context))
            after = scorer.score(*made)
            found.append((before, after))
            if aimed_at and not after[aimed_at] < before[aimed_at]:
                misses.append({"steps": made[0], "gold": chain.steps, "before": before, "after": after})
        changes = {score: sum(a[score] - b[score] for b, a in found) / max(len(found), 1) for score in SCORES}
        lowered = 1 - len(misses) / max(len(found), 1)
        rows.append(Row(name, aimed_at, len(found), lowered, changes, misses))
    return rows


def mean_scores(chains: Sequence[Chain], scorer: ChainScorer) -> dict[str, float]:
    scores = [scorer.score(chain.steps, chain.context) for chain in chains]
    return {name: sum(score[name] for score in scores) / len(scores) for name in SCORES}


def settings(
    sets: Sequence[str], tasks_file: Path | None, **backends: str
) -> list[tuple[str, list[Chain], ChainScorer]]:
    """(title, chains, scorer) of every setting."""
    out: list[tuple[str, list[Chain], ChainScorer]] = []
    general = ChainScorer.fit((), **backends)
    if "scenes" in sets:
        train = [chain.steps for chain in scene_chains(held_out=False, number=800, seed=1)]
        fitted = ChainScorer.fit(train, claim_domains(), **backends)
        test = scene_chains(held_out=True, number=300)
        out += [
            ("scenes, as in an evaluation", test, fitted),
            ("scenes, facts, no gold chain", told(test, facts=True, reference=False), fitted),
            ("scenes, no facts", told(test, facts=False, reference=False), fitted),
            ("scenes, facts, nothing fitted", told(test, facts=True, reference=False, domains=False), general),
            ("scenes, no facts, nothing fitted", told(test, facts=False, reference=False, domains=False), general),
        ]
    if "tasks" in sets and tasks_file is not None:
        chains = task_chains(tasks_file)
        train, tasks = chains[::2], chains[1::2]
        out += [
            ("tasks, as in an evaluation", tasks, ChainScorer.fit([chain.steps for chain in train], **backends)),
            ("tasks, facts, nothing fitted", told(tasks, facts=True, reference=False), general),
            ("tasks, no facts, nothing fitted", told(tasks, facts=False, reference=False), general),
        ]
    for name, path in (("everyday", EVERYDAY), ("unseen", UNSEEN), ("independent", INDEPENDENT)):
        if name in sets:
            chains = everyday_chains(path)
            out += [
                (f"{name}, as in an evaluation", chains, general),
                (f"{name}, facts", told(chains, facts=True, reference=False), general),
                (f"{name}, no facts", told(chains, facts=False, reference=False), general),
            ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", default=SETS, choices=SETS, help="`tasks` needs --tasks_file")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--tasks_file", type=Path)
    parser.add_argument("--similarity", default="embedded")
    parser.add_argument("--entailment", default="embedded")
    parser.add_argument("--misses", type=int, default=0, help="print this many misses of each row")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--setting", default="", help="only settings whose title holds this")
    args = parser.parse_args()
    for title, chains, scorer in settings(
        args.set, args.tasks_file, similarity=args.similarity, entailment=args.entailment
    ):
        if args.setting not in title:
            continue
        means = mean_scores(chains, scorer)
        print(f"\n### {title}\n\nuntouched: " + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()) + "\n")
        print("| damage | aimed at | pairs | lowered | mean change: consistency, completeness, flow |")
        print("|---|---|---|---|---|")
        for row in measure(chains, scorer, pairs=args.pairs, only=args.only):
            changes = ", ".join(f"{row.mean_change[score]:+.3f}" for score in SCORES)
            share = f"{row.lowered:.1%}" if row.aimed_at else "-"
            print(f"| {row.name} | {row.aimed_at} | {row.num_pairs} | {share} | {changes} |", flush=True)
            for miss in row.misses[: args.misses]:
                print(json.dumps(miss, indent=1, default=float))


if __name__ == "__main__":
    main()
