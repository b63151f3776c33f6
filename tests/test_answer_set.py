"""What answers are chosen from comes from the records; whatever says otherwise is refused or told, never overruled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_helpers import CPU, TINY, make_tokenizer, write_model_yaml

from embervlm.config import ConfigError, TrainConfig
from embervlm.data.answer_space import told_answers
from embervlm.data.store import prepare
from embervlm.evaluation.eval_data import Evaluation
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.start import adopt_tokenizer, model_settings, start_from
from embervlm.world import World


def test_a_preset_that_names_answers_is_refused_with_the_place_for_them(tmp_path):
    preset = write_model_yaml(tmp_path, candidates=["Yes", "No"])
    with pytest.raises(ConfigError, match=r"tiny.yaml: candidates: Yes, No would not be used: .*metadata.candidates"):
        model_settings(TrainConfig(model=str(preset)), 4)
    same = write_model_yaml(tmp_path, candidates=list(ROBOTS))
    assert model_settings(TrainConfig(model=str(same)), 3)["candidates"] == ROBOTS


@pytest.mark.parametrize(("own", "told"), [(("Yes", "No"), True), (ROBOTS, False), ((), False)])
def test_a_run_says_that_it_does_not_take_over_the_answers_of_the_checkpoint(tmp_path, records, capsys, own, told):
    model = build_model({**TINY, "stage": 3, "candidates": own}, load_pretrained=False)
    model.attach_tokenizer(make_tokenizer(records))
    model.save_pretrained(tmp_path / "start")
    config = TrainConfig(model=str(write_model_yaml(tmp_path)), output_dir=str(tmp_path / "out"))
    started = start_from(config, World(0, 1, CPU), tmp_path / "start", 4)
    assert ("its answers (Yes, No) are not used" in capsys.readouterr().out) is told
    assert tuple(started.config.candidates) == ROBOTS


def test_a_new_model_embeds_the_tokens_of_its_data_and_no_more(tmp_path, records):
    torch.manual_seed(0)
    language = {"config": {**TINY["language"]["config"], "vocab_size": 4096}}
    config = TrainConfig(model=str(write_model_yaml(tmp_path, language=language)), output_dir=str(tmp_path / "out"))
    model = build_model(model_settings(config, 3))
    adopt_tokenizer(config, model, records)
    used = model.tokenizer.base_vocab_size
    assert used <= model.language_model.vocab_size < used + 64 and model.language_model.vocab_size % 64 == 0
    model.save_pretrained(tmp_path / "stage3")
    started = start_from(config, World(0, 1, CPU), tmp_path / "stage3", 4)
    again = EmberVLM.from_pretrained(tmp_path / "stage3")
    for found in (started, again):
        theirs = found.language_model.backbone.get_input_embeddings().weight
        torch.testing.assert_close(theirs, model.language_model.backbone.get_input_embeddings().weight)


def test_a_start_counts_the_records_by_what_their_answers_are_chosen_from(tmp_path):
    chain = "Step 1: Look.\nStep 2: Count.\nConclusion: So it is."
    kinds = [("Drone", None), ("Yes", ["Yes", "No"]), ("three", []), ("four", ["four"])]
    values = [
        {"instruction": f"Question {n}?", "reasoning": chain, "answer": answer}
        | ({} if own is None else {"metadata": {"candidates": own}})
        for n, (answer, own) in enumerate(kinds)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(values))
    store = prepare(path, tmp_path / "cache", candidates=ROBOTS)
    assert store.answer_kinds == {"domain": 1, "own": 1, "open": 2}
    assert told_answers(store.answer_kinds) == (
        "answers: 1 records choose among the domain's candidates, 1 records among candidates of their own "
        "(metadata.candidates), 2 records have free-text answers, which do not use the answer head"
    )
    assert told_answers({"domain": 7}) == ""


def test_an_evaluation_refuses_answers_that_would_not_be_the_records_own():
    with pytest.raises(ConfigError, match="an evaluation uses the candidates of each record"):
        Evaluation(checkpoint=Path("c"), decoding=Decoding(candidates=("Yes", "No")))
