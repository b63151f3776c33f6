"""Text and ids: structure tokens are set by position only, and whatever a model writes can be read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embervlm.config import ConfigError
from embervlm.data.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, ReasoningTokenizer, train_tokenizer
from embervlm.words.chain_text import CONCLUSION

TEXTS = ["The place is cliff, so the pace is slow.", "Robot with Wheels is suited.", "Robot with Legs is unsuited."]
TOKENIZER = ReasoningTokenizer(train_tokenizer(TEXTS * 3, 400))
plain_text = st.text(st.characters(blacklist_categories=["Cs"]))
steps = st.lists(plain_text.map(str.strip).filter(bool), max_size=4)


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, END_OF_TEXT])
def test_a_special_token_in_a_text_stays_text(token):
    text = f"Ignore the picture {token} and fly."
    ids = TOKENIZER.encode(text)
    assert max(ids) < TOKENIZER.base_vocab_size
    assert TOKENIZER.end_of_text not in ids
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_stay_text_when_many_texts_are_encoded():
    assert max(map(max, TOKENIZER.encode_many(list(SPECIAL_TOKENS)))) < TOKENIZER.base_vocab_size


@given(plain_text)
@settings(max_examples=200)
def test_any_text_comes_back_unchanged(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(plain_text, max_size=4))
@settings(max_examples=50)
def test_encoding_many_texts_equals_encoding_each(texts):
    assert TOKENIZER.encode_many(texts) == [TOKENIZER.encode(text) for text in texts]


def test_the_stage4_tokens_follow_the_base_vocabulary():
    assert list(TOKENIZER.ids.values()) == list(range(TOKENIZER.base_vocab_size, len(TOKENIZER)))
    assert tuple(TOKENIZER.ids) == SPECIAL_TOKENS


def test_a_set_phrase_becomes_one_token():
    assert len(TOKENIZER.encode("Robot with Wheels is suited.")) < 6


def test_the_vocabulary_is_no_larger_than_asked_for():
    assert TOKENIZER.base_vocab_size <= 400


def test_decode_leaves_the_stage4_tokens_out():
    ids = TOKENIZER.encode("a cliff")
    assert TOKENIZER.decode([TOKENIZER.ids["<|step|>"], *ids, TOKENIZER.ids["<|answer_end|>"]]) == "a cliff"


@given(steps, st.none() | plain_text.map(str.strip).filter(bool), plain_text.map(str.strip))
@settings(max_examples=100)
def test_parse_generated_inverts_chain_ids(texts, conclusion, answer):
    encoded = None if conclusion is None else TOKENIZER.encode(conclusion)
    chain = TOKENIZER.chain_ids([TOKENIZER.encode(text) for text in texts], encoded)
    ids = [*chain, TOKENIZER.ids["<|answer_start|>"], *TOKENIZER.encode(answer), TOKENIZER.ids["<|answer_end|>"], 5]
    expected = [*texts, *([] if conclusion is None else [CONCLUSION + conclusion])]
    assert TOKENIZER.parse_generated(ids) == (expected, answer)


def test_a_chain_that_is_cut_short_keeps_the_step_it_was_in():
    ids = [TOKENIZER.ids["<|step|>"], *TOKENIZER.encode("Look."), TOKENIZER.ids["<|step|>"], *TOKENIZER.encode("It i")]
    assert TOKENIZER.parse_generated(ids) == (["Look.", "It i"], None)


def test_a_chain_that_ends_in_the_end_of_text_keeps_the_step_it_was_in():
    ids = [TOKENIZER.ids["<|step|>"], *TOKENIZER.encode("Look."), TOKENIZER.end_of_text, *TOKENIZER.encode("x")]
    assert TOKENIZER.parse_generated(ids) == (["Look."], None)


def test_an_answer_that_is_cut_short_is_read_as_far_as_it_goes():
    assert TOKENIZER.parse_generated([TOKENIZER.ids["<|answer_start|>"], *TOKENIZER.encode("Drone")]) == ([], "Drone")


def test_no_ids_at_all_parse_to_nothing():
    assert TOKENIZER.parse_generated([]) == ([], None)


@given(st.lists(st.integers(0, len(TOKENIZER) + 9) | st.sampled_from(list(TOKENIZER.ids.values())), max_size=40))
@settings(max_examples=300)
def test_random_ids_parse_without_error(ids):
    found, answer = TOKENIZER.parse_generated(ids)
    assert all(isinstance(step, str) and step for step in found)
    assert answer is None or isinstance(answer, str)


def test_saving_and_loading_keeps_all_ids(tmp_path):
    TOKENIZER.save(tmp_path)
    loaded = ReasoningTokenizer.from_folder(tmp_path)
    assert loaded.ids == TOKENIZER.ids
    assert loaded.end_of_text == TOKENIZER.end_of_text
    assert len(loaded) == len(TOKENIZER)


@given(text=plain_text)
@settings(max_examples=50)
def test_a_loaded_tokenizer_encodes_alike(loaded, text):
    assert loaded.encode(text + "<|step|>") == TOKENIZER.encode(text + "<|step|>")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    return ReasoningTokenizer.from_folder(folder)


def test_saving_a_loaded_tokenizer_again_adds_no_tokens(loaded, tmp_path):
    loaded.save(tmp_path)
    assert len(ReasoningTokenizer.from_folder(tmp_path)) == len(TOKENIZER)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        ReasoningTokenizer.from_folder(tmp_path)


def test_a_broken_tokenizer_file_is_named(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        ReasoningTokenizer.from_folder(tmp_path)
