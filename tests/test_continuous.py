"""Texts that join others half-way are what they are alone."""

from __future__ import annotations

import dataclasses

import pytest

from embervlm.model import writer
from embervlm.model.continuous import Together, begin
from embervlm.model.decoding import Decoding


def asked_of(model, records):
    """Arguments of `begin`: with and without picture, greedy and drawn, long and short, one and several chains."""
    settings = [
        Decoding(max_new_tokens=30),
        Decoding(max_new_tokens=12, temperature=1.5, seed=4),
        Decoding(max_new_tokens=25, temperature=1.2, top_p=0.8, seed=5, num_chains=3),
        Decoding(max_new_tokens=40, max_reasoning_steps=2),
    ]
    out = []
    for index, record in enumerate(records[:12]):
        question = "Fly." if index % 5 == 1 else record.instruction * (1 + index % 3)
        out.append((model, None if index % 4 == 2 else record.image, question, settings[index % 4]))
    return out


def told(result):
    found = {**result, "confidence": round(result["confidence"], 4)}
    found["answer_tokens"] = [(text, round(p, 4)) for text, p in result["answer_tokens"]]
    found["head_probabilities"] = {name: round(p, 4) for name, p in result["head_probabilities"].items()}
    return found


def write(together, rounds):
    for _ in range(rounds):
        together.advance()


@pytest.mark.parametrize("own_step", [True, False], ids=["a step of our own", "the backbone called as it is"])
def test_texts_that_join_half_way_are_what_they_are_alone(own_step, lively_model, records, monkeypatch):
    model = lively_model
    if not own_step:
        config, plain = model.language_model.backbone.config, writer.language_step

        def called_as_it_is(language_model, room):
            with monkeypatch.context() as patch:
                patch.setattr(config, "_attn_implementation", "eager")
                return plain(language_model, room)

        monkeypatch.setattr(writer, "language_step", called_as_it_is)
    alone = []
    for arguments in asked_of(model, records):
        together, one = Together(), begin(*arguments)
        together.add([one])
        while not one.done:
            together.advance()
        alone.append([told(result) for result in one.results()])
    together, everyone = Together(), []
    for index, arguments in enumerate(asked_of(model, records)):
        everyone.append(begin(*arguments))
        if index % 3 != 1:  # the second of each three waits for the third
            together.add(everyone[-2:] if index % 3 == 2 else everyone[-1:])
        write(together, 7)
    while together.num_rows:
        together.advance()
    assert [[told(result) for result in one.results()] for one in everyone] == alone
    assert sum(result["num_tokens"] for results in alone for result in results) > 150


def test_a_text_alone_is_what_generate_with_reasoning_gives(lively_model, records):
    record = records[3]
    together, one = Together(), begin(lively_model, record.image, record.instruction, Decoding(max_new_tokens=50))
    together.add([one])
    while not one.done:
        together.advance()
    (found,) = one.results()
    given = lively_model.generate_with_reasoning(record.image, record.instruction, max_new_tokens=50)
    assert {name: found[name] for name in given} == given
    assert len(found["answer_tokens"]) <= found["num_answer_tokens"] <= found["num_tokens"]


def test_who_gives_up_leaves_the_others_alone(lively_model, records):
    settings = Decoding(max_new_tokens=40)
    together = Together()
    one, other = (begin(lively_model, r.image, r.instruction, settings) for r in records[:2])
    together.add([one, other])
    write(together, 3)
    one.give_up()
    while not other.done:
        together.advance()
    given = lively_model.generate_with_reasoning(records[1].image, records[1].instruction, max_new_tokens=40)
    assert other.results()[0]["text"] == given["text"] and len(one.writer.everyone[0].ids) <= 4


def test_a_follow_up_is_what_reason_gives_and_votes_are_counted(lively_model, records, monkeypatch):
    from embervlm.model import interactive

    monkeypatch.setattr(interactive, "step_probabilities", lambda *given: [1.0] * len(given[4]))
    before = ["It is high.", "So it flies."]
    settings = Decoding(max_new_tokens=20, num_chains=3, seed=2)
    together, one = Together(), begin(lively_model, records[0].image, "And now?", settings, before)
    assert one.kept_steps == before
    together.add([one])
    while together.num_rows:
        together.advance()
    (found,) = one.results(elect=True)
    given = lively_model.reason(records[0].image, "And now?", before, **dataclasses.asdict(settings))
    assert (found["reasoning_steps"], found["num_chains"]) == (given["reasoning_steps"], 3)
    assert "votes" in found and Together().num_rows == 0
