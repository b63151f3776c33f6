"""How long a text may get: as long as the training data needed, and whatever is cut off is said."""

from __future__ import annotations

import json

import pytest
import torch
from training_helpers import TINY, ok, save_stage3, train, write_model_yaml, write_run_yaml

from embervlm import run_dir
from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.data.records import read_records
from embervlm.model.config import EmberVLMConfig
from embervlm.model.decoding import UNKNOWN_TOKENS, Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import generate_answers
from embervlm.ranking import rank_checkpoints
from embervlm.report.table import cut_off_lines
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

NUM_STEPS = 13
SHELVES = [f"Shelf {letter}{number}: who empties it?" for letter in "ABCDEFGH" for number in range(5)]


@pytest.fixture(scope="module")
def run_of_long_chains(tmp_path_factory):
    """A run whose chains have 13 steps and a conclusion, trained until it writes them; one epoch's samples with it."""
    folder = tmp_path_factory.mktemp("long")
    steps = [f"Step {n}: {14 - n} of the boxes are left on the shelf." for n in range(1, NUM_STEPS + 1)]
    chain = "\n".join([*steps, "Conclusion: The shelf is empty, so it is a Drone."])
    data = folder / "data.json"
    data.write_text(json.dumps([{"instruction": text, "reasoning": chain, "answer": "Drone"} for text in SHELVES]))
    write_run_yaml(
        folder,
        write_model_yaml(folder),
        data,
        stage4__phase2__epochs=8,
        stage4__phase2__learning_rate=1e-2,
        stage4__phase2__learning_rate_multipliers={},
        stage4__phase2__consistency_loss_weight=0.0,
        eval_steps=500,
        stage4__scheduled_sampling__enabled=False,
    )
    save_stage3(folder / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
    found = ok(
        train(
            "python",
            "--config",
            folder / "run.yaml",
            "--stages",
            "4",
            "--phase",
            "2",
            "--engine",
            "torch",
            "--resume_from",
            folder / "start" / "stage3" / "checkpoint-final",
        )
    )
    assert "sample chains were cut off before their end" in found.stdout  # of the first epoch, which knows little
    return run_dir.phase_dir(folder / "outputs", 2)


@pytest.mark.slow
def test_a_model_of_long_chains_is_evaluated_with_all_their_steps_everywhere(run_of_long_chains, capsys):
    final = run_dir.checkpoint_path(run_of_long_chains, None)
    config = EmberVLMConfig.from_pretrained(str(final))
    assert config.longest_chain_steps == NUM_STEPS + 1 and config.longest_chain_tokens > 4 * NUM_STEPS
    ranked, *_ = rank_checkpoints(run_of_long_chains)
    assert ranked.metrics["final_answer_accuracy"] == 1 and ranked.metrics["cut_off_share"] == 0
    result = EmberVLM.from_pretrained(final).generate_with_reasoning(None, SHELVES[0])
    assert len(result["reasoning_steps"]) == NUM_STEPS + 1 and result["cut_off"] is None
    capsys.readouterr()
    main(["test-reasoning", "--checkpoint", str(final), "--num_samples", "2"])
    said = capsys.readouterr().out
    assert f"Step {NUM_STEPS}:" in said and "cut off" not in said


@pytest.mark.slow
def test_what_an_explicit_limit_cuts_off_is_counted_and_said(run_of_long_chains, tmp_path, capsys):
    final = run_dir.checkpoint_path(run_of_long_chains, None)
    model = EmberVLM.from_pretrained(final)
    ten = model.generate_with_reasoning(None, SHELVES[0], max_reasoning_steps=10)  # the guide's call means 10
    assert len(ten["reasoning_steps"]) <= 10 and ten["cut_off"] == "steps"
    assert model.generate_with_reasoning(None, SHELVES[0], max_new_tokens=20)["cut_off"] == "tokens"
    output = tmp_path / "eval.json"
    main(
        [
            "evaluate",
            "--checkpoint",
            str(final),
            "--split",
            "val",
            "--output_file",
            str(output),
            "--no_wandb",
            "--max_reasoning_steps",
            "10",
            "--no_comparisons",
            "--save_reasoning_samples",
        ]
    )
    said = capsys.readouterr().out
    assert "warning: cut off before their end: chains 100.0%. Chains had 10 steps" in said
    result = run_dir.read_eval(output)
    assert result["metrics"]["cut_off_share"] == 1 and result["decoding"]["max_reasoning_steps"] == 10
    (sample, *_) = run_dir.read_json(tmp_path / "eval_samples.json")
    assert (
        sample["cut_off"] == "steps"
        and sample["scores"]["reasons"][0] == "the text is cut off by max_reasoning_steps; raise it"
    )
    questions, own = tmp_path / "questions.json", tmp_path / "own.json"
    questions.write_text(json.dumps([{"instruction": text, "answer": "Drone"} for text in SHELVES[:3]]))
    with pytest.raises(SystemExit, match=r"3 rejected, .*: cut off \(3\)"):
        main(
            [
                "data",
                "generate",
                "--source",
                "self",
                "--checkpoint",
                str(final),
                "--input_dataset",
                str(questions),
                "--output_file",
                str(own),
                "--num_samples",
                "3",
                "--samples_per_record",
                "1",
                "--temperature",
                "0.01",
                "--max_reasoning_steps",
                "10",
            ]
        )


def test_limits_that_are_left_open_come_from_the_models_data_and_given_ones_stay(tiny_model):
    config = tiny_model.config
    assert Decoding(form="direct").for_model(config).max_new_tokens == UNKNOWN_TOKENS  # an old checkpoint
    config.longest_chain_steps, config.longest_chain_tokens, config.longest_answer_tokens = 14, 200, 90
    open_limits = Decoding().for_model(config)
    assert (open_limits.max_reasoning_steps, open_limits.max_new_tokens) == (17, 250)
    assert Decoding(form="direct").for_model(config).max_new_tokens == 112
    given = Decoding(max_reasoning_steps=10, max_new_tokens=48, form="direct").for_model(config)
    assert (given.max_reasoning_steps, given.max_new_tokens) == (10, 48)


def prefer(model, token):
    """Let the model write `token` only."""
    head, tokenizer = model.reasoning_module.reasoning_head, model.tokenizer
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.bias.fill_(10.0)
        head.token_embedding.weight[tokenizer.ids[token] - tokenizer.base_vocab_size] = 5.0


def test_a_text_that_comes_to_its_end_at_its_last_token_is_not_cut_off(lively_model):
    prefer(lively_model, "<|answer_end|>")
    (result,) = generate_answers(lively_model, [None], ["Fly."], Decoding(max_new_tokens=1))
    assert result["num_tokens"] == 1 and result["cut_off"] is None


def test_without_a_limit_a_text_takes_the_room_that_the_model_has_and_no_more(lively_model):
    prefer(lively_model, "<|step|>")
    limit = lively_model.language_model.backbone.config.max_position_embeddings
    word = len(lively_model.tokenizer.encode(" Fly"))
    room = limit - lively_model.num_visual_tokens
    long_one = "Fly" + " Fly" * ((room - 6) // word - 1)
    results = generate_answers(lively_model, [None, None], [long_one, "Fly."], Decoding(max_reasoning_steps=10**6))
    alone = generate_answers(lively_model, [None], [long_one], Decoding(max_reasoning_steps=10**6))
    assert results[0]["text"] == alone[0]["text"] and results[0]["num_tokens"] == alone[0]["num_tokens"] < 8
    assert results[1]["num_tokens"] > results[0]["num_tokens"] and results[0]["cut_off"] == "tokens"
    with pytest.raises(ConfigError, match=f"instruction 0: with the picture it has .* reads {limit} and has no room"):
        generate_answers(lively_model, [None], [long_one + " Fly" * 10], Decoding())


def test_the_warning_names_each_pass_that_was_cut_off_and_nothing_where_none_was():
    result = {
        "cut_off": {"chains": 0.25, "direct": 0.0, "same_samples": 0.5},
        "faithfulness": {"cut_off_share": 0.1},
        "decoding": {"max_reasoning_steps": 12, "max_new_tokens": 200},
    }
    assert "chains 25.0%, same_samples 50.0%, faithfulness probes 10.0%. Chains had 12 steps" in cut_off_lines(result)
    assert cut_off_lines({"cut_off": {"chains": 0.0}, "faithfulness": None}) == ""
