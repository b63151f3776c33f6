"""Checkpoint x split -> one JSON file: the metrics, what they are compared with, and the chains."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.evaluation.asked import Models, digest_of, passes_of, refuse_long_questions
from embervlm.evaluation.batches import chunks, found_by, in_order, tasks_of
from embervlm.evaluation.eval_data import EvalData, Evaluation, load_eval_data
from embervlm.evaluation.explain import explain_chains, without_padding
from embervlm.evaluation.faithfulness import Faithfulness
from embervlm.evaluation.known import keep_known
from embervlm.evaluation.own_steps import OwnSteps
from embervlm.evaluation.result import complete, result_of, scored
from embervlm.evaluation.sharing import Key, Task, TaskJournal, failing_together, share_out
from embervlm.evaluation.validator import validator_tasks
from embervlm.model.config import STAGE3
from embervlm.model.embervlm import EmberVLM
from embervlm.progress import progress_bar
from embervlm.report.table import cut_off_lines

EXPLAIN_BATCH = 16


def evaluate_checkpoint(checkpoint: str | Path, split: str = "val", **options: Any) -> dict[str, Any]:
    """Evaluate `checkpoint` on `split`, write `<checkpoint>/evals/<split>.json`, and return what it holds.

    The result is what `select_best` reads. See `Evaluation` for the options.
    """
    options.setdefault("compare", False)
    job = Evaluation(checkpoint=Path(checkpoint), split=split, **options)
    result, _ = evaluate(job)
    if job.world.rank == 0:
        keep_in_checkpoint(job, result, samples=None, whole=True)
        if warning := cut_off_lines(result):
            print(f"{checkpoint}: {warning}", file=sys.stderr)  # select_best's output is one line
    return result


def keep_in_checkpoint(
    job: Evaluation, result: dict[str, Any], samples: list[dict[str, Any]] | None, *, whole: bool
) -> None:
    """Write the files into the checkpoint that others read there; a warning if this is not possible.

    That is the temperature that `from_pretrained` takes and, of a `whole` evaluation, the file of its split with its
    samples, which `select_best` and the report read.
    """
    path = run_dir.eval_path(job.checkpoint, job.split)
    samples_file = path.with_name(f"{path.stem}_samples.json")
    try:
        if (found := result["calibration"]) is not None:
            kept = {name: found[name] for name in ("split_fitted", "num_fitted", "temperature", "written")}
            run_dir.write_json_atomic(run_dir.calibration_path(job.checkpoint), kept)
        if whole:
            run_dir.write_json_atomic(path, result)
            with run_dir.naming_unwritten(samples_file):
                samples_file.unlink(missing_ok=True)  # of an evaluation before
            if samples is not None:
                run_dir.write_json_atomic(samples_file, samples)
    except run_dir.WriteError as error:
        print(f"warning: nothing was saved in the checkpoint: {error}", file=sys.stderr)


def evaluate(job: Evaluation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result (on every process), and on process 0 one sample per record: picture, chain, answers and scores."""
    world, models = job.world, Models(job.world.device)
    model = models(job.checkpoint)
    reasons = model.config.stage != STAGE3
    data = load_eval_data(job, model.config.image_size, tuple(model.config.candidates), model.config.fill)
    refuse_long_questions(model, [*data.records, *data.val])
    passes = passes_of(job, data, reasons=reasons)
    journal = TaskJournal(job.partial, digest_of(job, passes), world)

    def shared(tasks: Sequence[Task], name: str) -> dict[Key, Any]:
        # a bar of its own: how much there is to ask of the chains is known only when they are written
        quiet = not job.progress or world.rank > 0 or not tasks
        with progress_bar(total=0, unit="record", desc=f"{name} {job.split}", disable=quiet) as bar:
            return share_out(tasks, models, world, journal, bar)

    tasks = [task for name, asked in passes.items() for task in asked.tasks(name, data.pictures)]
    answers = shared([*tasks, *validator_tasks(model, job.checkpoint, data)], "evaluate")
    for name, asked in passes.items():
        asked.results = in_order(name, asked.batches, answers)
    chains = passes["chains"].results
    own_steps = OwnSteps(data.records, chains, data.domains) if reasons and job.compare else None
    faithfulness = None
    if reasons and job.compare and job.faithfulness_samples:
        faithfulness = Faithfulness(
            data.records, [c["reasoning_steps"] for c in chains], data.domain, job.faithfulness_samples
        )
    later = _explain_tasks(job, data, chains) if reasons else []
    for questions in (own_steps, faithfulness):
        later += [] if questions is None else questions.tasks(job.checkpoint, data.see, job.decoding)
    explained = shared(later, "ask about")
    result: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    with failing_together(world):
        if world.rank == 0:
            samples = [scored(record, found, data) for record, found in zip(data.records, chains)]
            details = [detail for part in found_by("explained", explained) for detail in part]
            complete(samples, data, passes, details)
            keep_known(model, job.checkpoint, data.known, of_training=job.reasoning_data is None)
            result = result_of(job, model, data, samples, passes, answers)
            result["own_steps"] = None if own_steps is None else own_steps.result(explained)
            if faithfulness is not None:
                swapped = result["metrics"]["swapped_image_accuracy"]
                result["faithfulness"] = {"swapped_picture_accuracy": swapped, **faithfulness.result(explained)}
    return world.broadcast(result), samples


def _explain_tasks(job: Evaluation, data: EvalData, chains: Sequence[Mapping[str, Any]]) -> list[Task]:
    def explain(batch: Sequence[int], model: EmberVLM) -> list[dict[str, Any]]:
        records = [data.records[place] for place in batch]
        steps = [chains[place]["reasoning_steps"] for place in batch]
        found = explain_chains(model, *data.see(model, records), [record.instruction for record in records], steps)
        for record, one in zip(records, found):
            if one["attention"] and record.image and (area := data.pictures.area(record.image)) is not None:
                one["attention"] = without_padding(one["attention"], area)
        return found

    batches = chunks(range(min(job.explained, len(data.records))), EXPLAIN_BATCH)
    return tasks_of("explained", job.checkpoint, batches, explain, counted=False)
