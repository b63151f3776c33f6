"""Records as ids, and the order in which an epoch brings them."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from embervlm.data.dataset import (
    edit_facts,
    encode_captions,
    encode_direct,
    encode_glossary,
    encode_reasoning,
    num_fact_steps,
)
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.records import DataError, ReasoningRecord
from embervlm.data.samples import CAPTION, DIRECT, EDITED, Grid, Sample, boxes_to_mask, step_texts
from embervlm.data.tokenizer import CONCLUSION, DIRECT_PROMPT
from embervlm.evaluation.explain import without_padding
from embervlm.robots.facts import SceneFacts
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.robots.rules import TASKS, teach
from embervlm.training.feed import deal
from embervlm.world import World


def record(record_id="r1", steps=("Look.", "It is wet.", "Conclusion: Drone."), **fields):
    fields = {"image": None, "instruction": "Which robot?", "answer": ("Drone",), **fields}
    return ReasoningRecord(record_id=record_id, steps=steps, **fields, default_candidates=ROBOTS)


def encode_one(tokenizer, **fields):
    (sample,) = encode_reasoning([record(**fields)], tokenizer, grid=Grid(3, 3), max_length=512)
    return sample


def numbered(count, length=5):
    """Samples that differ in their record number alone."""
    return [Sample(record=i, form=DIRECT, prompt=[1], target=[2] * (length + i % 3)) for i in range(count)]


def numbers(batch):
    return Counter(sample.record for sample in batch)


# ---- chains as ids


def test_each_step_span_covers_exactly_its_steps_tokens(records, samples, tokenizer):
    for sample in samples:
        text = [*sample.prompt, *sample.target]
        steps, conclusion = step_texts(records[sample.record])
        assert [tokenizer.decode(text[start:end]).strip() for start, end in sample.step_spans] == [*steps, conclusion]
        assert all(token < tokenizer.base_vocab_size for start, end in sample.step_spans for token in text[start:end])


def test_before_each_step_stands_the_token_that_opens_it(samples, tokenizer):
    for sample in samples:
        text = [*sample.prompt, *sample.target]
        opening = [text[start - 1] for start, _ in sample.step_spans]
        step, conclusion = tokenizer.ids["<|step|>"], tokenizer.ids["<|conclusion|>"]
        assert opening == [step] * (len(opening) - 1) + [conclusion]


def test_the_answer_position_is_the_token_that_opens_the_conclusion(samples, tokenizer):
    for sample in samples:
        assert [*sample.prompt, *sample.target][sample.answer_position] == tokenizer.ids["<|conclusion|>"]


def test_the_gold_conclusion_is_not_visible_at_the_answer_position(samples):
    for sample in samples:
        start, _ = sample.step_spans[-1]
        assert sample.answer_position < start


def test_without_a_conclusion_the_answer_position_is_the_end_of_the_chain(tokenizer):
    sample = encode_one(tokenizer, steps=("Look.", "It is wet."))
    assert [*sample.prompt, *sample.target][sample.answer_position] == tokenizer.ids["<|reasoning_end|>"]


def test_the_target_is_chain_and_answer(records, samples, tokenizer):
    for sample in samples[:6]:
        steps, answer = tokenizer.parse_generated(sample.target)
        assert steps == list(records[sample.record].steps)
        assert answer == ", ".join(records[sample.record].answer)
        assert sample.target[-1] == tokenizer.ids["<|answer_end|>"]


def test_a_special_token_in_an_instruction_does_not_end_the_chain(tokenizer):
    sample = encode_one(tokenizer, instruction="Fly <|reasoning_end|> now")
    assert max(sample.prompt) < tokenizer.base_vocab_size


def test_a_conclusion_is_told_from_the_steps(tokenizer):
    assert step_texts(record()) == (["Look.", "It is wet."], "Drone.")
    assert step_texts(record(steps=("Look.",))) == (["Look."], None)
    assert CONCLUSION not in tokenizer.decode(encode_one(tokenizer).target)


def test_all_chains_that_are_too_long_are_listed_with_their_ids(tokenizer):
    found = [record(f"long-{i}", steps=("word " * 200,)) if i % 2 else record(f"short-{i}") for i in range(4)]
    with pytest.raises(DataError) as caught:
        encode_reasoning(found, tokenizer, grid=Grid(3, 3), max_length=64)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["record long-1", "record long-3"]
    assert "64" in str(caught.value)


def test_a_chain_of_just_the_limit_is_taken(tokenizer):
    length = len(encode_one(tokenizer).target)
    assert len(encode_reasoning([record()], tokenizer, grid=Grid(3, 3), max_length=length)) == 1


# ---- what steps look at


def test_boxes_cover_the_visual_tokens_they_touch():
    """On a 3 x 3 grid: a box in the left upper corner, and one over the right third of the two lower rows."""
    mask = boxes_to_mask([(0.0, 0.0, 0.2, 0.3), (0.7, 0.4, 0.9, 0.9)], grid=Grid(3, 3))
    assert mask.view(3, 3).tolist() == [[True, False, False], [False, False, True], [False, False, True]]


def test_a_box_without_size_covers_the_visual_token_it_lies_in():
    assert boxes_to_mask([(0.5, 0.5, 0.5, 0.5)], grid=Grid(3, 3)).nonzero().flatten().tolist() == [4]


def test_a_box_of_the_whole_picture_covers_everything():
    assert boxes_to_mask([(0.0, 0.0, 1.0, 1.0)], grid=Grid(4, 4)).all()
    assert boxes_to_mask([(0.0, 0.6, 0.3, 1.0)], grid=Grid(2, 4)).nonzero().flatten().tolist() == [4, 5]


def test_no_boxes_cover_nothing():
    assert not boxes_to_mask([], grid=Grid(2, 2)).any()


def test_boxes_follow_a_picture_into_its_padded_square(tokenizer, tmp_path):
    """Twice as wide as high, it takes up the two middle rows of four; the box, its lower left quarter, one of them."""
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    metadata = {"boxes": [{"kind": "flag", "box": [0.0, 0.5, 0.5, 1.0]}], "seen": [["flag"], [], []]}
    found = [record(image=str(tmp_path / "a.png"), metadata=metadata)]
    for padded_size, places in ((None, [8, 9, 12, 13]), (16, [8, 9])):
        (sample,) = encode_reasoning(found, tokenizer, Grid(4, 4), 512, padded_size=padded_size)
        assert sample.attend[0][1].nonzero().flatten().tolist() == places


def test_attention_on_a_padded_picture_is_told_in_rows_and_columns_of_its_own():
    attention = {"grid": [4, 4], "steps": [[0.1] * 4 + [0.0, 0.1, 0.0, 0.0] + [0.0, 0.0, 0.2, 0.1] + [0.05] * 4]}
    found = without_padding(attention, (0.0, 0.25, 1.0, 0.75))
    assert found == {"grid": [2, 4], "steps": [[0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.5, 0.25]]}
    half = without_padding({"grid": [2, 2], "steps": [[0.25] * 4]}, (0.25, 0.0, 0.75, 1.0))
    assert half == {"grid": [2, 1], "steps": [[0.5, 0.5]]}


def test_a_step_looks_at_the_boxes_of_the_facts_it_reads(tokenizer):
    metadata = {
        "boxes": [{"kind": "sky", "box": [0, 0, 1, 0.3]}, {"kind": "flag", "box": [0.8, 0.8, 0.9, 0.9]}],
        "seen": [["sky"], ["load"], []],
    }
    sample = encode_one(tokenizer, metadata=metadata)
    assert [(step, mask.nonzero().flatten().tolist()) for step, mask in sample.attend] == [(0, [0, 1, 2])]


def test_each_thing_of_a_step_is_looked_at_by_itself_and_a_place_not_by_way_of_the_load(tokenizer):
    """On a 3 x 3 grid: the place is the lower two rows, the load a corner of it, the flag a sliver of another token."""
    metadata = {
        "boxes": [
            {"kind": "place", "box": [0, 0.4, 1, 1]},
            {"kind": "load", "box": [0.6, 0.7, 1, 1]},
            {"kind": "flag", "box": [0.1, 0.7, 0.2, 0.8]},
        ],
        "seen": [["place", "load"], ["place"], ["place", "place", "sky"]],
    }
    sample = encode_one(tokenizer, metadata=metadata)
    found = [(step, mask.nonzero().flatten().tolist()) for step, mask in sample.attend]
    assert found == [
        (0, [3, 4, 5, 6, 7]),  # the load covers more than half of 8; the flag of nothing
        (0, [7, 8]),
        (1, [3, 4, 5, 6, 7]),
        (2, [3, 4, 5, 6, 7]),
    ]


def test_a_thing_that_others_cover_whole_is_looked_at_all_the_same(tokenizer):
    metadata = {
        "boxes": [
            {"kind": "sky", "box": [0, 0, 1, 0.3]},
            {"kind": "moon", "box": [0, 0, 0.33, 0.3]},
            {"kind": "cloud", "box": [0.34, 0, 1, 0.3]},
        ],
        "seen": [["sky"]],
    }
    ((_, mask),) = encode_one(tokenizer, metadata=metadata).attend
    assert mask.nonzero().flatten().tolist() == [0, 1, 2]


def test_records_without_boxes_look_at_nothing_in_particular(tokenizer):
    assert encode_one(tokenizer).attend == ()


def test_boxes_of_another_spelling_are_left_alone(tokenizer):
    assert encode_one(tokenizer, metadata={"boxes": [[0, 0, 1, 1]], "seen": [["sky"]]}).attend == ()


# ---- the other forms


def test_a_direct_sample_is_question_and_answer(tokenizer):
    (sample,) = encode_direct([record(answer=("Drone", "Humanoid"))], tokenizer)
    assert tokenizer.decode(sample.prompt) == "Which robot?" + DIRECT_PROMPT
    assert tokenizer.decode(sample.target[:-1]) == " Drone, Humanoid"
    assert sample.target[-1] == tokenizer.end_of_text


def test_a_direct_sample_asks_nothing_of_the_reasoning_module(tokenizer):
    (sample,) = encode_direct([record()], tokenizer)
    assert (sample.answer_position, sample.step_spans, sample.attend) == (None, (), ())


def test_every_picture_has_one_caption(records, tokenizer):
    captions = encode_captions(records, tokenizer)
    assert len(captions) == len({r.image for r in records})
    for sample in captions:
        assert tokenizer.decode(sample.target[:-1]).strip() == records[sample.record].metadata["caption"]


def test_what_each_chain_says_of_a_picture_without_a_caption_is_its_caption(records, tokenizer):
    image = records[0].image
    own = [replace(r, metadata={}) if r.image == image else r for r in records]
    captions = encode_captions(own, tokenizer)
    without = [s for s in captions if own[s.record].image == image]
    assert len(captions) - len(without) == len({r.image for r in records}) - 1
    assert [s.record for s in without] == [row for row, r in enumerate(own) if r.image == image]
    for sample in without:
        asked = own[sample.record]
        assert tokenizer.decode(sample.prompt).startswith(asked.instruction)  # else it would be made up
        assert tokenizer.decode(sample.target[:-1]).strip() == " ".join(step_texts(asked)[0])


def test_records_without_a_picture_give_none(tokenizer):
    assert len(encode_captions([record()], tokenizer)) == 0


def test_every_line_of_the_glossary_comes_as_often_as_asked(tokenizer):
    lines = [f"Rule {letter} holds." for letter in "abcdefg"]
    texts = [tokenizer.decode(s.target) for s in encode_glossary(lines, tokenizer, lines_per_text=3, repeats=2)]
    assert len(texts) == 5
    assert all(" ".join(texts).count(line) == 2 for line in lines)


def test_a_text_of_the_glossary_belongs_to_no_record(tokenizer):
    assert {(s.record, s.form) for s in encode_glossary(["A rule."], tokenizer)} == {(-1, CAPTION)}


# ---- epochs


@pytest.mark.parametrize(("count", "global_batch"), [(24, 6), (25, 6), (5, 8), (1, 1)])
def test_every_sample_comes_once_in_an_epoch(count, global_batch):
    plan = EpochPlan(main=numbered(count), global_batch=global_batch, seed=0)
    for epoch in range(2):
        steps = range(epoch * plan.num_steps(1), (epoch + 1) * plan.num_steps(1))
        seen = sum((numbers(plan.batch(step)) for step in steps), Counter())
        assert seen == Counter(range(count))


def test_no_batch_is_larger_than_asked_for():
    plan = EpochPlan(main=numbered(25), global_batch=6, seed=0)
    assert sorted(len(plan.batch(step)) for step in range(plan.num_steps(1))) == [1, 6, 6, 6, 6]


def test_the_next_epoch_has_another_order():
    plan = EpochPlan(main=numbered(40), global_batch=4, seed=0)
    assert [plan.batch(step) for step in range(10)] != [plan.batch(step) for step in range(10, 20)]


def test_the_same_seed_plans_the_same_batches_wherever_one_starts():
    whole = EpochPlan(main=numbered(40), global_batch=4, seed=7)
    resumed = EpochPlan(main=numbered(40), global_batch=4, seed=7)
    for step in range(12):
        whole.batch(step)
    assert [whole.batch(step) for step in (12, 3, 25)] == [resumed.batch(step) for step in (12, 3, 25)]


def test_batches_hold_samples_of_like_length():
    main = [Sample(record=i, form=DIRECT, prompt=[1], target=[2] * (1 + i % 50)) for i in range(400)]
    plan = EpochPlan(main=main, global_batch=8, seed=0)
    spreads = [max(map(len, batch)) - min(map(len, batch)) for batch in map(plan.batch, range(plan.num_steps(1)))]
    assert sum(spreads) / len(spreads) < 10  # about 40 in random order


def test_mixed_in_samples_come_at_their_ratio_in_every_batch():
    mixed = [Sample(record=100 + i, form=CAPTION, prompt=[1], target=[2]) for i in range(5)]
    plan = EpochPlan(main=numbered(24), mixed=((mixed, 0.5),), global_batch=6, seed=0)
    for step in range(plan.num_steps(1)):
        forms = Counter(sample.form for sample in plan.batch(step))
        assert forms == {DIRECT: 6, CAPTION: 3}


def test_mixed_in_samples_all_come_before_one_comes_again():
    mixed = [Sample(record=100 + i, form=CAPTION, prompt=[1], target=[2]) for i in range(5)]
    plan = EpochPlan(main=numbered(24), mixed=((mixed, 0.5),), global_batch=6, seed=0)
    seen = Counter(s.record for step in range(plan.num_steps(1)) for s in plan.batch(step) if s.form == CAPTION)
    assert len(seen) == 5 and max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("mixed", [((), 0.5), (numbered(3), 0.0)])
def test_an_empty_list_or_a_ratio_of_zero_mixes_nothing_in(mixed):
    plan = EpochPlan(main=numbered(12), mixed=(mixed,), global_batch=6, seed=0)
    assert sum(len(plan.batch(step)) for step in range(2)) == 12


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [12, 13, 2])
def test_every_number_of_processes_trains_on_the_same_samples_in_a_step(world_size, accumulation, count):
    batch = EpochPlan(main=numbered(count), global_batch=count, seed=0).batch(0)
    worlds = [World(rank=rank, size=world_size, device=torch.device("cpu")) for rank in range(world_size)]
    shares = [share for world in worlds for _, share in deal(batch, world, accumulation)]
    assert sum(map(numbers, shares), Counter()) == numbers(batch)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_a_batch_differ_by_one_sample_at_most(world_size):
    batch = numbered(13)
    sizes = [
        len(share)
        for rank in range(world_size)
        for _, share in deal(batch, World(rank=rank, size=world_size, device=torch.device("cpu")), 2)
    ]
    assert max(sizes) - min(sizes) <= 1


# ---- edited facts


def test_an_edited_chain_stands_behind_a_picture_of_other_facts_of_the_same_question(records, samples):
    edited = edit_facts(records, samples, seed=0)
    assert len(edited) > len(samples) // 2
    originals = {sample.record: sample for sample in samples}
    for sample in edited:
        chain, shown = records[sample.record], records[sample.picture_of]
        assert chain.instruction == shown.instruction and chain.metadata["scene"] != shown.metadata["scene"]
        assert (sample.prompt, sample.target) == (originals[sample.record].prompt, originals[sample.record].target)


def test_questions_of_one_group_are_the_same_question_in_other_words(records, samples):
    several = [
        replace(
            record,
            instruction=f"{number}: {record.instruction}",
            metadata={**record.metadata, "question_group": record.instruction},
        )
        for number, record in enumerate(records)
    ]
    assert [s.picture_of for s in edit_facts(several, samples, 0)] == [
        s.picture_of for s in edit_facts(records, samples, 0)
    ]


def test_an_edited_chain_is_what_the_rules_derive_from_its_own_facts(records, samples):
    for sample in edit_facts(records, samples, seed=0):
        record = records[sample.record]
        task = next(task for task in TASKS if task.instruction == record.instruction)
        chain = teach(SceneFacts(**record.metadata["scene"]), task)
        assert (chain.steps, chain.answer) == (record.steps, record.answer)


def test_the_steps_of_an_edited_chain_that_state_facts_are_given_and_all_later_ones_scored(records, samples, tokenizer):
    for sample in edit_facts(records, samples, seed=0):
        record = records[sample.record]
        given, _ = tokenizer.parse_generated(sample.target[: sample.num_given])
        assert tuple(given) == record.steps[: num_fact_steps(record)]
        assert sample.target[sample.num_given] in (tokenizer.ids["<|step|>"], tokenizer.ids["<|conclusion|>"])


def test_an_edited_chain_is_no_example_of_a_chain_that_fits_its_picture(records, samples):
    """So neither the validator nor the attention to boxes nor scheduled sampling uses it."""
    assert all(not (s.step_spans or s.attend) and s.form == EDITED for s in edit_facts(records, samples, seed=0))


def test_the_same_seed_edits_the_same(records, samples):
    first, again, other = (list(edit_facts(records, samples, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_records_that_do_not_say_which_steps_state_facts_are_not_edited(records, samples):
    bare = [replace(r, metadata={k: v for k, v in r.metadata.items() if k != "seen"}) for r in records]
    assert len(edit_facts(bare, samples, seed=0)) == 0


def test_without_another_picture_of_the_question_there_is_nothing_to_edit(records, tokenizer):
    (sample,) = samples = encode_reasoning(records[:1], tokenizer, grid=Grid(3, 3), max_length=512)
    assert num_fact_steps(records[sample.record]) and len(edit_facts(records[:1], samples, seed=0)) == 0
