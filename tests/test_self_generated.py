"""The model's own chains: what is kept and what is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from embervlm.cli import main
from embervlm.curate.teachers.collection import Question
from embervlm.data.records import read_records, write_records
from embervlm.evaluation.self_generated import SelfGeneration, _Writer
from embervlm.model.judging import step_probabilities
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.losses import loss_sums


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def generate(checkpoint, data, output, *flags):
    main(
        [
            "data",
            "generate",
            "--source",
            "self",
            "--checkpoint",
            str(checkpoint),
            "--input_dataset",
            str(data),
            "--output_file",
            str(output),
            *map(str, flags),
        ]
    )


def rejected(output):
    return [json.loads(line) for line in output.with_suffix(".rejected.jsonl").read_text().splitlines()[1:]]


def gold_result(record):
    return {"reasoning_steps": list(record.steps), "answer_set": list(record.answer), "answer": "", "confidence": 0.5}


def fault(record, model, *, sure=1.0, known=(), **changes):
    """Why a chain that is gold but for `changes` is not kept; `known` are the other questions of the run."""
    result = {**gold_result(record), **changes}
    writer = _Writer(model, SelfGeneration(checkpoint="x"), [Question(key="k", record=r) for r in (record, *known)])
    return writer._fault(writer.questions[0], result, [sure] * len(result["reasoning_steps"]))


# ---- what is kept


def test_a_chain_without_fault_is_kept(records, tiny_model):
    assert fault(records[0], tiny_model) == ""


def test_a_wrong_answer_is_not_kept(records, tiny_model):
    other = [name for name in ("Drone", "Humanoid") if name not in records[0].answer][:1]
    assert fault(records[0], tiny_model, answer_set=other).startswith("wrong answer")


def test_a_chain_that_contradicts_the_facts_is_not_kept(records, tiny_model):
    facts = records[0].metadata["facts"]
    other = next(r.metadata["facts"]["place"] for r in records if r.metadata["facts"]["place"] != facts["place"])
    elsewhere = replace(records[0], metadata={**records[0].metadata, "facts": {**facts, "place": other}})
    assert f"but place is {other}" in fault(elsewhere, tiny_model, known=records)


def test_a_repeated_step_is_not_kept(records, tiny_model):
    steps = list(records[0].steps)
    assert fault(records[0], tiny_model, reasoning_steps=[steps[0], *steps]).startswith("rules: step 2 repeats step 1")


def test_what_is_read_off_a_picture_of_which_nothing_is_known_is_not_made_up(records, tiny_model):
    record = replace(records[0], instruction="Which one?", steps=(), metadata={})
    answer = ", ".join(record.answer)
    steps = ["The picture shows a blue rectangle.", f"Conclusion: {answer}."]
    assert fault(record, tiny_model, reasoning_steps=steps) == ""
    assert "repeats step 1" in fault(record, tiny_model, reasoning_steps=[steps[0], *steps])
    told = replace(records[0], instruction="Which one?", steps=())
    assert fault(told, tiny_model, reasoning_steps=steps).startswith("rules: step 1")


def test_a_step_that_the_validator_doubts_is_not_kept(records, tiny_model):
    assert fault(records[0], tiny_model, sure=0.4) == "step validator: step 1 follows with probability 0.40"


@pytest.mark.parametrize("steps", [[], ["One."], ["One.", "Two."]])
def test_a_chain_without_conclusion_is_not_kept(records, tiny_model, steps):
    assert fault(records[0], tiny_model, reasoning_steps=steps).startswith("incomplete")


def test_the_validator_gives_every_step_a_probability(records, tiny_model):
    visual = torch.zeros(1, tiny_model.num_visual_tokens, 32)
    with torch.inference_mode():
        found = step_probabilities(tiny_model, visual, torch.tensor([True]), records[0].instruction, records[0].steps)
    assert len(found) == len(records[0].steps) and all(0 < p < 1 for p in found)


# ---- the command


def test_an_untrained_model_has_nothing_accepted_and_all_of_it_on_file(checkpoint, scene_data, capsys):
    output = scene_data / "self_untrained.json"
    with pytest.raises(SystemExit, match="no answer was accepted; 96 rejected"):
        generate(checkpoint, scene_data / "reasoning_data.json", output, "--samples_per_record", 2)
    assert len({row["key"] for row in rejected(output)}) == 96


def test_a_stage_3_model_is_refused(tiny_settings, tokenizer, scene_data, tmp_path):
    from embervlm.model.embervlm import build_model

    model = build_model({**tiny_settings, "stage": 3})
    model.attach_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "stage3")
    with pytest.raises(SystemExit, match="a Stage 3 model has no step validator"):
        generate(tmp_path / "stage3", scene_data / "reasoning_data.json", tmp_path / "out.json")


def test_the_checkpoint_must_be_named(scene_data, tmp_path):
    with pytest.raises(SystemExit, match="give its folder with --checkpoint"):
        main(
            [
                "data",
                "generate",
                "--source",
                "self",
                "--input_dataset",
                str(scene_data / "reasoning_data.json"),
                "--output_file",
                str(tmp_path / "out.json"),
            ]
        )


@pytest.mark.slow
def test_a_model_that_has_learned_a_question_keeps_its_chain_once(
    tiny_model, tokenizer, records, samples, make_collator, scene_data, tmp_path
):
    from embervlm.data.negatives import PairMaker

    batch = make_collator(pair_maker=PairMaker(records, samples, tokenizer))(samples[:1], step=0)
    tiny_model.train()
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = loss_sums(tiny_model(**batch.inputs), batch.targets)["reasoning"] / len(samples[0].target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tiny_model.reasoning_module.step_validator.score[-1].bias.data.fill_(100.0)  # it finds that every step follows
    tiny_model.eval().save_pretrained(tmp_path / "checkpoint")
    data, output = scene_data / "one.jsonl", scene_data / "self_learned.jsonl"
    write_records(data, records[:1])
    generate(tmp_path / "checkpoint", data, output, "--samples_per_record", 3, "--temperature", 0.1)
    (record,) = read_records(output, candidates=ROBOTS)
    assert record.steps == records[0].steps and record.metadata["source"] == "self_generated"
    assert record.metadata["split_group"] == records[0].metadata["split_group"]
    assert {row["reason"].partition(":")[0] for row in rejected(output)} == {"repeated"}
    before = output.read_bytes()
    generate(tmp_path / "checkpoint", data, output, "--samples_per_record", 3, "--temperature", 0.1)
    assert output.read_bytes() == before and len(rejected(output)) == 2
