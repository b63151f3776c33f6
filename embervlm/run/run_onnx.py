"""Ask a model that `embervlm export --format onnx` wrote: `python run_onnx.py picture.jpg "question"`.

Needs numpy, onnxruntime, tokenizers and Pillow; neither torch nor transformers nor embervlm. It stands in the folder of
the model, whose files it reads. It writes what `EmberVLM.generate_with_reasoning` writes, token for token.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

NO_PICTURE = "-"
MAX_PIXELS = 200_000_000
UNLIKE_QUESTION = "The question is unlike those that the model was trained on."
UNLIKE_PICTURE = "The picture is unlike those that the model was trained on."
PICTURE_MISSING = "There is no picture, and the questions that the model was trained on had one."
PICTURE_UNWANTED = "There is a picture, and the questions that the model was trained on had none."
CONCLUSION = "Conclusion: "
_LABEL = re.compile(r"(?:^|[,;.)\]:\n]|\band\b)[\s(\[*\"']*(?<!\w)([^\W_])(?=[)\].:]+(?:[\s*]|$))")
_ROLE = re.compile(
    r"(?:(?:primary|secondary|tertiary|main|lead|backup|support|fallback|answer)(?:\s+robots?)?|robots?)\s*:\s*",
    re.IGNORECASE,
)
_TRANSPOSE = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Arrays = dict[str, np.ndarray]


@dataclass
class Chain:
    """What is being written."""

    ids: list[int] = field(default_factory=list)
    num_steps: int = 0
    concluded: bool = False
    in_answer: bool = False
    ended: bool = False
    cut_off: str | None = None
    """Which limit cut it off, `steps` or `tokens`."""
    answer_log_prob: float = 0.0


class Model:
    """The model of a folder, for one question at a time.

    Args:
        num_threads: Of onnxruntime; 0 is as many as there are processors.
    """

    def __init__(self, folder: Path, num_threads: int = 0) -> None:
        self.settings = json.loads((folder / "runner.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3

        def graph(name: str) -> Callable[[Arrays], Arrays]:
            session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            return lambda inputs: dict(zip(names, session.run(None, inputs)))

        self._picture, self._text = graph("picture.onnx"), graph("text.onnx")
        self._answer = graph("answer.onnx") if self.settings["candidates"] else None
        self._known = Known(folder / "known.npz") if (folder / "known.npz").exists() else None
        self._templated, self._tokenizer = (Tokenizer.from_file(str(folder / "tokenizer.json")) for _ in range(2))
        for tokenizer in (self._templated, self._tokenizer):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # what stands in a question is text
        self.ids: dict[str, int] = self.settings["ids"]

    def ask(
        self,
        picture: str | Path | np.ndarray | None,
        question: str,
        on_step: Callable[[str], None] | None = None,
        min_known: float = 0.5,
        max_reasoning_steps: int | None = None,
        max_new_tokens: int | None = None,
    ) -> dict[str, Any]:
        """`{"reasoning_steps", "answer", "answer_set", "text", "confidence", "known", "why", "cut_off", "ids"}`.

        `answer` is None, and `why` a sentence, where there is none to trust.

        Args:
            picture: Path, uint8 array `[size, size, 3]`, or None for a question without a picture.
            on_step: Called with each step when it is written; with none of a question that is refused.
            min_known: Least `known` that gets an answer; 0 answers all.
        """
        if not question.strip():
            raise ValueError("the question is empty; write a question or a task")
        size, has_one = self.settings["image_size"], picture is not None
        if not isinstance(picture, np.ndarray):
            picture = load_picture(picture, size, self.settings["fill"]) if picture else np.zeros((size, size, 3), "u1")
        look = self._picture({"pixels": picture[None]})
        visual = look.pop("visual")
        known, unlike = (None, None) if self._known is None else self._known.of(visual, has_one, question)
        if known is not None and known < min_known:
            on_step = None
        if not has_one:  # the head's first key says that nothing is seen
            visual, look = visual[:, :0], {name: part[:, :, :1] for name, part in look.items()}
        steps = max_reasoning_steps or self.settings["max_reasoning_steps"]
        tokens = max_new_tokens or self.settings["max_new_tokens"]
        chain, state = self._write(visual, look, self._prompt(question), steps, tokens, on_step)
        result = self._result(chain, state, visual)
        result["known"], result["why"] = known, _no_answer(result)
        if known is not None:
            result["confidence"] *= known
            result["why"] = unlike if known < min_known else result["why"]
        result["answer"] = result["answer"] if result["why"] is None else None
        return result

    def _prompt(self, question: str) -> list[int]:
        prompt = self.settings["prompt"]
        if prompt is None:
            ids = [*self.settings["bos"], *self._plain(question)]
        elif any(token in question for token in self.settings["added_tokens"]):
            before, behind = (self._templated.encode(text, add_special_tokens=False).ids for text in prompt)
            ids = [*before, *self._plain(question), *behind]
        else:
            ids = self._templated.encode(prompt[0] + question + prompt[1], add_special_tokens=False).ids
        return [*ids, self.ids["<|reasoning_start|>"]]

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _write(
        self,
        visual: np.ndarray,
        look: Arrays,
        prompt: Sequence[int],
        most_steps: int,
        most_tokens: int,
        on_step: Callable[[str], None] | None,
    ) -> tuple[Chain, np.ndarray]:
        """The chain, and the state that the answer head reads: the one before the conclusion."""
        limit, length = self.settings["max_positions"], self.settings["num_visual_tokens"] + len(prompt)
        room = most_tokens if limit is None else min(most_tokens, limit - length)
        if room < 1:
            raise ValueError(f"with the picture the question has {length} tokens; the model reads {limit}: shorten it")
        chain = Chain()
        scores, last, past = self._read(prompt, visual, look, self._empty_caches())
        state, num_told, nothing = last, 0, visual[:, :0]
        while not chain.ended:
            token = self._next(chain, scores, most_steps)
            if len(chain.ids) >= room:
                chain.ended, chain.cut_off = True, chain.cut_off or "tokens"
            else:
                chain.ids.append(token)
                concludes = self._follow(chain, token)
            if on_step is not None and (chain.ended or token >= self.settings["base_vocab_size"]):
                steps, _ = self._parsed(chain.ids, also_unfinished=chain.ended)
                for step in steps[num_told:]:
                    on_step(step)
                num_told = len(steps)
            if not chain.ended:
                scores, last, past = self._read([token], nothing, look, past)
                state = last if concludes else state
        return chain, state

    def _read(
        self, ids: Sequence[int], visual: np.ndarray, look: Arrays, past: Arrays
    ) -> tuple[np.ndarray, np.ndarray, Arrays]:
        """Scores of the next token, the last token's state, and the caches behind it."""
        found = self._text({"input_ids": np.array([ids], np.int64), "visual": visual, **look, **past})
        scores, state = found.pop("logits")[0], found.pop("state")
        names = (("present_head.", "past_head."), ("present.", "past_key_values."))
        return scores, state, {name.replace(*names[name.startswith("present.")]): part for name, part in found.items()}

    def _empty_caches(self) -> Arrays:
        return {name: np.zeros(shape, np.float32) for name, shape in self.settings["empty_caches"].items()}

    def _next(self, chain: Chain, scores: np.ndarray, most_steps: int) -> int:
        """The likeliest token among those that may come."""
        step, conclusion = self.ids["<|step|>"], self.ids["<|conclusion|>"]
        if chain.concluded or chain.num_steps >= most_steps - 1:
            if not chain.concluded and int(scores.argmax()) == step:
                chain.cut_off = chain.cut_off or "steps"
            scores[step] = -np.inf
        if chain.concluded:
            scores[conclusion] = -np.inf
        token = int(scores.argmax())
        if chain.in_answer:
            highest = scores[token].astype(np.float64)
            chain.answer_log_prob -= float(np.log(np.exp(scores.astype(np.float64) - highest).sum()))
        return token

    def _follow(self, chain: Chain, token: int) -> bool:
        """Note what `token` means; whether the conclusion, or the end of a chain without one, begins with it."""
        if token == self.ids["<|step|>"]:
            chain.num_steps += 1
        elif token in (self.ids["<|conclusion|>"], self.ids["<|reasoning_end|>"]) and not chain.concluded:
            chain.concluded = True
            return True
        elif token == self.ids["<|answer_start|>"]:
            chain.in_answer = True
        elif token in (self.ids["<|answer_end|>"], self.settings["end_of_text"]):
            chain.ended = True
        return False

    def _parsed(self, ids: Sequence[int], also_unfinished: bool) -> tuple[list[str], str | None]:
        """Steps, the conclusion last, and the answer's text."""
        names, end = {token: name for name, token in self.ids.items()}, self.settings["end_of_text"]
        steps, part, opened = list[str](), list[int](), ""
        answer: list[int] | None = None

        def close() -> None:
            if opened and (text := self._decode(part)):
                steps.append(CONCLUSION + text if opened == "<|conclusion|>" else text)

        for token in ids:
            name = names.get(token, "")
            if name in ("<|step|>", "<|conclusion|>", "<|reasoning_end|>", "<|answer_start|>"):
                close()
                part, opened = [], name if name in ("<|step|>", "<|conclusion|>") else ""
                answer = [] if name == "<|answer_start|>" else answer
            elif name == "<|answer_end|>" or token == end:
                break
            elif answer is not None:
                answer.append(token)
            elif opened:
                part.append(token)
        if also_unfinished:
            close()
        return steps, None if answer is None else self._decode(answer)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([token for token in ids if token < self.settings["base_vocab_size"]])
        return text.strip()

    def _result(self, chain: Chain, state: np.ndarray, visual: np.ndarray) -> dict[str, Any]:
        steps, text = self._parsed(chain.ids, also_unfinished=True)
        candidates = self.settings["candidates"]
        answer = parse_answer(text or "", candidates) if candidates else [part for part in [text] if part]
        confidence = math.exp(chain.answer_log_prob) if text else 0.0
        if self._answer is not None and answer:
            nothing = np.zeros((1, self.settings["num_visual_tokens"], visual.shape[2]), np.float32)
            seen = visual if visual.shape[1] else nothing
            logits = self._answer({"state": state, "visual": seen})["logits"][0]
            confidence = set_confidence(dict(zip(candidates, logits)), answer, self.settings["temperature"])
        return {
            "reasoning_steps": steps,
            "answer": ", ".join(answer) if answer else (text or ""),
            "answer_set": answer,
            "text": text or "",
            "confidence": confidence,
            "cut_off": chain.cut_off,
            "ids": chain.ids,
        }


class Known:
    """What the training data looked like; see embervlm/model/known.py."""

    def __init__(self, path: Path) -> None:
        found = np.load(path)
        self.bank, self.centre, self.spread = found["bank"].astype(np.float32), found["centre"], found["spread"]
        self.indptr, self.columns, counts = found["indptr"], found["columns"], found["counts"]
        self.scales, self.share = found["scales"], float(found["with_picture_share"][0])
        self.num_columns, self.num_characters = (int(found[name]) for name in ("num_columns", "num_characters"))
        self.unlike, self.few = float(found["unlike"]), float(found["few"])
        having = np.bincount(self.columns, minlength=self.num_columns)
        self.rarity = np.log(len(self.indptr) / (1 + having)) + 1
        self.weights = self._weighed(self.columns, counts)
        self.lengths = np.sqrt(np.add.reduceat(self.weights**2, self.indptr[:-1]))

    def of(self, visual: np.ndarray, has_picture: bool, question: str) -> tuple[float, str]:
        """How well a question is known, in [0, 1], and the sentence that says what is least known of it."""
        found = [(self._grade(1, self._question_distance(question)), UNLIKE_QUESTION)]
        if has_picture:
            found.append((min(1.0, self.share / (2 * self.few)), PICTURE_UNWANTED))
            if len(self.bank):
                found.append((self._picture_known(visual[0]), UNLIKE_PICTURE))
        else:
            found.append((min(1.0, (1 - self.share) / (2 * self.few)), PICTURE_MISSING))
        return min(found)

    def _weighed(self, columns: np.ndarray, counts: np.ndarray) -> np.ndarray:
        weights: np.ndarray = (1 + np.log(counts)) * self.rarity[columns]
        return weights

    def _question_distance(self, question: str) -> float:
        """1 - cosine to the nearest training question, by groups of characters."""
        text, width = f" {' '.join(question.lower().split())} ", self.num_characters
        starts = range(max(1, len(text) - width + 1))
        groups = Counter(zlib.crc32(text[at : at + width].encode(errors="replace")) % self.num_columns for at in starts)
        asked = np.zeros(self.num_columns)
        asked[list(groups)] = self._weighed(np.array(list(groups)), np.array(list(groups.values())))
        products = np.add.reduceat(self.weights * asked[self.columns], self.indptr[:-1])
        return float(1 - (products / (self.lengths * np.sqrt((asked**2).sum()))).max())

    def _picture_known(self, visual: np.ndarray) -> float:
        """By the mean distance of its tokens to the nearest training token, and by how alike they are."""
        tokens = (visual - self.centre) / self.spread
        nearest = ((self.bank**2).sum(1) - 2 * tokens @ self.bank.T).min(1)
        far = float(np.sqrt((nearest + (tokens**2).sum(1)).clip(0)).mean())
        return min(self._grade(0, far), self._grade(2, float(-np.log(max(1e-6, tokens.std(0).mean())))))

    def _grade(self, row: int, far: float) -> float:
        usual, limit, unlike = map(float, self.scales[row])
        if far <= limit:
            return 1 - 0.5 * max(0.0, far - usual) / max(limit - usual, 1e-6)
        beyond = (far - limit) / max(unlike - limit, 0.02 * limit, 1e-6)
        return float(1 / (1 + self.unlike ** min(beyond, 100.0)))


def load_picture(path: str | Path, size: int, fill: Sequence[int] | None) -> np.ndarray:
    """uint8 RGB `[size, size, 3]`, upright, on white where it is transparent; `fill`: keep the aspect ratio on that.

    Raises:
        ValueError: names the file that is missing, too large, or no picture.
    """
    try:
        return _read_picture(path, size, fill)
    except Exception as error:  # decoders raise what they like
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path}: not readable as a picture ({reason}); give another") from error


def _read_picture(path: str | Path, size: int, fill: Sequence[int] | None) -> np.ndarray:
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; ours comes next
    with Image.open(path) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
        image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at a fraction of its size
        image.load()
        turn = _orientation(image)
        scaled = (size, size)
        if fill is not None:
            longest = max(width, height)
            scaled = (max(1, round(width * size / longest)), max(1, round(height * size / longest)))
        factors = tuple(max(1, side // (2 * size)) for side in image.size)
        if max(factors) > 1 and image.mode in ("L", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
            image = image.reduce(factors)  # type: ignore[assignment, arg-type]
        picture = _to_rgb(image).resize(scaled, Image.Resampling.BILINEAR)
        if fill is not None:
            square = Image.new("RGB", (size, size), tuple(fill))
            square.paste(picture, ((size - scaled[0]) // 2, (size - scaled[1]) // 2))
            picture = square
        return np.array(picture.transpose(_TRANSPOSE[turn]) if turn in _TRANSPOSE else picture, np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # of a broken EXIF part the orientation is lost, and the picture is still good
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.float32) / 257
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def parse_answer(text: str, candidates: Sequence[str]) -> list[str]:
    """The candidates that `text` names, in their order; the longest name is found first."""
    whole = _ROLE.sub("", text.strip(), count=1).strip(" .\t\n\"'()").casefold()
    if exact := [name for name in candidates if name.casefold() == whole]:
        return exact[:1]
    labels = {match[1].casefold() for match in _LABEL.finditer(text)} if _LABEL.match(text) else ()
    if lettered := [name for name in candidates if len(name) == 1 and name.casefold() in labels]:
        return lettered
    found = set()
    for name in sorted(filter(str.strip, candidates), key=len, reverse=True):
        words = r"[\s_-]+".join(map(re.escape, name.split()))
        before = r"(?<!\w)(?<!\d[.,])(?<![-\u2212])" if name.strip()[:1].isdigit() else r"(?<!\w)"
        after = r"(?!\w)(?![.,]\d)" if name.strip()[-1:].isdigit() else r"(?!\w)"
        text, count = re.subn(before + words + after, "\0", text, flags=re.IGNORECASE if len(name) > 1 else 0)
        if count:
            found.add(name)
    return [name for name in candidates if name in found]


def set_confidence(logits: dict[str, float], answer: Sequence[str], temperature: float) -> float:
    """How sure the answer head is of exactly the set `answer`: of each candidate in it, and of no other."""
    signed = np.array([logit if name in answer else -logit for name, logit in logits.items()], np.float64)
    bound = math.log(1e15)
    return float(np.exp(-np.logaddexp(0, -signed.clip(-bound, bound) / temperature).sum()))


def _no_answer(result: dict[str, Any]) -> str | None:
    """Why a result has no answer; None where it has one."""
    if result["answer_set"]:
        return None
    if result["cut_off"]:
        limit = {"steps": "max_reasoning_steps", "tokens": "max_new_tokens"}[result["cut_off"]]
        return f"The text was cut off by {limit} before it came to an answer."
    if result["text"]:
        return f'The model wrote "{result["text"][:80]}", which is none of its answers.'
    return "The model wrote no answer."


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the model of this folder about a picture.")
    parser.add_argument("picture", help=f"picture file; {NO_PICTURE} asks without a picture")
    parser.add_argument("question", help="in quotes")
    parser.add_argument("--min_known", type=float, default=0.5, help="least share known that gets an answer; 0: all")
    parser.add_argument("--num_threads", type=int, default=0, help="0: as many as there are processors")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON")
    args = parser.parse_args()
    number = 0

    def tell(step: str) -> None:
        nonlocal number
        number += 1
        print(step if step.startswith(CONCLUSION) else f"Step {number}: {step}", flush=True)

    try:
        model = Model(Path(__file__).resolve().parent, args.num_threads)
        picture = None if args.picture == NO_PICTURE else args.picture
        result = model.ask(picture, args.question, None if args.json else tell, args.min_known)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(result))
        return
    print(f"\nAnswer: {result['answer'] or 'none. ' + result['why']}\nConfidence: {result['confidence']:.0%}")


if __name__ == "__main__":
    main()
