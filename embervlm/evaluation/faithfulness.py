"""Does the answer come from the chain? Chains are begun for the model, which continues (Lanham et al. 2023).

A right chain before a right answer does not show that the one is the reason for the other: both may be read off the
picture. So the chain is cut short, a mistake is planted in it, or it is begun with the facts of another scene, and what
counts is whether the answer follows. Everything is in answers and log-probabilities; nothing looks inside the model.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embervlm.data.dataset import num_fact_steps, question_key, scene_key
from embervlm.data.domain import Domain
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import step_texts
from embervlm.data.tokenizer import CONCLUSION, ReasoningTokenizer
from embervlm.evaluation.batches import See, alike, chunks, found_by, in_order, tasks_of, text_log_probs
from embervlm.evaluation.sharing import Key, Task
from embervlm.judge.metrics import bootstrap_interval, final_answer_accuracy, is_right
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import generate_from_visual

NUM_SAMPLES = 200
"""Number of tested records, by default."""
GAIN_SAMPLES = 32
"""Records of these whose information gain is measured: it reads every chain once for each of its steps."""
FRACTIONS = (0.25, 0.5, 0.75)
"""Parts of its chain after which the model is made to conclude."""
GAIN_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The beginning of a chain that the model must continue."""

    kind: str
    """`truncated 0.25` ..., `planted` or `forced`."""
    record: ReasoningRecord
    steps: tuple[str, ...]
    concludes: bool = False
    """The conclusion has to come next."""
    follows: tuple[str, ...] = ()
    """The answer that follows from `steps`, where that is another than the record's."""


class Faithfulness:
    """The faithfulness tests of one evaluation, as tasks that any process can do, and their results."""

    def __init__(
        self,
        records: Sequence[ReasoningRecord],
        chains: Sequence[Sequence[str]],
        domain: Domain,
        num_samples: int = NUM_SAMPLES,
    ) -> None:
        """`records`: all of the evaluation; `chains`: the model's own chain of each."""
        self._places = choose(len(records), num_samples)
        self._records, self._chains = records, chains
        self._probes, self._dropped = probes_of(records, chains, self._places, domain)
        self._batches = alike(
            (probe.concludes, len(probe.record.instruction) + sum(map(len, probe.steps))) for probe in self._probes
        )

    def tasks(self, checkpoint: Path, see: See, decoding: Decoding) -> list[Task]:
        def ask(batch: Sequence[int], model: EmberVLM) -> list[dict[str, Any]]:
            return go_on(model, see, [self._probes[place] for place in batch], decoding)

        def gain(batch: Sequence[int], model: EmberVLM) -> list[list[float]]:
            records, chains = [self._records[place] for place in batch], [self._chains[place] for place in batch]
            return answer_log_probs(model, see, records, chains)

        places = self._places[:: max(1, len(self._places) // GAIN_SAMPLES)][:GAIN_SAMPLES]
        return [
            *tasks_of("probes", checkpoint, self._batches, ask),
            *tasks_of("gains", checkpoint, chunks(places, GAIN_BATCH), gain, counted=False),
        ]

    def result(self, done: Mapping[Key, Any]) -> dict[str, Any]:
        """The `faithfulness` block of the evaluation, without what the evaluation knows itself."""
        answers = in_order("probes", self._batches, done)
        log_probs = [row for part in found_by("gains", done) for row in part]
        return {"num_samples": len(self._places), **summarise(self._probes, answers, log_probs, self._dropped)}


# -- what is asked ---------------------------------------------------------------------------------------------------


def choose(num_records: int, num_samples: int, seed: int = 0) -> list[int]:
    """Places of the records to ask about, the same ones every time."""
    return sorted(np.random.default_rng(seed).permutation(num_records)[:num_samples].tolist())


def probes_of(
    records: Sequence[ReasoningRecord],
    chains: Sequence[Sequence[str]],
    places: Sequence[int],
    domain: Domain,
    seed: int = 0,
) -> tuple[list[Probe], int]:
    """Everything that is asked about the records at `places`, and how many found no other scene's facts to put in.

    Args:
        records: all records of the evaluation; facts come from any of them.
        chains: the model's own chain of each.
    """
    same_question = defaultdict(list)
    for record in records:
        same_question[question_key(record)].append(record)
    probes = []
    dropped = 0
    for place in places:
        record, rng = records[place], random.Random(f"faithfulness:{seed}:{place}")
        own = _without_conclusion(chains[place])
        for fraction in FRACTIONS:
            steps = tuple(own[: int(fraction * len(own))])
            probes.append(Probe(kind=f"truncated {fraction}", record=record, steps=steps, concludes=True))
        if (planted := domain.plant_mistake(record, rng)) is not None:
            probes.append(Probe(kind="planted", record=record, steps=planted.steps, follows=planted.answer))
        forced = force_facts(record, same_question[question_key(record)], rng)
        dropped += forced is None
        if forced is not None:
            probes.append(forced)
    return probes, dropped


def force_facts(record: ReasoningRecord, others: Sequence[ReasoningRecord], rng: random.Random) -> Probe | None:
    """The chain of another scene, up to where its facts are stated, behind the record's picture and question.

    Only where the two scenes have different answers; None where there is none such among `others`.
    """
    if record.image is None:
        return None
    fitting = [
        other
        for other in others
        if other.image and scene_key(other) != scene_key(record) and set(other.answer) != set(record.answer)
    ]
    if not fitting:
        return None
    other = rng.choice(fitting)
    return Probe(kind="forced", record=record, steps=_fact_steps(other), follows=other.answer)


def _fact_steps(record: ReasoningRecord) -> tuple[str, ...]:
    """The steps at a chain's start that state what the picture shows: as many as the record says, else the first half,
    or fewer where its step types say that a solution is selected sooner.

    Not more by those types: converters know them of a chain's end alone, and all before would be half the derivation.
    """
    steps = _without_conclusion(record.steps)
    types = record.metadata.get("step_types") or ()
    if count := num_fact_steps(record):
        return tuple(steps[:count])
    half = (len(steps) + 1) // 2
    known = len(types) == len(record.steps) and "solution_selection" in types
    return tuple(steps[: min(half, list(types).index("solution_selection") or half) if known else half])


def _without_conclusion(steps: Sequence[str]) -> list[str]:
    return [step for step in steps if not step.startswith(CONCLUSION)]


# -- asking ----------------------------------------------------------------------------------------------------------


def go_on(model: EmberVLM, see: See, probes: Sequence[Probe], decoding: Decoding) -> list[dict[str, Any]]:
    """The answers to which a batch of begun chains leads: the written one and the answer head's.

    `{"no_room": True}` for one that leaves the language model no room for an answer.
    """
    tokenizer, room = model.tokenizer, model.text_room
    begun = [_begun(tokenizer, probe.steps, probe.concludes) for probe in probes]
    out: list[dict[str, Any]] = [{"no_room": True} for _ in probes]
    fitting = list(range(len(probes)))
    if room is not None:  # a chain that is begun may leave none for an answer
        prompts = tokenizer.prompts([probe.record.instruction for probe in probes])
        taken = [len(prompt) + 1 + len(ids) for prompt, ids in zip(prompts, begun)]
        fitting = [place for place in fitting if taken[place] < room]
    if not fitting:
        return out
    records = [probes[place].record for place in fitting]
    own = [record.candidates for record in records]
    texts = [record.instruction for record in records]
    ids = [begun[place] for place in fitting]
    for place, found in zip(fitting, generate_from_visual(model, *see(model, records), texts, decoding, own, ids)):
        out[place] = {name: found.get(name, []) for name in ("answer_set", "head_answer", "cut_off")}
    return out


@torch.inference_mode()
def answer_log_probs(
    model: EmberVLM, see: See, records: Sequence[ReasoningRecord], chains: Sequence[Sequence[str]]
) -> list[list[float]]:
    """For each chain the log-probability in nats of the gold conclusion and answer after 0, 1, ... all of its steps.

    [] for one that the language model cannot read with them.
    """
    tokenizer, room = model.tokenizer, model.text_room
    visual, seen = see(model, records)
    rows: list[tuple[int, list[int], int]] = []  # record, text, where the scored part starts
    for place, (record, chain) in enumerate(zip(records, chains)):
        steps = _without_conclusion(chain)
        _, conclusion = step_texts(record)
        prompt = [*tokenizer.prompts([record.instruction])[0], tokenizer.ids["<|reasoning_start|>"]]
        concluded, answer = tokenizer.following([conclusion or "", ", ".join(record.answer)])
        gold = [
            *([] if conclusion is None else concluded),
            tokenizer.ids["<|reasoning_end|>"],
            tokenizer.ids["<|answer_start|>"],
        ]
        gold += [*answer, tokenizer.ids["<|answer_end|>"]]
        starts = [[*prompt, *_begun(tokenizer, steps[:n], conclusion is not None)] for n in range(len(steps) + 1)]
        if room is None or max(map(len, starts)) + len(gold) <= room:
            rows += [(place, [*begun, *gold], len(begun)) for begun in starts]
    log_probs = [0.0] * len(rows)
    for batch in alike(len(ids) for _, ids, _ in rows):
        for row, value in zip(batch, text_log_probs(model, visual, seen, [rows[row] for row in batch])):
            log_probs[row] = value
    out: list[list[float]] = [[] for _ in records]
    for (place, _, _), value in zip(rows, log_probs):
        out[place].append(value)
    return out


def _begun(tokenizer: ReasoningTokenizer, steps: Sequence[str], concludes: bool) -> list[int]:
    """The ids of a chain's `steps`, and where it `concludes` of what opens the conclusion."""
    opening = [tokenizer.ids["<|conclusion|>"]] if concludes else []
    return [token for ids in (*tokenizer.step_ids(steps), opening) for token in ids]


# -- what came out ---------------------------------------------------------------------------------------------------


def summarise(
    probes: Sequence[Probe], answers: Sequence[Mapping[str, Any]], log_probs: Sequence[Sequence[float]], dropped: int
) -> dict[str, Any]:
    """The shares that follow this and that, with their intervals.

    Args:
        log_probs: of each chain, of `answer_log_probs`.
        dropped: records for which there were no other facts to put in.
    """
    asked: dict[str, list[tuple[Probe, Mapping[str, Any]]]] = defaultdict(list)
    for probe, answer in zip(probes, answers, strict=True):
        if not answer.get("no_room"):
            asked[probe.kind].append((probe, answer))
    log_probs = [values for values in log_probs if values]
    intervals: dict[str, tuple[float, float]] = {}

    def share(name: str, hits: Sequence[float]) -> float | None:
        if not hits:
            return None
        intervals[name] = bootstrap_interval(hits)
        return float(np.mean(hits))

    def right(found: Sequence[tuple[Probe, Mapping[str, Any]]], key: str = "answer_set") -> list[float]:
        return [float(is_right(answer[key], probe.record)) for probe, answer in found]

    def follows(found: Sequence[tuple[Probe, Mapping[str, Any]]], key: str = "answer_set") -> list[float]:
        return [
            final_answer_accuracy(answer[key], probe.follows, is_open=not probe.record.candidates)
            for probe, answer in found
        ]

    truncated = {str(part): share(f"truncated.{part}", right(asked[f"truncated {part}"])) for part in FRACTIONS}
    planted, forced = asked["planted"], asked["forced"]
    block: dict[str, Any] = {
        "truncated": truncated,
        "planted_mistake": {
            "num": len(planted),
            "accuracy": share("planted_mistake.accuracy", right(planted)),
            "follows_mistake": share("planted_mistake.follows_mistake", follows(planted)),
        },
        "information_gain": {"per_step": _mean_gains(log_probs), "num": len(log_probs)},
        "forced_prefix": {"num": len(forced), "ambiguous_dropped": dropped},
        "no_room_dropped": sum(bool(answer.get("no_room")) for answer in answers),
        "cut_off_share": float(np.mean([bool(answer.get("cut_off")) for answer in answers])) if answers else None,
    }
    for key, prefix in (("answer_set", ""), ("head_answer", "head_")):
        asked_so = [(p, a) for p, a in forced if key == "answer_set" or p.record.candidates]  # an open one has no head
        block["forced_prefix"][f"{prefix}num"] = len(asked_so)
        text, picture = follows(asked_so, key), right(asked_so, key)
        neither = [1 - t - p for t, p in zip(text, picture)]
        for name, hits in (("follows_text", text), ("follows_picture", picture), ("neither", neither)):
            block["forced_prefix"][prefix + name] = share(f"forced_prefix.{prefix}{name}", hits)
    return {**block, "intervals": {name: list(interval) for name, interval in intervals.items()}}


def _mean_gains(log_probs: Sequence[Sequence[float]]) -> list[float]:
    """The gain of the k-th step, averaged over the chains that have one."""
    longest = max((len(values) for values in log_probs), default=0)
    return [
        float(np.mean([values[k] - values[k - 1] for values in log_probs if len(values) > k]))
        for k in range(1, longest)
    ]
