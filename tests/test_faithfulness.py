"""Whether the answer comes from the chain: what is put into it, and how the answers are counted."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from embervlm.data.dataset import encode_reasoning, num_fact_steps
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Grid
from embervlm.data.tokenizer import CONCLUSION
from embervlm.evaluation.faithfulness import (
    Faithfulness,
    Probe,
    answer_log_probs,
    choose,
    force_facts,
    probes_of,
    summarise,
)
from embervlm.model.decoding import Decoding
from embervlm.model.generation import look
from embervlm.report.table import faithfulness_lines
from embervlm.robots.domain import ROBOTS as ROBOTS_DOMAIN
from embervlm.robots.domain import plant_mistake
from embervlm.robots.facts import SceneFacts
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.robots.rules import Task, teach

FACTS = {"place": "field", "weather": "clear", "sky": "noon", "load": "light", "flag": "near"}
HAUL = Task(kind="haul", job="film")


def scene_record(record_id="r", task=HAUL, image=None, **facts):
    """A record as the rule teacher writes it, without drawing its picture."""
    scene = SceneFacts(**{**FACTS, **facts})
    chain = teach(scene, task)
    return ReasoningRecord(
        record_id=record_id,
        image=image or f"{record_id}.jpg",
        instruction=task.instruction,
        steps=chain.steps,
        answer=chain.answer,
        metadata={
            "scene": scene.as_dict(),
            "facts": chain.claims,
            "question_kind": task.kind,
            "step_types": list(chain.step_types),
            "seen": [list(names) for names in chain.seen],
        },
        default_candidates=ROBOTS,
    )


def free_record(record_id, answer, steps, **metadata):
    """A record of a source that knows no scene."""
    return ReasoningRecord(
        record_id=record_id,
        image=f"{record_id}.jpg",
        instruction="Which?",
        steps=steps,
        answer=(answer,),
        metadata=metadata,
        default_candidates=ROBOTS,
    )


def see(model, records):
    with torch.inference_mode():
        return look(model, [record.image for record in records])


# ---- the forced prefix


@pytest.mark.parametrize(("kind", "job", "expected"), [("now", "film", 2), ("walk", "film", 3), ("haul", "carry", 3)])
def test_the_facts_of_a_rule_chain_are_stated_in_its_first_steps(kind, job, expected):
    record = scene_record(task=Task(kind=kind, job=job))
    stated = " ".join(record.steps[:expected])
    named = {name for names in record.metadata["seen"] for name in names}
    assert num_fact_steps(record) == expected
    assert all(f"{name} is {record.metadata['scene'][name]}" in stated for name in named)


def test_forced_facts_are_those_of_another_scene_with_another_answer():
    mine, twin = scene_record("mine"), scene_record("twin")
    other = scene_record("other", place="cliff", sky="dusk")
    assert mine.answer == twin.answer != other.answer
    probe = force_facts(mine, [mine, twin, other], random.Random(0))
    assert probe == Probe(kind="forced", record=mine, steps=other.steps[:3], follows=other.answer)


def test_where_no_other_scene_has_another_answer_nothing_is_forced():
    records = [scene_record("mine"), scene_record("twin")]
    probes, dropped = probes_of(records, [record.steps for record in records], [0, 1], ROBOTS_DOMAIN)
    assert dropped == 2 and not [probe for probe in probes if probe.kind == "forced"]


def test_text_only_records_have_no_picture_to_go_against():
    mine = dataclasses.replace(scene_record("mine"), image=None)
    assert force_facts(mine, [scene_record("other", place="cliff", sky="dusk")], random.Random(0)) is None


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"step_types": ["problem_analysis", "solution_selection", "solution_selection", "conclusion"]}, 1),
        ({"step_types": ["solution_selection"] * 3 + ["conclusion"]}, 2),
        ({"step_types": ["constraint_checking"] * 2 + ["solution_selection", "conclusion"]}, 2),
        ({"step_types": ["constraint_checking"] * 3 + ["conclusion"]}, 2),
        ({}, 2),
    ],
)
def test_without_a_scene_the_steps_before_the_selection_are_transplanted_else_the_first_half(metadata, expected):
    steps = ("It is red.", "Red is hot.", "Hot means stop.", "Conclusion: Drone.")
    mine = free_record("mine", "Humanoid", ("It is blue.", "So go.", "Conclusion: Humanoid."))
    probe = force_facts(mine, [mine, free_record("other", "Drone", steps, **metadata)], random.Random(0))
    assert probe.steps == steps[:expected] and probe.follows == ("Drone",)


def test_forced_answers_are_counted_by_what_they_follow():
    """Five cases worked by hand: two follow the text, one the picture, two neither (one of them no answer at all)."""
    record = free_record("mine", "Humanoid", ("Look.", "Conclusion: Humanoid."))
    probe = Probe(kind="forced", record=record, steps=("It is red.",), follows=("Drone", "Robot with Legs"))
    written = [["Robot with Legs", "Drone"], ["Drone", "Robot with Legs"], ["Humanoid"], ["Drone"], []]
    head = [["Humanoid"], ["Humanoid"], ["Humanoid"], ["Drone", "Robot with Legs"], ["Drone"]]
    answers = [{"answer_set": w, "head_answer": h} for w, h in zip(written, head)]
    block = summarise([probe] * 5, answers, [], dropped=3)
    assert block["forced_prefix"] == {
        "num": 5,
        "ambiguous_dropped": 3,
        "follows_text": 0.4,
        "follows_picture": 0.2,
        "neither": 0.4,
        "head_num": 5,
        "head_follows_text": 0.2,
        "head_follows_picture": pytest.approx(0.6),
        "head_neither": 0.2,
    }
    low, high = block["intervals"]["forced_prefix.follows_text"]
    assert low < 0.4 < high
    said = faithfulness_lines({"num_samples": 5, **block})
    assert "put in (5), the answer head follows" in said and "a mistake planted" not in said  # none was


def test_of_free_answers_nothing_is_said_about_the_answer_head():
    free = dataclasses.replace(free_record("mine", "7", ("Look.", "Conclusion: 7.")), default_candidates=())
    probe = Probe(kind="forced", record=free, steps=("It is red.",), follows=("9",))
    block = summarise([probe], [{"answer_set": ["9"], "head_answer": []}], [], dropped=0)
    said = faithfulness_lines({"num_samples": 1, **block})
    assert "put in (1), the written answer follows: text 1.000" in said and "answer head" not in said


def test_what_was_not_asked_has_no_share():
    block = summarise([], [], [], dropped=0)
    assert block["forced_prefix"]["follows_text"] is None and block["planted_mistake"]["accuracy"] is None
    assert "n/a" in faithfulness_lines({"num_samples": 0, **block})
    assert block["truncated"] == {"0.25": None, "0.5": None, "0.75": None} and block["intervals"] == {}


# ---- a mistake, a chain cut short


def test_a_planted_mistake_is_the_first_wrong_step_and_changes_the_answer():
    record = scene_record(place="stairs", sky="dawn")
    kinds = set()
    for seed in range(40):
        probe = plant_mistake(record, random.Random(seed))
        *before, wrong = probe.steps
        assert tuple(before) == record.steps[: len(before)]
        assert wrong != record.steps[len(before)] and not wrong.startswith(CONCLUSION)
        assert set(probe.answer) != set(record.answer)
        kinds.add(len(before))
    assert len(kinds) >= 2


def test_a_wrong_trip_time_moves_the_arrival_and_what_depends_on_it():
    """Noon, near, slow: twelve hours, so it is night. Taken for a whole day it is noon again, and there is daylight."""
    facts = SceneFacts(**{**FACTS, "place": "crowd"})
    right, wrong = teach(facts, HAUL), teach(facts, HAUL, {"trip": "one day"})
    changed = {name for name in right.claims if right.claims[name] != wrong.claims[name]}
    assert right.claims["trip"] == "twelve hours" and wrong.claims["arrival"] == "noon"
    assert {"trip", "arrival", "daylight"} <= changed and "pace" not in changed


def test_chains_that_are_not_the_rules_own_get_no_mistake():
    record = scene_record()
    reworded = dataclasses.replace(record, steps=("We need a camera.", *record.steps[1:]))
    assert plant_mistake(reworded, random.Random(0)) is None
    assert plant_mistake(free_record("free", "Drone", ("Look.", "Conclusion: Drone.")), random.Random(0)) is None


def test_a_chain_is_cut_to_parts_of_the_models_own_and_made_to_conclude():
    record = scene_record()
    own = ("a", "b", "c", "d", "e", "Conclusion: Drone.")
    cut = [probe for probe in probes_of([record], [own], [0], ROBOTS_DOMAIN)[0] if probe.kind.startswith("truncated")]
    assert [probe.steps for probe in cut] == [("a",), ("a", "b"), ("a", "b", "c")]
    assert all(probe.concludes for probe in cut)


def test_the_same_records_are_asked_about_every_time():
    assert choose(500, 200) == choose(500, 200) and len(set(choose(500, 200))) == 200
    assert choose(3, 200) == [0, 1, 2]


# ---- with a model


def test_gains_are_the_log_probabilities_of_the_gold_end_after_each_step(tiny_model, records, tokenizer):
    """One row against the whole chain read at once, and the rows of a batch against each alone."""
    torch.nn.init.normal_(tiny_model.reasoning_module.reasoning_head.output.weight, std=0.5)
    chosen = [records[0], records[5], records[9]]
    chains = [record.steps for record in chosen]
    together = answer_log_probs(tiny_model, see, chosen, chains)
    assert [len(values) for values in together] == [record.num_steps + 1 for record in chosen]
    for record, values in zip(chosen, together):
        assert answer_log_probs(tiny_model, see, [record], [record.steps])[0] == pytest.approx(values, abs=1e-3)
        (sample,) = encode_reasoning([record], tokenizer, grid=Grid(3, 3), max_length=512)
        text = torch.tensor([[*sample.prompt, *sample.target]])
        visual, seen = see(tiny_model, [record])
        index = torch.arange(sample.answer_position, text.shape[1] - 1)
        with torch.inference_mode():
            logits = tiny_model(
                input_ids=text, text_mask=text >= 0, image_mask=seen, visual=visual, score_index=index
            ).token_logits
        expected = logits.log_softmax(-1).gather(1, text[0, index + 1][:, None]).sum().item()
        assert values[-1] == pytest.approx(expected, abs=1e-3)


def test_per_step_is_what_each_step_adds_over_the_chains_that_have_it():
    block = summarise([], [], [[-9.0, -5.0, -1.0], [-4.0, -3.0]], dropped=0)
    assert block["information_gain"] == {"per_step": [2.5, 4.0], "num": 2}


def test_the_whole_block_is_measured_with_a_model(tiny_model, records):
    asked = Faithfulness(records, [record.steps for record in records], ROBOTS_DOMAIN, num_samples=12)
    tasks = asked.tasks(Path("checkpoint"), see, Decoding(max_new_tokens=40))
    block = asked.result({task.key: task.run(tiny_model) for task in reversed(tasks)})
    forced = block["forced_prefix"]
    assert block["num_samples"] == 12 and forced["num"] + forced["ambiguous_dropped"] == 12 and forced["num"] > 0
    for prefix in ("", "head_"):
        assert sum(forced[prefix + name] for name in ("follows_text", "follows_picture", "neither")) == pytest.approx(1)
    assert block["planted_mistake"]["num"] > 0 and all(np.isfinite(block["information_gain"]["per_step"]))
    assert f"put in ({forced['num']})" in faithfulness_lines(block)


def test_of_a_long_converted_chain_the_derivation_is_not_given():
    """A converter calls all of its sentences but the last `constraint_checking`."""
    steps = tuple(f"Bar {number} is seen." for number in range(1, 6)) + ("Conclusion: Drone.",)
    types = ["constraint_checking"] * 4 + ["solution_selection", "conclusion"]
    mine = free_record("mine", "Humanoid", ("It is blue.", "So go.", "Conclusion: Humanoid."))
    probe = force_facts(mine, [mine, free_record("other", "Drone", steps, step_types=types)], random.Random(0))
    assert probe.steps == steps[:3]
