"""Judges by name: the embedded one, and models of others from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from embervlm.config import ConfigError
from embervlm.judge.backends import EMBEDDED_VERSION, make_backends
from embervlm.judge.metrics import ChainScorer
from embervlm.judge.reading import ChainContext

WORDS = "the lamp is not dark bright iron wood conducts badly well . conclusion :".split()
STEPS = ["The lamp is dark.", "Iron conducts well.", "Conclusion: the lamp is bright."]


def save_model(folder: Path, *, nli: bool = False, labels=("contradiction", "entailment", "neutral"), seed=0) -> str:
    """A tiny model with random weights, as its authors would publish it."""
    folder.mkdir()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: n for n, name in enumerate(labels)},
        initializer_range=1.0,
    )
    torch.manual_seed(seed)
    (BertForSequenceClassification if nli else BertModel)(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    return str(folder)


def states_of(folder: str, text: str) -> torch.Tensor:
    tokenizer, model = BertTokenizerFast.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]


def test_a_sentence_encoder_compares_means_of_token_states(tmp_path):
    folder = save_model(tmp_path / "encoder")
    found = make_backends(similarity=folder).similarity.matrix(STEPS)
    vectors = [torch.nn.functional.normalize(states_of(folder, step).mean(0), dim=0) for step in STEPS]
    expected = [[max(float(a @ b), 0) for b in vectors] for a in vectors]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_sentence_encoder_pools_as_its_folder_says(tmp_path):
    folder = save_model(tmp_path / "encoder")
    (Path(folder) / "1_Pooling").mkdir()
    settings = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}
    (Path(folder) / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    found = make_backends(similarity=folder).similarity.matrix(STEPS[:2])
    a, b = (torch.nn.functional.normalize(states_of(folder, step)[0], dim=0) for step in STEPS[:2])
    assert found[0, 1] == pytest.approx(max(float(a @ b), 0), abs=1e-5)


def test_a_pooling_that_is_not_known_is_an_error(tmp_path):
    folder = save_model(tmp_path / "encoder")
    (Path(folder) / "1_Pooling").mkdir()
    (Path(folder) / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ConfigError, match="pools by pooling_mode_max_tokens"):
        make_backends(similarity=folder)


def test_a_cross_encoder_judges_premise_and_hypothesis_by_its_labels(tmp_path):
    folder = save_model(tmp_path / "nli", nli=True, labels=("ENTAILMENT", "neutral", "Contradiction"))
    entailed, contradicted = make_backends(entailment=folder).entailment.judge(STEPS, [(0, 2), (2, 0)])
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        shares = [
            model(**tokenizer([STEPS[a]], [STEPS[b]], return_tensors="pt")).logits.softmax(-1)[0]
            for a, b in ((0, 2), (2, 0))
        ]
    np.testing.assert_allclose(entailed, [float(share[0]) for share in shares], atol=1e-5)
    np.testing.assert_allclose(contradicted, [float(share[2]) for share in shares], atol=1e-5)
    assert abs(entailed[0] - entailed[1]) > 1e-4  # the order of the pair matters


def test_chains_are_scored_with_models_of_others_and_the_record_names_them(tmp_path):
    similarity, entailment = save_model(tmp_path / "encoder"), save_model(tmp_path / "nli", nli=True)
    scorer = ChainScorer.fit(similarity=similarity, entailment=entailment)
    scores = scorer.score(STEPS, ChainContext(instruction="Is the lamp dark?"))
    plain = ChainScorer.fit().score(STEPS, ChainContext(instruction="Is the lamp dark?"))
    assert 0 <= scores["reasoning_consistency"] <= 1 and scores["adjacent_similarity"] != plain["adjacent_similarity"]
    record = scorer.backends.record
    assert record["similarity"]["name"] == similarity and record["entailment"]["name"] == entailment
    assert record["similarity"]["version"].startswith("sha256:")
    assert record["similarity"]["version"] != record["entailment"]["version"]


def test_other_weights_are_another_version(tmp_path):
    one, other = (save_model(tmp_path / f"encoder{seed}", seed=seed) for seed in (0, 1))
    first, again, second = (make_backends(similarity=folder).similarity.version for folder in (one, one, other))
    assert first == again != second


def test_a_classifier_of_something_else_is_an_error(tmp_path):
    folder = save_model(tmp_path / "nli", nli=True, labels=("positive", "negative"))
    with pytest.raises(ConfigError, match=r"labels are \['negative', 'positive'\], none is entailment"):
        make_backends(entailment=folder)


@pytest.mark.parametrize("use", ["similarity", "entailment"])
def test_a_model_that_is_not_there_is_an_error(tmp_path, use):
    with pytest.raises(ConfigError, match=f"{use} backend .*nowhere: no such folder"):
        make_backends(**{use: str(tmp_path / "nowhere")})


def test_the_embedded_judge_names_its_version_and_the_chains_it_was_fitted_on():
    plain, fitted, other = (ChainScorer.fit(chains) for chains in ([], [STEPS, STEPS[::-1]], [STEPS, STEPS]))
    versions = [scorer.backends.record["similarity"]["version"] for scorer in (plain, fitted, other)]
    version = str(EMBEDDED_VERSION)
    assert (
        versions[0] == version
        and versions[1].startswith(f"{version}, fitted on 2 chains (")
        and len(set(versions)) == 3
    )
    assert fitted.backends.record["entailment"] == fitted.backends.record["similarity"]
