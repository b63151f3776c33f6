"""The `embervlm` command. Nothing heavy is imported before the subcommand is known."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embervlm.config import BACKBONE, TrainConfig, model_preset
from embervlm.errors import OneLineParser, told_in_one_line

if TYPE_CHECKING:
    from embervlm.curate.checking import CheckOptions
    from embervlm.model.generation import Decoding


def underscored(argv: Sequence[str]) -> list[str]:
    """`--num-samples` as the guide spells it, `--num_samples`."""
    out = []
    for item in argv:
        name, equals, value = item.partition("=")
        out.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if item.startswith("--") else item)
    return out


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="embervlm", description="Train and use a vision-language model that reasons.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_describe(commands.add_parser("describe", help="sizes of a model preset"))
    data = commands.add_parser("data", help="make reasoning data").add_subparsers(dest="action", required=True)
    _add_generate(data.add_parser("generate", help="chains by a teacher, by the model itself, or by people"))
    _add_merge(data.add_parser("merge", help="one data set from the shards of a job"))
    _add_validate(data.add_parser("validate", help="every problem of a data set, and what is in it"))
    _add_filter(data.add_parser("filter", help="keep the records of at least a quality"))
    _add_augment(data.add_parser("augment", help="more chains from those of a file, each checked, none twice"))
    _add_convert(data.add_parser("convert", help="other formats to the unified spelling"))
    _add_evaluate(commands.add_parser("evaluate", help="metrics of a checkpoint on a split"))
    _add_try(commands.add_parser("test-reasoning", help="a few chains of a checkpoint, and whether it reasons"))
    _add_analyze(commands.add_parser("analyze", help="what a checkpoint does well and badly on a test set"))
    _add_transition(commands.add_parser("check-transition", help="what moved at the switch from phase 1 to phase 2"))
    _add_score_chains(commands.add_parser("score-chains", help="metrics of chains from any model, with reasons"))
    _add_report(commands.add_parser("report", help="figures and pages of a run, from its recorded files"))
    _add_plan(commands.add_parser("plan", help="memory, steps and time of a run, before anything is booked"))
    _add_quickstart(commands.add_parser("quickstart", help="the newcomer's run, from data to evaluation"))
    _add_cluster(commands.add_parser("cluster", help="node recipes for Slurm and the global batch of each"))
    commands.add_parser("train", help="same as launch/train.py", add_help=False)
    commands.add_parser("select-best", help="same as python -m embervlm.select_best", add_help=False)
    return parser


def _add_describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type="path", required=True, help="preset in configs/model/, or a YAML")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_describe)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", choices=("teacher", "self", "human"), default="teacher", help="who writes chains")
    parser.add_argument("--teacher_model", default="rules", help="rules is embedded; others are behind an endpoint")
    parser.add_argument("--input_dataset", type=Path, help="records or tasks; rules needs none")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON or JSONL; pictures go to images/ beside")
    parser.add_argument(
        "--num_samples", type=int, help="default: 50000; rules makes one for each task of --input_dataset"
    )
    parser.add_argument("--shard", metavar="I/N", help="part I (from 0) of N, such as $SLURM_ARRAY_TASK_ID/8")
    parser.add_argument("--image_root", type=Path, help="what the input's image paths are relative to")
    parser.add_argument("--samples_per_record", type=int, help="chains for each question; teacher 1, self 4")
    parser.add_argument("--temperature", type=float, help="endpoint: its own by default; self: 0.8")
    rules = parser.add_argument_group("--teacher_model rules")
    rules.add_argument("--questions_per_picture", type=int, default=1)
    rules.add_argument("--seed", type=int, default=0)
    rules.add_argument("--workers", type=int, help="processes that draw; default: one per core")
    own = parser.add_argument_group("--source self")
    own.add_argument("--checkpoint", type=Path)
    own.add_argument("--max_reasoning_steps", type=int, help="most steps; default: as the training data needed")
    other = parser.add_argument_group("other teachers, behind an OpenAI-compatible endpoint")
    other.add_argument("--teacher_base_url", dest="base_url", help="such as http://localhost:8000/v1")
    other.add_argument("--teacher_api_key_env", dest="api_key_env", metavar="NAME", help="default: OPENAI_API_KEY")
    other.add_argument("--teacher_sees_pictures", dest="sees_pictures", action="store_true", help="send the picture")
    other.add_argument(
        "--no_teacher_sees_pictures", dest="sees_pictures", action="store_false", help="tell the facts (default)"
    )
    other.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    other.add_argument("--attempts", type=int, default=3, help="answers asked for until one is accepted")
    other.add_argument("--max_answer_tokens", type=int, default=4096)
    other.add_argument("--request_timeout_s", type=float, default=600.0)
    other.add_argument("--max_retries", type=int, default=6, help="of a request that failed")
    other.add_argument("--max_tokens_total", type=int, help="stop before this many tokens, earlier runs included")
    other.add_argument("--max_usd_total", type=float, help="stop before this cost, earlier runs included")
    other.add_argument("--usd_per_million_input", type=float, default=0.0)
    other.add_argument("--usd_per_million_output", type=float, default=0.0)
    parser.set_defaults(run=_generate)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARD")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--image_root", type=Path, help="of the shards and of the output; default: each file's folder")
    parser.set_defaults(run=_merge)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data_file", type=Path, required=True, help="as --reasoning_data: a file, a folder of parts, a pattern"
    )
    parser.add_argument("--output_report", type=Path, required=True, help="text, or JSON by .json; a page goes beside")
    _add_check_options(parser)
    parser.set_defaults(run=_validate)


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help=".json, .jsonl or .parquet")
    parser.add_argument("--min_quality_score", type=float, required=True, help="from 0 to 1; docs/data.md defines it")
    parser.add_argument("--output", type=Path, required=True, help=".json or .jsonl; the others go beside")
    _add_check_options(parser)
    parser.set_defaults(run=_filter)


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image_root", type="path", help="folder that picture paths are relative to")
    parser.add_argument("--allow_outside", action="store_true", help="pictures outside the data folder")
    parser.add_argument("--max_reasoning_length", type=int, default=512, help="tokens of chain and answer")
    parser.add_argument(
        "--model", type="path", default=TrainConfig.model, help="preset that will train on it: how much it reads"
    )
    parser.add_argument(
        "--tokenizer", type="path", help="folder of the tokenizer that counts; default: the one a run would use"
    )
    parser.add_argument("--workers", type=int, help="processes that check; default: one per core")


def _add_augment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="JSON, JSONL or Parquet file of reasoning records")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON or JSONL; the report goes beside it")
    parser.add_argument("--target_samples", type=int, default=50_000, help="records in all, the given ones included")
    parser.add_argument("--validate_reasoning", action="store_true", default=True, help="check every chain (default)")
    parser.add_argument("--no_validate_reasoning", action="store_false", dest="validate_reasoning")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_augment)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from embervlm.curate.convert import CONVERTERS

    parser.add_argument("--from", dest="source", required=True, choices=tuple(CONVERTERS), help="format of the input")
    parser.add_argument("--input", type=Path, required=True, help="JSON, JSONL or Parquet file")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON or JSONL, in the unified spelling")
    parser.add_argument(
        "--image_root", type=Path, help="what picture paths are relative to; default: the input's folder"
    )
    parser.add_argument("--skip_bad", action="store_true", help="write the rest; list the skipped in a file beside")
    parser.add_argument("--allow_outside", action="store_true", help="pictures outside the image root")
    parser.set_defaults(run=_convert)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=int, default=4, choices=(3, 4))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--reasoning_metrics", nargs="+", default=["all"])
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--save_reasoning_samples", action="store_true", help="write the chains beside the output file")
    parser.add_argument("--explain_samples", type=int, default=200, help="chains saved with attention and step scores")
    parser.add_argument(
        "--faithfulness_samples",
        type=int,
        default=200,
        help="records of which to ask whether the answer comes from the chain; 0 leaves it out",
    )
    parser.add_argument("--num_samples", type=int, help="at most this many records of the split")
    _add_eval_data(parser)
    parser.add_argument("--no_comparisons", action="store_true", help="only the chains: no baselines, no other picture")
    parser.add_argument("--wandb_project", help="W&B project for numbers and figures; default: the training's")
    parser.add_argument("--no_wandb", action="store_true", help="send nothing there")
    _add_judges(parser)
    _add_decoding(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.set_defaults(run=_evaluate)


def _add_eval_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reasoning_data", type="path", help="default: what the checkpoint was trained on")
    parser.add_argument("--image_root", type="path", help="folder that picture paths are relative to")
    parser.add_argument("--allow_outside", action="store_true", default=None, help="pictures outside the data folder")


def _add_try(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--num_samples", type=int, default=10)
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--visualize", action="store_true", help="also draw where the model looked at each step")
    parser.add_argument("--output_dir", type=Path, help="for what is drawn; default: evals/samples in the checkpoint")
    _add_eval_data(parser)
    _add_decoding(parser)
    parser.set_defaults(run=_try)


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--test_set", type=Path, required=True, help="file of records; all of them are asked")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_samples", type=int, help="at most this many records")
    parser.add_argument("--explain_samples", type=int, default=200, help="chains saved with attention and step scores")
    parser.add_argument("--faithfulness_samples", type=int, default=200, help="as in evaluate; 0 leaves it out")
    _add_eval_data(parser)
    _add_decoding(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=_analyze)


def _add_transition(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase1_checkpoint", type=Path, required=True)
    parser.add_argument("--phase2_checkpoint", type=Path, required=True)
    parser.add_argument("--start_checkpoint", type=Path, help="where phase 1 started; default: what the run recorded")
    parser.set_defaults(run=_check_transition)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_reasoning_steps",
        type=int,
        help="most steps, the conclusion included; default: what the checkpoint's training data needed, with a margin",
    )
    parser.add_argument("--max_new_tokens", type=int, help="most tokens that are written; default: likewise")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _decoding(args: argparse.Namespace) -> Decoding:
    from embervlm.model.generation import Decoding

    return Decoding(
        max_reasoning_steps=args.max_reasoning_steps,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="--output_dir of the training")
    parser.add_argument(
        "--results",
        type=Path,
        help="evaluation to show; default: RUN_DIR/results/"
        "stage4_eval.json, else the newest of the test split that a checkpoint carries",
    )
    parser.add_argument("--num_samples", type=int, default=200, help="samples that the page shows")
    parser.add_argument("--wandb", action="store_true", help="also add the figures to the run's W&B run")
    parser.set_defaults(run=_report)


def _add_score_chains(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE.jsonl", help="{steps, answer, gold_answer?, instruction?, facts?}"
    )
    parser.add_argument("--output_file", type=Path, help="JSONL: the same lines with their scores")
    parser.add_argument("--json", action="store_true", help="print the lines with their scores, and nothing else")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="training chains (lines as these, or a data set) to fit on: "
        "rarity of words, usual order, values of facts; default: nothing is fitted",
    )
    _add_judges(parser)
    parser.set_defaults(run=_score_chains)


def _add_judges(parser: argparse.ArgumentParser) -> None:
    backend = "who judges the chains: embedded, or a Hugging Face id or local folder of"
    parser.add_argument(
        "--similarity", type="path", default="embedded", help=f"{backend} a sentence-transformers model"
    )
    parser.add_argument("--entailment", type="path", default="embedded", help=f"{backend} an NLI cross-encoder")


def _add_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--smoke", action="store_true", help="the same path in under a minute; figures mean nothing")
    parser.add_argument("--input_dataset", type=Path, help="start from tasks of others, such as robot_selection.json")
    parser.set_defaults(run=_quickstart)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_cluster)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type="path", required=True, help="recipe in configs/cluster/, or a YAML")
    parser.add_argument("--model", type="path", help="preset in configs/model/, or a YAML; default: the run's")
    parser.add_argument("--config", type="path", help="the run's YAML; default: configs/training_stages.yaml")
    parser.add_argument(
        "--records", type=int, help="records of all splits together; default: target_samples, or 50,000"
    )
    parser.add_argument("--question_tokens", type=int, help="tokens of a question; default: 128")
    parser.add_argument("--chain_tokens", type=int, help="tokens of chain and answer; default: max_reasoning_length")
    parser.add_argument(
        "--utilisation", type=float, help="share of the GPU's rated speed that is reached; see the plan's assumptions"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from embervlm.run.plan import run_plan

    run_plan(
        cluster=args.cluster,
        model=args.model,
        config=args.config,
        records=args.records,
        question_tokens=args.question_tokens,
        chain_tokens=args.chain_tokens,
        utilisation=args.utilisation,
        as_json=args.json,
    )


def _describe(args: argparse.Namespace) -> None:
    from embervlm.model.embervlm import build_model

    model = build_model(model_preset(args.model), load_pretrained=False)
    parts = model.parameter_counts()
    total = sum(parts.values())
    phase1 = total - sum(parts[name] for name in BACKBONE)
    report = {
        "model": args.model,
        "components": parts,
        "total": total,
        "trainable": {"phase1": phase1, "phase2": total},
        "visual_tokens": model.num_visual_tokens,
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for name, count in parts.items():
        print(f"{name:<16} {count:>12,}  {count / total:6.1%}")
    print(f"{'total':<16} {total:>12,}")
    print(f"trainable in phase 1: {phase1:,} ({phase1 / total:.1%}), in phase 2: {total:,} (100.0%)")
    print(f"visual tokens: {model.num_visual_tokens}")


def _generate(args: argparse.Namespace) -> None:
    common = {name: getattr(args, name) for name in ("input_dataset", "output_file", "num_samples", "shard")}
    if args.num_samples is None and (args.source != "teacher" or args.teacher_model != "rules"):
        from embervlm.curate.commands import DEFAULT_SAMPLES

        common["num_samples"] = DEFAULT_SAMPLES
    if args.source == "self":
        from embervlm.evaluation.self_generated import SelfGeneration, generate_by_itself

        settings = SelfGeneration(
            checkpoint=args.checkpoint,
            seed=args.seed,
            max_reasoning_steps=args.max_reasoning_steps,
            samples_per_record=4 if args.samples_per_record is None else args.samples_per_record,
            temperature=0.8 if args.temperature is None else args.temperature,
        )
        return generate_by_itself(settings, image_root=args.image_root, **common)
    if args.source == "human":
        from embervlm.curate.commands import convert_annotations

        return convert_annotations(image_root=args.image_root, **common)
    if args.teacher_model != "rules":
        from dataclasses import fields

        from embervlm.curate.commands import generate_by_teacher
        from embervlm.curate.teachers.endpoint import EndpointConfig

        args.samples_per_record = 1 if args.samples_per_record is None else args.samples_per_record
        endpoint = EndpointConfig(**{field.name: getattr(args, field.name) for field in fields(EndpointConfig)})
        return generate_by_teacher(endpoint, image_root=args.image_root, **common)
    from embervlm.curate.commands import generate

    generate(seed=args.seed, questions_per_picture=args.questions_per_picture, workers=args.workers, **common)


def _merge(args: argparse.Namespace) -> None:
    from embervlm.curate.commands import merge

    merge(shards=args.shards, output_file=args.output_file, image_root=args.image_root)


def _check_options(args: argparse.Namespace) -> CheckOptions:
    """What training with these flags would hold the data against."""
    from embervlm.curate.checking import CheckOptions
    from embervlm.run.plan import empty_model

    settings = model_preset(args.model)
    model, language = empty_model(settings), settings["language"]
    brings_own = language.get("pretrained") or (language.get("name_or_path") and not language.get("config"))
    return CheckOptions(
        image_root=args.image_root,
        allow_outside=args.allow_outside,
        max_reasoning_length=args.max_reasoning_length,
        positions=model.language_model.max_positions,
        num_visual_tokens=model.num_visual_tokens,
        tokenizer=args.tokenizer or (language["name_or_path"] if brings_own else None),
        vocab_size=model.language_model.vocab_size,
        workers=args.workers,
    )


def _validate(args: argparse.Namespace) -> None:
    from embervlm.curate.validate import validate
    from embervlm.report.validation import summary, write_reports

    with tempfile.TemporaryDirectory() as unpack_dir:
        report = validate(args.data_file, dataclasses.replace(_check_options(args), unpack_dir=unpack_dir))
        page = write_reports(report, args.output_report)
    print(f"{summary(report)}\n{args.output_report}, {page}")
    if not report["trains"]:
        sys.exit(1)


def _filter(args: argparse.Namespace) -> None:
    from embervlm.curate.quality import filter_file, rejected_path

    options = dataclasses.replace(_check_options(args), open_pictures=False)
    kept, rejected = filter_file(
        args.input, output=args.output, min_quality_score=args.min_quality_score, options=options
    )
    print(f"{kept:,} records kept in {args.output}, {rejected:,} others with reasons in {rejected_path(args.output)}")
    if args.output.resolve().parent != (root := Path(args.image_root or args.input.parent)).resolve():
        print(f"their pictures lie where they were: read {args.output} with --image_root {root}")


def _augment(args: argparse.Namespace) -> None:
    from embervlm.curate.augment import augment_file

    augment_file(
        args.input,
        args.output_file,
        target_samples=args.target_samples,
        validate_reasoning=args.validate_reasoning,
        seed=args.seed,
    )


def _convert(args: argparse.Namespace) -> None:
    from embervlm.curate.convert import convert_file, summary

    made = convert_file(
        args.input,
        args.output_file,
        source=args.source,
        image_root=args.image_root,
        skip_bad=args.skip_bad,
        allow_outside=args.allow_outside,
    )
    print(summary(made, args.output_file))


def _evaluate(args: argparse.Namespace) -> None:
    from embervlm.run.evaluate import evaluate_to_file, evaluating_processes, print_result

    with evaluating_processes(args.local_rank) as world:
        result = evaluate_to_file(
            args.checkpoint,
            split=args.split,
            output_file=args.output_file,
            save_samples=args.save_reasoning_samples,
            explain_samples=args.explain_samples,
            faithfulness_samples=args.faithfulness_samples,
            reasoning_metrics=tuple(args.reasoning_metrics),
            num_samples=args.num_samples,
            reasoning_data=args.reasoning_data,
            image_root=args.image_root,
            allow_outside=args.allow_outside,
            decoding=_decoding(args),
            compare=not args.no_comparisons,
            world=world,
            similarity=args.similarity,
            entailment=args.entailment,
        )
        if world.rank == 0:
            print_result(result, args.output_file)
            if not args.no_wandb:
                _send_evaluation(args.checkpoint, result, args.output_file, args.wandb_project)


def _send_evaluation(checkpoint: Path, result: Mapping[str, Any], output_file: Path, project: str | None) -> None:
    """The evaluation's numbers and figures to W&B, where a project is known. What fails there is only said."""
    from tempfile import TemporaryDirectory

    from embervlm.report.figures import write_figures
    from embervlm.report.recorded import evaluation_alone
    from embervlm.run_dir import trained_with
    from embervlm.training.tracking import log_evaluation

    config = trained_with(checkpoint)
    project = project or config.get("wandb_project")
    if not project:
        return
    try:
        with TemporaryDirectory() as folder:
            figures = write_figures(evaluation_alone(output_file), folder)
            sent = log_evaluation(
                checkpoint.absolute().parent, result, figures, project=project, run_name=config.get("wandb_run_name")
            )
        print(f"sent to W&B: project {project}" if sent else "not sent to W&B, which is disabled (WANDB_MODE)")
    except Exception as error:  # drawing and W&B raise what they like
        print(f"not sent to W&B ({type(error).__name__}: {error})")


def _try(args: argparse.Namespace) -> None:
    from embervlm.run.debug import try_reasoning

    output_dir = args.output_dir or args.checkpoint / "evals" / "samples"
    try_reasoning(
        args.checkpoint,
        num_samples=args.num_samples,
        split=args.split,
        decoding=_decoding(args),
        output_dir=output_dir if args.visualize else None,
        reasoning_data=args.reasoning_data,
        image_root=args.image_root,
        allow_outside=args.allow_outside,
    )


def _analyze(args: argparse.Namespace) -> None:
    from embervlm.run.debug import analyze
    from embervlm.run.evaluate import evaluating_processes

    with evaluating_processes(args.local_rank) as world:
        analyze(
            args.checkpoint,
            test_set=args.test_set,
            output_dir=args.output_dir,
            world=world,
            explain_samples=args.explain_samples,
            faithfulness_samples=args.faithfulness_samples,
            num_samples=args.num_samples,
            reasoning_data=args.reasoning_data,
            image_root=args.image_root,
            allow_outside=args.allow_outside,
            decoding=_decoding(args),
        )


def _check_transition(args: argparse.Namespace) -> None:
    from embervlm.run.debug import check_phases

    if not check_phases(args.phase1_checkpoint, args.phase2_checkpoint, args.start_checkpoint):
        sys.exit(1)


def _report(args: argparse.Namespace) -> None:
    from embervlm.report.build import write_report

    report = write_report(args.run_dir, results=args.results, num_samples=args.num_samples)
    for notice in report.notices:
        print(notice)
    if report.result_path is not None:
        print(f"Evaluation: {report.result_path}")
    print(f"Report: {report.index}")
    if args.wandb:
        from embervlm.config import ConfigError
        from embervlm.run_dir import phase_dir
        from embervlm.training.tracking import log_figures, wandb_mode

        if wandb_mode() == "disabled":
            raise ConfigError("--wandb: W&B is disabled (WANDB_MODE); the report is written, and nothing is sent")
        project = report.config.get("wandb_project")
        if not project or not log_figures(
            phase_dir(args.run_dir, 2), report.figures, project=project, run_name=report.config.get("wandb_run_name")
        ):
            raise ConfigError(f"--wandb: {args.run_dir} was trained without --wandb_project, so there is no W&B run")


def _score_chains(args: argparse.Namespace) -> None:
    from embervlm.judge.chain_file import score_file

    score_file(
        args.file,
        output_file=args.output_file,
        as_json=args.json,
        reference=args.reference,
        similarity=args.similarity,
        entailment=args.entailment,
    )


def _quickstart(args: argparse.Namespace) -> None:
    from embervlm.run.quickstart import Quickstart

    Quickstart(output_dir=args.output_dir, smoke=args.smoke, input_dataset=args.input_dataset).run()


def _cluster(args: argparse.Namespace) -> None:
    from embervlm.cluster import check_recipes

    print(check_recipes())


def main(argv: Sequence[str] | None = None) -> None:
    arguments = underscored(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        from embervlm.run.train import main as train

        return train(arguments[1:])
    if arguments[:1] == ["select-best"]:
        from embervlm.select_best import main as select_best

        sys.exit(select_best(arguments[1:]))
    with told_in_one_line():
        args = build_parser().parse_args(arguments)
        args.run(args)


if __name__ == "__main__":
    main()
