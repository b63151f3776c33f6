"""The guide's "Self-Generated with Validation": a chain of the model's own is checked and kept for training."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.judge.faults import judge_steps
from embervlm.judge.reading import ChainContext
from embervlm.model.embervlm import EmberVLM
from embervlm.model.interactive import Reasoning, as_reasoning, form_faults
from embervlm.run_dir import write_text_atomic
from embervlm.words.chain_text import format_reasoning, parse_reasoning_text

OWN_CHAINS = "data/stage4/self_generated.jsonl"
"""Where `save_to_dataset` writes unless told otherwise; `--reasoning_data` takes it."""


def reasoning_validator(reasoning: Any, model: EmberVLM | None = None) -> bool:
    """Whether a chain is consistent: at least two steps, no step repeats or contradicts an earlier one, and a
    conclusion that names the answer.

    By rules over the words alone, which do not know what the picture shows; `model` is asked as well, where it is
    given. `reasoning_problems` says why not.

    Args:
        reasoning: Of `EmberVLM.generate_reasoning` or `reason`; or steps, or their text.
        model: Its step validator must also find each step more likely to follow than not.
    """
    return not reasoning_problems(reasoning, model)


def reasoning_problems(reasoning: Any, model: EmberVLM | None = None) -> list[str]:
    """The reasons why `reasoning_validator` rejects a chain, a sentence each."""
    given = as_reasoning(reasoning)
    found = list(_problems_by_rule(given))
    if model is not None:
        found += [fault for fault in model.reasoning_faults(given) if fault not in found]
    return found


def _problems_by_rule(given: Reasoning) -> Iterator[str]:
    yield from form_faults(given)
    if given.question and not given.answer_set:
        yield "it has no answer"
    answer = frozenset(given.answer_set)
    context = ChainContext(instruction=given.question, answer=answer, gold_answer=answer, candidates=answer)
    for number, fault in enumerate(judge_steps(given.steps, context), 1):
        yield from (f"step {number} {found}" for found in (fault.contradicted, fault.redundant) if found)


def save_to_dataset(reasoning: Any, path: str | Path = OWN_CHAINS) -> Path:
    """Add a chain to the records in `path` (JSONL), and return that path; a chain that is there already is not added.

    Its picture goes beside the file into `images/`, so that the file trains as it is. Whether the chain is any good is
    for `reasoning_validator` to say.
    """
    path, given = Path(path), as_reasoning(reasoning)
    if not given.question or not given.answer_set:
        raise ConfigError(f"{path}: a chain without its {'answer' if given.question else 'question'} is not a record")
    if path.suffix != ".jsonl":
        raise ConfigError(f"{path}: chains can only be added to a file that ends in .jsonl")
    if list(parse_reasoning_text(format_reasoning(given.steps))) != list(given.steps):
        raise ConfigError(
            f"{path}: the text of one step contains the beginning of another; the chain could not be read back"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    value = given.record() | {"image": _keep_picture(given.image, path.parent)}
    text = json.dumps([value["image"], given.question, format_reasoning(given.steps), given.answer_set])
    value["id"] = f"own-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not any(value["id"] in line for line in lines):
        lines.append(json.dumps({key: item for key, item in value.items() if item is not None}))
        write_text_atomic(path, "\n".join([*lines, ""]))
    print(f"{path}: {len(lines)} records")
    return path


def _keep_picture(image: Any, folder: Path) -> Any:
    """The picture's path relative to `folder`, where a copy lies under a name made of its content; of several a
    list."""
    if image is None:
        return None
    if isinstance(image, (list, tuple)):
        return [_keep_picture(one, folder) for one in image]
    images = folder / "images"
    images.mkdir(exist_ok=True)
    if isinstance(image, (str, Path)):
        name = f"{hashlib.blake2b(Path(image).read_bytes(), digest_size=8).hexdigest()}{Path(image).suffix.lower()}"
        if not (images / name).exists():
            shutil.copyfile(image, images / name)
    else:
        from PIL import Image

        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        name = f"{hashlib.blake2b(picture.convert('RGB').tobytes(), digest_size=8).hexdigest()}.png"
        if not (images / name).exists():
            picture.convert("RGB").save(images / name)
    return f"images/{name}"
