"""Conversations about a picture: LLaVA, LLaVA-CoT, replies in <think> and <answer>, and LLaMA-Factory's two formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from embervlm.curate.formats.answers import (
    Answer,
    answer_in,
    answering,
    answers_apart,
    free_answer,
    leads,
    lettered_choices,
    only_leads,
)
from embervlm.curate.formats.shared import ANALYSIS, CHECKING, SELECTION, Source, chain_of, sentences
from embervlm.data.record_fields import kind, quote
from embervlm.data.record_pictures import check_placeholders, same_path

Turn = tuple[str, str, str]
"""Question, reply, and the name of the reply's place in the record."""
Parts = list[tuple[str, str]]
"""Step type and text."""
Reader = Callable[[Source, Turn], tuple[Parts, Answer] | None]
"""Reads a reply; what is wrong with one is reported, and gives None."""


def llava(at: Source) -> list[dict[str, Any]]:
    """`id`, `image`, `conversations` of human and gpt in turn; one record for each reply that reasons.

    A reply with <think> is read as `read_thought` has it. Of another a sentence such as "Answer: dog" is the answer,
    else the last one, or the first where only that answers (`answers.answering`); the others are the steps.
    """
    return _records(at, "llava", _turns(at), read_reply)


def llava_cot(at: Source) -> list[dict[str, Any]]:
    """The same with replies as `<SUMMARY> <CAPTION> <REASONING> <CONCLUSION>`, each with its end tag."""
    return _records(at, "llava_cot", _turns(at), _read_tagged)


def sharegpt(at: Source) -> list[dict[str, Any]]:
    """LLaMA-Factory's `sharegpt` (its `data/README.md`): `conversations` or OpenAI's `messages`, and `images`.

    A turn is `from` and `value`, or `role` and `content`; a system turn may come first and stays in the metadata.
    """
    return _records(at, "sharegpt", _turns(at), read_reply)


def alpaca(at: Source) -> list[dict[str, Any]]:
    """LLaMA-Factory's `alpaca` (its `data/README.md`): `instruction`, `input`, `output`, `images`, `history`.

    The question may also be called `query` (as ms-swift does), `prompt`, `question` or `problem`, the reply `response`,
    `content`, `completion` or `solution`. Where there is an `answer` beside it, all of the reply is reasoning.
    """
    asked, reply = at.one_of(_ASKED), at.one_of(" ".join(_REPLIES))
    more, history = at.text("input", required=False), at.value.get("history") or []
    answer = at.text("answer", required=False)
    if not isinstance(history, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        at.report("history: is not a list of [question, reply]; write both texts of every earlier turn")
    if at.problems:
        return []
    if answer and not _THOUGHT.search(reply):
        reply = f"<think>{reply}</think><answer>{answer}</answer>"
    name = _given(at, _REPLIES)
    turns = [(question, text, f"history[{number}]") for number, (question, text) in enumerate(history)]
    question = "\n".join(filter(None, (asked, more)))
    used = f"{_OF_ANY} {_given(at, _ASKED.split())} {name} input history answer"
    return _records(at, "alpaca", [*turns, (question, reply, name)], read_reply, required=(name,), used=used)


def _given(at: Source, names: Sequence[str]) -> str:
    """The first of these fields that says anything, as `Source.one_of` takes it."""
    return next(name for name in names if at.value.get(name) not in (None, ""))


_REPLIES = ("output", "response", "content", "completion", "solution")
_ASKED = "instruction query prompt question problem"
_OF_ANY = "id image images"
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


def _records(
    at: Source,
    source: str,
    turns: Sequence[Turn],
    read: Reader,
    required: Sequence[str] = (),
    used: str = f"{_OF_ANY} conversations messages",
) -> list[dict[str, Any]]:
    """A record for each reply that reasons, behind the turns before it.

    With `required`, a reply that stands elsewhere than in one of these fields need not reason. Fields of the record
    that are not `used` stay in the metadata.
    """
    images, identity = at.value.get("image"), at.value.get("id", source)
    images = at.value.get("images") if images is None else images
    if any("<image>" in question + reply for question, reply, _ in turns) and not images:
        at.report("image: is missing, but a turn says <image>; name the picture, or take <image> out")
    for name in _OTHER_MEDIA:
        if at.value.get(name):
            at.report(f"{name}: is no picture; take a frame of it as the image, or drop the record")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        at.report(f"id: is {kind(identity)}; give a string or a number, or leave the field out")
    if isinstance(images, list) and len(images) > 1:
        turns = _numbered(at, turns, len(images))
    if at.problems:
        return []
    records, earlier = [], ""
    for number, (question, reply, where) in enumerate(turns, 1):
        question, reply = (text.replace("<image>", "").strip() for text in (question, reply))
        question = _TAGS_ASKED_FOR.sub(_before_request, question).strip()
        problems = len(at.problems)
        found = read(at, (question, reply, where))
        if required and where not in required:
            del at.problems[problems:]
        if found is not None:
            parts, (answer, about) = found
            # ids of pictures are used more than once, hence the record's number
            turn_id = f"{identity}-{at.number}" + (f"-{number}" if len(turns) > 1 else "")
            chain = chain_of(parts, answer, at.metadata(used, source=source, **about))
            pictured = {} if images in (None, []) else {"image": images}
            records.append({"id": turn_id, "instruction": earlier + question, "answer": answer, **pictured, **chain})
        earlier += f"Question: {question}\nAnswer: {_without_thought(reply)}\n"
    return records


def _without_thought(reply: str) -> str:
    """What a tagged reply told the user, for the turns behind it; another reply as it stands."""
    for pattern in (_ANSWERED, _CONCLUDED):
        if found := pattern.search(reply):
            return found[1].strip()
    return _without_tags(reply[ends[-1].end() :] if (ends := list(_THOUGHT.finditer(reply))) else reply).strip()


def _numbered(at: Source, turns: Sequence[Turn], num_pictures: int) -> list[Turn]:
    """The turns with the numbers of their pictures in place of `<image>`, counted over all of them."""
    texts = [text for question, reply, _ in turns for text in (question, reply)]
    told = check_placeholders("\0".join(texts), num_pictures, at.report).split("\0")
    return [(question, reply, where) for question, reply, (_, _, where) in zip(told[::2], told[1::2], turns)]


_TAGS_ASKED_FOR = re.compile(r"[^.!?\n]*<(?:think|answer)>[^\n]*?(?:[.!?](?=\s|$)|$)", re.IGNORECASE | re.MULTILINE)
"""A sentence of a question that asks for tags, which no chain has here."""
_REQUEST = re.compile(
    r"\b(?:Answer|Enclose|First|Give|Output|Place|Please|Provide|Put|Reason|Respond|Return|Show|Think|Use|Wrap|Write)\b"
)
"""Its first word, where it stands behind a question without a full stop."""


def _before_request(sentence: re.Match[str]) -> str:
    request = _REQUEST.search(sentence[0].partition("<")[0])
    return sentence[0][: request.start()].rstrip() if request else ""


_SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


def _turns(at: Source) -> list[Turn]:
    """Of `conversations` or `messages`; [] where something was reported."""
    field = next((name for name in ("conversations", "messages") if at.value.get(name) is not None), "conversations")
    given = at.value.get(field)
    spelled = ("from", "value") if field == "conversations" else ("role", "content")
    pair = " and ".join(("human", "gpt") if field == "conversations" else ("user", "assistant"))
    first = 0
    if isinstance(given, list) and given and isinstance(given[0], dict):
        first = int(given[0].get("from", given[0].get("role")) == "system")
    if not isinstance(given, list) or len(given) == first or (len(given) - first) % 2:
        at.report(f"{field}: is not a list of turns in pairs; write {pair} in turn")
        return []
    texts = []
    for number, turn in enumerate(given[first:]):
        speaker = pair.split(" and ")[number % 2]
        turn = turn if isinstance(turn, dict) else {}
        if problem := _part_problem(at, turn.get("value", turn.get("content"))):
            at.report(f"{field}[{number + first}]: {problem}")
            return []
        said, text = turn.get("from", turn.get("role")), _text_of(turn.get("value", turn.get("content")))
        if text is None or not isinstance(said, str) or _SPEAKERS.get(said) != number % 2:
            wanted = f'{{"{spelled[0]}": "{speaker}", "{spelled[1]}": text}}'
            at.report(f"{field}[{number + first}]: is not {wanted}; correct the turn")
            return []
        texts.append(_with_thought(turn, text))
    if first:
        at.value.setdefault("system", _text_of(given[0].get("value", given[0].get("content"))))
    return [(texts[i], texts[i + 1], f"{field}[{i + 1 + first}]") for i in range(0, len(texts), 2)]


_THOUGHT_FIELDS = ("reasoning_content", "reasoning")
"""Of a turn, where DeepSeek's and other endpoints tell the reasoning apart."""


def _with_thought(turn: dict[str, Any], text: str) -> str:
    thought = next(
        (turn[name] for name in _THOUGHT_FIELDS if isinstance(turn.get(name), str) and turn[name].strip()), ""
    )
    return f"<think>{thought}</think>{text}" if thought and not _THOUGHT.search(text) else text


_PICTURE_PARTS = ("image", "image_url")


def _part_problem(at: Source, content: Any) -> str:
    """What of a turn's parts would be lost; empty where nothing is."""
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    for part in parts:
        if (name := part.get("type")) in _PICTURE_PARTS:
            beside = at.value.get("image") or at.value.get("images")
            if (within := part.get(name)) and not beside:
                return "its picture stands within the turn; name it in `images`, beside the turns"
            within = within.get("url") if isinstance(within, dict) else within
            named = beside if isinstance(beside, list) else [beside]
            if isinstance(within, str) and not any(isinstance(one, str) and same_path(one, within) for one in named):
                return (
                    f"its picture {quote(within[:80])} is none of `images`; name it there, or leave it out of the turn"
                )
        elif name != "text":
            return f"a part of type {quote(str(name))} is not read; leave it out, or drop the record"
    return ""


def _text_of(content: Any) -> str | None:
    """The text of a turn, which may be a list of parts as OpenAI has it, with <image> for a picture; None where it is
    neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return None
    texts = ["<image>" if part.get("type") in _PICTURE_PARTS else part.get("text") for part in content]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None


# ---- replies


def read_reply(at: Source, turn: Turn) -> tuple[Parts, Answer] | None:
    """Of a reply in <think> and <answer>, or in sentences of which one answers."""
    question, reply, where = turn
    if _THOUGHT.search(reply):
        return _read_thought(at, turn)
    lines = sentences(answers_apart(reply))
    if len(lines) < 2:
        at.report(f"{where}: holds no reasoning, only an answer; add the steps, or drop the turn")
        return None
    if not lettered_choices(question):
        place, answer, says_more = answering(lines)
        steps = [line for number, line in enumerate(lines) if number != place or says_more]
        return [(CHECKING, line) for line in steps], free_answer(answer, question, at.candidates)
    for place in dict.fromkeys((*reversed([n for n, line in enumerate(lines) if leads(line)]), len(lines) - 1, 0)):
        if found := answer_in(lines[place], question, at.candidates):
            return [(CHECKING, line) for number, line in enumerate(lines) if number != place], found
    at.report(f"{where}: neither its last nor its first sentence names one of the choices; end with the answer")
    return None


_THINK = "think(?:ing)?|thought|reasoning"
_THOUGHT = re.compile(rf"</?(?:{_THINK})>", re.IGNORECASE)
_THOUGHT_WHOLE = re.compile(
    rf"(?P<before>.*?)<(?P<tag>{_THINK})>(?P<thought>.*?)</(?P=tag)>(?P<behind>.*)", re.IGNORECASE | re.DOTALL
)
_ANSWERED = re.compile(r"<answer>(?P<answer>.*?)(?:</answer>|$)", re.IGNORECASE | re.DOTALL)
_CONCLUDED = re.compile(r"<CONCLUSION>(.*?)</CONCLUSION>", re.DOTALL)
_CAPTION = re.compile(r"<(caption|description)>(?P<caption>.*?)</\1>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?(?P<name>[a-z_]+)>", re.IGNORECASE)
_FORMATTING = frozenset("b i u s em strong sub sup mark small code span tt".split())


def _without_tags(text: str) -> str:
    """A line for each part between tags; those that only format are taken out of their sentence.

    One that is never closed is no tag: `List<int>`.
    """
    closed = {name.casefold() for name in re.findall(r"</([a-z_]+)>", text, re.IGNORECASE)}

    def instead(tag: re.Match[str]) -> str:
        name = tag["name"].casefold()
        return tag[0] if name not in closed else "" if name in _FORMATTING else "\n"

    return _TAG.sub(instead, text)


def _read_thought(at: Source, turn: Turn) -> tuple[Parts, Answer] | None:
    """`<think>...</think><answer>...</answer>`, or the answer in the last sentence behind `</think>` (DeepSeek-R1).

    The opening tag may be missing, as where a chat template writes it. Text before it and a `<caption>` come first.
    """
    question, reply, where = turn
    tags = [tag.lower() for tag in _THOUGHT.findall(reply)]
    if len(tags) == 1 and tags[0].startswith("</"):
        reply, tags = f"<{tags[0][2:]}{reply}", [tags[0].replace("/", ""), *tags]
    match = _THOUGHT_WHOLE.fullmatch(reply) if len(tags) == 2 else None
    if match is None:
        at.report(f"{where}: {_quoted(tags)} do not enclose one thought; write <think>...</think> once")
        return None
    thought = match["thought"]
    answered = _ANSWERED.search(match["behind"])
    behind = _without_tags(match["behind"][: answered.start()] if answered else match["behind"])
    said = [sentence for sentence in sentences(behind) if not only_leads(sentence)]
    final = answered["answer"].strip() if answered else " ".join(said[-1:])
    if not sentences(thought) or not re.search(r"\w", final):
        lacking = f"<answer> behind </{match['tag']}>" if sentences(thought) else f"<{match['tag']}>"
        at.report(f"{where}: {lacking} is missing or empty; write it, or drop the turn")
        return None
    found = answer_in(final, question, at.candidates) or (
        None if answered else answer_in(behind, question, at.candidates)
    )
    if found is None:
        at.report(f"{where}: the answer behind </{match['tag']}> names none of the choices, or several; name one")
        return None
    caption = _CAPTION.search(reply)
    seen = " ".join(caption["caption"].split()) if caption else ""
    parts = [
        (ANALYSIS, _without_tags(match["before"])),
        (CHECKING, _without_tags(thought)),
        (SELECTION, "\n".join(said if answered else said[:-1])),
    ]
    answer, about = found
    return [(name, text) for name, text in parts if text], (answer, {**({"caption": seen} if seen else {}), **about})


def _quoted(tags: Sequence[str]) -> str:
    return quote(" ".join(tags[:4]) + (" ..." if len(tags) > 4 else ""))[1:-1]


_TAGS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")


def _read_tagged(at: Source, turn: Turn) -> tuple[Parts, Answer] | None:
    question, reply, where = turn
    once = all(reply.count(f"<{tag}>") == reply.count(f"</{tag}>") == 1 for tag in _TAGS)
    pattern = r"\s*".join(rf"<{tag}>(?P<{tag}>.*?)</{tag}>" for tag in _TAGS)
    match = re.fullmatch(pattern, reply.strip(), re.DOTALL) if once else None
    if match is None:
        at.report(f"{where}: is not {' '.join(f'<{tag}>...</{tag}>' for tag in _TAGS)}; write each once, in this order")
        return None
    summary, caption, reasoning, conclusion = (" ".join(text.split()) for text in match.groups())
    for tag, text in (("REASONING", reasoning), ("CONCLUSION", conclusion)):
        if not re.search(r"\w", text):
            at.report(f"{where}: {tag} is empty; write it, or drop the turn")
            return None
    found = answer_in(conclusion, question, at.candidates)
    if found is None:
        at.report(f"{where}: CONCLUSION names none of the choices, or several; name one")
        return None
    parts = [(ANALYSIS, summary), (ANALYSIS, caption), (CHECKING, match["REASONING"])]
    return parts, (found[0], {**({"caption": caption} if caption else {}), **found[1]})
