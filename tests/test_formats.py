"""Formats of published data sets: what of their boxes, captions and programs becomes of the records."""

import json

import pytest
from format_samples import (
    CLEVR,
    CLEVR_SCENES,
    EGOPLAN,
    EGOPLAN_IT,
    GEOMETRY3K,
    VISUAL_COT,
    VISUAL_COT_TURNS,
    clevr_program,
)
from PIL import Image

from embervlm.curate.checking import CheckOptions, check_file
from embervlm.curate.convert import convert_file
from embervlm.curate.formats.geometry3k import in_words
from embervlm.data.domain import NO_DOMAIN
from embervlm.data.records import DataError, read_records


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def convert(folder, source, content, **options):
    """The records that `content`, a list of values or a whole file, gives without a domain."""
    (folder / "in.json").write_text(json.dumps(content))
    made = convert_file(
        folder / "in.json", folder / "out.json", source=source, progress=False, domain=NO_DOMAIN, **options
    )
    assert read_records(folder / "out.json") == made.records
    return made.records


def problem(folder, source, content):
    with pytest.raises(DataError) as caught:
        convert(folder, source, content)
    return str(caught.value)


# ---- Visual-CoT


def test_visual_cot_boxes_are_kept_and_each_step_is_about_them(folder):
    (record,) = convert(folder, "visual_cot", [VISUAL_COT])
    assert record.metadata["boxes"] == [
        {"kind": "region", "box": [0.5373, 0.2656, 0.62, 0.3561]},
        {"kind": "region", "box": [0.0, 0.565, 0.5, 1.0]},
    ], "in shares of the picture, and cut off at its edge"
    assert record.steps == (
        "Look at the upper center of the picture, from (0.54, 0.27) to (0.62, 0.36).",
        "Look at the lower left of the picture, from (0.00, 0.56) to (0.50, 1.00).",
        "The tv is across from the truck.",
        "Conclusion: tv.",
    )
    assert record.metadata["seen"] == [["region"]] * 3 + [[]]
    assert record.answer == ("tv",) and "candidates" not in record.metadata, "the data decide"


def test_a_step_about_a_box_needs_no_words_of_the_question(folder):
    convert(folder, "visual_cot", [VISUAL_COT])
    data = check_file(folder / "out.json", CheckOptions(domain=NO_DOMAIN))
    assert not [problem for problem in data.problems if problem.kind == "unsupported"]


def test_visual_cot_turns_give_the_region_in_pixels_of_the_picture(folder):
    (record,) = convert(folder, "visual_cot", [VISUAL_COT_TURNS])
    assert record.record_id == "visual_cot-138460" and record.instruction == "What is the share of lemons?"
    assert record.metadata["boxes"] == [{"kind": "region", "box": [0.125, 0.25, 0.625, 0.5]}]
    assert record.answer == ("8%",) and record.num_steps == 1


def test_a_box_of_a_turn_alone_is_of_the_picture_padded_to_a_square(folder):
    Image.new("RGB", (100, 50)).save(folder / "wide.png")
    value = json.loads(json.dumps(VISUAL_COT_TURNS | {"image": ["wide.png"]}))
    value["conversations"][1]["value"] = "[0.500, 0.250, 1.000, 0.500]"
    (record,) = convert(folder, "visual_cot", [value])
    assert record.metadata["boxes"] == [{"kind": "region", "box": [0.5, 0.0, 1.0, 0.5]}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (VISUAL_COT | {"bboxs": []}, "bboxs: is not a list of boxes; write [[left, top, right, bottom], ...]"),
        (VISUAL_COT | {"bboxs": [[9, 9, 2, 2]]}, "bboxs[0]: is no box [left, top, right, bottom] in pixels"),
        (VISUAL_COT | {"width": None}, "width: is null; give the picture's width in pixels"),
        (VISUAL_COT_TURNS | {"image": "a.png"}, 'image: is not [path, "path###[left, top, right, bottom]"]'),
        (VISUAL_COT_TURNS | {"image": ["b.png"]}, 'image: "b.png" is no picture in'),
        (
            VISUAL_COT_TURNS | {"conversations": VISUAL_COT_TURNS["conversations"][2:]},
            "conversations: is not question, box, <image>, answer; records without a box are read with --from llava",
        ),
    ],
)
def test_visual_cot_without_usable_boxes_is_named(folder, value, message):
    assert message in problem(folder, "visual_cot", [value])


# ---- CLEVR


def test_clevr_functions_become_steps_in_words(folder):
    (record,) = convert(folder, "clevr", {"info": {"split": "train"}, "questions": [CLEVR]})
    assert record.steps == (
        "Look at all things.",
        "Find the large things.",
        "Find the large metal things.",
        "There is one large metal thing.",
        "Look at the things right of the large metal thing.",
        "Find the spheres right of the large metal thing.",
        "Count the spheres right of the large metal thing.",
        "Conclusion: 2.",
    )
    assert record.answer == ("2",) and record.metadata["candidates"] == [str(n) for n in range(11)]
    assert "caption" not in record.metadata and record.metadata["question_family_index"] == 12


def test_with_clevrs_scenes_each_step_says_its_result_and_the_things_are_the_caption(folder):
    (folder / "scenes").mkdir()
    (folder / "scenes" / "CLEVR_train_scenes.json").write_text(json.dumps(CLEVR_SCENES))
    (record,) = convert(folder, "clevr", {"questions": [CLEVR]})
    assert record.steps == (
        "Look at all things: there are 3.",
        "Find the large things: there is 1.",
        "Find the large metal things: there is 1.",
        "The large metal thing is a large gray metal cube.",
        "Look at the things right of the large metal thing: there are 2.",
        "Find the spheres right of the large metal thing: there are 2.",
        "Count the spheres right of the large metal thing: 2.",
        "Conclusion: 2.",
    )
    assert record.metadata["caption"] == ("large gray metal cube, small red metal sphere, small red rubber sphere.")


SPHERES = [("scene", [], []), ("filter_material", [0], ["metal"]), ("filter_shape", [1], ["sphere"])]


@pytest.mark.parametrize(
    ("nodes", "answer", "last"),
    [
        ([*SPHERES, ("exist", [2], [])], "yes", "Check whether there are metal spheres: yes."),
        ([*SPHERES, ("unique", [2], []), ("query_color", [3], [])], "red", "Read the color of the metal sphere: red."),
        (
            [*SPHERES, ("unique", [2], []), ("same_color", [3], []), ("count", [4], [])],
            "1",
            "Count the things of the same color as the metal sphere: 1.",
        ),
        (
            [*SPHERES, ("count", [2], []), ("count", [0], []), ("less_than", [3, 4], [])],
            "yes",
            "Check whether the number of metal spheres is less than the number of things, given 1 and 3: yes.",
        ),
        (
            [
                *SPHERES,
                ("unique", [2], []),
                ("query_size", [3], []),
                ("filter_shape", [0], ["cube"]),
                ("unique", [5], []),
                ("query_size", [6], []),
                ("equal_size", [4, 7], []),
            ],
            "no",
            "Check whether the size of the metal sphere equals the size of the cube, given small and large: no.",
        ),
        (
            [*SPHERES, ("filter_shape", [0], ["cube"]), ("union", [2, 3], []), ("count", [4], [])],
            "2",
            "Count the things among the metal spheres or the cubes: 2.",
        ),
        (
            [*SPHERES, ("filter_color", [0], ["red"]), ("intersect", [2, 3], []), ("count", [4], [])],
            "1",
            "Count the things among the metal spheres and the red things: 1.",
        ),
    ],
)
def test_clevr_programs_are_run_on_the_scene(folder, nodes, answer, last):
    (folder / "CLEVR_train_scenes.json").write_text(json.dumps(CLEVR_SCENES))
    value = CLEVR | {"program": clevr_program(*nodes), "answer": answer}
    (record,) = convert(folder, "clevr", {"questions": [value]})
    assert record.steps[-2] == last and record.answer == (answer,) and answer in record.metadata["candidates"]


def test_clevrs_published_layout_is_found_from_the_image_root(folder):
    for name in ("images/train", "questions", "scenes"):
        (folder / name).mkdir(parents=True)
    (folder / "a.png").rename(folder / "images" / "train" / "a.png")
    (folder / "scenes" / "CLEVR_train_scenes.json").write_text(json.dumps(CLEVR_SCENES))
    path = folder / "questions" / "CLEVR_train_questions.json"
    path.write_text(json.dumps({"questions": [CLEVR]}))
    options = {"image_root": folder, "progress": False, "domain": NO_DOMAIN}
    (record,) = convert_file(path, folder / "out.json", source="clevr", **options).records
    assert record.image.endswith("images/train/a.png") and "caption" in record.metadata


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (CLEVR | {"program": None}, "program: is missing or no list (test sets have none)"),
        (CLEVR | {"program": clevr_program(("paint", [], []))}, 'program: "paint" is no function of CLEVR'),
        (CLEVR | {"program": clevr_program(("filter_mood", [], []))}, '"filter_mood" is no function of CLEVR'),
        (CLEVR | {"program": clevr_program(("count", [], []))}, "program: count does not fit what it is given"),
        (CLEVR | {"program": clevr_program(("count", [3], []))}, "program[0]: is not {function, inputs: earlier nodes"),
        (CLEVR | {"answer": "3"}, 'answer: is "3", but the program gives "2" for the scene'),
        (CLEVR | {"image_filename": "b.png"}, 'image_filename: "b.png" is not in'),
    ],
)
def test_a_clevr_question_that_does_not_fit_is_named(folder, value, message):
    (folder / "CLEVR_train_scenes.json").write_text(json.dumps(CLEVR_SCENES))
    found = problem(folder, "clevr", {"questions": [value]})
    assert found.startswith(f"{folder / 'in.json'} record 1: ") and message in found


def test_a_broken_scene_is_named_in_its_own_file(folder):
    (folder / "CLEVR_train_scenes.json").write_text(json.dumps({"scenes": [{"objects": []}]}))
    assert "CLEVR_train_scenes.json record 1: is no scene of CLEVR" in problem(folder, "clevr", [CLEVR])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"questions": [', "line 1 column 16: invalid JSON"),
        ('{"questions": [] "info": 1}', "line 1 column 18: invalid JSON (Expecting ',' delimiter)"),
        ("{questions: []}", "line 1 column 2: invalid JSON (Expecting property name"),
        ('{"questions": []} 3', "line 1 column 19: invalid JSON (Extra data)"),
        ('{"answers": [1]}', "contains no records"),
    ],
)
def test_a_list_inside_an_object_is_read_as_json_is(folder, text, message):
    (folder / "in.json").write_text(text)
    with pytest.raises(DataError) as caught:
        convert_file(folder / "in.json", folder / "out.json", source="clevr", progress=False, domain=NO_DOMAIN)
    assert message in str(caught.value)


# ---- EgoPlan


def test_egoplan_actions_done_become_steps_and_the_choices_candidates(folder):
    first, second = convert(folder, "egoplan", [EGOPLAN, EGOPLAN_IT])
    assert first.steps == (
        "The goal is to store cereal.",
        "Done: take bag.",
        "Done: open cupboard.",
        "Conclusion: put box into cupboard.",
    )
    assert first.metadata["candidates"] == ["put box into cupboard", "take bag", "open cupboard", "put bag into box"]
    assert first.instruction.endswith("(C) open cupboard (D) put bag into box") and first.record_id == "egoplan-115"
    assert second.metadata["candidates"] == ["grab onion", "open drawer", "slice onion"]
    assert second.metadata["split_group"] == "P07_113", "frames of one video stay in one split"


def test_egoplan_finds_the_frame_among_those_of_epic_kitchens(folder):
    frames = folder / "EPIC-KITCHENS" / "P01" / "rgb_frames" / "P01_13"
    frames.mkdir(parents=True)
    (folder / "a.png").rename(frames / "frame_0000000760.jpg")
    value = {key: item for key, item in EGOPLAN.items() if key != "current_observation_basename"}
    (record,) = convert(folder, "egoplan", [value])
    assert record.image.endswith("P01_13/frame_0000000760.jpg")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (EGOPLAN | {"golden_choice_idx": None}, "golden_choice_idx: is missing or no letter A to D"),
        (EGOPLAN | {"golden_choice_idx": "B"}, 'golden_choice_idx: "B" is not the choice that is the answer'),
        (EGOPLAN_IT | {"negative_answers": None}, "choice_a: there are no different choices"),
        (EGOPLAN | {"task_progress_metadata": ["x"]}, "task_progress_metadata: is not a list of {narration_text"),
        (EGOPLAN | {"current_observation_basename": "", "current_observation_frame": "1"}, "is missing or no number"),
    ],
)
def test_an_egoplan_record_that_does_not_fit_is_named(folder, value, message):
    assert message in problem(folder, "egoplan", [value])


# ---- Geometry3K


def test_geometry3k_folders_give_what_the_diagram_shows_as_steps_and_caption(folder):
    (folder / "train" / "7").mkdir(parents=True)
    (folder / "a.png").rename(folder / "train" / "7" / "img_diagram.png")
    data = {key: item for key, item in GEOMETRY3K.items() if key not in ("folder", "logic_form")}
    (folder / "train" / "7" / "data.json").write_text(json.dumps(data))
    (folder / "train" / "7" / "logic_form.json").write_text(json.dumps(GEOMETRY3K["logic_form"]))
    options = {"source": "geometry3k", "progress": False, "domain": NO_DOMAIN}
    (record,) = convert_file(folder / "train", folder / "out.json", **options).records
    assert record.steps == (
        "The length of line TR is x+21.",
        "The measure of angle TRS is 4y-10.",
        "Point Q lies on line RN.",
        "Triangle RST is congruent to triangle XYZ.",
        "We look for y.",
        "Conclusion: 7.5.",
    )
    assert record.metadata["caption"] == " ".join(record.steps[:3]) and record.image.endswith("7/img_diagram.png")
    assert record.answer == ("7.5",) and record.metadata["candidates"] == ["5", "7.5", "10", "15"]
    (folder / "train" / "7" / "data.json").write_text("{")
    with pytest.raises(DataError, match="train/7: not readable as JSON"):
        convert_file(folder / "train", folder / "out.json", **options)


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("IsMedianOf(Line(J,K),Quadrilateral(A,B,T,Q))", "Line JK is the median of quadrilateral ABTQ."),
        ("Find(LengthOf(Line(J,K)))", "We look for the length of line JK."),
        ("Equals(LengthOf(Line(Q, A)), LengthOf(Line(R, A)))", "The length of line QA is the length of line RA."),
        ("Perpendicular(Line(A, B), Line(C, D))", "Line AB is perpendicular to line CD."),
        ("Find(AreaOf(Circle(O)))", "We look for the area of circle O."),
        ("Equals(Find(", "Equals(Find(."),
    ],
)
def test_literals_are_put_in_words(literal, text):
    assert in_words(literal) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (GEOMETRY3K | {"answer": "E"}, "answer: is no letter of 4 choices"),
        (GEOMETRY3K | {"logic_form": None}, "logic_form: is missing or empty; keep logic_form.json beside data.json"),
        (GEOMETRY3K | {"logic_form": {"text_logic_form": [1]}}, "logic_form: has no lists of literals"),
    ],
)
def test_a_geometry3k_problem_that_does_not_fit_is_named(folder, value, message):
    (folder / "a.png").rename(folder / "img_diagram.png")
    assert message in problem(folder, "geometry3k", [value])


# ---- conversations

REPLY = "There are three red cubes. There are two blue cubes. So there are five."


def turns(*parts):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": REPLY}]


ASKED = {"type": "text", "text": "How many cubes?"}


def test_a_picture_within_a_turn_and_what_is_no_text_are_not_dropped(folder):
    (record,) = convert(folder, "sharegpt", [{"images": ["a.png"], "messages": turns({"type": "image"}, ASKED)}])
    assert record.instruction == "How many cubes?" and record.image == str(folder / "a.png")
    within = [{"messages": turns({"type": "image", "image": "a.png"}, ASKED)}]
    assert "its picture stands within the turn; name it in `images`" in problem(folder, "sharegpt", within)
    bare = [{"messages": turns({"type": "image"}, ASKED)}]
    assert "a turn says <image>; name the picture" in problem(folder, "sharegpt", bare)
    video = [{"messages": turns({"type": "video", "video": "a.mp4"}, ASKED)}]
    assert 'a part of type "video" is not read' in problem(folder, "sharegpt", video)
    (text_only,) = convert(folder, "sharegpt", [{"images": [], "messages": turns(ASKED)}])
    assert text_only.image is None


def test_a_thought_with_formatting_and_a_conclusion_of_its_own_keeps_its_sentences(folder):
    thought = "The <b>left</b> cube is red, a List<int> has two.\n<plan>I count.</plan> Conclusion: there are two."
    reply = f"<think>{thought}</think><answer>2</answer>"
    (record,) = convert(folder, "alpaca", [{"instruction": "How many cubes?", "output": reply}])
    assert record.steps == (
        "The left cube is red, a List<int> has two.",
        "I count.",
        "there are two.",
        "Conclusion: 2.",
    )


def test_a_turns_own_picture_must_be_one_of_those_beside_the_turns(folder):
    same = turns({"type": "image_url", "image_url": {"url": "old/a.png"}}, ASKED)
    (record,) = convert(folder, "sharegpt", [{"images": ["a.png"], "messages": same}])
    assert record.image == str(folder / "a.png")
    other = turns({"type": "image", "image": "b.png"}, ASKED)
    found = problem(folder, "sharegpt", [{"images": ["a.png"], "messages": other}])
    assert 'its picture "b.png" is none of `images`; name it there, or leave it out of the turn' in found


def test_fields_that_the_format_does_not_use_stay_in_the_metadata(folder):
    given = {"messages": turns(ASKED), "instruction": "Count.", "answer": "2", "output": "two", "kept": 1}
    (record,) = convert(folder, "sharegpt", [given])
    assert record.metadata.items() >= {"instruction": "Count.", "answer": "2", "output": "two", "kept": 1}.items()
    given = {"instruction": "How many?", "output": REPLY, "solution": "I count.", "input": "", "prompt": "Count."}
    (record,) = convert(folder, "alpaca", [given])
    assert record.metadata.items() >= {"solution": "I count.", "prompt": "Count."}.items()
    assert record.metadata.keys().isdisjoint({"instruction", "output", "input"})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_the_reasoning_that_an_endpoint_tells_apart_is_that_of_the_turn(folder, name):
    reply = {"role": "assistant", "content": "Two.", name: "I see a red one. I see a blue one."}
    (record,) = convert(folder, "sharegpt", [{"messages": [{"role": "user", "content": "How many cubes?"}, reply]}])
    assert record.steps[:2] == ("I see a red one.", "I see a blue one.") and record.answer == ("Two",)


@pytest.mark.parametrize(
    "asked", ["How many cubes are there?", "The bar is red. How many cubes are there", "How many? (A) 2"]
)
def test_a_request_for_tags_on_the_questions_line_leaves_the_question(folder, asked):
    text = f"{asked} Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    (record,) = convert(folder, "sharegpt", [{"messages": turns({"type": "text", "text": text})}])
    assert record.instruction == asked


def test_a_box_of_left_top_width_and_height_is_refused(folder):
    record = {"id": "1", "image": "a.png", "instruction": "Red?", "reasoning": "Step 1: I look.\nConclusion: Yes."}
    box = {"kind": "bar", "box": [0.6, 0.6, 0.2, 0.2]}
    (folder / "one.json").write_text(json.dumps([{**record, "answer": "yes", "metadata": {"boxes": [box]}}]))
    with pytest.raises(DataError, match=r"metadata\.boxes: a box is not"):
        read_records(folder / "one.json")
