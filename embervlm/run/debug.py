"""The guide's debug commands: try a checkpoint out, analyse it on a test set, look at the switch between the phases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from embervlm import run_dir
from embervlm.report.figures import write_attention, write_figures
from embervlm.report.pages import best_examples, failure_cases, samples_page
from embervlm.report.recorded import as_sample, evaluation_alone, samples_path
from embervlm.report.table import cut_off_lines, metrics_table

if TYPE_CHECKING:
    from embervlm.world import World


def try_reasoning(
    checkpoint: Path, *, num_samples: int, output_dir: Path | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Print a few chains and whether the model reasons; with `output_dir` also draw their attention."""
    from embervlm.evaluation.analysis import sample_text, samples_verdict
    from embervlm.evaluation.evaluate import Evaluation, evaluate

    job = Evaluation(
        checkpoint=checkpoint,
        num_samples=num_samples,
        compare=False,
        progress=False,
        explained=0 if output_dir is None else num_samples,
        **options,
    )
    result, samples = evaluate(job)
    for number, sample in enumerate(samples, 1):
        print(sample_text(sample, number) + "\n")
    print("\n".join(filter(None, (samples_verdict(samples), cut_off_lines(result)))))
    if output_dir is not None:
        page = output_dir / "samples.html"
        samples_page(samples, page, f"{checkpoint}: {len(samples)} samples")
        write_attention([as_sample(sample) for sample in samples], output_dir)
        print(f"Page: {page}\nPictures: {output_dir / 'attention_maps'}")
    return samples


def analyze(checkpoint: Path, *, test_set: Path, output_dir: Path, world: World, **options: Any) -> None:
    """Evaluate all records of `test_set`; write figures, pages and a verdict. Call it on every process of `world`."""
    from embervlm.evaluation.analysis import analysis_text
    from embervlm.run.evaluate import evaluate_to_file

    path = output_dir / "evaluation.json"
    result = evaluate_to_file(
        checkpoint, split="test", output_file=path, save_samples=True, test_set=str(test_set), world=world, **options
    )
    if world.rank > 0:
        return
    record = evaluation_alone(path)
    cut = cut_off_lines(result)
    text = f"{metrics_table(result)}\n" + (f"{cut}\n" if cut else "")
    text += f"\n{analysis_text(result, run_dir.read_json(samples_path(path)))}"
    write_figures(record, output_dir)
    for name, chosen in (("best_reasoning_examples", best_examples), ("failure_cases", failure_cases)):
        samples_page(
            chosen(record.samples),
            output_dir / "samples" / f"{name}.html",
            name.replace("_", " ").capitalize(),
            result=result,
        )
    run_dir.write_text_atomic(output_dir / "analysis.txt", text + "\n")
    print(f"{text}\nwritten: {output_dir}")


def check_phases(phase1: Path, phase2: Path, start: Path | None) -> bool:
    """Print what happened at the switch from phase 1 to phase 2, and return whether nothing is wrong."""
    from embervlm.evaluation.transition import check_transition, transition_text

    found = check_transition(phase1, phase2, start)
    print(transition_text(found))
    return not found.problems
