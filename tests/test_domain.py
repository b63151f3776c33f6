"""General code asks the domain of its run; a run about own data has none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from training_helpers import REPOSITORY, ok, train, write_model_yaml, write_run_yaml

from embervlm.config import ConfigError
from embervlm.data.answer_space import AnswerSpace
from embervlm.data.domain import NO_DOMAIN
from embervlm.data.records import DataError, ReasoningRecord, read_records
from embervlm.data.store import prepare
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.robots.domain import DOMAINS, ROBOTS, domain_named
from embervlm.robots.rules import ROBOT_ORDER

PACKAGE = REPOSITORY / "embervlm"
ASKS_FOR_A_DOMAIN = {
    "run/data.py": "--domain",
    "curate/commands.py": "the rule teacher is one of the teachers",
    "curate/formats/guide.py": "robot_selection is one of the formats",
    "curate/teachers/collection.py": "a file of robot tasks is one of the inputs",
    "evaluation/eval_data.py": "the domain that the checkpoint was trained with",
    "run/plan_counts.py": "a made-up batch has the answers of a scene",
    "run/run_data.py": "the domain of the run",
    "run/start.py": "the domain of the run",
}
"""Files outside robots/ that may import it, and what for."""


def own_data(folder: Path, num_records: int = 24) -> Path:
    """Questions about plain pictures with answers in free words; nothing about robots, no candidates."""
    colors = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    records = []
    for number in range(num_records):
        color = list(colors)[number % 3]
        Image.new("RGB", (36, 36), tuple(c + number % 7 for c in colors[color])).save(folder / f"{number}.png")
        records.append(
            {
                "image": f"{number}.png",
                "instruction": f"What color is card {number}?",
                "reasoning": f"Step 1: The card is flat.\nStep 2: Its color is {color}.\nConclusion: {color}.",
                "answer": color,
            }
        )
    path = folder / "cards.json"
    path.write_text(json.dumps(records))
    return path


def answered(*answers: str) -> ReasoningRecord:
    return ReasoningRecord(record_id="1", image=None, instruction="?", steps=(), answer=answers)


def test_only_files_with_a_reason_import_the_robots() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "robots" not in path.relative_to(PACKAGE).parts
        and re.search(r"(from|import) embervlm\.robots", path.read_text(encoding="utf-8"))
    }
    assert found == ASKS_FOR_A_DOMAIN.keys()


def test_the_report_does_not_know_that_answers_are_robots() -> None:
    folder = REPOSITORY / "embervlm" / "report"
    pages = [*folder.glob("*.jinja"), *folder.glob("*.js"), *folder.glob("*.py")]
    assert len(pages) > 10
    for page in pages:
        assert not re.search(r"\brobots?\b", page.read_text(encoding="utf-8"), re.IGNORECASE), page.name


def test_an_answer_without_candidates_is_the_domains_or_open(tmp_path: Path) -> None:
    path = own_data(tmp_path, 3)
    assert {record.candidates for record in read_records(path)} == {()}
    with pytest.raises(DataError, match='answer "red" is not one of Drone'):
        read_records(path, candidates=ROBOTS.candidates)
    path.write_text(path.read_text().replace("red", "Drone").replace("green", "Humanoid").replace("blue", "Drone"))
    assert {r.candidates for r in read_records(path, candidates=ROBOTS.candidates)} == {ROBOT_ORDER}


def test_a_domain_is_found_by_its_name() -> None:
    assert {name: domain_named(name) for name in ("robots", "none")} == DOMAINS == {"robots": ROBOTS, "none": NO_DOMAIN}
    with pytest.raises(ConfigError, match="domain: 'cooking' is not one of robots, none"):
        domain_named("cooking")


@pytest.mark.slow
def test_own_data_train_and_are_evaluated_without_a_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = own_data(tmp_path)
    run = write_run_yaml(tmp_path, write_model_yaml(tmp_path), data, engine="torch", domain="none", report=False)
    told = ok(train("python", "--config", run, "--stages", "3", "4", processes=1)).stdout
    assert "answers: 24 records choose among the 3 answers of the data (blue, green, red)" in told
    final = tmp_path / "outputs" / "stage4" / "phase2" / "checkpoint-final"
    assert json.loads((final / "config.json").read_text())["candidates"] == ["blue", "green", "red"]
    vocabulary = "\n".join(ReasoningTokenizer.from_folder(final).hugging_face.get_vocab())
    assert "Drone" not in vocabulary and "red" in vocabulary

    from embervlm.evaluation.eval_data import Evaluation
    from embervlm.evaluation.evaluate import evaluate, evaluate_checkpoint

    result = evaluate_checkpoint(final, "train", num_samples=6, progress=False)
    assert result["metrics"]["final_answer_accuracy"] is not None
    assert result["metrics"]["head_accuracy"] is not None

    given = json.loads(data.read_text())[:2]
    given[0] |= {"id": "first", "answer": given[0]["answer"].upper()}
    given[1] |= {"id": "odd", "answer": "mauve", "reasoning": given[1]["reasoning"].replace("green", "mauve")}
    (tmp_path / "other.json").write_text(json.dumps(given))
    job = Evaluation(checkpoint=final, test_set=str(tmp_path / "other.json"), compare=False, progress=False)
    _, (first, odd) = evaluate(job)
    assert first["head_probabilities"].keys() == odd["head_probabilities"].keys() == {"blue", "green", "red"}
    assert first["gold_answer"] == ["red"] and odd["gold_answer"] == ["mauve"] and not odd["correct"]
    told = capsys.readouterr().out
    assert "1 of the 2 records of" in told and '(record odd: "mauve"); they count as wrong' in told


def test_few_answers_are_a_set_in_the_commonest_spelling(tmp_path: Path) -> None:
    space = AnswerSpace(limit=64)
    for answers in [["red"], ["Red"], ["red "], ["blue"], ["blue"], ["blue", "red"], ["blue"]]:
        space.add(answered(*answers))
    assert space.closed == ("blue", "red")
    path = own_data(tmp_path, 12)
    path.write_text(path.read_text().replace('"answer": "red"', '"answer": "RED"', 1))
    store = prepare(path, tmp_path / "cache", max_closed_answers=3)
    assert store.candidates == ("blue", "green", "red")
    assert {answer for record in store.all() for answer in record.answer} == {"blue", "green", "red"}
    assert {record.candidates for record in store.all()} == {store.candidates}


@pytest.mark.parametrize(
    ("limit", "answers"),
    [
        (0, ["yes", "no"] * 9),
        (64, [f"{n}" for n in range(30)] * 2),
        (8, [f"{n}" for n in range(9)] * 9),
        (64, ["a"] * 9),
    ],
)
def test_many_rare_or_equal_answers_are_no_set(limit: int, answers: list[str]) -> None:
    space = AnswerSpace(limit)
    for answer in answers:
        space.add(answered(answer))
    assert space.closed == ()


def test_answers_stay_open_where_their_records_say_so(tmp_path: Path) -> None:
    path = own_data(tmp_path, 12)
    records = json.loads(path.read_text())
    for record in records[:6]:
        record["metadata"] = {"candidates": []}
    path.write_text(json.dumps(records))
    store = prepare(path, tmp_path / "cache", max_closed_answers=2)
    assert store.candidates == () and store.answer_kinds == {"open": 12}
    records += [{**record, "instruction": f"{record['instruction']} Again."} for record in records[6:]]
    path.write_text(json.dumps(records))
    store = prepare(path, tmp_path / "cache", max_closed_answers=3)
    assert store.answer_kinds == {"open": 6, "closed": 12} and store.candidates == ("blue", "green", "red")
