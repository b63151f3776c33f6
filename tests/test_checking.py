"""The data checks: every planted fault is found at its record, and nothing is found in data that has none."""

import json
import math
import random
import re
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.curate.checking import check_file, open_picture
from embervlm.curate.findings import KINDS, CheckOptions
from embervlm.curate.quality import filter_file
from embervlm.curate.validate import validate
from embervlm.data.blind import best_guess, blind_guess
from embervlm.data.domain import NO_DOMAIN
from embervlm.data.records import DataError, read_records
from embervlm.data.samples import Grid
from embervlm.data.splits import split_of, split_records
from embervlm.judge.contradiction import opposite_steps
from embervlm.report.validation import report_page, report_text, write_reports
from embervlm.robots.domain import ROBOTS as ROBOTS_DOMAIN
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.words.chain_text import step_numbers
from embervlm.words.claims import named_candidates

STOPPING = {name for name, kind in KINDS.items() if kind.stops_training}
SUMS = ["four", "five", "six"]


@pytest.fixture
def scenes(scene_data, tmp_path):
    """The values of 48 generated records in a folder of their own, with their pictures."""
    shutil.copytree(scene_data / "images", tmp_path / "images")
    return json.loads((scene_data / "reasoning_data.json").read_text(encoding="utf-8"))


@pytest.fixture
def check(tmp_path):
    """Writes values and checks them: `check(values)` -> {(kind, record number)}."""

    def check(values, **options):
        path = tmp_path / "data.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return {
            (found.kind, found.number)
            for found in check_file(path, CheckOptions(**options, domain=ROBOTS_DOMAIN)).problems
        }

    return check


def group_in(split):
    return next(str(i) for i in range(999) if split_of(str(i)) == split)


def sum_record(number, **changes):
    """A record of another domain, without a picture."""
    return {
        "instruction": f"Tom has {number} red marbles and finds two more in box {number * 7}. How many has Tom?",
        "reasoning": ["Tom starts with his red marbles.", "Two more marbles go on top.", "Conclusion: five"],
        "answer": "five",
        "metadata": {"candidates": SUMS, "split_group": group_in("train")},
        **changes,
    }


def test_generated_records_have_no_findings_but_near_duplicates_of_one_picture(scenes, check):
    assert {kind for kind, _ in check(scenes)} <= {"near_duplicate"}


def test_what_a_step_may_have_read_off_the_picture_is_not_held_against_it(scenes, check):
    """Nobody says what this picture shows, so "gray 2" is no worse than the words of the question."""
    bare = {"instruction": "Which bar is tallest?", "answer": "Drone", "image": scenes[0]["image"]}
    steps = ["From left to right I read gray 2, blue 4.", "So the tallest is the Drone."]
    assert check([{**bare, "reasoning": [*steps, "Conclusion: Drone"]}]) == set()
    assert check([{**bare, "reasoning": [*steps, "Conclusion: Drone"], "image": None}]) == {("unsupported", 1)}
    strange = ["The tide goes out at noon.", "Seven boats lie on dry sand."]
    assert check([{**bare, "reasoning": [*strange, "Conclusion: Drone"]}]) == {("unsupported", 1)}


@pytest.mark.parametrize(
    ("question", "steps", "answer"),
    [
        ("What is this?", ["I can see something white.", "It has wheels.", "So it must be an ambulance."], "ambulance"),
        ("Is that something to eat?", ["The picture shows a cupcake.", "A cupcake is food."], "yes"),
        ("How many of them are tools?", ["A saw and a cat lie there.", "The saw counts.", "That makes one."], "1"),
    ],
)
def test_a_right_chain_that_shares_no_word_with_its_question_has_no_findings(scenes, check, question, steps, answer):
    record = {"instruction": question, "image": scenes[0]["image"], "metadata": {"candidates": []}}
    assert check([{**record, "reasoning": [*steps, f"Conclusion: {answer}"], "answer": answer}]) == set()


@pytest.mark.parametrize(
    ("conclusion", "answer", "found"),
    [
        ("food", "animal", True),
        ("none", "2", True),
        ("two", "2", False),
        ("it is on the left side", "left", False),
        ("the answer is yes", "no", False),  # "yes" may be of something else; candidates would tell
        ("No", "yes", True),
        ("a red bus", "the bus", False),
    ],
)
def test_a_conclusion_in_other_words_than_the_free_answer_is_found(scenes, check, conclusion, answer, found):
    steps = ["The picture shows some things.", "They are looked at.", f"Conclusion: {conclusion}."]
    record = {"instruction": "What do the things show?", "image": scenes[0]["image"], "metadata": {"candidates": []}}
    kinds = {kind for kind, _ in check([{**record, "reasoning": steps, "answer": answer}])}
    assert ("conclusion" in kinds) == found


def test_records_of_another_domain_without_pictures_have_no_findings(check):
    assert check([sum_record(number) for number in (3, 50, 700)]) == set()


# ---- one planted fault each


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


def with_metadata(record, **metadata):
    return record | {"metadata": record["metadata"] | metadata}


FAULTS = {
    "schema": lambda record: without(record, "instruction"),
    "markers": lambda record: record | {"reasoning": "<|reasoning_start|>Step 1: Tom counts marbles."},
    "unknown_answer": lambda record: record | {"answer": "fiive"},
    "picture": lambda record: record | {"image": "images/none.jpg"},
    "split": lambda record: with_metadata(record, split="dev"),
    "conclusion": lambda record: record | {"answer": "six"},
    "numbering": lambda record: record | {"reasoning": "Step 1: Red marbles.\nStep 3: Two more.\nConclusion: five"},
    "given_away": lambda record: record | {"instruction": "Tom has five red marbles. How many red marbles has Tom?"},
    "contradiction": lambda record: (
        record | {"reasoning": ["The red marbles fit into box A.", "The red marbles cannot fit into box A."]}
    ),
    "repetition": lambda record: (
        record | {"reasoning": ["Tom has red marbles.", "Two more come.", "Tom has red marbles."]}
    ),
    "unsupported": lambda record: record | {"reasoning": ["Tom has red marbles.", "Whales sing."]},
    "maybe_too_long": lambda record: record | {"reasoning": ["Tom has red marbles " + "and more " * 300]},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found_at_its_record_alone(kind, check):
    values = [sum_record(3), FAULTS[kind](sum_record(50)), sum_record(700)]
    found = check(values)
    assert (kind, 2) in found
    assert {number for _, number in found} == {2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("facts", "none"),
        ("facts", {"load": 3}),
        ("step_types", ["one"]),
        ("seen", 5),
        ("caption", 7),
        ("boxes", [{"kind": "load", "box": [0, 1]}]),
        ("scene", 4),
    ],
)
def test_metadata_that_training_cannot_use_is_found(name, value, check):
    assert check([sum_record(3), with_metadata(sum_record(50), **{name: value})]) == {("schema", 2)}


def test_a_picture_that_is_cut_off_is_found_in_every_record_that_shows_it(scenes, tmp_path, check):
    picture = tmp_path / scenes[3]["image"]
    picture.write_bytes(picture.read_bytes()[:900])
    showing = {number for number, value in enumerate(scenes, 1) if value["image"] == scenes[3]["image"]}
    assert len(showing) == 3
    assert {number for kind, number in check(scenes) if kind == "picture"} == showing


@pytest.mark.slow
def test_pictures_are_opened_in_other_processes_as_in_this_one(scenes, tmp_path, check, monkeypatch):
    (tmp_path / scenes[0]["image"]).write_bytes(b"no picture")
    alone = check(scenes, workers=1)
    monkeypatch.setattr("embervlm.curate.checking.ITEMS_PER_WORKER", 4)
    assert check(scenes, workers=2) == alone
    assert ("picture", 1) in alone


def test_equal_pictures_have_equal_digests_whatever_they_are_called(scenes, tmp_path):
    first, copy = tmp_path / scenes[0]["image"], tmp_path / "copy.jpg"
    shutil.copy(first, copy)
    assert open_picture(str(first)) == open_picture(str(copy)) and open_picture(str(first)).digest


def test_a_fact_that_a_step_gets_wrong_is_a_contradiction(scenes, check):
    number = next(n for n, value in enumerate(scenes, 1) if "load is light" in value["reasoning"])
    scenes[number - 1]["reasoning"] = scenes[number - 1]["reasoning"].replace("load is light", "load is heavy")
    assert ("contradiction", number) in check(scenes)


def test_a_picture_in_two_splits_is_found_by_its_content(scenes, tmp_path, check):
    shutil.copy(tmp_path / scenes[0]["image"], tmp_path / "copy.jpg")
    copy = with_metadata(scenes[1], split="test", split_group="other") | {"image": "copy.jpg"}
    found = check([with_metadata(scenes[0], split="train"), copy])
    assert ("picture_leak", 2) in found
    path = tmp_path / "data.json"
    with pytest.raises(DataError, match="is in train"):
        split_records(read_records(path, candidates=ROBOTS))  # what training would say


SAVED_AGAIN = {
    "jpeg.jpg": lambda picture, path: picture.save(path, quality=70),
    "twice.png": lambda picture, path: picture.resize((picture.width * 2, picture.height * 2)).save(path),
    "half.webp": lambda picture, path: picture.resize((picture.width // 2, picture.height // 2)).save(path),
}


@pytest.mark.parametrize("name", SAVED_AGAIN)
def test_a_picture_that_was_saved_again_is_found_in_another_split(name, scenes, tmp_path, check):
    with Image.open(tmp_path / scenes[0]["image"]) as picture:
        SAVED_AGAIN[name](picture.convert("RGB"), tmp_path / name)
    asked = with_metadata(scenes[1], split="test", split_group="other") | {"image": name}
    pictured = [with_metadata(value, split="train") for value in scenes if value["image"] != scenes[1]["image"]]
    found = check([with_metadata(scenes[0], split="train"), asked, *pictured[1:]])
    assert [number for kind, number in found if kind == "picture_alike"] == [2]


def test_other_pictures_in_another_split_do_not_look_the_same(scenes, check):
    pictures = sorted({value["image"] for value in scenes})
    halves = [with_metadata(value, split="train" if pictures.index(value["image"]) % 2 else "test") for value in scenes]
    assert not any(kind == "picture_alike" for kind, _ in check(halves))


def page(seed: int) -> Image.Image:
    """Forty lines of text, as a scan has them: from afar one page is like another."""
    draw, rng = ImageDraw.Draw(picture := Image.new("RGB", (420, 640), "white")), random.Random(seed)
    for line in range(40):
        text = "".join(rng.choice("etaoinshrdlu ") for _ in range(60))
        draw.text((20, 12 + 15 * line), text, fill="black")
    return picture


def test_two_pages_of_text_are_two_and_a_smaller_copy_of_one_is_not(tmp_path, check):
    who = {"candidates": ["Ann", "Bob"]}
    asked = {"instruction": "Who signed it?", "answer": "Ann", "reasoning": ["Ann stands at the end."]}
    page(1).save(tmp_path / "1.png")
    page(2).save(tmp_path / "2.png")
    page(1).resize((300, 457)).save(tmp_path / "3.jpg", quality=60)
    values = [{**asked, "image": "1.png", "metadata": {**who, "split": "train"}}]
    values += [{**asked, "image": name, "metadata": {**who, "split": "test"}} for name in ("2.png", "3.jpg")]
    assert [number for kind, number in check(values) if kind == "picture_alike"] == [3]
    values[2]["answer"] = "Bob"  # asked the same: so they are not the same
    assert not any(kind == "picture_alike" for kind, _ in check(values))


def test_a_task_without_a_picture_in_two_splits_is_found_whatever_its_case(check):
    moved = sum_record(3, metadata={"candidates": SUMS, "split": "test"})
    moved["instruction"] = moved["instruction"].upper()
    assert ("text_leak", 2) in check([sum_record(3), moved])


def test_an_instruction_with_other_answers_for_other_pictures_is_no_leak(scenes, check):
    same = [value | {"instruction": "Which robots can go?"} for value in scenes]
    assert not any(kind == "text_leak" for kind, _ in check(same))


def test_an_exact_duplicate_is_found_and_so_is_another_answer_to_the_same_question(check):
    again = sum_record(3) | {"id": "again"}
    other = sum_record(3, answer="six", reasoning=["Tom starts with red marbles.", "Three come.", "Conclusion: six"])
    found = check([sum_record(3), again, other])
    assert {("duplicate", 2), ("conflict", 3)} <= found


@pytest.mark.parametrize("most_compared", [0, 64])
def test_a_text_with_one_word_changed_is_a_near_duplicate_and_another_text_is_not(most_compared, check, monkeypatch):
    """In pairs as well as with MinHash."""
    monkeypatch.setattr("embervlm.curate.duplicates.MOST_COMPARED", most_compared)
    words = [f"word{i}" for i in range(100)]
    changed = [*words[:50], "other", *words[51:]]
    values = [
        sum_record(number, reasoning=["Tom counts " + " ".join(text)])
        for number, text in ((3, words), (3, changed), (3, words[::-1]))
    ]
    found = check(values)
    assert [number for kind, number in sorted(found) if kind == "near_duplicate"] == [2]


def test_an_instruction_that_always_has_one_answer_needs_no_picture(scenes, check):
    for value in scenes:
        value["instruction"] = "Who goes?" if value["answer"] == scenes[0]["answer"] else value["instruction"]
    same = [value for value in scenes if value["instruction"] == "Who goes?"]
    values = (same * 10)[:10]
    assert ("guessable", 1) in check(values)


def test_the_same_id_twice_is_found(check):
    assert ("duplicate_id", 2) in check([sum_record(3, id="a"), sum_record(50, id="a")])


def test_lengths_counted_with_a_tokenizer_are_those_training_refuses(records, tokenizer, scenes, tmp_path):
    from embervlm.data.dataset import encode_reasoning

    tokenizer.save(tmp_path / "tokenizer")
    path = tmp_path / "data.json"
    path.write_text(json.dumps(scenes), encoding="utf-8")
    lengths = [len(sample.target) for sample in encode_reasoning(records, tokenizer, grid=Grid(3, 3), max_length=512)]
    limit = sorted(lengths)[len(lengths) // 2]
    options = CheckOptions(tokenizer=str(tmp_path / "tokenizer"), max_reasoning_length=limit, domain=ROBOTS_DOMAIN)
    data = check_file(path, options)
    assert data.num_tokens == lengths
    too_long = {number for number, length in enumerate(lengths, 1) if length > limit}
    assert too_long and {found.number for found in data.problems if found.kind == "too_long"} == too_long


def test_a_fact_with_hundreds_of_values_is_not_looked_for(check):
    values = [with_metadata(sum_record(i), facts={"marbles": f"number {i}"}) for i in range(201)]
    assert not any(kind == "contradiction" for kind, _ in check(values))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = sum_record(3).keys() | {"image", "id", "confidence"}
METADATA_KEYS = ("facts", "scene", "step_types", "seen", "boxes", "caption", "split", "split_group", "complexity")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(st.sampled_from(sorted(KEYS)), JSON_VALUES | st.text(max_size=40), max_size=2),
    metadata=st.dictionaries(st.sampled_from(METADATA_KEYS), JSON_VALUES, max_size=3),
)
@example(fields={"answer": math.inf}, metadata={"facts": math.inf})
def test_any_value_in_any_field_is_accepted_or_reported(fields, metadata, tmp_path):
    path = tmp_path / "data.json"
    value = sum_record(50)
    path.write_text(json.dumps([sum_record(3), value | {"metadata": value["metadata"] | metadata} | fields]))
    report = validate(path, CheckOptions(domain=ROBOTS_DOMAIN))
    assert report["num_records"] == 2
    assert report["num_stopping"] == len({f["number"] for f in report["problems"] if f["kind"] in STOPPING} - {0})
    report_page(report)
    report_text(report)
    if report["trains"]:
        assert len(read_records(path, candidates=ROBOTS)) == 2


@pytest.mark.parametrize("facts", ["Infinity", '{"a": 1, "a": 2}'])
def test_a_record_of_a_list_that_json_does_not_know_has_its_number_and_is_counted(facts, tmp_path):
    path = tmp_path / "data.json"
    first, second = json.dumps(sum_record(3)), json.dumps(sum_record(50, facts="FACTS")).replace('"FACTS"', facts)
    path.write_text(f"[{first}, {second}]")
    report = validate(path, CheckOptions(domain=ROBOTS_DOMAIN))
    assert report["num_records"] == 2
    assert [found["number"] for found in report["problems"] if found["kind"] == "schema"] == [2]


def test_half_a_surrogate_pair_is_found_and_can_be_reported(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sum_record(3), sum_record(50, instruction="Tom \ud800 red marbles")]))
    report = validate(path, CheckOptions(domain=ROBOTS_DOMAIN))
    assert [(f["kind"], f["number"], f["field"]) for f in report["problems"]] == [("schema", 2, "instruction")]
    for name in ("report.txt", "report.json"):
        write_reports(report, tmp_path / name)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["num_stopping"] == 1
    assert filtered([sum_record(3), sum_record(50, instruction="Tom \ud800 red marbles")], tmp_path)[0] == (1, 1)


# ---- parts


def test_step_numbers_are_those_written():
    assert step_numbers("Step 1: a\nStep 3: b") == [1, 3]
    assert step_numbers("**Step 2:** a Step 4: b\nConclusion: c") == [2, 4]
    assert step_numbers("Step 1: a\nStep 2: as in Step 1: b") == [1, 2]


def test_a_sentence_and_its_negation_are_opposites_but_a_question_is_not():
    assert opposite_steps(["The wall is too high.", "So: no.", "The wall is not too high."]) == (1, 3)
    assert opposite_steps(["Is the wall too high?", "The wall is not too high."]) is None
    assert opposite_steps(["The wall is not high.", "The gate is high."]) is None


def test_a_one_letter_choice_is_named_only_as_written():
    assert named_candidates("It is a box, so B", ["A", "B"]) == {"B"}


def test_blind_guessers_of_a_hand_case():
    train = [("train", "lift the red box", "A"), ("train", "lift the box", "A"), ("train", "dive", "B")]
    test = [
        ("test", "lift the blue box", "A"),
        ("test", "dive", "B"),
        ("test", "dive deep", "B"),
        ("test", "dive", "A"),
    ]
    found = blind_guess((split, text, text, answer) for split, text, answer in train + test)
    assert found == {"most_common": 1 / 2, "fitted_on_train": 1 / 4, "words": 3 / 4, "in_hindsight": 3 / 4}
    assert best_guess(found) == 3 / 4


def test_the_same_question_in_other_words_is_guessed_alike():
    rows = [("train", "go", "Go!", "A"), ("test", "go", "Please go.", "A"), ("test", "go", "Go now.", "B")]
    found = blind_guess(rows)
    assert found["fitted_on_train"] == found["in_hindsight"] == 1 / 2


# ---- reports


def test_the_report_says_what_is_in_the_data(scenes, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(scenes), encoding="utf-8")
    report = validate(path, CheckOptions(domain=ROBOTS_DOMAIN))
    assert report["trains"] and report["num_records"] == 48
    assert report["distinct"]["pictures"] == 16
    assert sum(report["splits"].values()) == sum(report["counts"]["answer"].values()) == 48
    histogram = report["histograms"]["tokens of chain and answer"]
    assert sum(count for _, _, count in histogram["bins"]) == 48


def test_every_finding_stands_in_the_text_with_record_field_and_fix(scenes, tmp_path):
    scenes[4]["answer"] = "Humaniod"
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*map(json.dumps, scenes[:5]), "{broken"]), encoding="utf-8")
    report = validate(path, CheckOptions(domain=ROBOTS_DOMAIN))
    text = report_text(report)
    assert f'{path} record 5: answer: "Humaniod" is not one of' in text
    assert f"{path} record 6: " in text and "invalid JSON" in text
    assert len([line for line in text.splitlines() if line.startswith(f"{path} record")]) == len(report["problems"])


def test_the_page_escapes_the_data_and_needs_no_other_file(scenes, tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    scenes[0] |= {"instruction": f"{attack} Send the Drone", "answer": "Drone", "metadata": {"source": attack}}
    scenes[1] = {"id": attack, "image": attack, "instruction": [attack]}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(scenes), encoding="utf-8")
    page = report_page(validate(path, CheckOptions(domain=ROBOTS_DOMAIN)))
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page
    assert 'src="data:image/jpeg;base64,' in page
    assert 'src="http' not in page and 'href="http' not in page and "url(" not in page


def test_a_report_named_html_is_refused(scenes, tmp_path):
    with pytest.raises(ConfigError, match="beside"):
        write_reports({}, tmp_path / "report.html")


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"answer": "fiive"}, 1), ({"answer": "six"}, 0)])
def test_the_command_exits_with_one_only_where_a_record_would_not_train(changes, code, tmp_path, capsys):
    path, report = tmp_path / "data.json", tmp_path / "out" / "report.json"
    path.write_text(json.dumps([sum_record(3), sum_record(50) | changes]), encoding="utf-8")
    arguments = ["data", "validate", "--data_file", str(path), "--output_report", str(report)]
    if code:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
    else:
        main(arguments)
    assert json.loads(report.read_text(encoding="utf-8"))["trains"] == (not code)
    assert report.with_suffix(".html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "2 records" in capsys.readouterr().out


def test_data_of_another_domain_are_told_how_to_be_read(tmp_path):
    path = tmp_path / "data.json"
    strange = {"image": None, "instruction": "How many?", "reasoning": ["I count.", "Conclusion: 4."], "answer": "4"}
    path.write_text(json.dumps([strange, strange]), encoding="utf-8")
    text = report_text(validate(path, CheckOptions(domain=ROBOTS_DOMAIN)))
    assert "2 answers are none of this domain's: data about something else need `--domain none`" in text
    assert "--domain" not in report_text(validate(path, CheckOptions(domain=NO_DOMAIN)))


def test_a_file_without_a_usable_record_still_gets_its_report(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[1, null, {}]", encoding="utf-8")
    report = validate(path, CheckOptions(domain=ROBOTS_DOMAIN))
    assert (report["num_records"], report["num_stopping"]) == (3, 3)
    assert "3 records would stop training" in report_text(report)
    assert "Record 2" in report_page(report)


def test_parquet_is_checked_like_json(tmp_path):
    import pyarrow
    from pyarrow import parquet

    values = [sum_record(3), sum_record(50, answer="fiive")]
    rows = [value | {"metadata": json.dumps(value["metadata"])} for value in values]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    data = check_file(tmp_path / "data.parquet", CheckOptions(domain=ROBOTS_DOMAIN))
    assert [(found.kind, found.number) for found in data.problems] == [("unknown_answer", 2)]


# ---- filter


def filtered(values, tmp_path, minimum=0.8, output="kept.json"):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    counts = filter_file(
        path, output=tmp_path / output, min_quality_score=minimum, options=CheckOptions(domain=ROBOTS_DOMAIN)
    )
    return counts, tmp_path / output


def test_a_good_record_has_score_one_and_stays_as_it_is(tmp_path):
    value = sum_record(3)
    counts, output = filtered([value], tmp_path)
    (kept,) = json.loads(output.read_text(encoding="utf-8"))
    assert counts == (1, 0)
    assert set(kept["metadata"].pop("quality").values()) == {1.0}
    assert kept == value


@pytest.mark.parametrize(
    ("kind", "part", "value"),
    [
        ("conclusion", "conclusion", 0.0),
        ("contradiction", "consistency", 0.5),
        ("numbering", "form", 0.75),
        ("given_away", "question", 0.5),
        ("unsupported", "relevance", 0.5),
        ("repetition", "relevance", 0.6667),
    ],
)
def test_a_fault_lowers_its_part_of_the_score(kind, part, value, tmp_path):
    counts, output = filtered([sum_record(3), FAULTS[kind](sum_record(50))], tmp_path)
    assert counts == (1, 1)
    (rejected,) = json.loads(output.with_name("kept.rejected.json").read_text(encoding="utf-8"))
    quality = rejected["value"]["metadata"]["quality"]
    assert quality[part] == value
    assert rejected["record"] == 2 and rejected["score"] == quality["score"] <= value
    assert rejected["reasons"]


def test_steps_about_an_unknown_picture_are_a_finding_but_drop_no_record(scenes, tmp_path):
    steps = ["The tide goes out at noon.", "Seven boats lie on dry sand.", "Conclusion: Drone"]
    strange = {"instruction": "Which bar is tallest?", "answer": "Drone", "reasoning": steps}
    assert filtered([{**strange, "image": scenes[0]["image"]}], tmp_path)[0] == (1, 0)
    assert filtered([strange], tmp_path)[0] == (0, 1)


def test_what_is_kept_and_what_is_not_make_up_the_file(scenes, tmp_path):
    values = [*scenes, 5, {"instruction": "What?"}, {**scenes[0], "id": "again"}]
    (kept, rejected), output = filtered(values, tmp_path, output="kept.jsonl")
    assert kept + rejected == len(values) and rejected >= 3
    read_records(output, candidates=ROBOTS)  # trains
    lines = output.with_name("kept.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert {49, 50, 51} <= {json.loads(line)["record"] for line in lines}


def test_a_minimum_of_zero_drops_only_what_would_not_train(tmp_path):
    counts, _ = filtered([sum_record(3), sum_record(3, id="again"), sum_record(50, answer="fiive")], tmp_path, 0)
    assert counts == (2, 1)


def test_filtering_again_keeps_everything(scenes, tmp_path):
    (kept, _), output = filtered(scenes, tmp_path)
    assert filtered(json.loads(output.read_text(encoding="utf-8")), tmp_path, output="again.json")[0] == (kept, 0)


@pytest.mark.parametrize(
    ("minimum", "output", "message"),
    [(1.5, "kept.json", "from 0 to 1"), (0.5, "kept.csv", "end in .json"), (0.5, "data.json", "is the input")],
)
def test_a_wrong_flag_of_filter_is_explained(minimum, output, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        filtered([sum_record(3)], tmp_path, minimum, output)


def test_the_filter_command_says_where_everything_went(tmp_path, capsys):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sum_record(3), sum_record(50, answer="six")]), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    output = tmp_path / "elsewhere" / "kept.json"
    main(["data", "filter", "--input", str(path), "--min_quality_score", "0.8", "--output", str(output)])
    said = capsys.readouterr().out
    assert f"1 records kept in {output}" in said and "kept.rejected.json" in said
    assert f"--image_root {tmp_path}" in said


def test_a_report_where_its_page_would_be_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(SystemExit, match="the HTML page is written beside it"):
        main(["data", "validate", "--data_file", str(tmp_path / "none.json"), "--output_report", "report.html"])


def answers_alone(value):
    """The record as phase 3 takes it: a question and its answer."""
    bare = {name: item for name, item in value.items() if name != "reasoning"}
    bare["metadata"] = {name: item for name, item in value["metadata"].items() if name in ("split", "split_group")}
    return bare


def test_records_without_chains_are_fine_where_phase_3_is_to_train_on_them(scenes, tmp_path, capsys):
    path, kept = tmp_path / "data.json", tmp_path / "kept.json"
    path.write_text(json.dumps([answers_alone(value) if n % 2 else value for n, value in enumerate(scenes)]))
    checked = ["data", "validate", "--data_file", str(path), "--output_report", str(tmp_path / "report.txt")]
    with pytest.raises(SystemExit):
        main(checked)
    assert "for it, say `--without_chains`" in capsys.readouterr().out
    main([*checked, "--without_chains"])
    assert "every record can be used for training" in capsys.readouterr().out
    chosen = ["data", "filter", "--input", str(path), "--output", str(kept), "--min_quality_score", "0.8"]
    main([*chosen, "--without_chains"])
    assert 0 < sum("reasoning" not in value for value in json.loads(kept.read_text()))
    assert "is missing" not in (tmp_path / "kept.rejected.json").read_text()


def test_a_terminal_shows_the_first_findings_that_stop_training(tmp_path, capsys):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sum_record(n) | {"answer": "fiive"} for n in range(7)]))
    with pytest.raises(SystemExit):
        main(["data", "validate", "--data_file", str(path), "--output_report", str(tmp_path / "report.txt")])
    out = capsys.readouterr().out
    assert f'{path} record 5: answer: "fiive" is not one of' in out and "record 6:" not in out
    assert "... and 2 more that stop training" in out


def test_a_list_that_is_cut_short_names_its_line_and_no_record(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sum_record(1), sum_record(2)], indent=1)[:-40])
    report = validate(path, CheckOptions(domain=ROBOTS_DOMAIN))
    assert report["num_records"] == 1
    (found,) = [found for found in report["problems"] if found["kind"] == "schema"]
    assert found["number"] == 0 and found["what"].startswith("line ") and "invalid JSON" in found["what"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_that_powershell_wrote_is_one_line(encoding, tmp_path):
    path = tmp_path / "data.jsonl"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    path.write_bytes(mark + "".join(json.dumps(sum_record(n)) + "\n" for n in range(3)).encode(encoding))
    with pytest.raises(DataError, match=r"data\.jsonl: is UTF-16, as PowerShell writes it; save it as UTF-8"):
        read_records(path)


def test_bars_end_at_their_last_item(scenes, check, capsys):
    check(scenes)
    bars = capsys.readouterr().err
    assert "pictures: 16/16" in bars and re.search(r"chains: (\d+)/\1 ", bars)
