"""The guide's debug commands: try a checkpoint, analyse it on a test set, check the switch between the phases."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.evaluation.analysis import analysis_text, sample_text, samples_verdict
from embervlm.evaluation.eval_data import Evaluation
from embervlm.evaluation.evaluate import evaluate
from embervlm.evaluation.transition import check_transition, transition_text
from embervlm.model.decoding import Decoding
from embervlm.options import chosen
from embervlm.report.figures import write_attention, write_figures
from embervlm.report.pages import best_examples, failure_cases, samples_page
from embervlm.report.recorded import as_sample, evaluation_alone, samples_path
from embervlm.report.table import cut_off_lines, metrics_table
from embervlm.run.evaluate import data_options, decoding_options, evaluate_to_file, evaluating_processes


def try_reasoning_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--num_samples", type=int, default=10, help="records to ask about")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="of the records")
    parser.add_argument("--visualize", action="store_true", help="also draw where the model looked at each step")
    parser.add_argument(
        "--output_dir", type=Path, help="folder for the drawings; default: evals/samples in the checkpoint"
    )
    data_options(parser)
    decoding_options(parser)


def try_reasoning(
    checkpoint: Path, *, num_samples: int, visualize: bool, output_dir: Path | None, **options: Any
) -> None:
    """Print a few chains and whether the model reasons; with `visualize` also draw their attention."""
    job = Evaluation(
        checkpoint=checkpoint,
        num_samples=num_samples,
        compare=False,
        progress=False,
        explained=num_samples if visualize else 0,
        decoding=Decoding(**chosen(options, Decoding)),
        **options,
    )
    result, samples = evaluate(job)
    for number, sample in enumerate(samples, 1):
        print(sample_text(sample, number) + "\n")
    print("\n".join(filter(None, (samples_verdict(samples), cut_off_lines(result)))))
    if visualize:
        output_dir = output_dir or checkpoint / "evals" / "samples"
        page = output_dir / "samples.html"
        samples_page(samples, page, f"{checkpoint}: {len(samples)} samples", unmeasured=True)
        print(f"Page: {page}")
        if write_attention([as_sample(sample) for sample in samples], output_dir):
            print(f"Pictures: {output_dir / 'attention_maps'}")


def analyze_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--test_set", type=Path, required=True, help="file of records; all of them are used")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for figures, pages and the verdict")
    parser.add_argument("--num_samples", type=int, help="at most this many records")
    parser.add_argument(
        "--explain_samples", type=int, default=200, help="number of chains saved with attention and step scores"
    )
    parser.add_argument("--faithfulness_samples", type=int, default=200, help="as in evaluate; 0 skips it")
    data_options(parser)
    decoding_options(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def analyze(
    checkpoint: Path, *, test_set: Path, output_dir: Path, local_rank: int | None = None, **options: Any
) -> None:
    """Evaluate all records of `test_set`; write figures, pages and a verdict."""
    path = output_dir / "evaluation.json"
    options["decoding"] = Decoding(**chosen(options, Decoding))
    with evaluating_processes(local_rank) as world:
        result = evaluate_to_file(
            checkpoint,
            split="test",
            output_file=path,
            save_samples=True,
            test_set=str(test_set),
            world=world,
            **options,
        )
        if world.rank == 0:
            _write_analysis(result, path)


def _write_analysis(result: dict[str, Any], path: Path) -> None:
    record, output_dir = evaluation_alone(path), path.parent
    cut = cut_off_lines(result)
    text = f"{metrics_table(result)}\n" + (f"{cut}\n" if cut else "")
    text += f"\n{analysis_text(result, run_dir.read_json(samples_path(path)))}"
    write_figures(record, output_dir)
    for name, choose in (("best_reasoning_examples", best_examples), ("failure_cases", failure_cases)):
        samples_page(
            choose(record.samples),
            output_dir / "samples" / f"{name}.html",
            name.replace("_", " ").capitalize(),
            result=result,
        )
    run_dir.write_text_atomic(output_dir / "analysis.txt", text + "\n")
    print(f"{text}\nwritten: {output_dir}")


def check_phases_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase1_checkpoint", type=Path, required=True, help="where phase 1 ended")
    parser.add_argument("--phase2_checkpoint", type=Path, required=True, help="any of phase 2")
    parser.add_argument(
        "--start_checkpoint",
        type=Path,
        help="checkpoint from which phase 1 started; default: the one that the run recorded",
    )


def check_phases(phase1_checkpoint: Path, phase2_checkpoint: Path, start_checkpoint: Path | None) -> None:
    """Print what happened at the switch from phase 1 to phase 2; exit status 1 if something is wrong."""
    found = check_transition(phase1_checkpoint, phase2_checkpoint, start_checkpoint)
    print(transition_text(found))
    if found.problems:
        sys.exit(1)
