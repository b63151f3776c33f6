"""A chain is told piece by piece as it is written, and the pieces are the chain."""

import pytest

from embervlm.model.streaming import ANSWER, CONCLUSION, STEP, Pieces

QUESTION = "Which robots are suited?"


def joined(pieces):
    """Place -> section and number -> text."""
    out: dict = {}
    for piece in pieces:
        section = out.setdefault(piece.place, {})
        key = (piece.section, piece.number)
        assert piece.begins == (key not in section)
        section[key] = section.get(key, "") + piece.text
    return out


def spelled(sections):
    steps = [("Conclusion: " if name == CONCLUSION else "") + text for (name, _), text in sections.items()]
    return [text for (name, _), text in zip(sections, steps) if name != ANSWER]


def test_the_pieces_of_a_batch_are_its_chains(lively_model, records):
    heard = []
    results = lively_model.generate_with_reasoning(
        [records[0].image, None, records[1].image],
        [QUESTION, "What flies?", QUESTION],
        temperature=1.5,
        seed=1,
        max_new_tokens=60,
        on_text=heard.append,
    )
    found = joined(heard)
    assert len(heard) > 10
    for place, result in enumerate(results):
        assert spelled(found.get(place, {})) == result["reasoning_steps"]
    assert any(result["reasoning_steps"] for result in results)


def test_a_direct_answer_is_one_section(lively_model, records):
    heard = []
    result = lively_model.generate_with_reasoning(
        records[0].image, QUESTION, form="direct", temperature=1.5, on_text=heard.append
    )
    assert "".join(piece.text for piece in heard) == result["text"] != ""
    assert {piece.section for piece in heard} == {ANSWER}


def test_half_a_character_waits_for_its_other_half(tokenizer):
    heard = []
    pieces = Pieces(tokenizer, heard.append)
    ids = [tokenizer.ids["<|step|>"], *tokenizer.encode(" a \u20ac b ")]
    pieces.all(0, [*ids, tokenizer.ids["<|reasoning_end|>"]])
    assert joined(heard) == {0: {(STEP, 1): "a \u20ac b"}}
    assert not any("\ufffd" in piece.text for piece in heard)


def test_the_steps_that_a_follow_up_keeps_are_told_first(lively_model, records, monkeypatch):
    from embervlm.model import interactive

    monkeypatch.setattr(interactive, "step_probabilities", lambda *given: [1.0] * len(given[4]))
    heard = []
    found = lively_model.reason(
        records[0].image, "And now?", previous_reasoning=["It is high.", "So it flies."], on_text=heard.append
    )
    assert spelled(joined(heard)[0]) == found["reasoning_steps"]
    assert "".join(piece.text for piece in heard).startswith("It is high.So it flies.")


@pytest.mark.parametrize("form", ["reasoning", "direct"])
def test_what_hears_a_token_can_end_the_writing(lively_model, records, form):
    class Gone(Exception):
        pass

    def leave(piece):
        raise Gone

    with pytest.raises(Gone):
        lively_model.generate_with_reasoning(records[0].image, QUESTION, form=form, temperature=1.5, on_text=leave)
