"""Other formats -> the unified spelling: what comes out reads back equal, and nothing is lost without a word."""

import json
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from format_samples import CLEVR, EGOPLAN, EGOPLAN_IT, GEOMETRY3K, VISUAL_COT, VISUAL_COT_TURNS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.curate.convert import CONVERTERS, convert_file, skipped_path, summary
from embervlm.curate.formats.shared import sentences
from embervlm.data.curriculum import complexity_by_steps
from embervlm.data.domain import NO_DOMAIN
from embervlm.data.records import DataError, read_records
from embervlm.robots.domain import ROBOTS as ROBOTS_DOMAIN
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run_dir import WriteError

FLEET = (
    "Robots: Drone, Underwater Robot, Humanoid, Robot with Wheels, Robot with Legs. What is the most suited robot?\n"
    "Drone:\ncapabilities: fastest, aerial inspection,\nlimitations: limited payload,\nenvironments: outdoor\n"
    "Humanoid:\ncapabilities: manipulation, tool use,\nlimitations: slow movement,\nenvironments: indoor, stairs"
)
TEACHER = {
    "image": "a.png",
    "question": "Which robot should pick boxes?",
    "answer": "Humanoid",
    "confidence": 0.95,
    "reasoning": [
        "<|reasoning_start|>",
        "Step 1: Analyze the task",
        "- It is high",
        "",
        "Step 2: Drones cannot lift",
        "",
        "Conclusion: Humanoid robot is the best choice",
        "<|reasoning_end|>",
    ],
}
HUMAN = {
    "image": "a.png",
    "question": "What combination works best?",
    "answer": ["Drone", "Humanoid"],
    "reasoning_steps": ["First, the task.", "Second, the place."],
    "annotator_id": "expert_123",
}
UNIFIED = {
    "image": "a.png",
    "instruction": "Select the best robot for the shelf.",
    "answer": "Humanoid",
    "reasoning": "<|reasoning_start|>Step 1: The shelf is high. Conclusion: Humanoid.<|reasoning_end|>",
    "metadata": {"source": "teacher_generated", "complexity": "high", "num_steps": 1, "validated": True},
}
SINGLE = {"instruction": FLEET, "input": "Task: Inspect a high-rise.", "output": "Humanoid, Drone"}
MULTI = {
    "instruction": FLEET,
    "input": "Task: Inspect a high-rise.",
    "original_single_robot_output": "Drone",
    "subtasks": [
        {"subtask": "Look closely at the facade", "assigned_robot": "Humanoid", "execution_order": 2},
        {"subtask": "Overview from above", "assigned_robot": "Drone", "execution_order": 1},
    ],
}
SCIENCE = {
    "question": "Which of these states is farthest north?",
    "choices": ["West Virginia", "Louisiana", "Arizona"],
    "answer": 0,
    "hint": "",
    "image": "image.png",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "social science",
    "topic": "geography",
    "category": "Geography",
    "skill": "Read a map",
    "split": "train",
    "lecture": "Maps have four cardinal directions.\nNorth is toward the North Pole, e.g. up on most maps. Look for N.",
    "solution": "To find the answer, look at the compass rose. West Virginia is farthest north.",
}
AOKVQA = {
    "split": "train",
    "image_id": 299207,
    "question_id": "22MexNkBPpdZGX6sxbxVBH",
    "question": "What is the man by the bags awaiting?",
    "choices": ["skateboarder", "train", "delivery", "cab"],
    "correct_choice_idx": 3,
    "difficult_direct_answer": False,
    "direct_answers": ["ride", "bus", "taxi"],
    "rationales": [
        "A train would not be on the street.",
        "He has luggage and waits for a cab.",
        "A train would not be on the street.",
    ],
}
CHOICES = "Which property do they share?\nContext: Select the better answer.\nOptions: (A) hard (B) yellow\n<image>"
LLAVA = {
    "id": "000000033471",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nIs it safe to fly here?"},
        {"from": "gpt", "value": "The sky is dark. Wind bends the trees. The answer is no."},
        {"from": "human", "value": CHOICES},
        {"from": "gpt", "value": "LECTURE: A lemon is soft. SOLUTION: Both are yellow.\n###\nANSWER: B."},
    ],
}
LLAVA_COT = {
    "id": "sqa/train/20839",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": CHOICES.removesuffix("\n<image>")},
        {
            "from": "gpt",
            "value": "<SUMMARY> I will compare the objects. </SUMMARY>\n\n<CAPTION> A lemon and a banana. "
            "</CAPTION>\n\n<REASONING> The lemon is soft. 1. Both are yellow.\nSo color is shared. </REASONING>\n\n"
            "<CONCLUSION> B </CONCLUSION>",
        },
    ],
}
THOUGHT = {
    "id": 7,
    "image": "a.png",
    "conversations": [
        {
            "from": "human",
            "value": "<image>\nWhat made the block move?\nOptions:\n(A) Gravity\n(B) Collision\nOutput the thinking "
            "process in <think> </think> and final answer in <answer> </answer> tags.",
        },
        {
            "from": "gpt",
            "value": "<think>A ball rolls in. It hits the block.\n\nSo they collide.</think> "
            "<answer>(B) Collision</answer>",
        },
    ],
}
SHAREGPT = {
    "messages": [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": "<image>\u4ed6\u5728\u505a\u4ec0\u4e48\uff1f"},
        {"role": "assistant", "content": "\u4ed6\u62ff\u7740\u7403\u3002\u4ed6\u5728\u8e22\u7403\u3002"},
        {"role": "user", "content": [{"type": "text", "text": "Is it a game?"}]},
        {"role": "assistant", "content": "A crowd looks on. Both teams are there. Yes."},
    ],
    "images": ["a.png"],
}
ALPACA = {
    "instruction": "How many lemons are there?",
    "input": "Count those on the table, too.",
    "output": "Two lemons lie in the bowl. One lies on the table.\n\\boxed{3}",
    "system": "You count.",
    "history": [["What is it?", "A bowl of fruit."]],
    "images": ["a.png"],
}
SAMPLES = {
    "teacher": [TEACHER],
    "human": [HUMAN],
    "unified": [UNIFIED],
    "robot_selection": [SINGLE, MULTI],
    "scienceqa": [SCIENCE, SCIENCE | {"image": None, "hint": "A map hangs here."}],
    "aokvqa": [AOKVQA],
    "llava": [LLAVA, THOUGHT],
    "llava_cot": [LLAVA_COT],
    "sharegpt": [SHAREGPT],
    "alpaca": [ALPACA],
    "visual_cot": [VISUAL_COT, VISUAL_COT_TURNS],
    "clevr": [CLEVR],
    "egoplan": [EGOPLAN, EGOPLAN_IT],
    "geometry3k": [GEOMETRY3K],
}


@pytest.fixture
def folder(tmp_path):
    """Pictures where each format looks for its own."""
    for number, name in enumerate(["a.png", "img_diagram.png", "train/1/image.png", "train2017/000000299207.jpg"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number, dtype=np.uint8)).save(path)
    return tmp_path


def convert(folder, source, *values, **options):
    """What `values` in the format `source` give; ScienceQA's stand under their numbers, as published."""
    content = {str(n): value for n, value in enumerate(values, 1)} if source == "scienceqa" else list(values)
    (folder / "in.json").write_text(json.dumps(content))
    return convert_file(
        folder / "in.json", folder / "out.json", source=source, progress=False, **options, domain=ROBOTS_DOMAIN
    )


def problems(folder, source, *values):
    with pytest.raises(DataError) as caught:
        convert(folder, source, *values)
    assert not (folder / "out.json").exists()
    return "\n".join(caught.value.problems)


# ---- every format


def test_every_format_has_a_sample_here():
    assert SAMPLES.keys() == CONVERTERS.keys()


@pytest.mark.parametrize("source", CONVERTERS)
def test_what_was_written_reads_back_equal(folder, source):
    made = convert(folder, source, *SAMPLES[source])
    assert read_records(folder / "out.json", candidates=ROBOTS) == made.records and not made.skipped


@pytest.mark.parametrize("source", CONVERTERS)
def test_every_record_has_a_complexity_and_as_many_step_types_as_steps_where_it_has_any(folder, source):
    for record in convert(folder, source, *SAMPLES[source]).records:
        types = record.metadata.get("step_types")
        assert record.metadata["complexity"] in ("simple", "medium", "complex", "high")
        assert len(types) == len(record.steps) if source not in ("teacher", "human", "unified") else types is None


@pytest.mark.parametrize("source", CONVERTERS)
def test_jsonl_out_holds_the_records_of_json_out(folder, source):
    made = convert(folder, source, *SAMPLES[source])
    convert_file(folder / "in.json", folder / "out.jsonl", source=source, progress=False, domain=ROBOTS_DOMAIN)
    assert read_records(folder / "out.jsonl", candidates=ROBOTS) == made.records


def test_teacher_spelling_becomes_the_unified_one(folder):
    convert(folder, "teacher", TEACHER)
    (written,) = json.loads((folder / "out.json").read_text())
    assert written == {
        "id": "in.json:1",
        "image": "a.png",
        "instruction": TEACHER["question"],
        "answer": "Humanoid",
        "confidence": 0.95,
        "metadata": {"complexity": "simple", "num_steps": 2},
        "reasoning": "<|reasoning_start|>\nStep 1: Analyze the task\n- It is high\nStep 2: Drones cannot lift\n"
        "Conclusion: Humanoid robot is the best choice\n<|reasoning_end|>",
    }


def test_complexity_that_the_record_gives_is_kept(folder):
    assert convert(folder, "unified", UNIFIED).records[0].metadata["complexity"] == "high"


@pytest.mark.parametrize(
    ("steps", "name"), [(1, "simple"), (3, "simple"), (4, "medium"), (5, "medium"), (6, "complex")]
)
def test_complexity_follows_the_guides_curriculum(steps, name):
    assert complexity_by_steps(steps) == name


# ---- robot selection


def test_single_file_quotes_the_description_of_the_robots_it_names(folder):
    (record,) = convert(folder, "robot_selection", SINGLE).records
    assert record.answer == ("Drone", "Humanoid")
    assert record.steps == (
        "The task is: Inspect a high-rise.",
        "Humanoid: capabilities are manipulation, tool use; limitations are slow movement; environments are indoor, "
        "stairs.",
        "Drone: capabilities are fastest, aerial inspection; limitations are limited payload; environments are "
        "outdoor.",
        "Conclusion: Drone, Humanoid.",
    )


def test_multi_file_takes_the_assignments_in_their_order_and_their_robots_as_the_answer(folder):
    (record,) = convert(folder, "robot_selection", MULTI).records
    assert record.answer == ("Drone", "Humanoid") and record.metadata["original_single_robot_output"] == "Drone"
    assert record.steps[1:] == (
        "Overview from above: Drone.",
        "Look closely at the facade: Humanoid.",
        "Conclusion: Drone, Humanoid.",
    )


def test_a_task_that_stands_twice_stays_in_one_split(folder):
    made = convert(folder, "robot_selection", SINGLE, SINGLE | {"input": "Task: inspect a high-rise"})
    assert len({record.metadata["split_group"] for record in made.records}) == 1


# ---- ScienceQA and A-OKVQA


def test_scienceqa_choices_become_candidates_and_lecture_and_solution_steps(folder):
    (record,) = convert(folder, "scienceqa", SCIENCE).records
    assert record.record_id == "scienceqa-1" and record.answer == ("West Virginia",)
    assert record.metadata["candidates"] == SCIENCE["choices"] and record.metadata["topic"] == "geography"
    assert record.instruction.endswith("north?\nChoices: (A) West Virginia (B) Louisiana (C) Arizona")
    assert record.steps == (
        "Maps have four cardinal directions.",
        "North is toward the North Pole, e.g. up on most maps.",
        "Look for N.",
        "To find the answer, look at the compass rose.",
        "West Virginia is farthest north.",
        "Conclusion: West Virginia.",
    )
    assert record.metadata["step_types"] == [
        *["problem_analysis"] * 3,
        "constraint_checking",
        "solution_selection",
        "conclusion",
    ]


def test_scienceqa_hint_stands_in_the_instruction(folder):
    (record,) = convert(folder, "scienceqa", SCIENCE | {"hint": "It is a map.", "image": None}).records
    assert "north?\nContext: It is a map.\nChoices: " in record.instruction and record.image is None


def test_scienceqa_finds_pictures_in_the_published_layout(folder):
    (folder / "images").mkdir()
    (folder / "train").rename(folder / "images" / "train")
    (record,) = convert(folder, "scienceqa", SCIENCE).records
    assert record.image.endswith("images/train/1/image.png")


def test_choices_that_differ_in_case_only_are_told_apart_by_their_letter(folder):
    value = SCIENCE | {"choices": ["Dear uncle Frank,", "Dear Uncle Frank,"], "answer": 1, "image": None}
    (record,) = convert(folder, "scienceqa", value).records
    assert record.answer == ("(B) Dear Uncle Frank,",)
    assert record.instruction.endswith("Choices: (A) Dear uncle Frank, (B) Dear Uncle Frank,")
    assert read_records(folder / "out.json", candidates=ROBOTS) == [record]


def test_a_picture_in_two_published_splits_goes_to_the_held_out_one(folder):
    (folder / "test" / "2").mkdir(parents=True)
    (folder / "test" / "2" / "image.png").write_bytes((folder / "train" / "1" / "image.png").read_bytes())
    made = convert(folder, "scienceqa", SCIENCE, SCIENCE | {"split": "test"}, SCIENCE | {"image": None})
    assert [record.metadata["split"] for record in made.records] == ["test", "test", "train"]
    assert made.records[0].metadata["source_split"] == "train" and made.num_moved == 1


def test_aokvqa_rationales_become_steps_once_each(folder):
    (record,) = convert(folder, "aokvqa", AOKVQA).records
    assert record.answer == ("cab",) and record.image.endswith("train2017/000000299207.jpg")
    assert record.steps == (*AOKVQA["rationales"][:2], "Conclusion: cab.")
    assert record.metadata["direct_answers"] == ["ride", "bus", "taxi"]


# ---- LLaVA


def test_each_reply_is_a_record_that_holds_the_turns_before_it(folder):
    first, second = convert(folder, "llava", LLAVA).records
    assert (first.record_id, second.record_id) == ("000000033471-1-1", "000000033471-1-2")
    assert first.instruction == "Is it safe to fly here?" and first.steps[:-1] == (
        "The sky is dark.",
        "Wind bends the trees.",
    )
    assert first.answer == ("No",) and first.metadata["candidates"] == ["Yes", "No"]
    assert second.instruction.startswith("Question: Is it safe to fly here?\nAnswer: The sky is dark.")


def test_a_letter_is_the_choice_that_the_question_gives_it(folder):
    second = convert(folder, "llava", LLAVA).records[1]
    assert second.answer == ("yellow",) and second.metadata["candidates"] == ["hard", "yellow"]
    assert second.steps == ("A lemon is soft.", "Both are yellow.", "Conclusion: yellow.")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("B", "yellow"),
        ("(A)", "hard"),
        ("Yellow.", "yellow"),
        ("The answer is (B).", "yellow"),
        ("B. yellow", "yellow"),
        ("They share that they are yellow", "yellow"),
        ("option A", "hard"),
    ],
)
def test_ways_to_name_a_choice(folder, reply, answer):
    turns = [LLAVA["conversations"][2], {"from": "gpt", "value": f"I look. I compare.\n{reply}"}]
    assert convert(folder, "llava", LLAVA | {"conversations": turns}).records[0].answer == (answer,)


@pytest.mark.parametrize(
    "question", ["Pick.\nA. hard\nB. yellow", "Pick.\nA) hard\nB) yellow", "Pick. (A) hard, (B) yellow"]
)
def test_ways_to_offer_choices(folder, question):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "I look. I compare.\nB"}]
    (record,) = convert(folder, "llava", LLAVA | {"conversations": turns}).records
    assert record.metadata["candidates"] == ["hard", "yellow"] and record.answer == ("yellow",)


def test_an_answer_of_robots_has_the_robots_as_candidates(folder):
    turns = [
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "It is wet. It is deep.\nAnswer: Humanoid, Drone."},
    ]
    (record,) = convert(folder, "llava", LLAVA | {"conversations": turns}).records
    assert record.answer == ("Drone", "Humanoid") and "candidates" not in record.metadata


def test_llava_cot_sections_become_typed_steps_and_a_caption(folder):
    (record,) = convert(folder, "llava_cot", LLAVA_COT).records
    assert record.answer == ("yellow",) and record.metadata["caption"] == "A lemon and a banana."
    assert list(zip(record.metadata["step_types"], record.steps)) == [
        ("problem_analysis", "I will compare the objects."),
        ("problem_analysis", "A lemon and a banana."),
        ("constraint_checking", "The lemon is soft."),
        ("constraint_checking", "1. Both are yellow."),
        ("solution_selection", "So color is shared."),
        ("conclusion", "Conclusion: yellow."),
    ]


def said(folder, question, reply, **options):
    """The one record of a conversation of one turn in LLaVA's format."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    (record,) = convert(folder, "llava", LLAVA | {"conversations": turns}, **options).records
    return record


SEEN = "I see a furry thing. It has a tail."
TWO = ("I see a furry thing.", "It has a tail.")


@pytest.mark.parametrize(
    ("reply", "answer", "last"),
    [
        (f"{SEEN} answer: dog", "dog", TWO[1]),
        (f"{SEEN}\nAnswer: dog\nI hope this helps!", "dog", TWO[1]),
        (f"Answer: dog\n{SEEN}", "dog", TWO[1]),
        (f"{SEEN} The answer is a pet. Answer: dog", "dog", "The answer is a pet."),
        (f"{SEEN} **dog**", "dog", TWO[1]),
        (f"{SEEN} $\\boxed{{\\text{{dog}}}}$", "dog", TWO[1]),
        (f"{SEEN}\nResult: dog", "dog", TWO[1]),
        (f"{SEEN} Thus, the correct answer is: dog", "dog", TWO[1]),
        (f"Dog. {SEEN}", "Dog", TWO[1]),
        (f"Sure. {SEEN}", "It has a tail", TWO[0]),  # nothing shorter is said
        (f"{SEEN} So it must be a dog.", "dog", "So it must be a dog."),
        (f"{SEEN} I would say this is a dog.", "dog", "I would say this is a dog."),
        (f"{SEEN} So its place is left.", "left", "So its place is left."),
        (f"{SEEN} So 1 of them.", "1", "So 1 of them."),
        (f"{SEEN} That makes none.", "none", "That makes none."),
        (f"{SEEN} That makes it a tool.", "tool", "That makes it a tool."),
        (f"{SEEN} So it is not a cat.", "So it is not a cat", TWO[1]),
        (f"{SEEN} So the dog is running.", "So the dog is running", TWO[1]),
        (f"{SEEN} Bell pepper.", "Bell pepper", TWO[1]),
    ],
)
def test_the_answer_is_the_sentence_that_says_so_else_the_last_else_a_first_word(folder, reply, answer, last):
    record = said(folder, "What is it?", reply)
    assert record.answer == (answer,) and record.steps[-2] == last and record.steps[0] in (*TWO, "Sure.")


@pytest.mark.parametrize(
    ("reply", "answer", "last"),
    [
        (f"Yes. {SEEN}", "Yes", TWO[1]),
        (f"Yes, it is an animal. {SEEN} That is typical of dogs.", "Yes", "That is typical of dogs."),
        (f"{SEEN} Yes, it is an animal.", "Yes", "Yes, it is an animal."),
        (f"{SEEN} So yes.", "Yes", TWO[1]),
        (f"{SEEN} Therefore, the answer is yes, it is one.", "Yes", "Therefore, the answer is yes, it is one."),
        (f"{SEEN} No, it isn't a car.", "No", "No, it isn't a car."),
        (f"{SEEN} No dog has wheels.", "No dog has wheels", TWO[1]),
    ],
)
def test_yes_and_no_are_answers_with_what_follows_them(folder, reply, answer, last):
    record = said(folder, "Is it an animal?", reply)
    assert record.answer == (answer,) and record.steps[-2] == last and record.steps[0] == TWO[0]
    assert (record.metadata.get("candidates") or None) == (["Yes", "No"] if answer in ("Yes", "No") else None)


@pytest.mark.parametrize(
    ("choices", "reply", "answer"),
    [
        ("\na) cat\nb) dog\nc) car", "Answer: b", "dog"),
        ("\n1) cat\n2) dog\n3) car", "Answer: 2", "dog"),
        (" A: cat, B: dog, C: car", "The answer is B.", "dog"),
        (" Is it (A) cat or (B) dog?", "So it is (B).", "dog"),
        ("\nA. cat\nB. dog\nC. car", "It is a dog, choice B. Answer: A", "cat"),
        ("\nA. cat\nB. dog\nC. car", "Answer: dog\nI hope this helps!", "dog"),
        ("\nA. cat\nB. dog\nC. car", "It is not (A), so (B) is right. Answer: B. dog", "dog"),
    ],
)
def test_choices_are_known_by_their_marks(folder, choices, reply, answer):
    record = said(folder, f"What is it?{choices}", f"{SEEN} {reply}")
    assert record.answer == (answer,) and record.metadata["candidates"][:2] == ["cat", "dog"]


def test_a_letter_beside_the_text_of_another_choice_is_refused(folder):
    with pytest.raises(DataError, match="names one of the choices"):
        said(folder, "What is it?\nA. cat\nB. dog\nC. car", f"{SEEN} Answer: (B) car")


def test_answers_that_are_sentences_are_told(folder):
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": f"{SEEN} Dogs like to run all day."}]
    made = convert(folder, "llava", LLAVA | {"conversations": turns})
    told = summary(made, folder / "out.jsonl")
    assert '1 of 1 free-text answers have 5 words or more, such as "Dogs like to run all day"' in told


def test_a_thought_in_tags_becomes_the_steps_and_what_the_answer_tag_holds_the_answer(folder):
    (record,) = convert(folder, "llava", THOUGHT).records
    assert record.steps == ("A ball rolls in.", "It hits the block.", "So they collide.", "Conclusion: Collision.")
    assert record.answer == ("Collision",) and record.metadata["candidates"] == ["Gravity", "Collision"]
    assert record.instruction.endswith("(B) Collision"), "the sentence that asks for tags is left out"


@pytest.mark.parametrize(
    ("reply", "steps", "answer"),
    [
        ("<think>I look. I count.</think>\n\nThere are many. The answer is 3.", 3, "3"),
        ("I look. I count.\n</think>\n\\boxed{3}", 2, "3"),
        ('<think>I look. I see two.</think><answer>["red", "blue"]</answer>', 2, "red, blue"),
        ("<caption>A bowl.</caption><thinking>I count.</thinking><answer>$\\boxed{\\text{3 cm}}$</answer>", 2, "3 cm"),
        ("<think>I count. I add.</think>\nThey stand there.\n\n**Answer:** There are 3.", 3, "There are 3"),
        (
            "<think>I add.</think>\n**Final Answer:**\n\\[\n\\boxed{\\frac{\\sqrt{3}}{3}}\n\\]",
            1,
            "\\frac{\\sqrt{3}}{3}",
        ),
        ("<THINK>\nI look.\n\nI count.\n</THINK>\nYes", 2, "Yes"),
    ],
)
def test_ways_to_write_a_thought(folder, reply, steps, answer):
    record = said(folder, "How many?", reply)
    assert record.num_steps == steps and record.answer == (answer,) and "<" not in " ".join(record.steps)
    assert record.metadata.get("caption") == ("A bowl." if "caption" in reply else None)


def test_a_boxed_value_may_stand_beside_the_letter(folder):
    question = "Find it.\nChoices:\nA: \\frac{1}{2}\nB: \\frac{\u221a{3}}{3}"
    reply = "<think>I look.</think>\n**Answer:** \\(\\boxed{\\frac{\\sqrt{3}}{3}}\\) (Option B)"
    assert said(folder, question, reply).answer == ("\\frac{\u221a{3}}{3}",)
    assert said(folder, question, "<think>I look.</think>\\boxed{B}").answer == ("\\frac{\u221a{3}}{3}",)


@pytest.mark.parametrize(
    ("question", "reply", "answer", "candidates"),
    [
        ("\u00bfEs rojo?", "Lo veo. La respuesta es s\u00ed.", "s\u00ed", ["s\u00ed", "no"]),
        ("\u00bfEs rojo?", "Lo veo. No.", "No", ["S\u00ed", "No"]),
        ("Ist es rot?", "Ich sehe es. Die Antwort lautet: Nein.", "Nein", ["Ja", "Nein"]),
        ("Est-ce rouge ?", "Je regarde. R\u00e9ponse : oui", "oui", ["oui", "non"]),
        (
            "\u042d\u0442\u043e?",
            "\u0412\u0438\u0436\u0443. \u0414\u0430.",
            "\u0414\u0430",
            ["\u0414\u0430", "\u041d\u0435\u0442"],
        ),
        ("\u662f\u5417\uff1f", "\u6211\u770b\u3002\u7b54\u6848\u662f\u5426\u3002", "\u5426", ["\u662f", "\u5426"]),
        ("Is it?", "I look.\nno", "No", ["Yes", "No"]),
    ],
)
def test_yes_and_no_are_closed_answers_in_the_spelling_given(folder, question, reply, answer, candidates):
    record = said(folder, question, reply)
    assert record.answer == (answer,) and record.metadata["candidates"] == candidates


@pytest.mark.parametrize(
    "question",
    [
        "\u9009\uff1a\uff08A\uff09\u732b\uff08B\uff09\u72d7\u3002",
        "\u9009\u3002A\uff0e\u732b B\uff0e\u72d7",
        "\u9009\uff1a\nA\u3001\u732b\nB\u3001\u72d7",
        "\u9009\uff1a\n\uff21.\u732b\n\uff22.\u72d7",
        "\u9009\u3002 A. \u732b\uff0cB. \u72d7",
    ],
)
@pytest.mark.parametrize(
    "reply",
    [
        "B",
        "\uff08B\uff09",
        "\u7b54\u6848\u662fB\u3002",
        "\u6545\u9009\uff1aB",
        "\u72d7\u3002",
        "B\u3001\u72d7",
        "\u7b54\u6848\uff1a\uff22",
    ],
)
def test_choices_may_be_marked_as_in_chinese(folder, question, reply):
    record = said(folder, question, f"\u6211\u770b\u3002\u6211\u6bd4\u3002\n{reply}")
    assert record.answer == ("\u72d7",) and record.metadata["candidates"] == ["\u732b", "\u72d7"]


def test_without_a_domain_a_free_answer_is_left_to_the_data_to_close(folder):
    (folder / "in.json").write_text(json.dumps([SHAREGPT]))
    made = convert_file(folder / "in.json", folder / "out.json", source="sharegpt", progress=False, domain=NO_DOMAIN)
    assert [record.metadata.get("candidates") for record in made.records] == [None, ["Yes", "No"]]
    assert convert(folder, "sharegpt", SHAREGPT).records[0].metadata["candidates"] == [], "robots are no answer to it"


# ---- LLaMA-Factory


def test_it_is_said_how_many_answers_are_none_of_the_domains(folder):
    said = summary(convert(folder, "sharegpt", SHAREGPT), folder / "out.json")
    assert "1 answers are none of the domain's and became free text (`candidates: []`)" in said
    made = convert_file(folder / "in.json", folder / "out.json", source="sharegpt", progress=False, domain=NO_DOMAIN)
    assert "free text" not in summary(made, folder / "out.json")


def test_the_files_of_a_folder_are_the_splits_that_they_are_called_after(folder):
    (data := folder / "data").mkdir()
    for number, name in enumerate(("test", "train", "validation")):
        turns = [{"from": "human", "value": "Is it day?"}, {"from": "gpt", "value": f"I see {number}. Yes."}]
        (data / f"{name}.jsonl").write_text(json.dumps({"id": number, "conversations": turns}))
    made = convert_file(data, folder / "out.json", source="llava", progress=False, domain=NO_DOMAIN)
    assert [record.metadata["split"] for record in made.records] == ["test", "train", "val"]


def test_sharegpt_takes_either_spelling_and_keeps_the_system_turn(folder):
    first, second = convert(folder, "sharegpt", SHAREGPT).records
    assert first.image.endswith("a.png") and first.metadata["system"] == "You are careful."
    assert first.steps[0] == "\u4ed6\u62ff\u7740\u7403\u3002" and "<image>" not in first.instruction
    assert second.instruction.endswith("Is it a game?") and second.answer == ("Yes",)
    assert convert(folder, "sharegpt", LLAVA).records[0].answer == ("No",)


def test_alpaca_joins_instruction_and_input_behind_the_history(folder):
    (record,) = convert(folder, "alpaca", ALPACA).records
    assert record.instruction == (
        "Question: What is it?\nAnswer: A bowl of fruit.\nHow many lemons are there?\nCount those on the table, too."
    )
    assert record.steps == ("Two lemons lie in the bowl.", "One lies on the table.", "Conclusion: 3.")
    assert record.answer == ("3",) and record.metadata["system"] == "You count." and record.image.endswith("a.png")


def test_of_a_tagged_reply_the_turns_behind_it_hold_the_answer_alone(folder):
    turns = [
        {"from": "human", "value": "Which bar is tallest?"},
        {"from": "gpt", "value": "<think>The yellow bar reaches 9. No other does.</think><answer>yellow</answer>"},
        {"from": "human", "value": "How many bars are there?"},
        {"from": "gpt", "value": "<think>I count. One, two, three.</think> There are three."},
        {"from": "human", "value": "Is one red?"},
        {"from": "gpt", "value": "<think>I look. One is.</think><answer>yes</answer>"},
    ]
    *_, last = convert(folder, "llava", LLAVA | {"conversations": turns}).records
    assert last.instruction == (
        "Question: Which bar is tallest?\nAnswer: yellow\n"
        "Question: How many bars are there?\nAnswer: There are three.\nIs one red?"
    )


@pytest.mark.parametrize("names", ["query response", "query content", "problem solution", "prompt completion"])
def test_alpaca_takes_other_names_of_question_and_reply(folder, names):
    asked, reply = names.split()
    (record,) = convert(
        folder, "alpaca", {asked: "Is it day?", reply: "The sky is blue. Yes.", "images": ["a.png"]}
    ).records
    assert record.instruction == "Is it day?" and record.steps[0] == "The sky is blue." and record.answer == ("Yes",)


def test_with_an_answer_of_its_own_all_of_the_reply_is_reasoning(folder):
    (record,) = convert(
        folder, "alpaca", {"problem": "What is x?", "solution": "Add 2. That is 5.", "answer": "5"}
    ).records
    assert record.steps == ("Add 2.", "That is 5.", "Conclusion: 5.") and record.answer == ("5",)


# ---- sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 3.5 m. Look up.", ["It is 3.5 m.", "Look up."]),
        ("The U.S. is here. Dr. Lee agrees.", ["The U.S. is here.", "Dr. Lee agrees."]),
        ("- one\n2. Two\n**Step 3:** three", ["one", "Two", "three"]),
        ('He said "Go!" Then he went.', ['He said "Go!"', "Then he went."]),
        ("###\n---", []),
        (
            "\u5929\u7a7a\u662f\u84dd\u8272\u3002\u98de\u5427\u3002",
            ["\u5929\u7a7a\u662f\u84dd\u8272\u3002", "\u98de\u5427\u3002"],
        ),
        (
            "\u4ed6\u8bf4\uff1a\u201c\u597d\uff01\u201d\u8d70\u4e86\uff1f\u8d70\u3002",
            ["\u4ed6\u8bf4\uff1a\u201c\u597d\uff01\u201d", "\u8d70\u4e86\uff1f", "\u8d70\u3002"],
        ),
        ("Das Dach ist rot. \u00dcber ihm ist es blau.", ["Das Dach ist rot.", "\u00dcber ihm ist es blau."]),
        ("Der Zug hat z. B. Nr. 5 und ca. 20 Wagen.", ["Der Zug hat z. B. Nr. 5 und ca. 20 Wagen."]),
        ("No. The sky is dark, see No. 5.", ["No.", "The sky is dark, see No. 5."]),
        (
            "\u041d\u0435\u0431\u043e \u0441\u0438\u043d\u0435\u0435. \u042d\u0442\u043e \u0434\u0435\u043d\u044c.",
            [
                "\u041d\u0435\u0431\u043e \u0441\u0438\u043d\u0435\u0435.",
                "\u042d\u0442\u043e \u0434\u0435\u043d\u044c.",
            ],
        ),
        ("Es rojo. \u00bfEs grande? S\u00ed.", ["Es rojo.", "\u00bfEs grande?", "S\u00ed."]),
    ],
)
def test_sentences_are_cut_where_they_end(text, expected):
    assert sentences(text) == expected


def test_a_step_heading_inside_a_sentence_starts_no_step(folder):
    value = SCIENCE | {"image": None, "solution": "First do Step 2: measure. We see Conclusion: it is West Virginia."}
    (record,) = convert(folder, "scienceqa", value).records
    assert record.steps[-3:-1] == ("First do step 2: measure.", "We see conclusion: it is West Virginia.")


# ---- what cannot be converted


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("teacher", HUMAN, "reasoning: is missing; this is how --from spells it"),
        ("teacher", TEACHER | {"reasoning": "Step 1: x"}, "reasoning: is a string; name the spelling"),
        ("human", TEACHER, "reasoning_steps: is missing"),
        ("unified", UNIFIED | {"answer": "Boat"}, 'answer "Boat" is not one of Drone'),
        ("robot_selection", SINGLE | {"input": "Task: "}, "input: is empty; write the task"),
        ("robot_selection", SINGLE | {"output": "Boat"}, 'output: "Boat" is not one of Drone'),
        ("robot_selection", SINGLE | {"output": "Robot with Legs"}, "instruction: does not describe Robot with Legs"),
        ("robot_selection", MULTI | {"subtasks": []}, "subtasks: is not a list of objects"),
        (
            "robot_selection",
            MULTI | {"subtasks": [{"subtask": "x", "assigned_robot": "Boat", "execution_order": 1}]},
            "subtasks[1].assigned_robot: is not one of",
        ),
        (
            "robot_selection",
            MULTI | {"subtasks": [{"subtask": "x", "assigned_robot": "Drone"}]},
            "subtasks[1].execution_order: is null",
        ),
        ("scienceqa", SCIENCE | {"answer": 3}, "answer: 3 is no index of 3 choices; count them from 0"),
        ("scienceqa", SCIENCE | {"answer": "West Virginia"}, "answer: is a string, not an index"),
        ("scienceqa", SCIENCE | {"answer": True}, "answer: is true or false, not an index"),
        ("scienceqa", SCIENCE | {"choices": ["a"]}, "choices: is not a list of 2 to 26 texts"),
        ("scienceqa", SCIENCE | {"choices": ["a", "a "]}, "choices: lists a choice twice"),
        ("scienceqa", SCIENCE | {"lecture": "", "solution": ""}, "solution: is empty, and so is lecture"),
        ("scienceqa", SCIENCE | {"split": "minival"}, 'split: "minival" is not one of train, val, test'),
        ("scienceqa", SCIENCE | {"image": "gone.png"}, 'image: "train/1/gone.png" is not in'),
        ("scienceqa", SCIENCE | {"solution": " ".join(f"It is {n}." for n in range(70))}, "73 steps, more than 64"),
        ("aokvqa", AOKVQA | {"correct_choice_idx": None}, "correct_choice_idx: is missing"),
        ("aokvqa", AOKVQA | {"rationales": []}, "rationales: is empty"),
        ("aokvqa", AOKVQA | {"image_id": "x"}, "image_id: is no COCO id"),
        ("llava", LLAVA | {"conversations": LLAVA["conversations"][:1]}, "conversations: is not a list of turns"),
        ("llava", LLAVA | {"conversations": LLAVA["conversations"][1:3]}, 'conversations[0]: is not {"from": "human"'),
        ("llava", {key: LLAVA[key] for key in ("id", "conversations")}, "image: is missing, but a turn says <image>"),
        (
            "llava",
            LLAVA | {"conversations": [LLAVA["conversations"][0], {"from": "gpt", "value": "No."}]},
            "conversations[1]: holds no reasoning, only an answer",
        ),
        (
            "llava",
            LLAVA | {"conversations": [LLAVA["conversations"][2], {"from": "gpt", "value": "It is. It was."}]},
            "conversations[1]: neither its last nor its first sentence names one of the choices",
        ),
        (
            "llava",
            json.loads(json.dumps(THOUGHT).replace("</think> <answer>", "")),
            "conversations[1]: <think> do not enclose one thought; write <think>...</think> once",
        ),
        (
            "llava",
            json.loads(json.dumps(THOUGHT).replace("(B) Collision</", "</")),
            "<answer> behind </think> is missing",
        ),
        ("llava", json.loads(json.dumps(THOUGHT).replace("(B) Collision</", "Wind</")), "names none of the choices"),
        ("sharegpt", SHAREGPT | {"messages": SHAREGPT["messages"][:2]}, "messages: is not a list of turns in pairs"),
        (
            "sharegpt",
            {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
            'messages[1]: is not {"role": "assistant", "content": text}',
        ),
        ("sharegpt", SHAREGPT | {"videos": ["a.mp4"]}, "videos: is no picture; take a frame of it"),
        (
            "alpaca",
            {"instruction": "x", "images": ["a.png"]},
            "output: is missing or empty (also looked for: response,",
        ),
        ("alpaca", ALPACA | {"history": ["x"]}, "history: is not a list of [question, reply]"),
        ("llava_cot", LLAVA, "conversations[1]: is not <SUMMARY>...</SUMMARY>"),
        ("llava_cot", json.loads(json.dumps(LLAVA_COT).replace("> B <", "> A and B <")), "CONCLUSION names none"),
        ("llava_cot", json.loads(json.dumps(LLAVA_COT).replace("> B <", "> <")), "CONCLUSION is empty"),
    ],
)
def test_what_cannot_be_converted_is_named_by_file_record_and_field(folder, source, value, message):
    found = problems(folder, source, value)
    assert found.startswith(f"{folder / 'in.json'} record 1: ") and "; " in found and message in found


def test_a_record_that_is_no_object_is_named(folder):
    assert "record 1: is a list, not an object" in problems(folder, "llava", [])


def test_two_records_of_one_id_are_named(folder):
    found = problems(folder, "unified", UNIFIED | {"id": "a"}, UNIFIED | {"id": "b"}, UNIFIED | {"id": "a"})
    assert found.endswith('record 3: id: "a" is also the id of record 1; give each its own')


def test_skip_bad_writes_the_rest_and_lists_the_skipped(folder):
    made = convert(folder, "scienceqa", SCIENCE | {"answer": 9}, SCIENCE | {"image": None}, 3, skip_bad=True)
    assert [record.record_id for record in read_records(folder / "out.json", candidates=ROBOTS)] == ["scienceqa-2"]
    listed = [json.loads(line) for line in skipped_path(folder / "out.json").read_text().splitlines()]
    assert [(item["record"], item.get("id")) for item in listed] == [(1, "1"), (3, None)] and listed == made.skipped
    assert listed[0]["problems"] == ["answer: 9 is no index of 3 choices; count them from 0"]


def test_skip_bad_lists_lines_that_are_no_json(folder):
    (folder / "in.jsonl").write_text(f"{json.dumps(UNIFIED)}\n{{oops\n")
    made = convert_file(
        folder / "in.jsonl", folder / "out.json", source="unified", skip_bad=True, progress=False, domain=ROBOTS_DOMAIN
    )
    assert len(made.records) == 1 and "in.jsonl line 2 column 2: invalid JSON" in made.skipped[0]["problems"][0]


def test_skip_bad_keeps_the_good_replies_of_a_conversation(folder):
    turns = [LLAVA["conversations"][0], {"from": "gpt", "value": "No."}, *LLAVA["conversations"][2:]]
    made = convert(folder, "llava", LLAVA | {"conversations": turns}, skip_bad=True)
    assert [record.record_id for record in made.records] == ["000000033471-1-2"]
    problem = "conversations[1]: holds no reasoning, only an answer; add the steps, or drop the turn"
    assert made.skipped == [{"record": 1, "id": LLAVA["id"], "problems": [problem]}]


def test_the_list_of_an_earlier_try_is_deleted_when_nothing_is_skipped(folder):
    skipped_path(folder / "out.json").write_text("old")
    convert(folder, "unified", UNIFIED, skip_bad=True)
    assert not skipped_path(folder / "out.json").exists()


def test_a_file_without_any_good_record_is_an_error_even_with_skip_bad(folder):
    with pytest.raises(DataError, match="record 1: answer: 9 is no index"):
        convert(folder, "scienceqa", SCIENCE | {"answer": 9}, skip_bad=True)


@pytest.mark.parametrize("source", CONVERTERS)
def test_every_fuzzed_record_is_converted_or_reported(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.png").write_bytes(b"png")
    texts = st.sampled_from(["", "a.png", "Drone", "B", "It is. It was.", "train", "<image>", "\ud800", "Step 2: x"])
    junk = st.recursive(
        st.none() | st.booleans() | st.integers(-1, 4) | st.floats() | st.text(max_size=5) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | texts, inner, max_size=3),
        max_leaves=6,
    )

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        sample = dict(SAMPLES[source][0])
        for field in data.draw(st.lists(st.sampled_from([*sample, "source", "id", "candidates", "parts"]), max_size=3)):
            sample[field] = data.draw(junk)
        values = [UNIFIED, sample, data.draw(junk)] if source == "unified" else [sample, data.draw(junk)]
        try:
            made = convert(folder, source, *values, skip_bad=True)
        except DataError as error:
            assert all("record " in problem for problem in error.problems)
            return
        assert read_records(folder / "out.json", candidates=ROBOTS) == made.records
        assert len(made.records) + len(made.skipped) >= len(values)

    check()


# ---- the command


def test_the_command_says_what_it_wrote_and_where_the_pictures_are(folder, capsys):
    (folder / "in.json").write_text(json.dumps([UNIFIED, HUMAN]))
    out = folder / "sub" / "out.jsonl"
    main(
        [
            "data",
            "convert",
            "--from",
            "unified",
            "--input",
            str(folder / "in.json"),
            "--output-file",
            str(out),
            "--skip_bad",
        ]
    )
    printed = capsys.readouterr().out
    assert f"{out}: 1 records, 1 with a picture, 1 to 1 steps (1 high)" in printed
    assert f"1 records skipped or cut short, listed in {skipped_path(out)}" in printed
    assert f"read it with --image_root {folder} to find its pictures" in printed
    assert len(read_records(out, image_root=folder, candidates=ROBOTS)) == 1


def test_pictures_below_the_output_folder_need_no_image_root(folder, capsys):
    (folder / "pictures").mkdir()
    (folder / "a.png").rename(folder / "pictures" / "a.png")
    made = convert(folder, "unified", UNIFIED, image_root=folder / "pictures")
    assert read_records(folder / "out.json", candidates=ROBOTS) == made.records and "--image_root" not in summary(
        made, folder / "out.json"
    )


def test_a_picture_outside_the_image_root_is_refused_unless_allowed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "b.png"
    outside.write_bytes(b"png")
    value = UNIFIED | {"image": str(outside)}
    assert "leaves" in problems(folder, "unified", value)
    made = convert(folder, "unified", value, allow_outside=True)
    assert read_records(folder / "out.json", allow_outside=True, candidates=ROBOTS) == made.records


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "gone.json"], "gone.json: No such file or directory; check the path"),
        (["--output_file", "out.csv"], "--output_file out.csv: must end in .json or .jsonl"),
        (["--image_root", "nowhere"], "--image_root nowhere: no such folder"),
        (["--output_file", "/proc/out.json"], "/proc/out.json: not written"),
    ],
)
def test_a_wrong_flag_is_one_line(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    (folder / "in.json").write_text(json.dumps([UNIFIED]))
    with pytest.raises(SystemExit) as ended:
        main(["data", "convert", "--from", "unified", "--input", "in.json", "--output_file", "out.json", *flags])
    assert str(ended.value.code).startswith("error: ") and message in str(ended.value.code)


def test_an_unknown_format_is_named(folder):
    with pytest.raises(ConfigError, match="--from vqa: is not one of teacher, human"):
        convert(folder, "vqa", UNIFIED)


@contextmanager
def full_disk(num_bytes):
    """No file of this process may grow beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_a_full_disk_is_said_and_leaves_the_file_from_before(folder, name):
    convert_file_ = {"source": "unified", "progress": False}
    (folder / "in.json").write_text(json.dumps([UNIFIED]))
    convert_file(folder / "in.json", folder / name, **convert_file_, domain=ROBOTS_DOMAIN)
    before = (folder / name).read_bytes()
    (folder / "in.json").write_text(json.dumps([UNIFIED] * 2000))
    with full_disk(100_000), pytest.raises(WriteError, match=f"{name}: not written .*the disk or its quota is full"):
        convert_file(folder / "in.json", folder / name, **convert_file_, domain=ROBOTS_DOMAIN)
    assert (folder / name).read_bytes() == before
    assert not list(folder.glob(".tmp-*"))


# ---- training


@pytest.mark.slow
def test_text_only_records_of_every_kind_of_candidates_train_in_both_phases_under_deepspeed(tmp_path):
    """Two processes; no batch holds a picture, and the records choose among different numbers of candidates."""
    from training_helpers import TINY, ok, save_stage3, train, write_model_yaml, write_run_yaml

    values = [
        SCIENCE
        | {"image": None, "question": f"Which is {n}?", "choices": ["a", "b", "c"][: 2 + n % 2], "answer": n % 2}
        for n in range(24)
    ]
    convert(tmp_path, "scienceqa", *values)
    records = read_records(tmp_path / "out.json", candidates=ROBOTS)
    config = write_run_yaml(tmp_path, write_model_yaml(tmp_path), tmp_path / "out.json")
    start = save_stage3(tmp_path / "start" / "stage3", TINY, records)
    ok(train("ranks", "--config", config, "--stages", "4", "--resume_from", start, "--max_steps", "2"))
    for phase in ("phase1", "phase2"):
        assert (tmp_path / "outputs" / "stage4" / phase / "checkpoint-final" / "COMPLETE").exists()


def test_in_evaluation_each_record_chooses_among_its_own_candidates(tiny_model):
    import torch

    from embervlm.model.decoding import Decoding
    from embervlm.model.generation import generate_from_visual, look

    with torch.no_grad():
        visual, seen = look(tiny_model, [None, None])
    questions, short = ["Which is it?", "Which robot?"], Decoding(max_new_tokens=4)
    own, robots = generate_from_visual(tiny_model, visual, seen, questions, short, [("hard", "yellow"), None])
    alone = generate_from_visual(
        tiny_model, visual[:1], seen[:1], questions[:1], Decoding(max_new_tokens=4, candidates=("hard", "yellow"))
    )[0]
    assert own["head_probabilities"] == pytest.approx(alone["head_probabilities"], abs=1e-5)
    assert tuple(robots["head_probabilities"]) == ROBOTS
