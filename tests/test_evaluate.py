"""Checkpoint x split -> one JSON file: what stands in it, and that neither a kill nor more processes change it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from training_helpers import REPOSITORY, TINY, command, ok, run, run_ranks, save_stage3

from embervlm import run_dir
from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.data.records import read_records
from embervlm.data.splits import split_records
from embervlm.evaluation import asked as asked_module
from embervlm.evaluation import evaluate as evaluation_module
from embervlm.evaluation.calibration import (
    MIN_SAMPLES,
    calibration,
    expected_calibration_error,
    fit_temperature,
    fit_written,
    reliability_bins,
)
from embervlm.evaluation.eval_data import Evaluation
from embervlm.evaluation.evaluate import evaluate, evaluate_checkpoint
from embervlm.evaluation.result import METRICS, gains
from embervlm.evaluation.sharing import TaskJournal
from embervlm.model.confidence import set_confidence, written_confidence
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.evaluate import evaluate_to_file
from embervlm.run.quickstart import Quickstart
from embervlm.select_best import main as select_best

SHORT = Decoding(max_new_tokens=24)


@pytest.fixture
def checkpoint(lively_model, scene_data, records, tmp_path):
    """A Stage 4 checkpoint of a run that also has a no-reasoning baseline."""
    run = tmp_path / "outputs"
    part = run_dir.new_tmp_dir(run / "stage4" / "phase2")
    lively_model.save_pretrained(part)
    config = {"reasoning_data": str(scene_data / "reasoning_data.json"), "output_dir": str(run)}
    run_dir.write_json_atomic(part / "state.json", {"step": 7, "settings": {"phase": "phase 2", "config": config}})
    save_stage3(run / "baseline" / "same_samples", TINY, records)
    return run_dir.publish_checkpoint(part, run_dir.checkpoint_path(run / "stage4" / "phase2", 7), step=7)


def options(**changes):
    return {"split": "train", "decoding": SHORT, "progress": False, "faithfulness_samples": 2, **changes}


def evaluated(checkpoint, path, **changes):
    """The evaluation and the samples, as they stand on disk."""
    evaluate_to_file(checkpoint, output_file=path, save_samples=True, explain_samples=3, **options(**changes))
    return run_dir.read_eval(path), run_dir.read_json(path.with_name(f"{path.stem}_samples.json"))


# ---- what stands in it


def test_the_file_holds_every_metric_with_its_interval_and_what_made_it(checkpoint, tmp_path):
    result, samples = evaluated(checkpoint, tmp_path / "eval.json")
    assert result["format"] == run_dir.EVAL_FORMAT and result["step"] == 7 and result["phase"] == "phase 2"
    assert result["decoding"]["max_new_tokens"] == 24 and set(result["backend"]) == {"similarity", "entailment"}
    assert set(result["metrics"]) == set(METRICS)
    measured = {name: value for name, value in result["metrics"].items() if value is not None}
    # That baseline was not trained, and this model writes no conclusions.
    assert set(METRICS) - set(measured) == {"no_reasoning_same_time_accuracy", "conclusion_agreement"}
    assert set(result["intervals"]) == set(measured)
    for name, (low, high) in result["intervals"].items():
        assert low - 1e-9 <= measured[name] <= high + 1e-9, name
    assert set(result["gains"]) == {
        "stage4_direct_accuracy",
        "swapped_image_accuracy",
        "blind_accuracy",
        "no_reasoning_accuracy",
    }
    for name, row in result["gains"].items():
        assert row["gain"] == pytest.approx(measured["final_answer_accuracy"] - measured[name])
    assert sum(row["num"] for row in result["accuracy_by_question_kind"].values()) == len(samples)
    assert list(result["accuracy_by_wording"]) == ["None"]  # these records name none
    assert sum(row["num"] for row in result["impact_by_complexity"].values()) == result["num_samples"] == len(samples)
    assert {"precision", "recall", "support"} <= set(result["per_candidate"]["Drone"])
    assert result["faithfulness"]["num_samples"] == 2 and set(result["validator"]) and "NaN" not in json.dumps(result)
    assert set(result["own_steps"]) == {"temperature", "greedy", "drawn"}
    for row in (result["own_steps"]["greedy"], result["own_steps"]["drawn"]):
        assert row["right_chains"] + row["wrong_chains"] == len(samples)
    shares = [sample["correct"] for sample in samples]
    assert measured["final_answer_accuracy"] == pytest.approx(np.mean(shares))


def test_the_first_samples_also_hold_attention_and_the_validators_scores(checkpoint, tmp_path):
    _, samples = evaluated(checkpoint, tmp_path / "eval.json")
    assert all(sample["validator_scores"] is None for sample in samples[3:])
    shown = [sample for sample in samples[:3] if sample["reasoning_steps"]]
    for sample in shown:
        assert len(sample["validator_scores"]) == len(sample["reasoning_steps"])
        for shares in sample["attention"]["steps"]:
            assert len(shares) == 9 and sum(shares) == pytest.approx(1, abs=0.01)
    assert all(sample["without_reasoning"] is not None for sample in samples)


def test_no_progress_bar_of_an_evaluation_goes_to_its_end_and_back(checkpoint, tmp_path, monkeypatch):
    totals, real = [], evaluation_module.share_out

    def sharing(tasks, load, world, journal, bar):
        begun = (bar.n, bar.total)
        out = real(tasks, load, world, journal, bar)
        totals.append((bar.desc, begun, bar.n == bar.total))
        return out

    monkeypatch.setattr(evaluation_module, "share_out", sharing)
    evaluated(checkpoint, tmp_path / "eval.json", num_samples=3, progress=True)
    assert totals == [("evaluate train", (0, 0), True), ("ask about train", (0, 0), True)]


def test_a_gain_is_taken_record_by_record():
    values = {name: [] for name in METRICS}
    values |= {"final_answer_accuracy": [1.0, 1, 1, 0], "no_reasoning_accuracy": [1.0, 0, 0, 0]}
    found = gains(values)
    assert set(found) == {"no_reasoning_accuracy"}
    assert found["no_reasoning_accuracy"]["gain"] == pytest.approx(0.5)
    values["no_reasoning_accuracy"] = values["final_answer_accuracy"]
    assert gains(values)["no_reasoning_accuracy"] == {"gain": 0, "interval": [0, 0]}  # not two samples: pairs


def test_what_select_best_reads_has_no_comparisons_and_lies_in_the_checkpoint(checkpoint, capsys):
    result = evaluate_checkpoint(checkpoint, decoding=SHORT, progress=False)
    assert run_dir.read_eval(run_dir.eval_path(checkpoint, "val")) == json.loads(json.dumps(result))
    assert result["metrics"]["no_reasoning_accuracy"] is None and result["faithfulness"] is None
    assert select_best(["--checkpoints_dir", str(checkpoint.parent)]) == 0
    assert capsys.readouterr().out.strip() == f"Best checkpoint: {checkpoint}"


def test_chains_that_cannot_be_read_score_0_and_are_counted(checkpoint):
    result, samples = evaluate(
        Evaluation(checkpoint=checkpoint, compare=False, **options(decoding=Decoding(max_new_tokens=1), num_samples=5))
    )
    assert result["metrics"]["unparseable_share"] == 1 and result["num_samples"] == 5
    for name in ("reasoning_consistency", "step_completeness", "final_answer_accuracy"):
        assert result["metrics"][name] == 0
    assert [sample["correct"] for sample in samples] == [False] * 5


def test_a_score_that_is_no_number_counts_as_0_and_none_reaches_the_file(checkpoint, tmp_path, monkeypatch):
    judged = evaluation_module.scored

    def without_a_number(record, *rest):
        sample = judged(record, *rest)
        sample["scores"] = {**sample["scores"], "logical_flow_score": float("nan")}
        return sample

    monkeypatch.setattr(evaluation_module, "scored", without_a_number)
    result, _ = evaluate(Evaluation(checkpoint=checkpoint, compare=False, **options(num_samples=3)))
    assert result["metrics"]["logical_flow_score"] == 0 and result["intervals"]["logical_flow_score"] == [0, 0]
    run_dir.write_json_atomic(tmp_path / "eval.json", result)


# ---- a kill, and other processes


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 4])
def test_a_killed_evaluation_goes_on_and_ends_as_one_that_was_not(tasks, checkpoint, tmp_path, monkeypatch, capsys):
    straight = evaluated(checkpoint, tmp_path / "straight" / "eval.json")
    asked = []
    answer, add = asked_module.answer, TaskJournal.add

    def counted(model, pictures, records, decoding):
        asked.append(len(records))
        return answer(model, pictures, records, decoding)

    def killing(journal, key, value):
        add(journal, key, value)
        if len(journal.done) == tasks:
            raise Killed

    monkeypatch.setattr(asked_module, "answer", counted)
    evaluated(checkpoint, tmp_path / "counted" / "eval.json")
    whole = len(asked)
    path = tmp_path / "killed" / "eval.json"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TaskJournal, "add", killing)
        evaluated(checkpoint, path)
    assert not path.exists()
    (kept,) = path.with_name("eval.partial").glob("*.jsonl")
    with kept.open("a") as file:
        file.write('["chains", 17, [{"reasoning_st')  # in the middle of this line
    asked.clear()
    assert evaluated(checkpoint, path) == straight
    assert len(asked) == whole - tasks
    assert f"continuing with {tasks} finished batches of a killed evaluation" in capsys.readouterr().out
    assert not path.with_name("eval.partial").exists()


@pytest.mark.slow
def test_batches_of_another_decoding_are_not_taken_over(checkpoint, tmp_path, capsys):
    path = tmp_path / "eval.json"
    partial = path.with_name("eval.partial")
    evaluate(Evaluation(checkpoint=checkpoint, partial=partial, **options()))
    assert list(partial.iterdir())
    fewer = Decoding(max_new_tokens=12)
    found, _ = evaluated(checkpoint, path, decoding=fewer)
    assert "continuing with" not in capsys.readouterr().out
    assert found == evaluated(checkpoint, tmp_path / "other" / "eval.json", decoding=fewer)[0]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint, tmp_path):
    alone, samples = evaluated(checkpoint, tmp_path / "alone" / "eval.json")
    path = tmp_path / "both" / "eval.json"
    ok(
        run(
            command(
                "torchrun",
                REPOSITORY / "scripts" / "evaluate.py",
                "--checkpoint",
                checkpoint,
                "--split",
                "train",
                "--output_file",
                path,
                "--save_reasoning_samples",
                "--explain_samples",
                3,
                "--faithfulness_samples",
                2,
                "--max_new_tokens",
                24,
            )
        )
    )
    both = run_dir.read_eval(path)
    assert both["metrics"] == alone["metrics"] and both["intervals"] == alone["intervals"]
    assert both == alone and run_dir.read_json(path.with_name("eval_samples.json")) == samples


@pytest.mark.slow
def test_an_error_of_one_process_ends_both_at_once(checkpoint, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from embervlm.evaluation import asked, evaluate as module
from embervlm.run.evaluate import evaluating_processes
answer = asked.answer

def fails_on_one(model, pictures, records, decoding):
    if world.rank == 1:
        raise MemoryError("no room left")
    return answer(model, pictures, records, decoding)

with evaluating_processes() as world:
    asked.answer = fails_on_one
    module.evaluate(module.Evaluation(checkpoint=Path({str(checkpoint)!r}), split="train", progress=False, world=world))
""")
    found = run_ranks(script, processes=2, timeout_s=90)
    assert found.returncode != 0 and "process 1: MemoryError: no room left" in found.stderr


@pytest.mark.slow
def test_process_0_alone_fits_the_judge_and_all_hear_where_it_cannot(checkpoint, tmp_path):
    script = tmp_path / "fitting.py"
    script.write_text(f"""
import dataclasses, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from embervlm.errors import UserError
from embervlm.run.evaluate import evaluating_processes
from embervlm.evaluation.eval_data import Evaluation, load_eval_data

with evaluating_processes() as world:
    job = Evaluation(checkpoint=Path({str(checkpoint)!r}), split="train", world=world)
    print(f"process {{world.rank}} fits: {{load_eval_data(job, 36).scorer is not None}}")
    try:
        load_eval_data(dataclasses.replace(job, similarity=str(Path("no/such/judge"))), 36)
    except UserError as error:
        print(f"process {{world.rank}} hears: {{error}}")
""")
    found = ok(run_ranks(script, processes=2, timeout_s=90)).stdout
    assert "process 0 fits: True" in found and "process 1 fits: False" in found
    said = [line for line in found.splitlines() if " hears: " in line]
    assert len(said) == 2 and all("similarity backend no/such/judge" in line for line in said)


# ---- calibration


def answers(logits, chosen=()):
    """Results whose answer head gave these logits for one candidate."""
    return [{"head_probabilities": {"Drone": float(1 / (1 + np.exp(-x)))}, "answer_set": ["Drone"]} for x in logits]


def test_the_calibration_error_of_a_case_worked_by_hand():
    # bins (0.5, 0.6] with 0.55 and 1 of 2 right, (0.8, 0.9] with 0.85 and 0 of 2 right: (2 * 0.05 + 2 * 0.85) / 4
    assert expected_calibration_error([0.55, 0.55, 0.85, 0.85], [True, False, False, False]) == pytest.approx(0.45)
    bins = reliability_bins([0.0, 0.1, 0.100001, 1.0], [True, False, True, True])
    assert [found["num"] for found in bins] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert bins[0]["accuracy"] == 0.5 and bins[0]["confidence"] == pytest.approx(0.05) and bins[2]["accuracy"] is None
    assert expected_calibration_error([1.0, 1.0, 0.0], [True, True, False]) == 0
    with pytest.raises(ValueError, match="no answers"):
        expected_calibration_error([], [])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_fitted_temperature_is_that_of_the_data(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 20_000)
    right = rng.random(len(logits)) < 1 / (1 + np.exp(-logits / temperature))
    half = len(logits) // 2
    assert fit_temperature(answers(logits[:half]), right[:half]) == pytest.approx(temperature, rel=0.05)
    found = calibration(answers(logits[:half]), right[:half], answers(logits[half:]), right[half:])
    assert found["split_fitted"] == "val" and found["num_fitted"] == half and found["ece"] < 0.02
    assert sum(row["num"] for row in found["bins"]) == half
    if temperature != 1:
        assert found["ece_uncalibrated"] > 0.05


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.3, -1.5)])
def test_the_scale_of_answers_in_free_words_is_that_of_the_data(slope, offset):
    """As a model is surer of what it has concluded than it is right."""
    rng = np.random.default_rng(0)
    logits = rng.normal(3, 2, 20_000)
    right = rng.random(len(logits)) < 1 / (1 + np.exp(-slope * logits - offset))
    sure = 1 / (1 + np.exp(-logits))
    results = [{"answer_set": ["7"], "written_probability": p, "confidence": p} for p in sure]
    half = len(logits) // 2
    found = calibration(results[:half], right[:half], results[half:], right[half:])
    assert found["written"] == pytest.approx({"slope": slope, "offset": offset}, abs=0.1)
    assert found["temperature"] == 1 and found["ece"] < 0.02
    if offset:
        assert found["ece_uncalibrated"] > 0.3
    assert fit_written(results[: MIN_SAMPLES - 1], right[: MIN_SAMPLES - 1]) is None


def test_answers_that_are_all_right_make_none_certain():
    results = [{"answer_set": ["7"], "written_probability": 1.0, "confidence": 1.0}] * 50
    slope, offset = fit_written(results, [True] * 50)
    assert 0.9 < written_confidence(1.0, (slope, offset)) < 1


def test_of_a_set_the_confidence_is_that_of_exactly_it():
    probabilities = {"Drone": 0.9, "Humanoid": 0.2}
    assert set_confidence(probabilities, ["Drone"]) == pytest.approx(0.9 * 0.8)
    assert set_confidence(probabilities, ["Drone", "Humanoid"]) == pytest.approx(0.9 * 0.2)
    logit = np.log(0.9 / 0.1) / 2
    assert set_confidence({"Drone": 0.9}, ["Drone"], 2.0) == pytest.approx(1 / (1 + np.exp(-logit)))


def test_too_few_answers_are_not_fitted():
    few = answers(np.linspace(-2, 2, MIN_SAMPLES - 1))
    assert fit_temperature(few, [True] * len(few)) is None and calibration(few, [True] * len(few), few, []) is None


def test_the_temperature_of_val_is_kept_for_from_pretrained(
    lively_model, checkpoint, scene_data, tmp_path, monkeypatch
):
    prompts = [record.instruction for record in read_records(scene_data / "reasoning_data.json", candidates=ROBOTS)[:3]]
    monkeypatch.setattr("embervlm.evaluation.calibration.MIN_SAMPLES", 1)
    judged = asked_module.answer

    def with_answers(*given):  # an untrained model gives none
        return [{**result, "answer_set": result.get("head_answer", [])} for result in judged(*given)]

    monkeypatch.setattr(asked_module, "answer", with_answers)
    result, samples = evaluated(checkpoint, tmp_path / "eval.json", faithfulness_samples=0)
    fitted = result["calibration"]["temperature"]
    assert run_dir.read_json(run_dir.calibration_path(checkpoint))["temperature"] == fitted
    model = EmberVLM.from_pretrained(checkpoint)
    assert model.confidence_temperature == fitted and lively_model.confidence_temperature == 1
    for sample in samples:
        expected = set_confidence(sample["head_probabilities"], sample["answer_set"], fitted)
        assert sample["confidence"] == pytest.approx(expected)
    assert model.generate_with_reasoning(None, prompts[0], max_new_tokens=2)["confidence"] >= 0


# ---- what is wrong with the request


def refused(checkpoint, tmp_path, *flags):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--checkpoint", str(checkpoint), "--output_file", str(tmp_path / "e.json"), *flags])
    assert not (tmp_path / "e.json").exists()
    return str(ended.value.code)


def test_nothing_to_evaluate_is_an_error(checkpoint, tmp_path, capsys):
    assert "--num_samples 0: there is nothing to evaluate" in refused(checkpoint, tmp_path, "--num_samples", "0")
    refused(checkpoint, tmp_path, "--split", "dev")
    assert "'dev' is not one of train, val, test" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--split dev: unknown; choose from train, val, test"):
        evaluate(Evaluation(checkpoint=checkpoint, split="dev"))
    assert "no_such_metric" in refused(checkpoint, tmp_path, "--reasoning_metrics", "no_such_metric")
    assert "nowhere.json does not exist" in refused(checkpoint, tmp_path, "--reasoning_data", "nowhere.json")


def test_an_empty_split_is_named(checkpoint, scene_data, tmp_path):
    raw = json.loads((scene_data / "reasoning_data.json").read_text())
    kept = {
        r.record_id for r in split_records(read_records(scene_data / "reasoning_data.json", candidates=ROBOTS))["train"]
    }
    only_train = tmp_path / "train.json"
    only_train.write_text(json.dumps([item for item in raw if item["id"] in kept]))
    said = refused(checkpoint, tmp_path, "--reasoning_data", str(only_train), "--image_root", str(scene_data))
    assert "the test split is empty" in said


def test_an_evaluation_of_an_older_format_says_to_evaluate_again(checkpoint):
    path = run_dir.eval_path(checkpoint, "val")
    run_dir.write_json_atomic(path, {"format": 1, "metrics": {"reasoning_consistency": 0.9}})
    with pytest.raises(SystemExit) as ended:
        select_best(["--checkpoints_dir", str(checkpoint.parent)])
    assert str(path) in (said := str(ended.value)) and "format 1" in said and "evaluate again" in said


def test_a_test_set_of_its_own_is_evaluated_whole_and_known_records_are_named(checkpoint, scene_data, capsys):
    path = scene_data / "reasoning_data.json"
    job = Evaluation(checkpoint=checkpoint, test_set=str(path), compare=False, **options(split="test"))
    result, _ = evaluate(job)
    records = read_records(path, candidates=ROBOTS)
    trained = len(split_records(records)["train"])
    assert result["num_samples"] == len(records)
    assert f"{trained} of the {len(records)} records of {path} were used for training" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no such file"):
        evaluate(dataclasses.replace(job, test_set="nowhere.json"))


@pytest.mark.slow
def test_the_quickstart_evaluates_in_as_many_processes_as_it_trains_with(checkpoint, tmp_path, capfd):
    quickstart = Quickstart(output_dir=tmp_path / "quickstart", num_test=2)
    quickstart._best = checkpoint
    quickstart._evaluate()
    path = run_dir.eval_results_path(quickstart.output_dir)
    result = run_dir.read_eval(path)
    assert result["split"] == "test" and result["num_samples"] == 2 and set(result["metrics"]) == set(METRICS)
    assert len(run_dir.read_json(path.with_name(f"{path.stem}_samples.json"))) == 2
    assert "final_answer_accuracy" not in capfd.readouterr().out  # it is shown behind the report


def test_of_a_stage_3_checkpoint_only_its_direct_answers_are_measured(checkpoint, tmp_path, scene_data, capsys):
    (stage3,) = (checkpoint.parents[2] / "baseline" / "same_samples").glob("checkpoint-*")
    flags = ["--num_samples", "4", "--split", "train", "--max_new_tokens", "24", "--no_wandb"]
    data = ["--reasoning_data", str(scene_data / "reasoning_data.json")]
    main(
        [
            "evaluate",
            "--stage",
            "3",
            "--checkpoint",
            str(stage3),
            "--output_file",
            str(tmp_path / "e.json"),
            *flags,
            *data,
        ]
    )
    metrics = run_dir.read_eval(tmp_path / "e.json")["metrics"]
    measured = {name for name, value in metrics.items() if value is not None}
    assert measured == {"stage4_direct_accuracy", "no_reasoning_accuracy"}  # and the baseline beside it
    said = capsys.readouterr().out
    assert "A Stage 3 checkpoint writes no chains" in said and "max_new_tokens" not in said


# ---- W&B


@pytest.mark.slow
def test_an_evaluation_reaches_the_wandb_run_of_its_training(checkpoint, tmp_path, monkeypatch, capsys):
    from wandb_file import history

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (checkpoint.parent / "wandb_run_id").write_text("phase2id")
    flags = [
        "evaluate",
        "--checkpoint",
        str(checkpoint),
        "--output_file",
        str(tmp_path / "e.json"),
        "--split",
        "train",
        "--max_new_tokens",
        "24",
        "--num_samples",
        "6",
        "--faithfulness_samples",
        "0",
    ]
    main(flags)
    assert not (checkpoint.parent / "wandb").exists()  # no project: nothing is sent
    main([*flags, "--wandb_project", "embervlm", "--no_wandb"])
    assert not (checkpoint.parent / "wandb").exists()
    main([*flags, "--wandb_project", "embervlm"])
    assert "sent to W&B: project embervlm" in capsys.readouterr().out
    (line,) = history(checkpoint.parent)
    metrics = run_dir.read_eval(tmp_path / "e.json")["metrics"]
    assert line["train/final_answer_accuracy"] == metrics["final_answer_accuracy"] and line["train/step"] == 7
    assert [path for path in (checkpoint.parent / "wandb").glob("offline-run-*phase2id*")]
    pictures = list((checkpoint.parent / "wandb").rglob("files/media/images/train/**/*.png"))
    assert any(path.name.startswith("with_vs_without_reasoning") for path in pictures)


# ---- generation beside transformers' own


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_with_our_cache_is_token_for_token_that_of_transformers(family, tiny_settings, tokenizer, records):
    from embervlm.model.embervlm import build_model
    from embervlm.model.generation import look
    from embervlm.model.writer import Writer

    language = tiny_settings["language"]
    if family == "gpt2":
        config = {"model_type": "gpt2", "vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
        language = {"config": config}
    torch.manual_seed(3)
    model = build_model({**tiny_settings, "stage": 3, "language": language}).eval()
    model.attach_tokenizer(tokenizer)
    torch.nn.init.zeros_(model.reasoning_module.reasoning_head.token_embedding.weight)  # plain text alone
    for weight in model.language_model.backbone.base_model.parameters():
        weight.data.mul_(3)
    texts = [records[index].instruction * (1 + index) for index in range(4)]
    prompts = [tokenizer.encode(text) for text in texts]
    with torch.inference_mode():
        visual, seen = look(model, [records[0].image, None, records[1].image, records[2].image])
        writer = Writer(model, visual, seen, prompts, Decoding(max_new_tokens=40, form="text"))
        writer.end_ids = ()  # nothing ends a text
        writer.run()
        ours = [row.ids for row in writer.everyone]
        embeds = torch.cat([visual, model.embed(writer.input_ids)], dim=1)
        mask = torch.cat([seen[:, None].expand(-1, visual.shape[1]), writer.text_mask], dim=1).long()
        backbone = model.language_model.backbone
        backbone.generation_config.eos_token_id = None
        theirs = backbone.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0
        )
    assert ours == theirs.tolist()
    assert len({token for row in ours for token in row}) > 10


@pytest.mark.parametrize("num_records", [1, 3])
def test_masks_of_a_new_token_lie_on_words_of_16_bytes(num_records, lively_model, records, monkeypatch):
    """Attention on a GPU reads them so and stops at a misaligned address; here it would be read all the same."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        if attn_mask is not None and query.shape[-2] == 1:
            seen.append((attn_mask.data_ptr() % 16, attn_mask.is_contiguous()))
        return real(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    lively_model.generate_with_reasoning(
        image=[None] * num_records, instruction=[r.instruction for r in records[:num_records]], max_new_tokens=20
    )
    assert len(seen) > 20 and set(seen) == {(0, True)}
