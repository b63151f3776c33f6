"""The guide's advanced topics over `generate_with_reasoning`: templates, follow-up questions, self-verification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from embervlm.config import ConfigError
from embervlm.judge.arithmetic import wrong_arithmetic
from embervlm.judge.contradiction import opposite_steps
from embervlm.model.config import STAGE3
from embervlm.model.decoding import Decoding, OnToken
from embervlm.model.generation import check_length, generate_from_visual, known_of, look
from embervlm.model.judging import step_probabilities
from embervlm.model.known import settled
from embervlm.model.network import EmberVLMNetwork
from embervlm.model.streaming import OnText, Pieces
from embervlm.words.chain_text import CONCLUSION, REASONING_END, REASONING_START, format_reasoning, parse_reasoning_text
from embervlm.words.claims import conclusion_fault
from embervlm.words.english import sentences

TEMPLATES: dict[str, tuple[str, ...]] = {
    "analysis": ("Problem Analysis:", "Constraints:", "Available Options:", "Selection Criteria:"),
    "step_by_step": ("Step {i}:", "Rationale:", "Next Action:"),
    "comparative": ("Option A:", "Option B:", "Comparison:", "Decision:"),
}
"""The guide's; a heading with `{i}` starts a block that is repeated for every step."""
CONSISTENT = "ensure_logical_consistency"
ATTEMPTS = 8
"""Chains that are drawn under that constraint, beside the likeliest one."""
TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """A chain with what it is about. As text it reads `Step 1: ...`, or as its template lays it out."""

    question: str
    steps: list[str]
    """The conclusion last, as `Conclusion: ...`."""
    answer: str | None
    """None where there is none to trust: `why` says why."""
    answer_set: list[str]
    """As the model wrote it, whatever `answer` is."""
    confidence: float
    image: Any = None
    sections: list[tuple[str, str]] = field(default_factory=list)
    """Heading and text of a template."""
    kept_steps: int = 0
    """Steps that were taken over from the reasoning before."""
    candidates: tuple[str, ...] | None = None
    """What the answer was chosen from: () for an open answer, None where it is not known."""
    cut_off: str | None = None
    """`steps` or `tokens` where that limit cut the text off."""
    num_chains: int = 1
    """Chains that were drawn, of which this is one with the elected answer."""
    votes: dict[str, float] = field(default_factory=dict)
    """Answer -> its votes, the elected one first; {} of a single chain."""
    known: float | None = None
    """How well the question is known, in [0, 1]; None where that was not measured."""
    why: str | None = None
    """A sentence that says why there is no answer; None where there is one."""

    def __str__(self) -> str:
        if self.sections:
            return "\n".join(
                heading + ("\n" if text.startswith("- ") else " ") + text for heading, text in self.sections
            )
        return format_reasoning(self.steps)

    def record(self) -> dict[str, Any]:
        """As a record of the unified format. Its picture has to be a path, or a list of paths."""
        several = isinstance(self.image, (list, tuple))
        return {
            "image": list(map(str, self.image)) if several else None if self.image is None else str(self.image),
            "instruction": self.question,
            "reasoning": f"{REASONING_START}{format_reasoning(self.steps)}{REASONING_END}",
            "answer": self.answer_set,
            "confidence": self.confidence,
            "metadata": {
                "source": "self_generated",
                "num_steps": sum(not step.startswith(CONCLUSION) for step in self.steps),
                **({} if self.candidates is None else {"candidates": list(self.candidates)}),  # [] of an open answer
            },
        }


# -- templates --------------------------------------------------------------------------------------------------------


def lay_out(steps: Sequence[str], headings: Sequence[str]) -> list[tuple[str, str]]:
    """The chain under the headings of a template, in order: nothing is left out and nothing made up.

    A step that begins with a heading goes there. The others fill the headings evenly, and the conclusion comes under
    the last. In a template with `{i}` each step is a block, and its sentences fill the block's headings.
    """
    if not headings:
        raise ConfigError("template: has no heading")
    conclusion = [step.removeprefix(CONCLUSION) for step in steps if step.startswith(CONCLUSION)]
    body = [step for step in steps if not step.startswith(CONCLUSION)]
    if any("{i}" in heading for heading in headings):
        out = []
        for number, step in enumerate(body, 1):
            out += _fill(sentences(step), [heading.replace("{i}", str(number)) for heading in headings])
        return [*out, *((CONCLUSION.strip(), text) for text in conclusion)]
    own = {step: heading for step in body for heading in headings if step.lower().startswith(heading.lower())}
    if own:
        found = [(own.get(step, ""), step[len(own[step]) :].strip() if step in own else step) for step in body]
        return [*found, *((CONCLUSION.strip(), text) for text in conclusion)]
    return [*_fill(body, headings[:-1] or headings), *((headings[-1], text) for text in conclusion)]


def _fill(texts: Sequence[str], headings: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbouring texts under each heading, as evenly as it goes; headings without a text are left out."""
    ends = [round(len(texts) * (place + 1) / len(headings)) for place in range(len(headings))]
    if len(texts) < len(headings):
        ends = [min(place + 1, len(texts)) for place in range(len(headings))]
    out, start = [], 0
    for heading, end in zip(headings, ends):
        if end > start:
            out.append((heading, " ".join(texts[start:end])))
        start = end
    return out


def template_headings(template: str | Sequence[str], templates: Mapping[str, Sequence[str]]) -> Sequence[str]:
    if not isinstance(template, str):
        return template
    if template not in templates:
        raise ConfigError(f"template: {template!r} is not one of {', '.join(templates)}; or give a list of headings")
    return templates[template]


@torch.inference_mode()
def under_headings(
    model: EmberVLMNetwork, image: Any, question: str, headings: Sequence[str], decoding: Decoding
) -> Reasoning:
    """A chain with its `sections`; see `EmberVLM.generate_with_template`."""
    _check_asked(model, question)
    check_length(model, [question], decoding)
    chain = None
    if headings and not any("{i}" in heading for heading in headings):
        chain = _steered(model, image, question, headings, decoding)
    chain = chain or reason(model, image, question, decoding=decoding)
    return replace(chain, sections=lay_out(chain.steps, headings))


def _steered(
    model: EmberVLMNetwork, image: Any, question: str, headings: Sequence[str], decoding: Decoding
) -> Reasoning | None:
    """A chain whose first steps begin with `headings`, each put there before the model goes on; None where the chain
    then has faults."""
    decoding, tokenizer = replace(decoding, num_chains=1), model.tokenizer
    with model.in_eval_mode():
        visual, seen = look(model, [image])
        steps: list[str] = []
        for number, heading in enumerate(headings, 1):
            opened = [tokenizer.ids["<|step|>"], *tokenizer.following([heading])[0]]
            begun = [token for ids in (*tokenizer.step_ids(steps), opened) for token in ids]
            (result,) = generate_from_visual(model, visual, seen, [question], decoding, begun=[begun])
            steps = result["reasoning_steps"][:number]
        (result,) = settled([result], known_of(model, visual, seen, [question], decoding), decoding.min_known)
        found = as_reasoning({**result, "instruction": question, "image": image})
        return None if faults(model, found, visual, seen) else found


# -- reasoning ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def reason(
    model: EmberVLMNetwork,
    image: Any,
    question: str,
    previous: Any = None,
    constraint: str | None = None,
    decoding: Decoding | None = None,
    on_text: OnText | None = None,
) -> Reasoning:
    """One chain; see `EmberVLM.generate_reasoning` and `EmberVLM.reason`."""
    decoding = decoding or Decoding()
    _check_asked(model, question)
    if constraint not in (None, CONSISTENT):
        raise ConfigError(f"constraint: {constraint!r} is not known; the only one is {CONSISTENT!r}")
    with model.in_eval_mode():
        visual, seen = look(model, [image])
        kept: list[str] = []
        last = None
        if previous is not None:
            earlier, last = as_reasoning(previous), [question]
            question = behind(earlier, question)
            kept = still_holds(model, visual, seen, question, earlier.steps)
        check_length(model, [question], decoding)
        found = known_of(model, visual, seen, [question], decoding, last)
        begun = [token for ids in model.tokenizer.step_ids(kept) for token in ids]
        pieces = None if on_text is None else Pieces(model.tokenizer, on_text)
        if pieces is not None:
            pieces.all(0, begun)

        def draw(count: int, how: Decoding, on_token: OnToken | None = None) -> list[Reasoning]:
            results = generate_from_visual(
                model,
                visual.expand(count, -1, -1),
                seen.expand(count),
                [question] * count,
                how,
                begun=[begun] * count,
                on_token=on_token,
            )
            results = settled(results, None if found is None else found * count, how.min_known)
            about = {"instruction": question, "image": image}
            return [replace(as_reasoning({**result, **about}), kept_steps=len(kept)) for result in results]

        (likeliest,) = draw(1, decoding, pieces)
        if constraint is None or not faults(model, likeliest, visual, seen):
            return likeliest
        temperature = decoding.temperature or TEMPERATURE
        warmer = replace(decoding, num_chains=1, temperature=temperature, seed=decoding.seed + 1)
        return _most_consistent(model, [likeliest, *draw(ATTEMPTS, warmer)], visual, seen)


def _check_asked(model: EmberVLMNetwork, question: str) -> None:
    if not question.strip():
        raise ConfigError("the question is empty; write a question or a task")
    if model.config.stage == STAGE3:
        raise ConfigError("this model has no reasoning module: it is a Stage 3 model")


def behind(earlier: Reasoning, question: str) -> str:
    """A follow-up as it is asked: behind the question before."""
    return f"{earlier.question.strip()} {question.strip()}".strip()


def as_reasoning(given: Any) -> Reasoning:
    """The earlier reasoning in any accepted form: a `Reasoning`, a result, its steps, or their text."""
    if isinstance(given, Reasoning):
        return given
    if isinstance(given, Mapping):
        if isinstance(given.get("reasoning"), Reasoning):
            return given["reasoning"]  # type: ignore[no-any-return]
        steps, answers = given.get("reasoning_steps"), list(given.get("answer_set") or ())
        if isinstance(steps, Sequence) and not isinstance(steps, str):
            return Reasoning(
                question=str(given.get("instruction", "")),
                image=given.get("image"),
                steps=list(steps),
                answer=None if (answer := given.get("answer", "")) is None else str(answer),
                answer_set=answers,
                confidence=float(given.get("confidence", 0)),
                candidates=tuple(given["head_probabilities"] or ()) if "head_probabilities" in given else None,
                cut_off=given.get("cut_off"),
                num_chains=int(given.get("num_chains", 1)),
                votes=dict(given.get("votes") or {}),
                known=given.get("known"),
                why=given.get("why"),
            )
    if isinstance(given, str):
        given = parse_reasoning_text(given)
    if isinstance(given, Sequence) and all(isinstance(step, str) for step in given):
        return Reasoning(question="", steps=list(given), answer="", answer_set=[], confidence=0.0)
    raise ConfigError(f"reasoning: {type(given).__name__} is not a result of generate_reasoning, nor steps, nor text")


def still_holds(model: EmberVLMNetwork, visual: Tensor, seen: Tensor, question: str, steps: Sequence[str]) -> list[str]:
    """The first steps of an earlier chain that the step validator also lets pass after `question`."""
    body = [step for step in steps if not step.startswith(CONCLUSION)]
    kept = []
    for step, probability in zip(body, step_probabilities(model, visual, seen, question, body)):
        if probability <= 0.5:
            break
        kept.append(step)
    return kept


# -- verification -----------------------------------------------------------------------------------------------------


def faults(model: EmberVLMNetwork, reasoning: Reasoning, visual: Tensor, seen: Tensor) -> list[str]:
    """The faults of a chain, by its form and by the model's own step validator; [] if there are none."""
    steps = reasoning.steps
    out = list(form_faults(reasoning, reasoning.candidates or model.config.candidates))
    for number, probability in enumerate(step_probabilities(model, visual, seen, reasoning.question, steps), 1):
        if probability <= 0.5:
            out.append(f"step {number} follows with probability {probability:.2f} only")
    return out


def form_faults(reasoning: Reasoning, candidates: Collection[str] = ()) -> Iterator[str]:
    """What speaks against a chain by its form alone; `candidates`: what a conclusion may name."""
    steps = reasoning.steps
    if reasoning.cut_off:
        yield f"it is cut off by {'max_reasoning_steps' if reasoning.cut_off == 'steps' else 'max_new_tokens'}"
    if len(steps) < 2:
        yield f"{len(steps)} steps: too few for a chain"
    if steps and not steps[-1].startswith(CONCLUSION):
        yield "it has no conclusion"
    counts = Counter(" ".join(step.lower().split()) for step in steps)
    yield from (f"it says {count} times: {step[:80]}" for step, count in counts.items() if count > 1)
    for number, step in enumerate(steps, 1):
        if wrong := wrong_arithmetic(step):
            yield f"step {number} says '{wrong}', which does not come out"
    if opposite := opposite_steps(steps):
        yield "step {1} denies step {0}".format(*opposite)
    if steps and steps[-1].startswith(CONCLUSION):
        if fault := conclusion_fault(steps[-1], reasoning.answer_set, {*candidates, *(reasoning.candidates or ())}):
            yield f"the conclusion {fault}"
        elif missing := [name for name in reasoning.answer_set if name.lower() not in steps[-1].lower()]:
            yield from (f"the conclusion does not name {name}" for name in missing)


def _most_consistent(model: EmberVLMNetwork, drawn: Sequence[Reasoning], visual: Tensor, seen: Tensor) -> Reasoning:
    """The chain with the fewest faults; of equal ones, one with the answer that most give (Wang et al. 2023)."""
    found = [(len(faults(model, one, visual, seen)), one) for one in drawn]
    fewest = min(count for count, _ in found)
    best = [one for count, one in found if count == fewest]
    votes = Counter(frozenset(one.answer_set) for one in best)
    return max(best, key=lambda one: (votes[frozenset(one.answer_set)], one.confidence))


@torch.inference_mode()
def verify(model: EmberVLMNetwork, reasoning: Any, image: Any = None, question: str | None = None) -> list[str]:
    """What speaks against `reasoning`; see `EmberVLM.verify_reasoning`."""
    given = as_reasoning(reasoning)
    asked = question if question is not None else given.question
    if not asked.strip():
        raise ConfigError("this reasoning does not contain its question; give image= and question= as well")
    with model.in_eval_mode():
        visual, seen = look(model, [image if image is not None else given.image])
        return faults(model, replace(given, question=asked), visual, seen)
