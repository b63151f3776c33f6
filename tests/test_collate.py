"""Micro-batches: what is scored, what the heads are asked, and what is drawn at random."""

import dataclasses
import random

import pytest
import torch

from embervlm.data import collate
from embervlm.data.collate import DenseLabels, validator_inputs
from embervlm.data.dataset import edit_facts, encode_captions, encode_direct, encode_glossary, encode_reasoning
from embervlm.data.negatives import PairMaker
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Grid, boxes_to_mask
from embervlm.model.reasoning import StepValidator
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.feed import deal
from embervlm.world import World


@pytest.fixture
def text_only(records):
    """Eight of the records without their pictures."""
    return [dataclasses.replace(record, image=None) for record in records[:8]]


def record(**fields):
    fields = {
        "record_id": "r1",
        "image": None,
        "instruction": "Which?",
        "steps": ("Look.", "Conclusion: it."),
        "answer": ("Drone",),
        **fields,
    }
    return ReasoningRecord(**fields, default_candidates=ROBOTS)


def texts_of(samples):
    return [[*sample.prompt, *sample.target] for sample in samples]


# ---- tokens


def test_only_chain_and_answer_tokens_are_scored(samples, make_collator):
    batch = make_collator()(samples[:5], step=0)
    assert batch.targets["labels"].tolist() == [token for sample in samples[:5] for token in sample.target]


def test_each_label_is_the_token_after_its_scored_position(samples, make_collator):
    batch = make_collator()(samples[:5], step=0)
    flat = batch.inputs["input_ids"].flatten()
    assert torch.equal(flat[batch.inputs["score_index"] + 1], batch.targets["labels"])


def test_counts_say_how_many_tokens_of_each_form_are_scored(records, samples, tokenizer, make_collator):
    mixed = [*samples[:2], *encode_direct(records[:3], tokenizer)]
    batch = make_collator()(mixed, step=0)
    assert batch.counts["reasoning"] == sum(len(sample.target) for sample in mixed[:2])
    assert batch.counts["direct"] == sum(len(sample.target) for sample in mixed[2:])
    assert batch.targets["direct"].sum() == batch.counts["direct"]


def test_the_text_mask_covers_the_text_and_no_padding(samples, make_collator):
    batch = make_collator()(samples[:5], step=0)
    texts = texts_of(samples[:5])
    assert batch.inputs["text_mask"].sum(1).tolist() == list(map(len, texts))
    for row, text in enumerate(texts):
        assert batch.inputs["input_ids"][row, : len(text)].tolist() == text


def test_a_batch_names_its_records(records, samples, make_collator):
    assert make_collator()(samples[:3], step=0).record_ids == [record.record_id for record in records[:3]]


# ---- pictures


def test_each_row_has_the_picture_of_its_record(records, samples, pictures, make_collator):
    batch = make_collator()(samples[2:5], step=0)
    for row, sample in enumerate(samples[2:5]):
        place = batch.inputs["picture_rows"][row]
        assert (batch.inputs["pictures"][place].numpy() == pictures[records[sample.record].image]).all()
        assert batch.picture_index[row] == pictures.index(records[sample.record].image)


def test_pictures_can_be_left_to_a_cache_of_visual_tokens(samples, make_collator):
    assert "pictures" not in make_collator()(samples[:2], step=0, load_pictures=False).inputs


def test_a_batch_of_records_without_pictures_is_marked_as_such(text_only, tokenizer, make_collator):
    samples = encode_reasoning(text_only, tokenizer, grid=Grid(3, 3), max_length=512)
    batch = make_collator(text_only)(samples, step=0)
    assert not batch.inputs["image_mask"].any()
    assert batch.picture_index.tolist() == [-1] * len(samples)
    assert not batch.inputs["pictures"].any()


def test_texts_of_the_glossary_go_beside_captions(records, tokenizer, make_collator):
    mixed = [*encode_captions(records, tokenizer)[:2], *encode_glossary(["A rule."], tokenizer)[:1]]
    batch = make_collator(use_reasoning=False)(mixed, step=0)
    assert batch.inputs["image_mask"].tolist() == [True, True, False]
    assert batch.record_ids[-1] == "glossary"


# ---- the answer head


def test_the_answer_head_reads_where_the_conclusion_opens(samples, tokenizer, make_collator):
    batch = make_collator()(samples[:4], step=0)
    read = batch.inputs["input_ids"].flatten()[batch.inputs["answer_index"]]
    assert read.tolist() == [tokenizer.ids["<|conclusion|>"]] * 4


def test_no_token_of_the_conclusion_stands_before_the_answer_heads_position(samples, make_collator):
    batch = make_collator()(samples[:4], step=0)
    length = batch.inputs["input_ids"].shape[1]
    for row, position in enumerate(batch.inputs["answer_index"].tolist()):
        assert position - row * length < samples[row].step_spans[-1][0]


def test_the_right_candidates_are_those_of_the_answer(records, samples, make_collator):
    batch = make_collator()(samples[:6], step=0)
    for row, sample in enumerate(samples[:6]):
        expected = [float(robot in records[sample.record].answer) for robot in ROBOTS]
        assert batch.targets["answers"][row].tolist() == expected
    assert batch.counts["answer"] == 6 * len(ROBOTS)


def test_direct_samples_ask_nothing_of_the_answer_head(records, samples, tokenizer, make_collator):
    batch = make_collator()([*encode_direct(records[:2], tokenizer), samples[0]], step=0)
    length = batch.inputs["input_ids"].shape[1]
    assert (batch.inputs["answer_index"] // length).tolist() == [2]


def test_records_may_bring_candidates_of_their_own(tokenizer, make_collator):
    own = [record(metadata={"candidates": ["A", "B", "C"]}, answer=("B",)), record()]
    batch = make_collator(own)(encode_reasoning(own, tokenizer, Grid(3, 3), 512), step=0)
    assert batch.targets["answers"].tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert batch.targets["answers_real"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.counts["answer"] == 8


def test_candidates_of_their_own_that_all_records_share_are_encoded_once(tokenizer, make_collator):
    own = [record(metadata={"candidates": ["Left turn", "Right"]}, answer=("Right",))] * 2
    batch = make_collator(own)(encode_reasoning(own, tokenizer, Grid(3, 3), 512), step=0)
    ids = batch.inputs["candidate_ids"]
    assert [tokenizer.decode([t for t in row if t >= 0]) for row in ids.tolist()] == ["Left turn", "Right"]


def test_candidate_ids_are_those_of_each_records_candidates(tokenizer, make_collator):
    own = [record(metadata={"candidates": ["Left turn", "Right"]}, answer=("Right",)), record()]
    batch = make_collator(own)(encode_reasoning(own, tokenizer, Grid(3, 3), 512), step=0)
    rows = batch.inputs["candidate_ids"].tolist()
    names = [[tokenizer.decode([t for t in ids if t >= 0]) for ids in row] for row in rows]
    assert names == [["Left turn", "Right", "", "", ""], list(ROBOTS)]


# ---- the step validator


def test_the_validator_gets_question_previous_steps_and_step_apart(samples):
    inputs = validator_inputs([([5, 6], [7], [8, 9]), ([5], [], [8])])
    assert inputs["pair_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 8, 0, 0, 0]]
    names = [StepValidator.SEGMENTS[index] for index in inputs["pair_segments"][0].tolist()]
    assert names == ["question", "question", "previous", "step", "step"]
    assert inputs["pair_mask"].sum(1).tolist() == [5, 2]


def test_what_the_validator_reads_never_exceeds_its_length():
    inputs = validator_inputs([([1] * 1000, [2] * 256, [3] * 1000)])
    assert inputs["pair_ids"].shape[1] <= StepValidator.MAX_LENGTH
    assert (inputs["pair_segments"] == StepValidator.SEGMENTS.index("question")).sum() == 128


def test_pairs_point_at_their_records_row(records, samples, tokenizer, make_collator):
    maker = PairMaker(records, samples, tokenizer)
    batch = make_collator(pair_maker=maker)(samples[:4], step=0)
    own = int(batch.targets["valid_weight"][len(batch.inputs["pair_record"]) :].sum())  # see test_own_mistakes.py
    assert batch.counts["consistency"] == len(batch.inputs["pair_record"]) + own == batch.targets["valid_weight"].sum()
    assert set(batch.inputs["pair_record"].tolist()) == {0, 1, 2, 3}
    for pair, row in enumerate(batch.inputs["pair_record"].tolist()):
        prompt = samples[row].prompt
        assert batch.inputs["pair_ids"][pair, : len(prompt)].tolist() == prompt


def test_without_a_share_of_records_the_validator_is_asked_nothing(records, samples, tokenizer, make_collator):
    maker = PairMaker(records, samples, tokenizer)
    batch = make_collator(pair_maker=maker, pair_records_ratio=0.0)(samples[:4], step=0)
    assert batch.counts["consistency"] == 0
    assert not batch.targets["valid_weight"].any()  # stand-ins, so that every process runs the validator


# ---- grounding


def test_grounded_tokens_are_those_of_the_steps_that_look(records, samples, tokenizer, make_collator):
    (batch, sample) = (make_collator(grounding=True)(samples[:1], step=0), samples[0])
    expected = [p for step, _ in sample.attend for p in range(*sample.step_spans[step])]
    assert batch.inputs["ground_index"].tolist() == expected
    assert batch.targets["ground"].shape == (len(expected), 9)
    assert batch.counts["multimodal"] == len(expected)


@pytest.fixture
def contrast_all(monkeypatch):
    monkeypatch.setattr(collate, "CONTRAST_RATIO", 1.0)


def bare(records, *kept):
    return [dataclasses.replace(record, metadata={name: record.metadata[name] for name in kept}) for record in records]


@pytest.mark.parametrize("kept", [(), ("boxes",), ("boxes", "scene")])
def test_where_no_step_reads_a_box_a_chain_is_read_again_behind_a_picture_that_it_does_not_fit(
    kept, contrast_all, records, tokenizer, make_collator
):
    """Boxes without `seen` turned the multimodal loss off."""
    chains = encode_reasoning(bare(records, *kept), tokenizer, Grid(3, 3), 512)[:3]
    batch = make_collator(bare(records, *kept), grounding=True)(chains, step=0)
    assert batch.counts["multimodal"] == 3 and batch.inputs["repeated"].tolist() == [0, 1, 2]
    ids, tokens, rows = batch.inputs["input_ids"], len(batch.targets["direct"]), batch.picture_index.tolist()
    assert torch.equal(ids[:3], ids[3:]) and batch.counts["reasoning"] == tokens
    scored, length = batch.inputs["score_index"], ids.shape[1]
    assert torch.equal(scored[tokens:], scored[:tokens] + 3 * length)
    assert torch.equal(batch.targets["labels"][tokens:], batch.targets["labels"][:tokens])
    assert batch.targets["contrast_lengths"].tolist() == [len(sample.target) for sample in chains]
    said = {
        row: [record.steps for record in records if record.image == records[chain.record].image]
        for row, chain in zip(rows[:3], chains)
    }
    for chain, own, other in zip(chains, rows, rows[3:]):
        assert own != other and records[chain.record].steps not in said.get(other, [])


def test_which_chains_are_contrasted_with_what_does_not_depend_on_the_rest_of_the_batch(
    records, tokenizer, make_collator
):
    chains = encode_reasoning(bare(records), tokenizer, Grid(3, 3), 512)[:8]
    batcher = make_collator(bare(records), grounding=True)
    whole = batcher(chains, step=5)
    alone = [batcher([chain], step=5, places=[place]) for place, chain in enumerate(chains)]
    assert whole.picture_index[8:].tolist() == [row for one in alone for row in one.picture_index[1:].tolist()]
    assert whole.inputs["repeated"].tolist() == [place for place, one in enumerate(alone) if one.counts["multimodal"]]
    assert 0 < whole.counts["multimodal"] < 8
    assert batcher(chains, step=6).picture_index[8:].tolist() != whole.picture_index[8:].tolist()


def test_a_chain_without_a_picture_that_it_does_not_fit_is_not_contrasted(records, tokenizer, make_collator):
    same = [dataclasses.replace(record, steps=records[0].steps) for record in bare(records)]
    batch = make_collator(same, grounding=True)(encode_reasoning(same, tokenizer, Grid(3, 3), 512)[:2], step=0)
    assert batch.counts["multimodal"] == 0 and len(batch.picture_index) == 2


# ---- scheduled sampling


def test_scheduled_sampling_replaces_only_tokens_of_steps(samples, make_collator):
    batch = make_collator()(samples[:4], step=0, teacher_forcing=0.0)
    length = batch.inputs["input_ids"].shape[1]
    expected = [row * length + p for row, s in enumerate(samples[:4]) for span in s.step_spans for p in range(*span)]
    assert batch.inputs["sampled_index"].tolist() == expected


def test_with_full_teacher_forcing_nothing_is_replaced(samples, make_collator):
    assert "sampled_index" not in make_collator()(samples[:4], step=0, teacher_forcing=1.0).inputs


def test_teacher_forcing_is_the_share_of_gold_tokens(samples, make_collator):
    total = sum(end - start for s in samples for start, end in s.step_spans)
    batch = make_collator()(samples, step=0, teacher_forcing=0.75)
    assert len(batch.inputs["sampled_index"]) / total == pytest.approx(0.25, abs=0.05)


def test_the_model_replaces_no_structure_token_and_no_prompt(tiny_model, samples, make_collator):
    batch = make_collator()(samples[:4], step=0, teacher_forcing=0.0)
    gold = batch.inputs["input_ids"]
    visual = tiny_model.see(tiny_model.normalise(batch.inputs["pictures"]))[batch.inputs["picture_rows"]]
    sampled = tiny_model.with_own_predictions(
        visual, batch.inputs["image_mask"], gold, batch.inputs["text_mask"], batch.inputs["sampled_index"]
    )
    changed = (sampled != gold).flatten().nonzero().flatten()
    assert len(changed)
    assert set(changed.tolist()) <= set(batch.inputs["sampled_index"].tolist())
    assert sampled.max() <= tiny_model.tokenizer.ids["<|answer_end|>"]


# ---- random draws


def test_the_same_step_draws_the_same(records, samples, tokenizer, make_collator):
    one, other = (
        make_collator(pair_maker=PairMaker(records, samples, tokenizer))(samples[:4], step=5, teacher_forcing=0.5)
        for _ in range(2)
    )
    assert torch.equal(one.inputs["sampled_index"], other.inputs["sampled_index"])
    assert torch.equal(one.inputs["pair_ids"], other.inputs["pair_ids"])


def test_another_step_draws_anew(samples, make_collator):
    one, other = (make_collator()(samples[:4], step=step, teacher_forcing=0.5) for step in (0, 1))
    assert one.inputs["sampled_index"].tolist() != other.inputs["sampled_index"].tolist()


def test_what_is_drawn_leaves_the_global_random_state_alone(samples, make_collator):
    before = random.getstate()
    make_collator()(samples[:4], step=0, teacher_forcing=0.5)
    assert random.getstate() == before


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_number_of_processes_draws_the_same_for_a_sample(world_size, samples, make_collator):
    def drawn(size):
        """Record -> tokens replaced in its text."""
        found = {}
        for rank in range(size):
            world = World(rank=rank, size=size, device=torch.device("cpu"))
            for places, share in deal(samples[:7], world, 1):
                batch = make_collator()(share, step=0, places=places, teacher_forcing=0.5)
                length = batch.inputs["input_ids"].shape[1]
                for row, sample in enumerate(share):
                    index = batch.inputs["sampled_index"]
                    found[sample.record] = (index[index // length == row] - row * length).tolist()
        return found

    assert drawn(world_size) == drawn(1)


# ---- labels of patches


def test_dense_labels_of_a_hand_case():
    """On a 2 x 2 grid: sky over the upper half, a flag in the lower right corner, clutter that is no fact."""
    boxes = [
        {"kind": "sky", "label": "noon", "box": [0, 0, 1, 0.5]},
        {"kind": "flag", "label": "near", "box": [0.6, 0.6, 0.9, 0.9]},
        {"kind": "clutter", "label": "bird", "box": [0, 0, 1, 1]},
    ]
    scene = {"sky": "noon", "flag": "near"}
    other = record(metadata={"boxes": [{"kind": "sky", "label": "dawn", "box": [0, 0, 1, 1]}], "scene": scene})
    labels = DenseLabels([record(metadata={"boxes": boxes, "scene": scene}), other], grid=Grid(2, 2))
    assert labels.classes == {"flag": ["near"], "sky": ["dawn", "noon"]}
    assert labels.sizes == [2, 3]
    assert labels.of(record(metadata={"boxes": boxes})).tolist() == [[0, 2], [0, 2], [0, 0], [1, 0]]


def test_patches_without_ground_truth_are_not_scored():
    labels = DenseLabels(
        [record(metadata={"boxes": [{"kind": "sky", "label": "noon", "box": [0, 0, 1, 1]}], "scene": {"sky": "noon"}})],
        grid=Grid(2, 2),
    )
    assert (labels.of(record(metadata={})) == -1).all()


def test_dense_labels_of_generated_records_lie_in_their_boxes(records):
    labels = DenseLabels(records, grid=Grid(3, 3))
    kinds = list(labels.classes)
    assert set(kinds) == {"place", "weather", "sky", "load", "flag"}
    found = labels.of(records[0])
    (flag,) = (box for box in records[0].metadata["boxes"] if box["kind"] == "flag")
    marked = found[:, kinds.index("flag")] > 0
    assert torch.equal(marked, boxes_to_mask([flag["box"]], Grid(3, 3)))


def test_dense_counts_leave_texts_without_a_picture_out(records, tokenizer, make_collator):
    mixed = [*encode_captions(records, tokenizer)[:1], *encode_glossary(["A rule."], tokenizer)[:1]]
    batch = make_collator(use_reasoning=False, dense_labels=DenseLabels(records, Grid(3, 3)))(mixed, step=0)
    assert batch.counts["dense"] == 9 * 5
    assert batch.targets["dense"].shape == (2, 9, 5)


# ---- batches


def test_a_muted_batch_counts_nothing(samples, make_collator):
    batch = make_collator()(samples[:1], step=0)
    batch.mute()
    assert batch.muted and not any(batch.counts.values())


def test_a_batch_keeps_everything_when_it_moves(samples, make_collator):
    batch = make_collator()(samples[:2], step=0)
    moved = batch.to(torch.device("cpu"))
    assert moved.inputs.keys() == batch.inputs.keys() and moved.targets.keys() == batch.targets.keys()
    assert (moved.counts, moved.record_ids, moved.muted) == (batch.counts, batch.record_ids, batch.muted)


# ---- edited facts


def test_an_edited_chain_is_scored_behind_its_given_steps_and_shows_the_other_picture(
    records, samples, tokenizer, pictures, make_collator
):
    edited = edit_facts(records, samples, seed=0)[:4]
    maker = PairMaker(records, samples, tokenizer)
    batch = make_collator(pair_maker=maker, grounding=True)(edited, step=0, teacher_forcing=0.5)
    assert batch.targets["labels"].tolist() == [token for s in edited for token in s.target[s.num_given :]]
    assert not batch.targets["direct"].any() and batch.counts["reasoning"] == len(batch.targets["labels"])
    assert batch.picture_index.tolist() == [pictures.index(records[s.picture_of].image) for s in edited]
    assert batch.counts["consistency"] == batch.counts["multimodal"] == 0
    assert not len(batch.inputs["sampled_index"])


def test_the_answer_head_is_taught_the_answer_of_the_edited_facts(records, samples, make_collator):
    edited = [
        s for s in edit_facts(records, samples, seed=0) if records[s.record].answer != records[s.picture_of].answer
    ]
    batch = make_collator()(edited[:4], step=0)
    for row, sample in zip(batch.targets["answers"], edited[:4]):
        assert [name for name, right in zip(ROBOTS, row) if right] == list(records[sample.record].answer)


def test_an_edited_chain_is_not_matched_with_the_picture_it_contradicts(contrast_all, records, samples, make_collator):
    without_boxes = [
        dataclasses.replace(r, metadata={k: v for k, v in r.metadata.items() if k != "boxes"}) for r in records
    ]
    edited = edit_facts(without_boxes, samples, seed=0)[:2]
    batch = make_collator(without_boxes, grounding=True)([*samples[:2], *edited], step=0)
    assert batch.inputs["repeated"].tolist() == [0, 1]
