"""The common part of all questions of an evaluation: records in batches, a task for each batch, and the results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from embervlm.data.collate import padded
from embervlm.data.images import PictureCache
from embervlm.data.records import ReasoningRecord
from embervlm.evaluation.sharing import Key, Task
from embervlm.judge.reading import ChainContext
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import generate_from_visual

BATCH_SIZE = 64
See = Callable[[EmberVLM, Sequence[ReasoningRecord]], tuple[torch.Tensor, torch.Tensor]]
"""Visual tokens of the records' pictures, and which have one."""
Item = TypeVar("Item")


def chunks(items: Sequence[Item], size: int = BATCH_SIZE) -> list[Sequence[Item]]:
    """`items` in order, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def alike(lengths: Iterable[Any]) -> list[Sequence[int]]:
    """Places of the `lengths` in batches; those of like length are answered together."""
    keys = list(lengths)
    return chunks(sorted(range(len(keys)), key=keys.__getitem__))


def tasks_of(
    name: str,
    checkpoint: Path,
    batches: Iterable[Sequence[int]],
    run: Callable[[Sequence[int], EmberVLM], Any],
    *,
    counted: bool = True,
) -> list[Task]:
    """A task for each batch of places; the progress bar counts its records where it is `counted`."""
    return [
        Task(
            name=name,
            number=number,
            checkpoint=checkpoint,
            num_records=len(batch) if counted else 0,
            run=partial(run, batch),
        )
        for number, batch in enumerate(batches)
    ]


def found_by(name: str, done: Mapping[Key, Any]) -> list[Any]:
    """The results of the tasks `name`, in order."""
    return [done[key] for key in sorted(key for key in done if key[0] == name)]


def in_order(name: str, batches: Sequence[Sequence[int]], done: Mapping[Key, Any]) -> list[dict[str, Any]]:
    """The results of the tasks `name` for each place of `batches`, by place."""
    found = {
        place: value
        for number, batch in enumerate(batches)
        for place, value in zip(batch, done[name, number], strict=True)
    }
    return [found[place] for place in sorted(found)]


@torch.inference_mode()
def see(
    model: EmberVLM, pictures: PictureCache, records: Sequence[ReasoningRecord]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual tokens of the records' pictures, and which have one."""
    model.eval()
    size = model.config.image_size
    blank = np.zeros((size, size, 3), dtype=np.uint8)
    pixels = np.stack([pictures[record.image] if record.image else blank for record in records])
    mask = torch.tensor([record.image is not None for record in records], device=model.device)
    return model.see_pictures(torch.from_numpy(pixels)), mask


def answer(
    model: EmberVLM, pictures: PictureCache, records: Sequence[ReasoningRecord], decoding: Decoding
) -> list[dict[str, Any]]:
    """Model output for a batch of records."""
    visual, seen = see(model, pictures, records)
    own = [record.candidates for record in records]
    return generate_from_visual(model, visual, seen, [record.instruction for record in records], decoding, own)


def cut_off_reasons(result: Mapping[str, Any]) -> list[str]:
    """The reason for a text that a limit cut off."""
    limits = {"steps": "max_reasoning_steps", "tokens": "max_new_tokens"}
    return [f"the text is cut off by {limits[result['cut_off']]}; raise it"] if result.get("cut_off") else []


def known_of(record: ReasoningRecord, domains: Mapping[str, Collection[str]], answer: Collection[str]) -> ChainContext:
    """The judge's information about a record, for a chain that leads to `answer`."""
    return ChainContext(
        instruction=record.instruction,
        facts=record.metadata.get("facts") or {},
        domains=domains,
        reference_steps=record.steps,
        answer=frozenset(answer),
        gold_answer=frozenset(record.answer),
        candidates=frozenset(record.candidates),
        is_pictured=record.image is not None,
    )


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return float(np.mean(values)) if len(values) else None


@torch.inference_mode()
def text_log_probs(
    model: EmberVLM, visual: torch.Tensor, seen: torch.Tensor, rows: Sequence[tuple[int, list[int], int]]
) -> list[float]:
    """Summed log-probability in nats of each text from where its scored part starts.

    Args:
        rows: the picture's place in `visual`, the text, and where the scored part starts.
    """
    ids = padded([text for _, text, _ in rows], 0).to(visual.device)
    batch, length = ids.shape
    mask = torch.arange(length, device=ids.device) < torch.tensor(
        [[len(text)] for _, text, _ in rows], device=ids.device
    )
    owner = torch.tensor([place for place, _, _ in rows], device=ids.device)
    index = [at * length + i - 1 for at, (_, text, start) in enumerate(rows) for i in range(start, len(text))]
    scored = torch.tensor(index, device=ids.device)
    out = model(input_ids=ids, text_mask=mask, image_mask=seen[owner], visual=visual[owner], score_index=scored)
    found = out.token_logits.float().log_softmax(-1).gather(1, ids.flatten()[scored + 1][:, None])[:, 0]
    return torch.zeros(batch, device=ids.device).index_add(0, scored // length, found).tolist()  # type: ignore[no-any-return]
