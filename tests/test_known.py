"""A model says that it does not know: the question, the picture, or that there is none."""

import dataclasses

import numpy as np
import pytest
import torch

from embervlm import run_dir
from embervlm.config import ConfigError
from embervlm.errors import UserError
from embervlm.evaluation import known as fitting
from embervlm.evaluation.eval_data import Evaluation
from embervlm.evaluation.evaluate import evaluate
from embervlm.evaluation.known import KnownData, fit_known
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.known import (
    NO_PICTURE,
    NO_PICTURE_WANTED,
    UNLIKE_PICTURE,
    UNLIKE_QUESTION,
    Known,
    known_path,
    read_known,
    settled,
)
from embervlm.run.export import export

QUESTIONS = [
    f"{verb} the load to the {place}. Which robots are suited?"
    for verb in ("Carry", "Take", "Bring", "Deliver")
    for place in ("flag", "gate", "pump")
]
NOISE = np.random.default_rng(0).integers(0, 256, size=(36, 36, 3), dtype=np.uint8)
OFF = ("What is 2+2?", "Who wrote Hamlet?", "is there a red triangle in the image?", "Sort 9, 3, 7 and 1.")


def tokens(count, seed=0, centre=0.0):
    """Pictures of four tokens of eight numbers each."""
    return centre + torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(seed))


def fitted(share=1.0, pictures=200):
    return Known.fit(tokens(pictures), tokens(pictures // 2, seed=1), QUESTIONS, QUESTIONS[:5], share)


def verdict(known, question=QUESTIONS[0], visual=None, has_one=True):
    visual = tokens(1, seed=2) if visual is None else visual
    return known.of(visual, torch.tensor([has_one]), [question])[0]


def test_a_question_of_training_is_known_and_one_about_something_else_is_not():
    known = fitted()
    assert verdict(known)[0] > 0.5
    for question in OFF:
        found, why = verdict(known, question)
        assert found < 0.01 and why == UNLIKE_QUESTION, question


def test_a_few_questions_of_a_form_of_their_own_do_not_open_the_door_to_any_other():
    """Of bar charts: 64 questions differ in their colors alone, four have no color and stand alone."""
    colors = ("red", "blue", "green", "gray", "black", "purple", "orange", "yellow")
    pairs = [(a, b) for a in colors for b in colors if a != b]
    asked = [f"Is the {a} bar taller than the {b} one?" for a, b in pairs]
    asked += [f"What is the value of the {color} bar?" for color in colors]
    lone = ["Which bar is tallest?", "How many bars are there?", "List the colors above 5.", "Name the lowest one."]
    known = Known.fit(tokens(200), tokens(100, seed=1), [*asked, *lone], asked[:20], 1.0)
    for question in OFF:
        assert verdict(known, question)[0] < 0.5, question
    for question in ("Is the red bar higher than the blue one?", "Which bar is the tallest one?"):
        assert verdict(known, question)[0] >= 0.5, question


def test_another_wording_is_known_where_it_shares_most_of_its_words_with_one_of_training():
    known = fitted()
    for question in ("Please carry the load over to the flag. Which robots are suited?", "Take the load to the pump!"):
        assert verdict(known, question)[0] > 0.5, question


@pytest.mark.parametrize("strange", [*OFF, "And at night?", "Why?"])
def test_a_strange_follow_up_is_unknown_behind_a_known_question(strange):
    known = Known.fit(
        tokens(200), tokens(100, seed=1), [*QUESTIONS, "Carry the load. Which robots? And the gate?"], QUESTIONS[:5], 1
    )
    visual, seen = tokens(1, seed=2), torch.tensor([True])
    (together,) = known.of(visual, seen, [f"{QUESTIONS[0]} {strange}"])
    (followed,) = known.of(visual, seen, [f"{QUESTIONS[0]} {strange}"], [strange])
    assert together[0] > 0.1 > followed[0] and followed[1] == UNLIKE_QUESTION
    (again,) = known.of(visual, seen, [f"{QUESTIONS[0]} {QUESTIONS[1]}"], [QUESTIONS[1]])
    assert again[0] > 0.5
    (trained,) = known.of(visual, seen, ["Carry the load. Which robots? And the gate?"], ["And the gate?"])
    assert trained[0] == 1, "training had both together"


def test_a_picture_unlike_those_of_training_is_told_and_no_more_than_a_few_of_theirs_are():
    known = fitted()
    found, why = verdict(known, visual=tokens(1, centre=4.0))
    assert found < 1e-6 and why == UNLIKE_PICTURE
    new = known.of(tokens(300, seed=3), torch.ones(300, dtype=torch.bool), QUESTIONS[:1] * 300)
    assert np.mean([share < 0.5 for share, _ in new]) <= 0.04


def test_an_empty_picture_is_unknown_though_each_of_its_tokens_is_one_of_training():
    pictures = tokens(200)
    known = Known.fit(pictures, tokens(100, seed=1), QUESTIONS, QUESTIONS[:5], 1.0)
    background = pictures[:, :1].repeat(1, 4, 1)  # of each picture one token, everywhere
    for empty in background[:20]:
        assert known.picture_distances(empty[None]) < known.picture_distances(tokens(1, seed=2))
        found, why = verdict(known, visual=empty[None])
        assert found < 1e-6 and why == UNLIKE_PICTURE


def test_a_file_of_before_knows_no_empty_pictures(tmp_path):
    known = fitted()
    old = dataclasses.replace(known, scales=known.scales[:2])
    old.save(tmp_path)
    empty = tokens(1, seed=2)[:, :1].repeat(1, 4, 1)
    assert verdict(read_known(tmp_path), visual=empty) == verdict(old, visual=empty)
    assert verdict(known, visual=empty)[0] < 1e-6


def test_the_farther_a_picture_is_the_less_it_is_known():
    found = [verdict(fitted(), visual=tokens(1, centre=far))[0] for far in (0.5, 1.0, 1.5, 2.0, 4.0)]
    assert found == sorted(found, reverse=True) and len(set(found)) == 5


def test_a_missing_picture_is_unknown_only_where_training_had_one():
    assert verdict(fitted(), has_one=False) == (0.0, NO_PICTURE)
    assert verdict(fitted(share=0.9), has_one=False)[0] > 0.5
    without = Known.fit(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), QUESTIONS, QUESTIONS[:5], 0.0)
    assert verdict(without, has_one=False)[0] > 0.5
    assert verdict(without) == (0.0, NO_PICTURE_WANTED)


def test_what_was_fitted_comes_back_from_its_file_and_a_damaged_file_is_named(tmp_path):
    known = fitted()
    known.save(tmp_path)
    read = read_known(tmp_path)
    asked = (tokens(3, seed=5), torch.tensor([True, False, True]), [QUESTIONS[0], OFF[0], "Carry a cat to the flag."])
    assert read.of(*asked) == known.of(*asked)
    assert read_known(tmp_path / "never evaluated") is None
    known_path(tmp_path).write_bytes(b"{}")
    with pytest.raises(UserError, match="known.safetensors: damaged .*evaluate again"):
        read_known(tmp_path)


# ---- what a user gets


def result(**changes):
    written = {"answer": "Drone", "answer_set": ["Drone"], "text": "Drone", "confidence": 0.8, "cut_off": None}
    return written | changes


def test_below_the_threshold_the_answer_is_none_with_a_reason_and_what_was_written_stays():
    ((sure, unsure),) = [settled([result(), result()], [(0.9, UNLIKE_PICTURE), (0.2, UNLIKE_QUESTION)], 0.5)]
    assert (sure["answer"], sure["why"], sure["known"]) == ("Drone", None, 0.9)
    assert (unsure["answer"], unsure["why"]) == (None, UNLIKE_QUESTION)
    assert unsure["answer_set"] == ["Drone"] and unsure["text"] == "Drone"
    assert [sure["confidence"], unsure["confidence"]] == pytest.approx([0.72, 0.16])
    assert f"{unsure['confidence']:.2%}" == "16.00%"
    assert settled([result()], [(0.2, UNLIKE_QUESTION)], 0.0)[0]["answer"] == "Drone"


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ({"text": "", "cut_off": "tokens"}, "The text was cut off by max_new_tokens before it came to an answer."),
        ({"text": ""}, "The model wrote no answer."),
        ({"text": "Robot"}, 'The model wrote "Robot", which is none of its answers.'),
    ],
)
def test_an_answer_is_never_empty(written, why):
    (found,) = settled([result(answer=written["text"], answer_set=[], confidence=0.0, **written)], None, 0.5)
    assert found["answer"] is None and found["why"] == why and found["known"] is None


@pytest.fixture(scope="module")
def kept(records):
    """Training and val records: enough of both."""
    return KnownData.of(records, (records * 20)[:40])


def test_a_model_refuses_what_it_was_not_trained_on_and_answers_when_told_to(lively_model, kept, records):
    picture, question = records[0].image, records[0].instruction
    ask = {"max_new_tokens": 24}
    plain = lively_model.generate_with_reasoning(picture, question, **ask)
    assert plain["known"] is None
    lively_model.known = fit_known(lively_model, kept)
    off = lively_model.generate_with_reasoning(picture, "What is 2+2?", **ask)
    assert off["answer"] is None and off["why"] == UNLIKE_QUESTION and off["confidence"] < 0.01
    assert lively_model.generate_with_reasoning(None, question, **ask)["why"] == NO_PICTURE
    assert lively_model.generate_with_reasoning(NOISE, question, **ask)["why"] == UNLIKE_PICTURE
    found = lively_model.generate_with_reasoning(picture, question, **ask)
    assert found["known"] > 0.5 and found["answer_set"] == plain["answer_set"]
    told = lively_model.generate_with_reasoning(picture, "What is 2+2?", min_known=0, **ask)
    assert told["why"] != UNLIKE_QUESTION and told["known"] == off["known"]


def test_the_reasoning_object_says_so_too(lively_model, kept, records):
    lively_model.known = fit_known(lively_model, kept)
    found = lively_model.generate_reasoning(records[0].image, "Who wrote Hamlet?", max_new_tokens=24)
    assert found.answer is None and found.why == UNLIKE_QUESTION and found.known < 0.5
    again = lively_model.reason(records[0].image, "Who wrote Hamlet?", max_new_tokens=24)
    assert again["answer"] is None and again["why"] == UNLIKE_QUESTION


def test_a_strange_follow_up_gets_no_answer(lively_model, kept, records):
    lively_model.known = fit_known(lively_model, kept)
    first = lively_model.reason(records[0].image, records[0].instruction, max_new_tokens=80)
    assert first["why"] != UNLIKE_QUESTION
    second = lively_model.reason(records[0].image, "Who wrote Hamlet?", first["reasoning"], max_new_tokens=80)
    assert second["answer"] is None and second["why"] == UNLIKE_QUESTION


def test_a_threshold_that_is_no_share_is_refused():
    with pytest.raises(ConfigError, match=r"min_known: 2 is not in \[0, 1\]"):
        Decoding(min_known=2)


# ---- where it comes from


def test_too_few_val_records_say_nothing():
    assert KnownData.of([], []) is None


def test_an_evaluation_leaves_the_file_takes_answers_as_written_and_an_export_takes_the_file_along(
    lively_model, scene_data, tmp_path, monkeypatch
):
    data = scene_data / "reasoning_data.json"
    part = run_dir.new_tmp_dir(tmp_path)
    lively_model.save_pretrained(part)
    run_dir.write_json_atomic(part / "state.json", {"step": 7, "settings": {"config": {"reasoning_data": str(data)}}})
    checkpoint = run_dir.publish_checkpoint(part, run_dir.checkpoint_path(tmp_path, 7), step=7)

    def asked(**options):
        decoding = Decoding(max_new_tokens=8)
        return evaluate(Evaluation(checkpoint=checkpoint, compare=False, decoding=decoding, num_samples=4, **options))

    monkeypatch.setattr(fitting, "MIN_VAL", 1)
    without, _ = asked(progress=False)
    assert EmberVLM.from_pretrained(checkpoint).known is not None
    with_it, samples = asked(progress=False)
    assert with_it["metrics"] == without["metrics"] and "why" not in samples[0]
    export(str(checkpoint), tmp_path / "exported")
    assert EmberVLM.from_pretrained(tmp_path / "exported").known is not None


def test_data_that_a_user_gives_for_an_evaluation_replace_nothing(lively_model, kept, tmp_path):
    fitting.keep_known(lively_model, tmp_path, kept, of_training=False)
    first = known_path(tmp_path).read_bytes()
    other = KnownData(kept.pictures, ["Something else?"], kept.val, 0.5)
    fitting.keep_known(lively_model, tmp_path, other, of_training=False)
    assert known_path(tmp_path).read_bytes() == first
    fitting.keep_known(lively_model, tmp_path, other, of_training=True)
    assert known_path(tmp_path).read_bytes() != first
