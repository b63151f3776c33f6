"""Reading reasoning records: the guide's three spellings, and every way a file can be wrong."""

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embervlm.data.records import DataError, ReasoningRecord, read_records, record_to_json, write_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

TEACHER = {
    "image": "warehouse_scene.jpg",
    "question": "Which robot should pick boxes from high shelves?",
    "reasoning": [
        "<|reasoning_start|>",
        "Step 1: Analyze the task requirements",
        "- The task involves picking boxes from HIGH shelves",
        "- The robot must be able to lift heavy boxes",
        "",
        "Step 2: Evaluate robot capabilities",
        "- Drones cannot carry heavy boxes reliably",
        "",
        "Conclusion: Humanoid robot is the best choice",
        "<|reasoning_end|>",
    ],
    "answer": "Humanoid",
    "confidence": 0.95,
}
HUMAN = {
    "image": "warehouse_scene.jpg",
    "question": "What robot combination works best?",
    "reasoning_steps": ["First, identify the task.", "Second, analyze the environment.", "Third, coordinate."],
    "answer": ["Humanoid", "Drone"],
    "annotator_id": "expert_123",
}
UNIFIED = {
    "image": "warehouse_scene.jpg",
    "instruction": "Select the best robot for the flooded tunnel.",
    "reasoning": "<|reasoning_start|>Step 1: The tunnel is flooded. Step 2: Only one robot dives. "
    "Conclusion: It dives.<|reasoning_end|>",
    "answer": "Underwater Robot",
    "metadata": {"source": "teacher_generated", "complexity": "high", "num_steps": 5, "validated": True},
}
GOOD = {"instruction": "Which robot flies?", "reasoning": "Step 1: Only the drone has rotors.", "answer": "Drone"}


@pytest.fixture
def read(tmp_path):
    """Writes values as a JSON list beside one picture and reads them."""
    (tmp_path / "warehouse_scene.jpg").write_bytes(b"jpeg")

    def read(*values, **options):
        (tmp_path / "train.json").write_text(json.dumps(list(values)))
        return read_records(tmp_path / "train.json", **options, candidates=ROBOTS)

    return read


def problems(read, value, **options):
    with pytest.raises(DataError) as caught:
        read(value, **options)
    return "\n".join(caught.value.problems)


# ---- the three spellings


def test_teacher_spelling_keeps_bullets_in_their_step(read, tmp_path):
    (record,) = read(TEACHER)
    assert record.steps == (
        "Analyze the task requirements\n- The task involves picking boxes from HIGH shelves\n"
        "- The robot must be able to lift heavy boxes",
        "Evaluate robot capabilities\n- Drones cannot carry heavy boxes reliably",
        "Conclusion: Humanoid robot is the best choice",
    )
    assert (record.num_steps, record.answer, record.confidence) == (2, ("Humanoid",), 0.95)
    assert record.image == os.path.realpath(tmp_path / "warehouse_scene.jpg")
    assert record.record_id == "train.json:1"


def test_human_spelling_takes_each_element_as_a_step(read):
    (record,) = read(HUMAN)
    assert record.steps == tuple(HUMAN["reasoning_steps"]) and record.num_steps == 3
    assert record.answer == ("Drone", "Humanoid")  # in the order of the robots
    assert record.metadata == {"annotator_id": "expert_123"}


def test_unified_spelling_reads_a_chain_written_on_one_line(read):
    (record,) = read(UNIFIED)
    assert record.steps == ("The tunnel is flooded.", "Only one robot dives.", "Conclusion: It dives.")
    assert record.metadata == {"source": "teacher_generated", "complexity": "high", "validated": True}


def test_guides_own_unified_example_is_readable(read):
    (record,) = read(UNIFIED | {"reasoning": "<|reasoning_start|>Step 1...<|reasoning_end|>", "answer": "Humanoid"})
    assert record.steps == ("...",)


def test_plain_steps_keep_their_bullets_and_conclusion(read):
    (record,) = read(HUMAN | {"reasoning_steps": ["Look.", "- wet", "- dark", "", "Decide.", "conclusion: swim"]})
    assert record.steps == ("Look.\n- wet\n- dark", "Decide.", "Conclusion: swim")


def test_steps_that_are_all_bullets_stay_apart(read):
    (record,) = read(HUMAN | {"reasoning_steps": ["- look", "- decide"]})
    assert record.steps == ("- look", "- decide")


def test_record_names_itself_with_id_or_record_id(read):
    assert [record.record_id for record in read(GOOD | {"id": "a"}, GOOD | {"record_id": 7})] == ["a", "7"]


def test_direct_answer_record_is_read_only_when_allowed(read):
    direct = {key: GOOD[key] for key in ("instruction", "answer")}
    (record,) = read(direct, require_reasoning=False)
    assert record.steps == () and record.num_steps == 0
    assert "record 1: reasoning: is missing" in problems(read, direct)


def test_text_only_record_has_no_image(read):
    assert read(GOOD)[0].image is None


def test_jsonl_and_parquet_give_the_same_records_as_json(read, tmp_path):
    import pyarrow
    import pyarrow.parquet

    values = [{"id": "r1", "instruction": None, **TEACHER}, {"id": "r2", **GOOD}]
    expected = read(*values)
    (tmp_path / "train.jsonl").write_text("\n\n".join(map(json.dumps, values)))
    values[1] = values[1] | {"reasoning": [GOOD["reasoning"]]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "train.parquet")
    assert read_records(tmp_path / "train.jsonl", candidates=ROBOTS) == expected
    assert read_records(tmp_path / "train.parquet", candidates=ROBOTS) == expected


# ---- answers


def test_answer_string_may_be_a_set_with_roles(read):
    (record,) = read(GOOD | {"answer": "Primary: Robot with Wheels, Secondary: drone & Humanoid"})
    assert record.answer == ("Drone", "Humanoid", "Robot with Wheels")


def test_repeated_answers_count_once(read):
    assert read(GOOD | {"answer": ["Drone", "drone"]})[0].answer == ("Drone",)


def test_record_with_its_own_candidates_is_checked_against_those(read):
    choices = {"metadata": {"candidates": ["Yes, it floats", "No"]}}
    assert read(GOOD | choices | {"answer": "yes, it floats"})[0].answer == ("Yes, it floats",)
    assert 'answer "Drone" is not one of Yes, it floats, No;' in problems(read, GOOD | choices)


# ---- everything that can be wrong with a record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": None}, "instruction: is missing; add"),
        ({"instruction": "  "}, "instruction: is empty; write"),
        ({"instruction": ["x"]}, "instruction: is a list, not a string; write"),
        ({"reasoning": None}, "reasoning: is missing; write the steps"),
        ({"reasoning": ""}, "reasoning: is empty; write the steps"),
        ({"reasoning": 3}, "reasoning: is a number; give a string"),
        ({"reasoning": ["Step 1: x", 0]}, "reasoning: its list contains a number; use only strings"),
        ({"reasoning_steps": ["x"]}, "reasoning: is given together with reasoning_steps; keep one"),
        ({"reasoning": "<|reasoning_start|><|reasoning_end|>"}, "reasoning: the chain is empty; write"),
        ({"reasoning": ["", " "]}, "reasoning: the chain is empty; write"),
        ({"reasoning": "The drone flies."}, 'reasoning: "The drone flies." belongs to no step; write'),
        ({"reasoning": "Step 1: x\nConclusion: y\nStep 2: z"}, 'reasoning: "Step 2: z" belongs to no step'),
        ({"reasoning": "Conclusion: fly"}, "reasoning: a conclusion without steps; write"),
        ({"reasoning": "<|reasoning_start|>Step 1: x"}, "reasoning: unbalanced markers, 1 x <|reasoning_start|> and 0"),
        ({"reasoning": ["<|reasoning_start|>look", "fly"]}, "reasoning: unbalanced markers"),
        ({"reasoning": "<|reasoning_end|>Step 1: x<|reasoning_start|>"}, "reasoning: unbalanced markers"),
        ({"reasoning": ["look"] * 65}, "reasoning: 65 steps, more than 64; shorten"),
        ({"reasoning": "Step 1: " + "x" * 100_000}, "reasoning: 100008 characters, more than 100000; shorten"),
        ({"answer": None}, "answer: is missing; add"),
        ({"answer": ""}, "answer: is empty; add"),
        ({"answer": []}, "answer: is empty; add"),
        ({"answer": 4}, "answer: is a number; give"),
        ({"answer": ["Drone", None]}, "answer: its list contains null; use only"),
        ({"answer": "Humaniod"}, 'answer "Humaniod" is not one of Drone, Underwater Robot, Humanoid, '),
        ({"answer": "Humaniod"}, 'did you mean "Humanoid"? correct it or drop the record'),
        ({"answer": "Drone, Boat"}, 'answer "Boat" is not one of Drone'),
        ({"answer": "four"}, "drop the record (data about something else need `--domain none`, in the YAML"),
        ({"confidence": float("nan")}, "confidence: is NaN, which is not JSON; write null, or leave the field out"),
        ({"confidence": 92.5}, "confidence: 92.5 is not between 0 and 1; correct"),
        ({"confidence": "0.9"}, "confidence: is a string, not a number; give"),
        ({"confidence": True}, "confidence: is true or false, not a number; give"),
        ({"metadata": []}, "metadata: is a list, not an object; write"),
        ({"metadata": {"source": "a"}, "source": "b"}, '"source": differs from the same field in metadata; keep'),
        ({"metadata": {"candidates": "AB"}}, "metadata.candidates: must be a list of non-empty strings; list"),
        ({"metadata": {"candidates": ["Yes", "yes"]}}, "metadata.candidates: lists a choice twice; keep"),
        ({"id": ["a"]}, "id: is a list; give"),
        ({"image": 5}, "image: is a number, not a string; give"),
        ({"image": ""}, "image: is empty; give"),
        ({"image": "gone.jpg"}, 'image: "gone.jpg" is not in '),
        ({"image": "."}, 'image: "." is not a file; give'),
        ({"image": "a\0b.jpg"}, 'image: "a\\u0000b.jpg" is not in '),
        ({"image": "../up.jpg"}, 'image: "../up.jpg" leaves '),
        ({"image": "/etc/hostname"}, 'image: "/etc/hostname" leaves '),
        ({"image": "https://example.org/a.jpg"}, "is a URL, which is not downloaded; download it yourself"),
    ],
)
def test_problem_is_named_with_file_record_and_field(read, tmp_path, change, message):
    found = problems(read, GOOD | change)
    assert found.startswith(f"{tmp_path / 'train.json'} record 1: ") and message in found and "; " in found


def test_record_that_is_no_object_is_named(read):
    assert "record 1: is a list, not an object; write" in problems(read, [])


def test_all_problems_of_a_file_are_raised_together(read):
    with pytest.raises(DataError) as caught:
        read({"answer": "Boat"}, GOOD, 3)
    assert [line.split(" record ")[1][:14] for line in caught.value.problems] == [
        "1: instruction",
        "1: reasoning: ",
        '1: answer "Boa',
        "3: is a number",
    ]


def test_message_prints_fifty_problems_and_counts_the_rest(read):
    with pytest.raises(DataError) as caught:
        read(*[1] * 60)
    assert len(caught.value.problems) == 60
    assert str(caught.value).count("\n") == 50 and str(caught.value).endswith("... and 10 more")


def test_link_that_leaves_the_folder_is_refused_unless_allowed(read, tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "real.jpg"
    outside.write_bytes(b"jpeg")
    (tmp_path / "link.jpg").symlink_to(outside)
    (tmp_path / "folder").symlink_to(outside.parent)
    for image in ("link.jpg", "folder/real.jpg", str(outside)):
        assert "leaves" in problems(read, GOOD | {"image": image})
        assert read(GOOD | {"image": image}, allow_outside=True)[0].image == os.path.realpath(outside)


def test_image_root_replaces_the_data_files_folder(read, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"jpeg")
    assert read(GOOD | {"image": "a.jpg"}, image_root=tmp_path / "pictures")[0].image.endswith("pictures/a.jpg")
    with pytest.raises(DataError, match=r"image root .*nowhere: no such folder; give"):
        read(GOOD, image_root=tmp_path / "nowhere")


# ---- everything that can be wrong with a file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "the file is empty; write"),
        ("a.jsonl", b"\n \n", "the file is empty; write"),
        ("a.json", b"[]", "contains no records; write"),
        ("a.json", b"{}", "contains an object, not a list of records; put"),
        ("a.json", b'[\n {"a": 1,}]', "line 2 column 10: invalid JSON"),
        ("a.json", b'[{"a": "\xff"}]', "line 1: not UTF-8 text .byte 8"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "record 1: is a number|line 1: invalid JSON"),
        ("a.jsonl", json.dumps(GOOD).encode() + b'\n{"instruc', "line 2 column 2: .*the file ends inside this line"),
        ("a.jsonl", b'{"instruc\n' + json.dumps(GOOD).encode(), "line 1 column 2: .*correct the line or delete it"),
        ("a.parquet", b"PAR1", "not readable as Parquet"),
        ("a.txt", b"x", 'unknown suffix ".txt"; use .json'),
    ],
)
def test_broken_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_records(tmp_path / name, candidates=ROBOTS)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["gone.json", "gone.jsonl", "gone.parquet", "folder.json"])
def test_file_that_cannot_be_opened_is_named(tmp_path, name):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=name):
        read_records(tmp_path / name, candidates=ROBOTS)


fields = st.sampled_from(["id", "image", "instruction", "question", "reasoning", "answer", "confidence", "metadata"])
other_fields = st.sampled_from(["reasoning_steps", "candidates"]) | st.text(max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["Drone", "Step 1: x", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields | other_fields, inner),
    max_leaves=12,
)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(value=json_values, require_reasoning=st.booleans(), allow_outside=st.booleans())
def test_any_json_gives_records_or_a_data_error(tmp_path, value, require_reasoning, allow_outside):
    for content in (value, [value, GOOD | value if isinstance(value, dict) else GOOD]):
        (tmp_path / "a.json").write_text(json.dumps(content))
        try:
            records = read_records(
                tmp_path / "a.json", require_reasoning=require_reasoning, allow_outside=allow_outside, candidates=ROBOTS
            )
        except DataError as error:
            assert str(error).encode()  # printable on any terminal
        else:
            assert all(isinstance(record, ReasoningRecord) for record in records)


# ---- writing


def test_written_records_read_back_equal(read, tmp_path):
    records = read(TEACHER, HUMAN, UNIFIED, GOOD)
    write_records(tmp_path / "copy.jsonl", records)
    assert read_records(tmp_path / "copy.jsonl", candidates=ROBOTS) == records
    assert json.loads((tmp_path / "copy.jsonl").read_text().splitlines()[0])["image"] == "warehouse_scene.jpg"


def test_record_is_written_in_the_unified_spelling(read, tmp_path):
    (record,) = read(UNIFIED)
    written = record_to_json(record, tmp_path)
    assert written.pop("id") == "train.json:1"
    assert written == UNIFIED | {
        "reasoning": "<|reasoning_start|>\nStep 1: The tunnel is flooded.\nStep 2: Only one robot dives.\n"
        "Conclusion: It dives.\n<|reasoning_end|>",
        "metadata": UNIFIED["metadata"] | {"num_steps": 2},
    }


def test_failed_write_leaves_the_old_file_and_no_other(read, tmp_path):
    (record,) = read(GOOD | {"id": "r1"})
    bad = ReasoningRecord(
        record_id="r2",
        image=None,
        instruction="x",
        steps=(),
        answer=("Drone",),
        metadata={"scene": object()},
        default_candidates=ROBOTS,
    )
    write_records(tmp_path / "copy.jsonl", [record])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"record r2: metadata: .*use only JSON values"):
        write_records(tmp_path / "copy.jsonl", [record, bad])
    assert sorted(tmp_path.iterdir()) == before
    assert read_records(tmp_path / "copy.jsonl", candidates=ROBOTS) == [record]


# ---- cost


def test_reading_ten_thousand_records_takes_seconds_not_minutes(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(0, 10_000, 10):
        (tmp_path / "images" / f"{i}.jpg").touch()
    with open(tmp_path / "big.jsonl", "w") as file:
        file.writelines(json.dumps(TEACHER | {"image": f"images/{i // 10 * 10}.jpg"}) + "\n" for i in range(10_000))
    start = time.process_time()
    assert len(read_records(tmp_path / "big.jsonl", candidates=ROBOTS)) == 10_000
    assert time.process_time() - start < 5


def test_records_module_imports_without_torch_or_pyarrow():
    heavy = {"torch", "transformers", "pyarrow", "numpy"}
    code = f"import sys, embervlm.data.records; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
