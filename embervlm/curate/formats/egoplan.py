"""EgoPlan: what was done so far in a video from the wearer's eyes, and which action comes next."""

from __future__ import annotations

import os
from typing import Any

from embervlm.curate.formats.shared import ANALYSIS, CHECKING, Source, chain_of, question_with_choices
from embervlm.data.record_fields import quote

_LETTERS = "abcd"


def egoplan(at: Source) -> list[dict[str, Any]]:
    """Chen et al. 2023, arXiv 2312.06722: EgoPlan-Bench (`choice_a` to `choice_d`, `golden_choice_idx`) or EgoPlan-IT.

    `question`, `answer`, `task_goal`, `task_progress_metadata` of `narration_text`, `video_id` and
    `current_observation_frame`; EgoPlan-IT has `negative_answers`, which become the other choices. The steps are the
    goal and the actions done. The picture is the current frame, `EPIC-KITCHENS/<person>/rgb_frames/<video>/
    frame_<10 digits>.jpg` or below `<video>/`; or `current_observation_basename` names it, as SEED-Bench-R1 does.
    """
    question, answer, goal = at.text("question"), at.text("answer"), at.text("task_goal")
    done, names, video = _done(at), _names(at, answer), at.text("video_id")
    frame, basename = at.value.get("current_observation_frame"), at.text("current_observation_basename", required=False)
    if not basename and (type(frame) is not int or not 0 <= frame < 10**10):
        at.report("current_observation_frame: is missing or no number of a frame; give it, or the picture's name")
    if at.problems:
        return []
    name = f"frame_{frame:010}.jpg" if not basename else ""
    epic = os.path.join("EPIC-KITCHENS", video.partition("_")[0], "rgb_frames", video, name)
    picture = basename or at.first_there(epic, os.path.join(video, name))
    used = "question answer task_progress_metadata negative_answers golden_choice_idx " + " ".join(_CHOICES)
    metadata = at.metadata(used, source="egoplan", candidates=names, split_group=video)
    parts = [(ANALYSIS, f"The goal is to {goal.rstrip('.')}."), *((CHECKING, f"Done: {text}.") for text in done)]
    return [
        {
            "id": f"egoplan-{at.value.get('sample_id', at.number)}",
            "instruction": question_with_choices(question, names),
            "answer": answer,
            "image": picture,
            **chain_of(parts, answer, metadata),
        }
    ]


_CHOICES = tuple(f"choice_{letter}" for letter in _LETTERS)


def _done(at: Source) -> list[str]:
    """What each entry of the progress tells."""
    given = at.value.get("task_progress_metadata")
    entries = given if isinstance(given, list) else [None]
    texts = [entry.get("narration_text") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        at.report("task_progress_metadata: is not a list of {narration_text, ...}; write what was done, or []")
        return []
    return [str(text).strip().rstrip(".") for text in texts]


def _names(at: Source, answer: str) -> list[str]:
    """The choices: the four of the benchmark in their order, or answer and negative answers by the alphabet."""
    given = [at.value.get(name) for name in _CHOICES]
    if any(given):
        index = at.value.get("golden_choice_idx")
        if not isinstance(index, str) or index.lower() not in list(_LETTERS):
            at.report("golden_choice_idx: is missing or no letter A to D; add it (the test set is published without)")
        elif given[_LETTERS.index(index.lower())] != answer:
            at.report(f"golden_choice_idx: {quote(index)} is not the choice that is the answer; correct one of the two")
    else:
        others = at.value.get("negative_answers")
        # by the alphabet, as their order would give the answer away
        given = sorted({answer, *others}) if isinstance(others, list) and all(map(_is_text, others)) else []
    if len(given) < 2 or not all(map(_is_text, given)) or len({str(name).casefold() for name in given}) < len(given):
        at.report("choice_a: there are no different choices; write choice_a to choice_d, or negative_answers")
        return []
    return [str(name) for name in given]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
