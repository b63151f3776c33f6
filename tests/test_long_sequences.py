"""One limit on the whole sequence, picture, question and text together, and what is told before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from training_helpers import CPU, TINY, make_data, make_tokenizer, write_model_yaml, write_run_yaml

from embervlm import run_dir
from embervlm.cli import main
from embervlm.config_file import load_train_config
from embervlm.data.images import PictureCache
from embervlm.data.records import DataError, read_records
from embervlm.evaluation.asked import refuse_long_questions
from embervlm.evaluation.batches import see
from embervlm.evaluation.explain import explain_chains
from embervlm.evaluation.faithfulness import Probe, answer_log_probs, go_on, summarise
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run import by_products
from embervlm.run.stages import Run
from embervlm.world import World


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    data = make_data(tmp_path_factory.mktemp("scenes"), num_samples=18)
    return [{**r, "image": str(data.parent / r["image"])} for r in json.loads(data.read_text())]


def runs(folder: Path, records: list[dict[str, Any]], *stages: str, **changes: Any) -> Path:
    """Trains `records` in this process and gives the output folder."""
    data = folder / "data.json"
    data.write_text(json.dumps(records))
    changes = {"allow_outside": True, "engine": "torch", "report": False, "max_steps": 2} | changes
    config = write_run_yaml(folder, changes.pop("model", None) or write_model_yaml(folder), data, **changes)
    Run(load_train_config(str(config), {}), World(0, 1, CPU)).go(list(stages), None)
    return folder / "outputs"


@pytest.mark.slow
def test_samples_that_cannot_be_written_end_no_run_and_a_save_comes_before_them(
    records: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def fails(config: Any, world: Any, model: Any, data: Any, epoch: int) -> None:
        saved.append(
            run_dir.list_checkpoints(run_dir.phase_dir(config.output_dir, 1 if epoch == 1 else 2))[-1].path.name
        )
        raise MemoryError("out of memory")

    monkeypatch.setattr(by_products, "write_samples", fails)
    output = runs(tmp_path, records, "3", "4", max_steps=None, stage4__batch_size=32, background_saves=False)
    assert saved == ["checkpoint-final", "checkpoint-1", "checkpoint-final"]
    assert "epoch 3: no samples (MemoryError: out of memory); training continues" in caplog.text
    assert run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None).is_dir()


GPT2 = {
    "config": {"model_type": "gpt2", "vocab_size": 400, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512}
}
"""With a table of positions: what is longer is an error of the device, far from its cause."""
VISUAL, POSITIONS = 9, 512


def long_question(record: dict[str, Any], num_words: int) -> dict[str, Any]:
    words = "The fleet waits at the depot and has been told nothing else so far. "
    return record | {"instruction": (words * num_words)[: 5 * num_words] + record["instruction"]}


def spoilt(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One question is too long in each split, and one chain."""
    out = [dict(record) for record in records]
    for place, split in ((0, "train"), (5, "val"), (9, "test")):
        out[place] = long_question(out[place], 1000)
        out[place]["metadata"] = out[place]["metadata"] | {"split": split, "split_group": f"own {split}"}
    steps = [f"The robot number {number} waits for a sign of {number * 7}." for number in range(60)]
    out[14] = out[14] | {"reasoning": steps, "metadata": {"split": "train", "split_group": "own"}}
    return [record | {"id": f"r{place}"} for place, record in enumerate(out)]


def test_every_text_that_is_too_long_is_refused_before_stage_3_trains(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = write_model_yaml(tmp_path, language=GPT2)
    with pytest.raises(DataError) as caught:
        runs(tmp_path, spoilt(records), "3", "4", model=model)
    problems = caught.value.problems
    fields = [tuple(problem.split(": ")[:2]) for problem in problems]
    assert set(fields) == {
        ("record r0", "instruction"),
        ("record r5", "instruction"),
        ("record r9", "instruction"),
        ("record r14", "reasoning"),
    }
    first = next(problem for problem in problems if problem.startswith("record r0:"))
    assert "(9 of the picture, " in first and "the language model reads 512; shorten it" in first
    assert "more than the 400 of --max_reasoning_length" in next(p for p in problems if p.startswith("record r14:"))
    assert not list((tmp_path / "outputs").glob("stage*"))


@pytest.mark.slow
def test_a_text_of_just_the_models_length_trains_and_the_validator_reads_no_further(
    records: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The validator reads 512 tokens where it can; picture and pair together must not be longer than the model."""
    model = write_model_yaml(tmp_path, language=GPT2)
    some = [long_question(record, 150) for record in records]
    with pytest.raises(DataError) as caught:
        runs(tmp_path, some, "3", model=write_model_yaml(tmp_path, language=resized(64)))
    longest = max(int(problem.split(": ")[2].split(" ")[0]) for problem in caught.value.problems)
    model = write_model_yaml(tmp_path, language=resized(longest))
    output = runs(tmp_path, some, "3", "4", model=model, sample_records=0, stage4__batch_size=32, max_steps=None)
    assert run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None).is_dir()
    assert "chains are longer than the step validator reads" in capsys.readouterr().out


def resized(positions: int) -> dict[str, Any]:
    return {"config": GPT2["config"] | {"n_positions": positions}}


def test_validate_refuses_the_texts_that_training_refuses_and_names_the_same_tokens(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = write_model_yaml(tmp_path, language=GPT2)
    with pytest.raises(DataError) as caught:
        runs(tmp_path, spoilt(records), "3", model=model)
    trained = {tuple(problem.removeprefix("record ").split(": ", 2)) for problem in caught.value.problems}
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "data",
                "validate",
                "--data_file",
                str(tmp_path / "data.json"),
                "--output_report",
                str(report),
                "--model",
                str(model),
                "--max_reasoning_length",
                "400",
                "--allow_outside",
            ]
        )
    assert ended.value.code == 1
    found = [p for p in json.loads(report.read_text())["problems"] if p["kind"] == "too_long"]
    assert {(f"r{p['number'] - 1}", p["field"], f"{p['what']}; {p['fix']}") for p in found} == trained


def test_an_evaluation_asks_nothing_that_the_model_cannot_read(records: list[dict[str, Any]], tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    found = read_records(data, allow_outside=True, candidates=ROBOTS)
    tokenizer = make_tokenizer(found, 400)
    lengths = [
        len(tokenizer.encode(record.instruction)) + len(tokenizer.encode(" ".join(record.steps))) for record in found
    ]
    positions = VISUAL + sorted(lengths)[len(lengths) // 2]  # for about half of them
    model = build_model({**TINY, "language": resized(positions), "candidates": ROBOTS}, load_pretrained=False)
    model.attach_tokenizer(tokenizer)
    pictures = PictureCache([record.image for record in found if record.image], 36)

    def look(model: EmberVLM, some: Any) -> Any:
        return see(model, pictures, some)

    probes = [Probe(kind="forced", record=record, steps=record.steps, follows=record.answer) for record in found]
    answers = go_on(model, look, probes, Decoding(max_new_tokens=4))
    without = sum("no_room" in answer for answer in answers)
    gains = answer_log_probs(model, look, found, [record.steps for record in found])
    explained = explain_chains(
        model, *look(model, found), [record.instruction for record in found], [record.steps for record in found]
    )
    assert 0 < without < len(found) and 0 < sum(map(bool, gains)) < len(found)
    assert summarise(probes, answers, gains, 0)["no_room_dropped"] == without
    unread = sum(entry["attention"] is None for entry in explained)
    assert 0 < unread < len(found)
    assert all(len(e["validator_scores"]) == len(r.steps) for e, r in zip(explained, found, strict=True))
    longer = [dataclasses.replace(record, instruction=record.instruction * 40) for record in found[:2]]
    with pytest.raises(DataError) as caught:
        refuse_long_questions(model, [*longer, *found])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"record {r.record_id}" for r in longer]
    refuse_long_questions(model, found)
