"""Generated data: the same for the same seed, not to be guessed without looking, and fit for others' tasks."""

import json
from collections import Counter

import pytest

from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.data.records import DataError, read_records
from embervlm.data.splits import split_records
from embervlm.robots.generate import (
    KIND_SHARES,
    blind_accuracy,
    generate_for_tasks,
    generate_scenes,
    plan_scenes,
    write_dataset,
)
from embervlm.robots.rules import ROBOT_ORDER, TASKS, teach
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.robots.tasks import is_task_file, read_tasks

TASKS_OF_OTHERS = [
    ("Carry heavy boxes through the factory", ("Robot with Wheels",)),
    ("Inspect the hull of a ship", ("Underwater Robot",)),
    ("Film a crop field and climb the tower beside it", ("Drone", "Humanoid")),
    ("Do everything at once, everywhere", ROBOT_ORDER),
]


@pytest.fixture(scope="module")
def planned():
    """Records as of a data set of 3000 questions, without pictures."""
    return [
        {
            "instruction": task.instruction,
            "answer": ", ".join(teach(plan.facts, task).answer),
            "kind": task.kind,
            "metadata": {"split_group": plan.facts.key},
        }
        for plan in plan_scenes(1000, 3, seed=0)
        for task in plan.tasks
    ]


@pytest.fixture(scope="module")
def for_tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "reasoning_data.json"
    generate_for_tasks(TASKS_OF_OTHERS, path)
    return read_records(path, candidates=ROBOTS)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- scenes of our own


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        generate_scenes(tmp_path / name / "data.json", num_samples=6, seed=3, workers=1, progress=False)
    first = files_of(tmp_path / "one")
    assert len(first) == 7
    assert first == files_of(tmp_path / "other")


def test_the_number_of_workers_changes_nothing(tmp_path):
    for name, workers in (("one", 1), ("other", 2)):
        generate_scenes(tmp_path / name / "data.json", num_samples=6, seed=3, workers=workers, progress=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_another_seed_plans_other_scenes():
    assert plan_scenes(5, 1, seed=0) != plan_scenes(5, 1, seed=1)


def test_a_number_of_samples_that_does_not_divide_is_met_exactly(tmp_path):
    written = generate_scenes(tmp_path / "d.jsonl", num_samples=4, questions_per_picture=3, workers=1, progress=False)
    assert len(written) == 4 == len(read_records(tmp_path / "d.jsonl", candidates=ROBOTS))


def test_generated_records_read_back_with_all_their_steps(scene_data, records):
    written = json.loads((scene_data / "reasoning_data.json").read_text(encoding="utf-8"))
    assert [record.num_steps for record in records] == [value["metadata"]["num_steps"] for value in written]


def test_every_record_knows_its_claims_types_and_boxes(records):
    for record in records:
        assert len(record.metadata["step_types"]) == len(record.metadata["seen"]) == len(record.steps)
        assert set(record.metadata["scene"].items()) <= set(record.metadata["facts"].items())
        assert {box["kind"] for box in record.metadata["boxes"]} > set()


def test_one_picture_is_asked_each_question_once():
    assert all(len(set(plan.tasks)) == 3 for plan in plan_scenes(200, 3, seed=0))


@pytest.mark.slow
def test_fifty_thousand_scenes_can_be_planned():
    assert len(plan_scenes(50_000, 1, seed=0)) == 50_000


def test_answers_are_never_empty(planned):
    assert all(record["answer"] for record in planned)


def test_the_instruction_alone_answers_at_most_two_in_five(planned):
    assert blind_accuracy(planned)["fitted_on_train"] <= 0.40


def test_blind_accuracy_in_hindsight_is_no_lower_than_fitted(planned):
    blind = blind_accuracy(planned)
    assert blind["in_hindsight"] >= blind["fitted_on_train"]


def test_blind_accuracy_of_a_hand_case():
    train, test = (next(key for key in map(str, range(99)) if split(key) == name) for name in ("train", "test"))
    rows = [(train, "q", "A"), (train, "q", "A"), (train, "q", "B"), (test, "q", "A"), (test, "q", "B")]
    rows += [(test, "q", "B"), (test, "new", "C")]
    records = [{"instruction": q, "answer": a, "metadata": {"split_group": key}} for key, q, a in rows]
    assert blind_accuracy(records) == {"fitted_on_train": 1 / 4, "in_hindsight": 3 / 4}


def split(key):
    from embervlm.data.splits import split_of

    return split_of(key)


def test_question_kinds_come_in_their_shares(planned):
    counts = Counter(record["kind"] for record in planned)
    for kind, share in KIND_SHARES.items():
        assert counts[kind] / len(planned) == pytest.approx(share, abs=0.04)


def test_no_combination_of_facts_stands_in_train_and_test(records):
    splits = split_records(records)
    groups = {name: {record.metadata["split_group"] for record in found} for name, found in splits.items()}
    assert groups["train"] and groups["test"]
    assert not groups["test"] & (groups["train"] | groups["val"])


@pytest.mark.parametrize("number", [0, len(TASKS) + 1])
def test_an_impossible_number_of_questions_is_refused(number):
    with pytest.raises(ConfigError, match=f"1 to {len(TASKS)} questions"):
        plan_scenes(1, number, seed=0)


@pytest.mark.parametrize("number", [len(TASKS) - 1, len(TASKS)])
def test_as_many_questions_as_there_are_can_be_asked_of_a_picture(number):
    assert all(len(set(plan.tasks)) == number for plan in plan_scenes(20, number, seed=0))


def test_a_failed_write_leaves_the_earlier_data_set(tmp_path):
    path = tmp_path / "data.json"
    write_dataset(path, [{"id": 1}])
    with pytest.raises(DataError, match="use only JSON values"):
        write_dataset(path, [{"id": 2}, {"id": {1, 2}}])
    assert json.loads(path.read_text()) == [{"id": 1}]


# ---- tasks that others wrote


@pytest.mark.parametrize("index", range(len(TASKS_OF_OTHERS)))
def test_a_task_of_others_keeps_its_gold_answer(for_tasks, index):
    assert for_tasks[index].answer == TASKS_OF_OTHERS[index][1]


@pytest.mark.parametrize("index", range(len(TASKS_OF_OTHERS)))
def test_the_chain_of_a_task_of_others_ends_in_its_gold_answer(for_tasks, index):
    assert for_tasks[index].conclusion == f"Conclusion: {', '.join(TASKS_OF_OTHERS[index][1])}."


@pytest.mark.parametrize("index", range(len(TASKS_OF_OTHERS)))
def test_the_verdicts_of_a_task_of_others_agree_with_its_gold_answer(for_tasks, index):
    text, gold = " ".join(for_tasks[index].steps), TASKS_OF_OTHERS[index][1]
    for robot in ROBOT_ORDER:
        assert text.count(f": {robot} is {'suited' if robot in gold else 'unsuited'}.") == 1
        assert for_tasks[index].metadata["facts"][robot] == ("suited" if robot in gold else "unsuited")


def test_a_scene_is_chosen_whose_place_fits_the_tasks_words(for_tasks):
    assert for_tasks[1].metadata["scene"]["place"] == "open water"


def test_the_same_task_in_other_letters_stays_in_one_split(tmp_path):
    written = generate_for_tasks([("Fly there!", ("Drone",)), ("fly THERE", ("Drone",))], tmp_path / "d.json")
    assert len({record["metadata"]["split_group"] for record in written}) == 1


def test_at_most_num_samples_tasks_are_taken(tmp_path):
    assert len(generate_for_tasks(TASKS_OF_OTHERS, tmp_path / "data.json", num_samples=2)) == 2


def test_more_samples_than_tasks_give_every_task_several_pictures(tmp_path):
    written = generate_for_tasks(TASKS_OF_OTHERS, tmp_path / "data.json", num_samples=2 * len(TASKS_OF_OTHERS) + 1)
    given = Counter(record["instruction"] for record in written)
    assert sorted(given.values()) == [2] * (len(TASKS_OF_OTHERS) - 1) + [3]
    assert len({record["image"] for record in written}) == len({record["id"] for record in written}) == len(written)
    golds = {f"{text} Which robots are suited?": set(gold) for text, gold in TASKS_OF_OTHERS}
    assert all(set(record["answer"].split(", ")) == golds[record["instruction"]] for record in written)
    scenes = {(record["instruction"], record["metadata"]["split_group"]) for record in written}
    assert len(scenes) == len(TASKS_OF_OTHERS)  # all pictures of a task stand in one split


def test_read_tasks_reads_outputs_and_subtasks(tmp_path):
    values = [
        {"instruction": "Select.", "input": "Task: Inspect the reef", "output": "Underwater Robot"},
        {"input": "Map the farm", "subtasks": [{"assigned_robot": "Drone"}, {"assigned_robot": "Humanoid"}]},
    ]
    assert is_task_file(values)
    assert read_tasks(values, tmp_path) == [
        ("Inspect the reef", ("Underwater Robot",)),
        ("Map the farm", ("Drone", "Humanoid")),
    ]


def test_read_tasks_reports_all_bad_records_together(tmp_path):
    values = [
        {"input": "Task: ", "output": "Drone"},
        {"input": "Fly", "output": "Drone"},
        {"input": "Fly", "output": "Helicopter"},
        "no record",
        {"input": 3, "output": "Drone"},
        {"input": "Fly", "subtasks": "Drone"},
    ]
    with pytest.raises(DataError) as caught:
        read_tasks(values, tmp_path / "robots.json")
    numbers = [int(problem.split("record ")[1].split(":")[0]) for problem in caught.value.problems]
    assert numbers == [1, 3, 4, 5, 6]
    assert "Helicopter" in str(caught.value) and "robots.json" in str(caught.value)


def test_read_tasks_reports_subtasks_that_are_no_objects(tmp_path):
    with pytest.raises(DataError, match="record 1"):
        read_tasks([{"input": "Fly", "subtasks": ["Drone"]}], tmp_path / "robots.json")


# ---- the command


def test_the_command_prints_what_was_made_and_the_blind_figure(tmp_path, capsys):
    path = tmp_path / "out" / "data.json"
    main(
        [
            "data",
            "generate",
            "--teacher-model",
            "rules",
            "--output-file",
            str(path),
            "--num-samples",
            "4",
            "--questions_per_picture",
            "2",
            "--workers",
            "1",
        ]
    )
    printed = capsys.readouterr().out
    assert "4 records, 2 pictures" in printed
    assert "answering from the instruction alone" in printed


def test_without_a_test_record_the_command_says_so_and_no_number(tmp_path, capsys):
    main(["data", "generate", "--output_file", str(tmp_path / "data.json"), "--num_samples", "2", "--workers", "1"])
    printed = capsys.readouterr().out
    assert "test split: it has no records" in printed and "nan" not in printed


def test_the_command_makes_records_for_the_tasks_of_others(tmp_path, capsys):
    tasks = tmp_path / "robot_selection.json"
    tasks.write_text(json.dumps([{"input": text, "output": ", ".join(gold)} for text, gold in TASKS_OF_OTHERS[:2]]))
    main(["data", "generate", "--input_dataset", str(tasks), "--output_file", str(tmp_path / "data.jsonl")])
    assert [record.answer for record in read_records(tmp_path / "data.jsonl", candidates=ROBOTS)] == [
        g for _, g in TASKS_OF_OTHERS[:2]
    ]
    assert "2 records, 2 pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher_model", "gpt-4"], "gpt-4"),
        (["--num_samples", "0"], "num_samples 0"),
        (["--output_file", "data.csv"], "data.csv"),
        (["--input_dataset", "nowhere.json"], "nowhere.json"),
    ],
)
def test_the_command_names_the_flag_that_cannot_be(tmp_path, flags, words):
    with pytest.raises(SystemExit, match=words):
        main(["data", "generate", "--output_file", str(tmp_path / "data.json"), "--workers", "1", *flags])


def test_the_command_names_a_task_file_that_is_no_json(tmp_path):
    (tmp_path / "tasks.json").write_text("[{")
    with pytest.raises(SystemExit, match=r"tasks\.json: .*not valid JSON"):
        main(
            [
                "data",
                "generate",
                "--output_file",
                str(tmp_path / "d.json"),
                "--input_dataset",
                str(tmp_path / "tasks.json"),
            ]
        )
