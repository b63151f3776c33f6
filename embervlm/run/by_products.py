"""What a training writes besides checkpoints: chains after each epoch, and evaluations. No failure here ends it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embervlm import run_dir
from embervlm.config import TrainConfig
from embervlm.errors import UserError
from embervlm.evaluation.evaluate import evaluate_checkpoint
from embervlm.evaluation.sight import Form, answer_twice, sight
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.run.eval_jobs import submit_evaluation
from embervlm.run.run_data import RunData
from embervlm.world import World

_log = logging.getLogger(__name__)


def after_epoch(config: TrainConfig, world: World, model: EmberVLM, data: RunData, epoch: int) -> None:
    """Write the chains of an epoch."""
    with _only_warned(world, f"epoch {epoch}: no samples"):
        write_samples(config, world, model, data, epoch)


def say_whether_it_looks(
    world: World, data: RunData, ended: str, form: Form, decoding: Decoding | None, most: int, model: EmberVLM
) -> None:
    """Print whether the pictures of the val split matter to `model`, with which the phase `ended`.

    Args:
        form: the texts that the phase trains on.
        decoding: how its questions are answered; None where it trains no answers.
        most: number of questions.
    """
    with _only_warned(world, f"{ended}: not known whether the model looks at the picture"):
        records = data.val or data.train
        shown = world.rank == 0
        found = sight(model, data.pictures, records, form, progress=shown)
        answers = None
        if decoding is not None and most:
            answers = answer_twice(model, data.pictures, records, decoding, most, progress=shown)
        if found is not None and found.num_texts and world.rank == 0:
            print(f"{ended}: {found}")
        if answers is not None and world.rank == 0:
            print(f"{ended}: {answers}")


@contextmanager
def _only_warned(world: World, what: str) -> Iterator[None]:
    """An error is only printed, and training continues.

    No process waits for another inside, so it may go wrong on one alone.
    """
    try:
        yield
    except Exception as error:  # a device may be out of memory
        if world.rank == 0 or not isinstance(error, UserError):  # the latter is the same on every process
            reason = str(error) if isinstance(error, run_dir.WriteError) else f"{type(error).__name__}: {error}"
            _log.warning("%s (%s); training continues", what, reason)


def write_samples(config: TrainConfig, world: World, model: EmberVLM, data: RunData, epoch: int) -> None:
    """Chains of a few val records; every process computes them (ZeRO-3 needs all), one writes."""
    records = (data.val or data.train)[: config.sample_records]
    images = [data.pictures[record.image] if record.image else None for record in records]
    results = model.generate_with_reasoning(images, [record.instruction for record in records])
    if world.rank == 0:
        samples = [
            {
                "id": record.record_id,
                "image": record.image,
                "instruction": record.instruction,
                "gold_answer": list(record.answer),
                "gold_steps": list(record.steps),
                **result,
            }
            for record, result in zip(records, results)
        ]
        run_dir.write_json_atomic(run_dir.reasoning_samples_path(config.output_dir, epoch), samples)
        if cut := sum(bool(result["cut_off"]) for result in results):
            print(f"epoch {epoch}: {cut} of {len(results)} sample chains were cut off before their end")


def evaluate_saved(config: TrainConfig, world: World, checkpoint: Path) -> None:
    """The evaluation that `select_best` reads: computed here by all processes, or by a separate job.

    An error is only printed: training continues, and `select_best` evaluates the checkpoint later.
    """
    try:
        if config.eval_cluster is None:
            evaluate_checkpoint(checkpoint, split="val", num_samples=config.eval_samples, progress=False, world=world)
        elif world.rank == 0:
            print(f"{checkpoint.name} is evaluated by job {submit_evaluation(checkpoint, config)}")
    except Exception as error:  # the same one on every process
        if world.rank == 0:
            print(f"{checkpoint}: not evaluated ({type(error).__name__}: {error}); training continues")
