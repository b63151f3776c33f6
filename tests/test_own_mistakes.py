"""The model's own mistakes: where it leans towards another value, and how it would have gone on."""

import dataclasses
import json
import math

import pytest
import torch

from embervlm.data.collate import Collator
from embervlm.data.dataset import encode_direct, encode_reasoning
from embervlm.data.negatives import PAIR_SEGMENTS, PairMaker
from embervlm.data.samples import Grid
from embervlm.data.tokenizer import ReasoningTokenizer, train_tokenizer
from embervlm.model.config import EmberVLMConfig
from embervlm.model.embervlm import build_model
from embervlm.model.inputs import Inputs
from embervlm.model.own_mistakes import own_mistakes
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.losses import loss_sums
from embervlm.words.chain_text import format_reasoning

NUM = 6


@pytest.fixture(scope="module")
def words(records):
    """A tokenizer as a run trains it: every value is a token of its own."""
    values = {value for record in records for value in record.metadata["facts"].values()}
    texts = [text for r in records for text in (r.instruction, format_reasoning(r.steps), ", ".join(r.answer))]
    return ReasoningTokenizer(train_tokenizer(texts, 600, values | set(ROBOTS)))


@pytest.fixture(scope="module")
def chains(records, words):
    return encode_reasoning(records, words, grid=Grid(3, 3), max_length=512)


@pytest.fixture
def model(tiny_settings, words):
    torch.manual_seed(0)
    model = build_model(tiny_settings)
    model.attach_tokenizer(words)
    torch.nn.init.normal_(model.reasoning_module.reasoning_head.output.weight, std=0.5)
    return model.eval()


@pytest.fixture
def collator(records, words, chains, pictures):
    return Collator(records, words, pictures, seed=0, image_size=36, pair_maker=PairMaker(records, chains, words))


def asked_of_own(collator, chains):
    """A batch in which some chains are asked about their own mistakes, and some about planted ones."""
    for step in range(20):
        batch = collator(chains[:NUM], step=step)
        own = len(batch.inputs["own_record"])
        if 1 < own < NUM and batch.targets["valid_weight"].all():
            return batch
    raise AssertionError("never both")


def drawn(model, batch):
    """The pairs of the own mistakes."""
    inputs = batch.inputs
    with torch.no_grad():
        visual = model.see(model.normalise(inputs["pictures"]))[inputs["picture_rows"]]
        logits = model(**inputs).token_logits
        pairs = own_mistakes(model.with_own_predictions, model.base_vocab_size, visual, Inputs(**inputs), logits)
    return pairs, logits, visual


def test_a_value_place_is_the_first_token_of_a_known_value_in_its_step(records, words, chains):
    maker = PairMaker(records, chains, words)
    for sample in chains[:NUM]:
        text, facts = [*sample.prompt, *sample.target], records[sample.record].metadata["facts"]
        places = maker.value_places(sample)
        assert len(places) >= 10
        for at, start, end in places:
            assert (start + 1, end) in sample.step_spans and start < at < end
            assert words.decode(text[at : at + 1]).strip() in facts.values()


def test_records_without_facts_are_asked_nothing_of_their_own(words, pictures, records):
    bare = [dataclasses.replace(record, metadata={}) for record in records[:4]]
    chains = encode_reasoning(bare, words, grid=Grid(3, 3), max_length=512)
    maker = PairMaker(bare, chains, words)
    assert maker.value_places(chains[0]) == []
    options = {"seed": 0, "image_size": 36, "pair_maker": maker}
    assert "own_places" not in Collator(bare, words, pictures, **options)(chains, step=0).inputs


def test_the_validator_is_asked_about_a_valid_and_a_wrong_step_of_each_chain(collator, chains, model):
    batch = asked_of_own(collator, chains)
    own = batch.inputs["own_record"].tolist()
    assert batch.counts["consistency"] == len(batch.targets["valid"]) == 2 * NUM
    rows = [*batch.inputs["pair_record"].tolist(), *own]
    for valid in (0, 1):
        assert sorted(row for row, asked in zip(rows, batch.targets["valid"]) if asked == valid) == list(range(NUM))
    assert not batch.targets["valid"][-len(own) :].any()
    assert model(**batch.inputs).validator_logits.shape == batch.targets["valid"].shape


def test_a_batch_without_own_mistakes_runs_a_stand_in_that_counts_nothing(collator, records, words, model):
    """Sharded engines match what the processes compute by its order."""
    batch = collator(encode_direct(records, words)[:2], step=0)
    assert batch.counts["consistency"] == 0 and len(batch.inputs["own_record"]) == 1
    assert not batch.targets["valid_weight"].any()
    assert loss_sums(model(**batch.inputs), batch.targets)["consistency"] == 0


def test_the_mistake_is_the_value_that_the_model_leans_to_most(collator, chains, model):
    """Worked anew from the logits, one chain at a time."""
    batch = asked_of_own(collator, chains)
    pairs, logits, _ = drawn(model, batch)
    for row, record in enumerate(batch.inputs["own_record"].tolist()):
        wrong = pairs["pair_ids"][row]
        gold = batch.inputs["input_ids"][record][: len(wrong)]
        probability = {}
        for score, at, _, end in batch.inputs["own_places"][row].tolist():
            probability[at, end] = logits[score].softmax(-1)[gold[at]].item(), logits[score]
        (at, end), (_, scores) = min(probability.items(), key=lambda found: found[1][0])
        assert (gold != wrong).nonzero()[0].item() == at  # nothing before it is changed
        scores = scores[: model.tokenizer.base_vocab_size].clone()
        scores[gold[at]] = -torch.inf
        assert wrong[at] == scores.argmax()
        assert pairs["pair_mask"][row].sum() == end and torch.equal(gold[end:], wrong[end:])


def test_the_model_goes_on_from_its_mistake_to_the_end_of_the_step(collator, chains, model):
    batch = asked_of_own(collator, chains)
    pairs, _, visual = drawn(model, batch)
    for row, record in enumerate(batch.inputs["own_record"].tolist()):
        wrong, mask = pairs["pair_ids"][row], pairs["pair_mask"][row]
        begun = batch.inputs["input_ids"][record][: len(wrong)].clone()
        at = (begun != wrong).nonzero()[0].item()
        begun[at] = wrong[at]
        with torch.no_grad():
            seen = visual[record : record + 1], torch.tensor([True])
            hidden = model.read(*seen, begun[None], mask[None])
            hidden, _ = model.refine(hidden, begun[None], *seen)
            likeliest = model.token_logits(hidden)[0, :, : model.tokenizer.base_vocab_size].argmax(-1)
        last = int(mask.sum())
        assert wrong[at + 1 : last].tolist() == likeliest[at : last - 1].tolist()


def test_question_chain_so_far_and_step_are_told_apart(collator, chains, model):
    batch = asked_of_own(collator, chains)
    pairs, _, _ = drawn(model, batch)
    for row, record in enumerate(batch.inputs["own_record"].tolist()):
        sample = chains[record]
        names = [PAIR_SEGMENTS[kind] for kind in pairs["pair_segments"][row][pairs["pair_mask"][row]].tolist()]
        start, end = next(span for span in sample.step_spans if span[1] == len(names))
        before = start - 1 - len(sample.prompt)
        assert names == ["question"] * len(sample.prompt) + ["previous"] * before + ["step"] * (end - start + 1)


def test_half_of_the_chains_are_asked_about_their_own_mistake(collator, chains):
    found = [len(collator(chains[:NUM], step=step).inputs["own_record"]) for step in range(40)]
    assert 0.35 < sum(found) / (40 * NUM) < 0.65


def test_a_new_validator_tells_small_surprises_apart_and_an_older_one_reads_them_as_it_learned(
    tiny_settings, model, tmp_path
):
    """Between a hundredth of a nat and one lies what a hesitating model says of itself."""
    older = EmberVLMConfig(**tiny_settings)
    assert model.config.surprise_by_magnitude and not older.surprise_by_magnitude
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    del kept["surprise_by_magnitude"]
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.json").write_text(json.dumps(kept))
    assert not EmberVLMConfig.from_pretrained(tmp_path / "older").surprise_by_magnitude
    seen = []
    validator = model.reasoning_module.step_validator
    validator.surprise.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten().tolist()))
    hidden = torch.zeros(1, 3, 32)
    for by_magnitude in (True, False):
        validator.surprise_by_magnitude = by_magnitude
        segments, mask = torch.full((1, 3), PAIR_SEGMENTS.index("step")), torch.ones(1, 3, dtype=torch.bool)
        validator(torch.zeros(1, 9, 32), torch.tensor([True]), hidden, torch.tensor([[0.0, 0.01, 1.0]]), segments, mask)
    assert seen[0] == pytest.approx([0.0, math.log(2), math.log(101)], rel=1e-4)
    assert seen[1] == pytest.approx([0.0, 0.01, 1.0])
