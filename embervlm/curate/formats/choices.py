"""Questions with choices and an explanation: ScienceQA and A-OKVQA."""

from __future__ import annotations

import os
from typing import Any

from embervlm.curate.formats.shared import (
    ANALYSIS,
    CHECKING,
    SELECTION,
    Source,
    chain_of,
    question_with_choices,
    sentences,
)
from embervlm.data.parquet_rows import holds_bytes
from embervlm.data.record_fields import kind


def scienceqa(at: Source) -> list[dict[str, Any]]:
    """`problems.json`: id -> question, choices, answer (index), hint, lecture, solution, image, split.

    Pictures lie at `<split>/<id>/<image>`, below `images/` in the published layout; or `image` holds the picture,
    as in rows of the Hugging Face hub.
    """
    question, hint, names = at.text("question"), at.text("hint", required=False), at.choices()
    answer = at.right_choice("answer", names)
    lecture, solution = at.text("lecture", required=False), at.text("solution", required=False)
    if not sentences(f"{lecture}\n{solution}"):
        at.report("solution: is empty, and so is lecture; write one of them, or drop the record: it has no reasoning")
    split, image, identity = at.split(), at.value.get("image"), at.value.get("id", at.number)
    if image is not None and not isinstance(image, str) and not holds_bytes(at.value):
        at.report(f"image: is {kind(image)}, not a file name; correct it, or write null")
    if at.problems:
        return []
    pictured = {}
    if image and not isinstance(image, str):
        pictured = {"image": image}
    elif image:
        own = os.path.join(split or "", str(identity), image)
        pictured = {"image": at.first_there(own, os.path.join("images", own))}
    metadata = at.metadata(
        "id question choices answer hint lecture solution image", source="scienceqa", candidates=names
    )
    chain = chain_of([(ANALYSIS, lecture), (CHECKING, solution)], answer, metadata)
    asked = question_with_choices(question, names, hint)
    return [{"id": f"scienceqa-{identity}", "instruction": asked, "answer": answer, **pictured, **chain}]


def aokvqa(at: Source) -> list[dict[str, Any]]:
    """`question`, `choices`, `correct_choice_idx`, `rationales`, `image_id`, `question_id`, `split`.

    Pictures are COCO's, `<split>2017/<image_id, 12 digits>.jpg`, or lie in `image_root` itself; or `image` holds the
    picture itself, as in rows of the Hugging Face hub.
    """
    question, names = at.text("question"), at.choices()
    answer = at.right_choice("correct_choice_idx", names)
    rationales, image = at.value.get("rationales"), at.value.get("image_id")
    if not isinstance(rationales, list) or not all(isinstance(text, str) for text in rationales):
        at.report("rationales: is missing or no list of texts; write them, or drop the record: it has no reasoning")
    elif not sentences("\n".join(rationales)):
        at.report("rationales: is empty; write one, or drop the record: it has no reasoning")
    embedded = holds_bytes(at.value)
    if embedded:
        image = 0
    elif isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < 10**12:
        at.report(f"image_id: is {'missing' if image is None else 'no COCO id'}; give the number of the picture")
    split = at.split()
    if not isinstance(identity := at.value.get("question_id", str(at.number)), str) or not identity:
        wrong = kind(identity) if identity != "" else "empty"
        at.report(f"question_id: is {wrong}; give it as text, or leave it out")
    if at.problems:
        return []
    name = f"{image:012}.jpg"
    published = [os.path.join(f"{split}2017", name)] if split else []
    metadata = at.metadata(
        "question choices correct_choice_idx rationales question_id image", source="aokvqa", candidates=names
    )
    return [
        {
            "id": f"aokvqa-{identity}",
            "instruction": question_with_choices(question, names),
            "answer": answer,
            "image": at.value["image"] if embedded else at.first_there(*published, name),
            **chain_of([(SELECTION, text) for text in rationales or ()], answer, metadata),
        }
    ]
