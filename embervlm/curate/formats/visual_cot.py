"""Visual-CoT: questions whose answer is in a region of the picture, with its box."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from embervlm.curate.formats.answers import free_answer
from embervlm.curate.formats.shared import CHECKING, SELECTION, Source, chain_of
from embervlm.data.record_fields import kind

REGION = "region"
"""The kind of the boxes, and what a step that is about one has seen."""


def visual_cot(at: Source) -> list[dict[str, Any]]:
    """Shao et al. 2024, arXiv 2403.16999: its `viscot_dataset/*.jsonl` or `viscot_363k.json`.

    The first: `question`, `answer`, `image`, `width`, `height`, `bboxs` in pixels, `dataset`, `split`; some with
    `full_answer`. The second: `image` as [path, "path###[left, top, right, bottom]"] and `conversations` of two pairs,
    the box and the answer. The chain says where the region is, then what it tells; the source has no other reasoning.
    """
    read = _read_turns if "conversations" in at.value else _read_fields
    found, told = read(at), at.text("full_answer", required=False)
    if found is None or at.problems:
        return []
    question, answer, image, boxes, identity = found
    answer, about = free_answer(answer, question, at.candidates)
    parts = [(CHECKING, f"Look at {place(box)}.") for box in boxes] + [(SELECTION, told)] * bool(told)
    used = "question answer image width height bboxs conversations question_id full_answer id"
    boxed = [{"kind": REGION, "box": box} for box in boxes]
    chain = chain_of(parts, answer, at.metadata(used, source="visual_cot", boxes=boxed, **about))
    num_steps = len(chain["metadata"]["step_types"])
    chain["metadata"]["seen"] = [[REGION]] * (num_steps - 1) + [[]]
    return [{"id": f"visual_cot-{identity}", "instruction": question, "answer": answer, "image": image, **chain}]


Found = tuple[str, str, str, list[list[float]], str]
"""Question, answer, picture, boxes in [0, 1], and id."""


def _read_fields(at: Source) -> Found | None:
    question, answer, name = at.text("question"), at.text("answer"), at.text("image")
    size = [at.value.get(side) for side in ("width", "height")]
    for side, pixels in zip(("width", "height"), size):
        if isinstance(pixels, bool) or not isinstance(pixels, (int, float)) or not 0 < pixels < math.inf:
            at.report(
                f"{side}: is {kind(pixels)}; give the picture's {side} in pixels, which the boxes are relative to"
            )
    boxes = at.value.get("bboxs")
    if not isinstance(boxes, list) or not boxes:
        at.report(
            "bboxs: is not a list of boxes; write [[left, top, right, bottom], ...] in pixels, or drop the record"
        )
        return None
    at.split()
    if at.problems:
        return None
    shares = [_share(at, f"bboxs[{place}]", box, size) for place, box in enumerate(boxes)]
    folder = {"textcap": "textvqa"}.get(str(at.value.get("dataset")), str(at.value.get("dataset")))
    image = at.first_there(name, os.path.join(folder, name), os.path.join("cot", folder, name))
    return question, answer, image, [box for box in shares if box], str(at.number)


def _read_turns(at: Source) -> Found | None:
    turns, images = at.value["conversations"], at.value.get("image")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
    ):
        at.report("conversations: is not a list of {from, value: text}; write question, box, <image> and answer")
        return None
    if len(turns) != 4 or _numbers(turns[1]["value"]) is None:
        at.report(
            "conversations: is not question, box, <image>, answer; records without a box are read with --from llava"
        )
        return None
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        at.report('image: is not [path, "path###[left, top, right, bottom]"]; name the picture and its region')
        return None
    path = images[0]
    size = at.picture_size(path)
    marks = [image.partition("###")[2] for image in images[1:] if "###" in image]
    boxes = []
    if size is not None and marks:
        boxes = [_share(at, f"image[{place}]", _numbers(mark), size) for place, mark in enumerate(marks, 1)]
    elif size is not None:
        boxes = [_share(at, "conversations[1]", _unpadded(turns[1]["value"], size), size)]
    question = _ASKS_FOR_BOX.sub("", turns[0]["value"].replace("<image>", "")).strip()
    at.split()
    answer = turns[3]["value"].strip()
    if not question or not answer:
        at.report(f"conversations[{0 if not question else 3}]: is empty; write it")
    return question, answer, path, [box for box in boxes if box], str(at.value.get("question_id", at.number))


_ASKS_FOR_BOX = re.compile(
    r"\s*Please (?:think step by step and )?provide the bounding box coordinate of the region.*", re.S
)


def _numbers(text: str) -> list[float] | None:
    """The four numbers of "[14, 645, 1776, 1617]"; None where it is none."""
    try:
        found = json.loads(text.strip().rstrip("."))
    except ValueError:
        return None
    return found if isinstance(found, list) and len(found) == 4 else None


def _unpadded(text: str, size: Sequence[float]) -> list[float] | None:
    """A box in pixels, of one in shares of the picture padded to a square, as Visual-CoT's turns give it."""
    found = _numbers(text)
    if found is None or not all(isinstance(edge, (int, float)) for edge in found):
        return None
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    return [edge * side - pad for edge, pad in zip(found, (left, top, left, top))]


def _share(at: Source, where: str, box: Any, size: Sequence[Any]) -> list[float] | None:
    """A box in pixels as shares of the picture, cut off at its edges; None where it is reported."""
    if isinstance(box, list) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box):
        edges = [round(min(max(edge / side, 0.0), 1.0), 4) for edge, side in zip(box, (*size, *size))]
        if edges[0] < edges[2] and edges[1] < edges[3]:
            return edges
    at.report(f"{where}: is no box [left, top, right, bottom] in pixels of the picture; correct it or take it out")
    return None


def place(box: Sequence[float]) -> str:
    """Where a box is, in words and in shares of the picture's width and height."""
    left, top, right, bottom = box
    at = f"from ({left:.2f}, {top:.2f}) to ({right:.2f}, {bottom:.2f})"
    if (right - left) * (bottom - top) > 0.7:
        return f"the whole picture, {at}"
    rows, columns = ("upper", "middle", "lower"), ("left", "center", "right")
    row, column = (names[min(int((a + b) / 2 * 3), 2)] for names, a, b in ((rows, top, bottom), (columns, left, right)))
    named = "center" if (row, column) == ("middle", "center") else f"{row} {column}"
    return f"the {named} of the picture, {at}"
