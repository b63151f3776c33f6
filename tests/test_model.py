"""The model: what each part may see, learn and change, and what is read from and written to disk."""

import copy
import dataclasses
import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

from embervlm import EmberVLM
from embervlm.config import COMPONENTS, ConfigError, PhaseConfig
from embervlm.config_file import model_preset
from embervlm.data.collate import padded, validator_inputs
from embervlm.data.dataset import encode_direct, encode_reasoning
from embervlm.data.images import ImageError
from embervlm.data.negatives import PairMaker
from embervlm.data.records import read_records
from embervlm.data.samples import Grid
from embervlm.engines.param_groups import build_param_groups
from embervlm.model.backbone import LanguageModel, VisionEncoder
from embervlm.model.cache import roomy_cache
from embervlm.model.config import STAGE3, EmberVLMConfig
from embervlm.model.decode import language_step
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import build_model
from embervlm.model.generation import generate_answers, generate_from_visual
from embervlm.model.reasoning import StepValidator
from embervlm.model.storage import CheckpointError, load_checkpoint_into
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.losses import loss_sums

BACKBONE = [name for name in COMPONENTS if name != "reasoning_module"]


@pytest.fixture
def batch(records, samples, tokenizer, make_collator):
    """Four chains and two direct answers, with everything that Phase 2 asks for."""
    maker = PairMaker(records, samples, tokenizer)
    mixed = [*samples[:4], *encode_direct(records, tokenizer)[4:6]]
    return make_collator(pair_maker=maker, grounding=True)(mixed, step=0)


@pytest.fixture
def checkpoint(lively_model, tmp_path):
    lively_model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def loss_of(model, batch):
    return sum(loss_sums(model(**batch.inputs), batch.targets).values())


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def token_logits(model, batch, **changes):
    with torch.no_grad():
        return model(**{**batch.inputs, **changes}).token_logits


# ---- Phase 1


def test_an_untrained_reasoning_head_changes_no_logit(tiny_model, batch):
    """Only Stage 4's own tokens, which enter a second time past the language model, do so from the start."""
    index = batch.inputs["score_index"]
    plain = batch.inputs["input_ids"].flatten()[index] < tiny_model.tokenizer.base_vocab_size
    refined, own = (token_logits(tiny_model, batch, use_reasoning=use)[plain] for use in (True, False))
    assert plain.sum() > 100 and torch.equal(refined, own)


def test_logits_without_reasoning_are_the_language_models_own(tiny_model, batch):
    base = tiny_model.tokenizer.base_vocab_size
    ids, mask = batch.inputs["input_ids"][:1], batch.inputs["text_mask"][:1]
    ids, mask = ids.masked_fill(ids >= base, 1), mask.clone()
    with torch.no_grad():
        visual = tiny_model.see(tiny_model.normalise(batch.inputs["pictures"][:1]))
        embeds = torch.cat([visual, tiny_model.language_model.backbone.get_input_embeddings()(ids)], dim=1)
        whole = torch.cat([torch.ones(1, 9, dtype=torch.bool), mask], dim=1)
        expected = tiny_model.language_model.backbone(inputs_embeds=embeds, attention_mask=whole.long()).logits[0, 9:]
        index = mask[0].nonzero().flatten()
        found = tiny_model(
            input_ids=ids,
            text_mask=mask,
            image_mask=torch.tensor([True]),
            visual=visual,
            score_index=index,
            use_reasoning=False,
        ).token_logits
    torch.testing.assert_close(found[:, :base], expected[index, :base])


def test_phase1_gives_gradients_to_the_reasoning_module_alone(tiny_model, batch):
    build_param_groups(tiny_model, PhaseConfig(freeze_backbone=True))
    tiny_model.freeze(BACKBONE)
    loss_of(tiny_model.train(), batch).backward()
    assert {name.split(".")[0] for name in gradients(tiny_model)} == {"reasoning_module"}


def test_every_part_of_the_reasoning_module_learns_in_phase1(lively_model, batch):
    lively_model.freeze(BACKBONE)
    loss_of(lively_model.train(), batch).backward()
    found = gradients(lively_model.reasoning_module)
    idle = {name for name, _ in lively_model.reasoning_module.named_parameters()} - set(found)
    assert {name for name in idle if "key_value.bias" not in name} == set()


def test_the_embeddings_of_the_added_tokens_learn_while_the_language_model_is_frozen(tiny_model, batch):
    tiny_model.freeze(BACKBONE)
    loss_of(tiny_model.train(), batch).backward()
    rows = tiny_model.reasoning_module.reasoning_head.token_embedding.weight.grad.abs().sum(1)
    assert (rows > 0).all()


def test_the_output_rows_of_added_tokens_learn_though_no_input_holds_them(tiny_model, batch):
    """Of a text whose inputs are base tokens only, the rows still get a gradient from the softmax."""
    tiny_model.freeze(BACKBONE)
    ids = torch.full((1, 3), 5)
    out = tiny_model(
        input_ids=ids,
        text_mask=torch.ones_like(ids).bool(),
        image_mask=torch.tensor([True]),
        pictures=batch.inputs["pictures"][:1],
        score_index=torch.tensor([1]),
    )
    out.token_logits.logsumexp(-1).sum().backward()
    assert (tiny_model.reasoning_module.reasoning_head.token_embedding.weight.grad.abs().sum(1) > 0).all()


def test_a_frozen_backbone_stays_in_eval_mode(tiny_model):
    tiny_model.freeze(BACKBONE)
    tiny_model.train()
    assert not any(module.training for name in BACKBONE for module in getattr(tiny_model, name).modules())
    assert tiny_model.reasoning_module.training


def test_a_thawed_backbone_trains_again(tiny_model, batch):
    tiny_model.freeze(BACKBONE)
    tiny_model.freeze(())
    loss_of(tiny_model.train(), batch).backward()
    assert {name.split(".")[0] for name in gradients(tiny_model)} == set(COMPONENTS)
    assert all(getattr(tiny_model, name).training for name in COMPONENTS)


def test_running_statistics_of_a_frozen_backbone_do_not_move(tiny_settings, tokenizer, batch):
    vision = {
        "config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
        }
    }
    model = build_model({**tiny_settings, "vision": vision})
    model.attach_tokenizer(tokenizer)
    model.freeze(BACKBONE)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model.see(model.normalise(batch.inputs["pictures"]))
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


# ---- what each part sees


def test_the_picture_changes_the_logits(lively_model, batch):
    dark = torch.zeros_like(batch.inputs["pictures"])
    assert not torch.allclose(token_logits(lively_model, batch), token_logits(lively_model, batch, pictures=dark))


def test_without_a_picture_its_pixels_change_nothing(lively_model, batch):
    none = torch.zeros_like(batch.inputs["image_mask"])
    dark = torch.zeros_like(batch.inputs["pictures"])
    one = lively_model(**{**batch.inputs, "image_mask": none, "pictures": dark})
    other = lively_model(**{**batch.inputs, "image_mask": none})
    for name in ("token_logits", "answer_logits", "validator_logits"):
        torch.testing.assert_close(one[name], other[name])


def test_later_tokens_do_not_change_earlier_logits(lively_model, batch):
    ids = batch.inputs["input_ids"]
    index = torch.arange(10)
    one = token_logits(lively_model, batch, score_index=index)
    changed = ids.clone()
    changed[:, 11:] = 7
    torch.testing.assert_close(one, token_logits(lively_model, batch, score_index=index, input_ids=changed))


def test_padding_changes_no_logit(lively_model, samples, make_collator):
    one = make_collator()(samples[:1], step=0)
    both = make_collator()(sorted(samples, key=len)[::-1][:1] + samples[:1], step=0)
    length = both.inputs["input_ids"].shape[1]
    mine = both.inputs["score_index"] // length == 1
    torch.testing.assert_close(
        token_logits(lively_model, one), token_logits(lively_model, both)[mine], rtol=1e-3, atol=1e-4
    )


def test_a_batch_of_text_only_records_trains_without_nan(lively_model, records, tokenizer, make_collator):
    bare = [dataclasses.replace(record, image=None) for record in records[:4]]
    samples = encode_reasoning(bare, tokenizer, grid=Grid(3, 3), max_length=512)
    maker = PairMaker(bare, samples, tokenizer)
    batch = make_collator(bare, pair_maker=maker, grounding=True)(samples, step=0, teacher_forcing=0.5)
    loss = loss_of(lively_model.train(), batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in lively_model.parameters() if p.grad is not None)


def test_attention_to_the_picture_sums_to_at_most_one(lively_model, batch):
    with torch.no_grad():
        attention = lively_model(**batch.inputs).grounding_attention
    assert attention.shape == (len(batch.inputs["ground_index"]), 9)
    assert (attention >= 0).all() and (attention.sum(-1) <= 1 + 1e-5).all()


# ---- step validator and answer head


def judge(model, tokenizer, pictures, question="Fly there.", previous="It is wet.", step="So it is deep.", seen=True):
    """The validator's logit of one step."""
    inputs = validator_inputs([tuple(map(tokenizer.encode, (question, previous, step)))])
    with torch.no_grad():
        visual = model.see(model.normalise(pictures[:1]))
        return model.judge_steps(visual, torch.tensor([seen]), **inputs).item()


@pytest.mark.parametrize("part", ["question", "previous", "step"])
def test_the_validator_reads_every_text(lively_model, tokenizer, batch, part):
    pictures = batch.inputs["pictures"]
    plain = judge(lively_model, tokenizer, pictures)
    assert judge(lively_model, tokenizer, pictures, **{part: "Something else."}) != pytest.approx(plain, abs=1e-6)


def test_the_validator_sees_the_picture(lively_model, tokenizer, batch):
    pictures = batch.inputs["pictures"]
    one, other = (judge(lively_model, tokenizer, p) for p in (pictures, pictures.flip(1)))
    assert one != pytest.approx(other, abs=1e-6)


def test_the_validator_does_not_see_a_picture_that_is_not_there(lively_model, tokenizer, batch):
    pictures = batch.inputs["pictures"]
    one, other = (judge(lively_model, tokenizer, p, seen=False) for p in (pictures, pictures.flip(1)))
    assert one == pytest.approx(other, abs=1e-6)


def test_the_consistency_term_moves_the_validator_alone(lively_model, batch):
    lively_model.train()
    loss_sums(lively_model(**batch.inputs), batch.targets)["consistency"].backward()
    moved = {path.partition(".step_validator.")[0] for path, p in lively_model.named_parameters() if p.grad is not None}
    assert moved == {"reasoning_module"}
    assert all(p.grad.any() for p in lively_model.reasoning_module.step_validator.layers.parameters())


def test_the_validator_refuses_a_text_longer_than_it_can_read(lively_model, tokenizer, batch):
    validator = lively_model.reasoning_module.step_validator
    text = torch.zeros(1, validator.MAX_LENGTH + 1, 32)
    segments = torch.zeros(1, validator.MAX_LENGTH + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="513 tokens"):
        validator(torch.zeros(1, 9, 32), torch.tensor([True]), text, text[..., 0], segments, segments == 0)


@pytest.mark.parametrize("names", [("Drone",), ("Left turn", "Right", "A very long third choice"), ROBOTS])
def test_the_answer_head_scores_any_list_of_candidates(lively_model, records, names):
    result = lively_model.generate_with_reasoning(records[0].image, "Which?", candidates=names, max_new_tokens=4)
    assert list(result["head_probabilities"]) == list(names)
    assert all(0 <= p <= 1 for p in result["head_probabilities"].values())


def test_a_candidates_score_does_not_depend_on_the_others(lively_model, tokenizer):
    head, state, visual = lively_model.reasoning_module.answer_head, torch.randn(2, 32), torch.randn(2, 9, 32)
    scores = []
    for names in (["Drone", "Humanoid"], ["Robot with Wheels and a long name", "Drone"]):
        embeds = lively_model.candidate_embeddings(padded(tokenizer.encode_many(names), -1))
        scores.append(head(state, visual, torch.tensor([True, False]), embeds)[:, names.index("Drone")])
    torch.testing.assert_close(*scores)


# ---- generation


def test_generation_with_a_cache_equals_reading_the_whole_text_for_every_token(lively_model, records, tokenizer):
    generated = []
    for record in records[:12:2]:
        settings = Decoding(max_new_tokens=24, max_reasoning_steps=10**6)
        (result,) = generate_ids(lively_model, [record.image], [record.instruction], settings)
        ids = [*tokenizer.encode(record.instruction), tokenizer.ids["<|reasoning_start|>"]]
        prompt_length = len(ids)
        with torch.inference_mode():
            visual = see(lively_model, [record.image])
            while len(ids) < prompt_length + len(result):
                text = torch.tensor([ids])
                logits = lively_model(
                    input_ids=text,
                    text_mask=torch.ones_like(text).bool(),
                    image_mask=torch.tensor([True]),
                    visual=visual,
                    score_index=torch.tensor([len(ids) - 1]),
                ).token_logits
                ids.append(int(logits.argmax()))
        assert ids[prompt_length:] == result
        generated += result
    assert len(generated) > 40 and len(set(generated)) > 10


def see(model, images):
    from embervlm.model.generation import look

    return look(model, images)[0]


def generate_ids(model, images, instructions, settings):
    """Generated ids of each row."""
    from embervlm.model.generation import look
    from embervlm.model.writer import Writer

    with torch.inference_mode():
        visual, mask = look(model, images)
        prompts = [[*model.tokenizer.encode(t), model.tokenizer.ids["<|reasoning_start|>"]] for t in instructions]
        writer = Writer(model, visual, mask, prompts, settings)
        writer.run()
        return [row.ids for row in writer.everyone]


def test_a_batch_of_unlike_prompts_gives_the_same_tokens_as_one_by_one(lively_model, records):
    images = [record.image if index % 3 else None for index, record in enumerate(records[:10])]
    instructions = ["Fly.", *(record.instruction * (1 + index % 3) for index, record in enumerate(records[1:10]))]
    settings = Decoding(max_new_tokens=20)
    together = generate_ids(lively_model, images, instructions, settings)
    alone = [generate_ids(lively_model, [i], [t], settings)[0] for i, t in zip(images, instructions)]
    assert together == alone
    assert sum(map(len, together)) > 60


def test_the_answer_head_says_the_same_in_a_batch_and_alone(lively_model, records):
    images = [records[0].image, None, records[5].image]
    texts = ["Fly.", records[1].instruction, records[2].instruction * 2]
    together = lively_model.generate_with_reasoning(images, texts, max_new_tokens=12)
    for image, text, result in zip(images, texts, together):
        alone = lively_model.generate_with_reasoning(image, text, max_new_tokens=12)
        assert alone["head_probabilities"] == pytest.approx(result["head_probabilities"], abs=1e-4)


def prefer(model, **tokens):
    """Let the model write the named Stage 4 tokens, whatever it reads: the larger the number, the likelier."""
    head = model.reasoning_module.reasoning_head
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.bias.fill_(10.0)
        for name, score in tokens.items():
            head.token_embedding.weight[model.tokenizer.ids[f"<|{name}|>"] - model.tokenizer.base_vocab_size] = score


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_chain_has_more_steps_than_allowed(lively_model, most):
    prefer(lively_model, step=3.0, conclusion=-3.0)
    ids = generate_ids(lively_model, [None], ["Fly."], Decoding(max_reasoning_steps=most, max_new_tokens=30))[0]
    assert ids.count(lively_model.tokenizer.ids["<|step|>"]) == most - 1


def test_a_chain_that_keeps_concluding_has_no_more_steps_than_allowed(lively_model):
    prefer(lively_model, step=-3.0, conclusion=3.0)
    ids = generate_ids(lively_model, [None], ["Fly."], Decoding(max_reasoning_steps=2, max_new_tokens=30))[0]
    assert ids.count(lively_model.tokenizer.ids["<|conclusion|>"]) <= 1


def test_a_row_that_has_ended_writes_nothing_more(lively_model):
    prefer(lively_model, answer_end=5.0)
    rows = generate_ids(lively_model, [None, None], ["Fly.", "Go there."], Decoding(max_new_tokens=30))
    assert rows == [[lively_model.tokenizer.ids["<|answer_end|>"]]] * 2


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_chain_that_is_begun_goes_on_as_if_the_model_had_written_it(lively_model, records, tokenizer, share):
    """In a batch of unlike beginnings; a chain begun up to its conclusion is read there by the answer head."""
    chains = encode_reasoning(records[:6], tokenizer, grid=Grid(3, 3), max_length=512)
    texts, images = [record.instruction for record in records[:6]], [record.image for record in records[:6]]
    begun = []
    for chain in chains:
        body = chain.target[1 : chain.answer_position - len(chain.prompt) + 1]  # the token that concludes stands last
        begun.append(body[: round(share * len(body))])
    visual = see(lively_model, images)
    settings = Decoding(max_new_tokens=24, max_reasoning_steps=10)
    results = generate_from_visual(lively_model, visual, torch.ones(6).bool(), texts, settings, begun=begun)
    for place, result in enumerate(results):
        prompt = [*tokenizer.encode(texts[place]), tokenizer.ids["<|reasoning_start|>"]]
        ids = [*prompt, *begun[place]]
        with torch.inference_mode():
            for _ in range(result["num_tokens"]):
                ids.append(next_token(lively_model, ids, visual[place : place + 1]))
        steps, text = tokenizer.parse_generated(ids[len(prompt) :])
        assert (result["reasoning_steps"], result["text"]) == (steps, text or "")
        if share == 1.0:
            at_conclusion = torch.tensor([[*prompt, *begun[place]]])
            logits = lively_model(
                input_ids=at_conclusion,
                text_mask=at_conclusion >= 0,
                image_mask=torch.tensor([True]),
                visual=visual[place : place + 1],
                answer_index=torch.tensor([at_conclusion.shape[1] - 1]),
                candidate_ids=padded(tokenizer.encode_many(ROBOTS), -1),
            ).answer_logits
            assert list(result["head_probabilities"].values()) == pytest.approx(logits[0].sigmoid().tolist(), abs=1e-4)


def next_token(model, ids, visual, most_steps=10):
    """The likeliest next token of a chain of which `ids` is the whole text so far, read anew."""
    text = torch.tensor([ids])
    logits = model(
        input_ids=text,
        text_mask=torch.ones_like(text).bool(),
        image_mask=torch.tensor([True]),
        visual=visual,
        score_index=torch.tensor([len(ids) - 1]),
    ).token_logits[0]
    step, conclusion = (model.tokenizer.ids[name] for name in ("<|step|>", "<|conclusion|>"))
    if conclusion in ids:
        logits[[step, conclusion]] = -torch.inf
    if ids.count(step) >= most_steps - 1:
        logits[step] = -torch.inf
    return int(logits.argmax())


def test_the_same_seed_samples_the_same_text(lively_model, records):
    texts = [
        lively_model.generate_with_reasoning(
            records[0].image, "Fly.", temperature=1.0, top_p=0.9, seed=seed, max_new_tokens=20, form="text"
        )["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_tiny_top_p_takes_the_likeliest_token(lively_model, records):
    greedy, nucleus = (
        generate_ids(lively_model, [records[0].image], ["Fly."], Decoding(max_new_tokens=15, **options))
        for options in ({}, {"temperature": 1.0, "top_p": 1e-6})
    )
    assert greedy == nucleus


def test_a_result_has_the_guides_fields(lively_model, records):
    result = lively_model.generate_with_reasoning(records[0].image, "Fly.", max_new_tokens=8)
    assert {"reasoning_steps", "answer", "confidence"} <= result.keys()
    assert isinstance(result["reasoning_steps"], list) and 0 <= result["confidence"] <= 1


def test_the_reasoning_can_be_left_out_of_the_result(lively_model, records):
    result = lively_model.generate_with_reasoning(records[0].image, "Fly.", return_reasoning=False, max_new_tokens=4)
    assert "reasoning_steps" not in result


def test_generation_leaves_the_training_mode_as_it_was(lively_model, records):
    for mode in (True, False):
        lively_model.train(mode)
        lively_model.generate_with_reasoning(records[0].image, "Fly.", max_new_tokens=2)
        assert lively_model.training is mode


def test_a_picture_may_be_a_path_an_image_an_array_or_bytes(lively_model, records, tmp_path):
    with Image.open(records[0].image) as opened:
        image = opened.convert("RGB")
    path = tmp_path / "picture.png"  # a JPEG file would be decoded at less than its full size
    image.save(path)
    results = [
        lively_model.generate_with_reasoning(given, "Fly.", max_new_tokens=2)["head_probabilities"]
        for given in (path, path.read_bytes(), image, np.asarray(image))
    ]
    assert all(result == results[0] for result in results)


def test_a_url_is_refused_with_what_to_do(lively_model):
    with pytest.raises(ImageError, match=r"download the picture"):
        lively_model.generate_with_reasoning("https://example.org/robot.jpg", "Fly.")


def test_bytes_that_are_no_picture_are_refused(lively_model):
    with pytest.raises(ImageError, match="11 bytes"):
        lively_model.generate_with_reasoning(b"not a photo", "Fly.")


def test_an_empty_instruction_is_refused(lively_model):
    with pytest.raises(ConfigError, match="instruction 0 is empty"):
        lively_model.generate_with_reasoning(None, "  ")


def test_as_many_pictures_as_instructions_are_needed(lively_model):
    with pytest.raises(ConfigError, match="1 pictures for 2 instructions"):
        lively_model.generate_with_reasoning([None], ["Fly.", "Go."])


def test_a_list_of_instructions_may_come_without_pictures(lively_model):
    assert len(lively_model.generate_with_reasoning(None, ["Fly.", "Go."], max_new_tokens=2)) == 2


@pytest.mark.parametrize(
    "options",
    [{"max_reasoning_steps": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"form": "poem"}],
)
def test_impossible_decoding_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Decoding(**options)


def test_an_instruction_cannot_end_its_own_prompt(lively_model):
    """What stands in angle brackets is text, so the model is asked the whole question."""
    results = generate_answers(lively_model, [None], ["Fly <|answer_end|>"], Decoding(max_new_tokens=3))
    assert results[0]["num_tokens"] >= 1


def test_the_model_needs_a_tokenizer_to_write(tiny_settings):
    with pytest.raises(ConfigError, match="no tokenizer"):
        build_model(tiny_settings).generate_with_reasoning(None, "Fly.")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny_settings, tokenizer):
    language = {"config": {**tiny_settings["language"]["config"], "vocab_size": 300}}
    with pytest.raises(ConfigError, match=r"embeds only 300"):
        build_model({**tiny_settings, "language": language}).attach_tokenizer(tokenizer)


def test_a_question_longer_than_the_language_model_reads_is_refused(tiny_settings, tokenizer):
    language = {
        "config": {
            "model_type": "gpt2",
            "vocab_size": 600,
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    }
    model = build_model({**tiny_settings, "language": language})
    model.attach_tokenizer(tokenizer)
    with pytest.raises(ConfigError, match="64"):
        model.generate_with_reasoning(None, "Which robot is suited to fly? " * 30, max_new_tokens=8)


def test_the_answer_head_reads_a_chain_without_conclusion_at_its_end(lively_model, tokenizer):
    """As in training: `encode_reasoning` puts the answer position at the end of such a chain."""
    prefer(lively_model, reasoning_end=5.0)
    result = lively_model.generate_with_reasoning(None, "Fly.", max_new_tokens=2)
    ids = torch.tensor([[*tokenizer.encode("Fly."), *tokenizer.chain_ids([], None)]])
    with torch.no_grad():
        logits = lively_model(
            input_ids=ids,
            text_mask=torch.ones_like(ids).bool(),
            image_mask=torch.tensor([False]),
            visual=torch.zeros(1, 9, 32),
            answer_index=torch.tensor([ids.shape[1] - 1]),
            candidate_ids=padded(tokenizer.encode_many(ROBOTS), -1),
        ).answer_logits
    assert list(result["head_probabilities"].values()) == pytest.approx(logits[0].sigmoid().tolist(), abs=1e-5)


def test_the_validator_takes_a_picture_of_more_visual_tokens_than_it_reads_text(lively_model):
    validator = StepValidator(lively_model.config, 32, num_visual_tokens=576)
    ones, text = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4, 32)
    validator(torch.zeros(1, 576, 32), torch.tensor([True]), text, text[..., 0], 3 * ones, ones.bool())


# ---- files


def test_a_saved_model_loads_with_equal_logits(lively_model, checkpoint, batch):
    loaded = EmberVLM.from_pretrained(checkpoint)
    torch.testing.assert_close(token_logits(loaded, batch), token_logits(lively_model, batch), rtol=0, atol=0)


def test_a_saved_model_loads_ready_to_answer(lively_model, checkpoint, records):
    one, other = (
        model.generate_with_reasoning(records[0].image, "Fly.", max_new_tokens=6)
        for model in (lively_model, EmberVLM.from_pretrained(checkpoint))
    )
    assert one == other


def test_a_checkpoint_has_the_guides_file_names(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "pytorch_model.bin", "reasoning_module.bin", "tokenizer.json"} <= names


def test_transformers_knows_the_model(checkpoint, lively_model, batch):
    assert isinstance(AutoConfig.from_pretrained(checkpoint), EmberVLMConfig)
    loaded = AutoModel.from_pretrained(checkpoint)
    assert isinstance(loaded, EmberVLM)
    assert torch.equal(token_logits(loaded, batch), token_logits(lively_model, batch))


def test_a_stage3_checkpoint_holds_no_reasoning_module(tiny_settings, tokenizer, tmp_path):
    model = build_model({**tiny_settings, "stage": STAGE3})
    model.attach_tokenizer(tokenizer)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "reasoning_module.bin").exists()
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert {key.split(".")[0] for key in state} == set(BACKBONE)
    assert EmberVLM.from_pretrained(tmp_path).config.stage == STAGE3


def test_a_reasoning_module_loads_onto_another_backbone(tiny_settings, lively_model, checkpoint):
    other = build_model(tiny_settings)
    before = copy.deepcopy({name: getattr(other, name).state_dict() for name in BACKBONE})
    other.reasoning_module.load_state_dict(torch.load(checkpoint / "reasoning_module.bin", weights_only=True))
    expected = lively_model.reasoning_module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.reasoning_module.state_dict().items())
    for name in BACKBONE:
        assert all(torch.equal(value, before[name][key]) for key, value in getattr(other, name).state_dict().items())


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_weight_file_that_is_cut_short_is_named(checkpoint, share):
    path = checkpoint / "pytorch_model.bin"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"^\S*pytorch_model\.bin: cut short"):
        EmberVLM.from_pretrained(checkpoint)


NOT_TENSORS = pytest.param(b"hello")


@pytest.mark.parametrize("content", [b"\x00" * 100, NOT_TENSORS, b"\x80\x02}q\x00.", bytes(range(256))])
def test_a_weight_file_of_something_else_is_named(checkpoint, content):
    (checkpoint / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        EmberVLM.from_pretrained(checkpoint)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_code_in_a_weight_file_is_not_run(checkpoint, tmp_path):
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malicious(tmp_path / "broken into")}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        EmberVLM.from_pretrained(checkpoint)
    assert not (tmp_path / "broken into").exists()


def test_code_in_a_zipped_weight_file_is_not_run(checkpoint, tmp_path):
    torch.save({"weight": Malicious(tmp_path / "broken into")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        EmberVLM.from_pretrained(checkpoint)
    assert not (tmp_path / "broken into").exists()


@pytest.mark.parametrize("content", [[1, 2], {"weight": "text"}, torch.zeros(2)])
def test_a_weight_file_without_named_tensors_is_named(checkpoint, content):
    torch.save(content, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: does not contain named tensors"):
        EmberVLM.from_pretrained(checkpoint)


def test_a_missing_weight_file_is_named(checkpoint):
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"^\S*pytorch_model\.bin: missing"):
        EmberVLM.from_pretrained(checkpoint)


def test_a_checkpoint_of_another_size_is_named_with_both_shapes(tiny_settings, checkpoint):
    wider = build_model({**tiny_settings, "projection_hidden_size": 64})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: belongs to another model.*\[48.*\[64"):
        load_checkpoint_into(wider, checkpoint, COMPONENTS)


def test_a_checkpoint_of_another_size_changes_no_weight(tiny_settings, checkpoint):
    wider = build_model({**tiny_settings, "projection_hidden_size": 64})
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(CheckpointError):
        load_checkpoint_into(wider, checkpoint, COMPONENTS)
    assert all(torch.equal(value, before[key]) for key, value in wider.state_dict().items())


@pytest.mark.parametrize("name", ["/nowhere/checkpoint", "./nowhere", "nowhere"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        EmberVLM.from_pretrained(name)


def test_a_hub_id_that_cannot_be_had_is_named():
    with pytest.raises(CheckpointError, match="nobody/no-such-model"):
        EmberVLM.from_pretrained("nobody/no-such-model")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        EmberVLM.from_pretrained(tmp_path)


def test_a_damaged_config_is_named(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "embervlm", "vis')
    with pytest.raises(CheckpointError, match=r"config\.json"):
        EmberVLM.from_pretrained(checkpoint)


def test_a_checkpoint_without_its_tokenizer_is_named(checkpoint):
    for path in checkpoint.glob("*tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match=str(checkpoint)):
        EmberVLM.from_pretrained(checkpoint)


# ---- parts from elsewhere


@pytest.mark.parametrize("part", ["vision", "language"])
@pytest.mark.parametrize("name", ["/nowhere/backbone", "nobody/no-such-backbone"])
def test_a_pretrained_part_that_cannot_be_had_is_named(tiny_settings, part, name):
    with pytest.raises(ConfigError) as caught:
        build_model({**tiny_settings, part: {"name_or_path": name, "pretrained": True}})
    assert name in str(caught.value) and f"{part}.name_or_path" in str(caught.value)


def test_a_part_that_is_neither_named_nor_described_is_refused(tiny_settings):
    with pytest.raises(ConfigError, match=r"vision: neither name_or_path nor config\.model_type"):
        build_model({**tiny_settings, "vision": {}})


def test_pretrained_without_a_name_is_refused(tiny_settings):
    with pytest.raises(ConfigError, match="language: pretrained is true, but name_or_path is empty"):
        build_model({**tiny_settings, "language": {**tiny_settings["language"], "pretrained": True}})


def test_an_unknown_model_type_is_refused(tiny_settings):
    with pytest.raises(ConfigError, match="no_such_type"):
        build_model({**tiny_settings, "vision": {"config": {"model_type": "no_such_type"}}})


def test_an_unknown_model_setting_is_refused(tiny_settings):
    with pytest.raises(ConfigError, match="reasoning_widht"):
        build_model({**tiny_settings, "reasoning_widht": 3})


@pytest.mark.parametrize("wrong", [{"pretraind": True}, {"config": {"num_hiden_layers": 9}}])
def test_a_typo_inside_a_part_is_refused(tiny_settings, wrong):
    part = {**tiny_settings["vision"], **wrong}
    part["config"] = {**tiny_settings["vision"]["config"], **wrong.get("config", {})}
    with pytest.raises(ConfigError):
        build_model({**tiny_settings, "vision": part})


def test_a_width_that_its_heads_do_not_divide_is_refused(tiny_settings):
    with pytest.raises(ConfigError, match="32"):
        build_model({**tiny_settings, "reasoning_heads": 5})


def test_a_local_folder_serves_as_pretrained_part(tiny_settings, tiny_model, tmp_path):
    tiny_model.vision_encoder.backbone.save_pretrained(tmp_path)
    built = build_model({**tiny_settings, "vision": {"name_or_path": str(tmp_path), "pretrained": True}})
    expected = tiny_model.vision_encoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in built.vision_encoder.state_dict().items())


VISION_FAMILIES = {
    "vit": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 64,
            "patch_size": 16,
        },
        16,
    ),
    "pvt_v2": (
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "image_size": 64},
        4,
    ),
    "mobilevitv2": ({"image_size": 64, "width_multiplier": 0.25}, 4),
    "convnextv2": ({"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64}, 4),
    "dinov2": (
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
        16,
    ),
    "dinov2_with_registers": (
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
        16,
    ),
}


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_vision_encoder_of_any_family_gives_a_grid(family):
    settings, tokens = VISION_FAMILIES[family]
    encoder = VisionEncoder(EmberVLMConfig(vision={"config": {"model_type": family, **settings}}, image_size=64))
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, tokens, encoder.vision_dim)
    assert encoder.grid.size == encoder.num_visual_tokens == tokens


def test_visual_tokens_can_be_pooled_to_fewer():
    settings, _ = VISION_FAMILIES["vit"]
    config = EmberVLMConfig(vision={"config": {"model_type": "vit", **settings}}, image_size=64, num_visual_tokens=4)
    assert VisionEncoder(config).num_visual_tokens == 4


def test_visual_tokens_can_be_pooled_to_other_rows_than_columns():
    settings, _ = VISION_FAMILIES["vit"]
    pictures, found = torch.randn(1, 3, 64, 64), []
    for asked in (None, [2, 4]):
        torch.manual_seed(0)
        vision = {"config": {"model_type": "vit", **settings}}
        encoder = VisionEncoder(EmberVLMConfig(vision=vision, image_size=64, num_visual_tokens=asked)).eval()
        found.append(encoder(pictures).detach().view(*encoder.grid, -1))
    whole, pooled = found
    assert pooled.shape[:2] == (2, 4)
    torch.testing.assert_close(pooled[1, 3], whole[2:, 3].mean(0))


def test_oblong_patches_are_read_row_by_row_behind_the_class_token():
    """Nine features: a class token and 2 x 4 patches, not 3 x 3."""
    settings, _ = VISION_FAMILIES["vit"]
    vision = {"config": {"model_type": "vit", **settings, "patch_size": [32, 16], "num_hidden_layers": 0}}
    encoder = VisionEncoder(EmberVLMConfig(vision=vision, image_size=64)).eval()
    assert encoder.grid == (2, 4)
    dark, bright = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    bright[:, :, 32:, 16:32] = 1
    changed = (encoder(dark) - encoder(bright)).abs().sum(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 1]


@pytest.mark.parametrize("family", ["yolos", "vit_mae"])
def test_features_that_are_no_grid_are_refused(family):
    """Of YOLOS objects stand behind the patches; a ViT of MAE leaves most patches out."""
    settings = {**VISION_FAMILIES["vit"][0], **({"image_size": [64, 64]} if family == "yolos" else {})}
    with pytest.raises(ConfigError, match=f"vision: {family} gives .* does not tell in which rows and columns"):
        VisionEncoder(EmberVLMConfig(vision={"config": {"model_type": family, **settings}}, image_size=64))


def test_a_number_of_visual_tokens_that_is_no_square_is_refused():
    settings, _ = VISION_FAMILIES["vit"]
    config = EmberVLMConfig(vision={"config": {"model_type": "vit", **settings}}, image_size=64, num_visual_tokens=5)
    with pytest.raises(ConfigError, match=r"5 is not a square number; for other shapes give \[rows, columns\]"):
        VisionEncoder(config)
    config.num_visual_tokens = [2, 0]
    with pytest.raises(ConfigError, match=r"\[2, 0\] is not \[rows, columns\], two numbers above 0"):
        VisionEncoder(config)


def test_every_weight_of_the_vision_encoder_learns(tiny_model, batch):
    tiny_model.train()
    loss_of(tiny_model, batch).backward()
    assert {name for name, p in tiny_model.vision_encoder.named_parameters() if p.grad is None} == set()


def test_visual_tokens_stand_row_by_row(tiny_settings):
    """A bright patch in the second row and third column shows in visual token 1 * 3 + 2."""
    torch.manual_seed(0)
    vision = {"config": {**tiny_settings["vision"]["config"], "num_hidden_layers": 0}}
    encoder = VisionEncoder(EmberVLMConfig(vision=vision, image_size=36)).eval()
    dark, bright = torch.zeros(1, 3, 36, 36), torch.zeros(1, 3, 36, 36)
    bright[:, :, 12:24, 24:36] = 1
    with torch.no_grad():
        changed = (encoder(dark) - encoder(bright)).abs().sum(-1)[0]
    assert changed.nonzero().flatten().tolist() == [5]


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64}
LANGUAGE_FAMILIES = {
    "llama": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 24},
    "llama with biases": {
        **SMALL,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 24,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama of grouped heads": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24},
    "qwen2": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24},
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_one_token_more_gives_what_reading_the_whole_text_gives(family, padded):
    torch.manual_seed(0)
    part = {"config": {"model_type": family.split()[0], **LANGUAGE_FAMILIES[family]}}
    language_model = LanguageModel(EmberVLMConfig(language=part)).eval()
    for weight in language_model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    mask = torch.ones(3, 20, dtype=torch.bool)
    if padded:
        mask[1, :7] = False
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        embeds = language_model.embed(torch.randint(50, (3, 20)))
        whole = language_model(embeds, mask.long(), positions)
        cache = roomy_cache(20)
        language_model(embeds[:, :12], mask[:, :12].long(), positions[:, :12], cache)
        step = language_step(language_model, room=20)
        for place in range(12, 20):
            seen = mask[:, : place + 1]
            unseen = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None] if padded else None
            states = step(embeds[:, place], seen, unseen, positions[:, place, None], cache)
            torch.testing.assert_close(states, whole[:, place], rtol=1e-4, atol=1e-5)


# ---- sizes and memory


SIZES = {
    "total": {"embervlm-39m": 39.0, "embervlm-48m": 48.3},
    "language_model": {"embervlm-39m": 30.0, "embervlm-48m": 30.0},
    "projection": {"embervlm-39m": 2.0, "embervlm-48m": 2.0},
    "reasoning_head": {"embervlm-39m": 1.5, "embervlm-48m": 1.5},
    "step_validator": {"embervlm-39m": 0.5, "embervlm-48m": 0.5},
    "answer_head": {"embervlm-39m": 0.3, "embervlm-48m": 0.3},
    "vision_encoder": {"embervlm-48m": 14.0},
}
"""Millions of parameters that the Stage 4 guide names."""


@pytest.fixture(scope="module")
def sizes():
    found = {}
    for name in ("embervlm-39m", "embervlm-48m"):
        counts = build_model(model_preset(name), load_pretrained=False).parameter_counts()
        found[name] = {**counts, "total": sum(counts.values())}
    return found


@pytest.mark.parametrize(("part", "preset"), [(part, preset) for part, of in SIZES.items() for preset in of])
def test_a_preset_has_the_guides_size(sizes, part, preset):
    assert sizes[preset][part] / 1e6 == pytest.approx(SIZES[part][preset], rel=0.03)


def test_the_quickstart_model_is_small():
    counts = build_model(model_preset("quickstart"), load_pretrained=False).parameter_counts()
    assert 1.8e6 < sum(counts.values()) < 4e6


def test_tied_weights_count_once(tiny_model):
    model = tiny_model.language_model
    assert tiny_model.parameter_counts()["language_model"] == sum(p.numel() for p in model.parameters())
    assert model.backbone.get_input_embeddings().weight is model.backbone.get_output_embeddings().weight


def test_gradient_checkpointing_gives_the_same_gradients(lively_model, batch):
    other = copy.deepcopy(lively_model)
    other.enable_gradient_checkpointing()
    for model in (lively_model.train(), other.train()):
        loss_of(model, batch).backward()
    expected = gradients(lively_model)
    found = gradients(other)
    assert expected.keys() == found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_a_prepared_picture_is_between_minus_one_and_one(tiny_model):
    pictures = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(36 * 36 * 3).view(2, 36, 36, 3)
    pixels = tiny_model.normalise(pictures)
    assert (pixels[0] == -1).all() and (pixels[1] == 1).all() and pixels.shape == (2, 3, 36, 36)


def test_pictures_may_be_given_as_visual_tokens(lively_model, batch):
    visual = lively_model.see(lively_model.normalise(batch.inputs["pictures"]))[batch.inputs["picture_rows"]]
    torch.testing.assert_close(
        token_logits(lively_model, batch, pictures=None, visual=visual), token_logits(lively_model, batch)
    )


def test_a_forward_pass_without_any_picture_input_is_refused(lively_model, batch):
    with pytest.raises(ValueError, match="pictures or visual"):
        lively_model(**{**batch.inputs, "pictures": None})


def test_a_record_of_the_data_file_can_be_answered(lively_model, scene_data):
    record = read_records(scene_data / "reasoning_data.json", candidates=ROBOTS)[0]
    with Image.open(record.image) as image:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
    result = lively_model.generate_with_reasoning(buffer.getvalue(), record.instruction, max_new_tokens=4)
    assert set(result["head_answer"]) <= set(ROBOTS)


def test_tokens_are_drawn_as_often_as_their_probability_within_the_nucleus_says():
    import random

    from embervlm.model.writer import Row, draw

    def rows(**how):
        decoding = Decoding(**how)
        about = {"decoding": decoding, "num_steps": 0, "concluded": False, "in_answer": False, "room": 9}
        return [Row(place=place, random=random.Random(f"3 {place}"), **about) for place in range(4000)]

    scores = torch.tensor([0.5, 0.3, 0.0, 0.2]).log().expand(4000, -1)
    assert torch.allclose(share(draw(scores, rows(temperature=1.0))), torch.tensor([0.5, 0.3, 0.0, 0.2]), atol=0.02)
    squared = torch.tensor([0.25, 0.09, 0.0, 0.04]) / 0.38
    assert torch.allclose(share(draw(scores, rows(temperature=0.5))), squared, atol=0.02)
    nucleus = torch.tensor([0.625, 0.375, 0.0, 0.0])
    assert torch.allclose(share(draw(scores, rows(temperature=1.0, top_p=0.7))), nucleus, atol=0.02)


def share(tokens):
    return torch.bincount(tokens, minlength=4) / len(tokens)


def test_a_drawn_text_does_not_depend_on_what_is_drawn_beside_it(lively_model, records):
    settings = Decoding(max_new_tokens=20, temperature=1.5, seed=4)
    images, texts = [record.image for record in records[:4]], [record.instruction for record in records[:4]]
    together = generate_ids(lively_model, images, texts, settings)
    fewer = generate_ids(lively_model, [images[0], None], [texts[0], "Fly."], settings)
    assert together[0] == fewer[0] and len({tuple(ids) for ids in together}) == 4
