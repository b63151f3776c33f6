"""The `embervlm` command. Nothing heavy is imported before the subcommand is known."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from embervlm.config import BACKBONE, model_preset


def underscored(argv: Sequence[str]) -> list[str]:
    """`--num-samples` as the guide spells it, `--num_samples`."""
    out = []
    for item in argv:
        name, equals, value = item.partition("=")
        out.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if item.startswith("--") else item)
    return out


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="embervlm", description="Train and use a vision-language model that reasons.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_describe(commands.add_parser("describe", help="sizes of a model preset"))
    data = commands.add_parser("data", help="make reasoning data").add_subparsers(dest="action", required=True)
    _add_generate(data.add_parser("generate", help="scenes, questions and chains by the rule teacher"))
    _add_validate(data.add_parser("validate", help="every problem of a data set, and what is in it"))
    _add_filter(data.add_parser("filter", help="keep the records of at least a quality"))
    _add_evaluate(commands.add_parser("evaluate", help="metrics of a checkpoint on a split"))
    _add_quickstart(commands.add_parser("quickstart", help="the newcomer's run, from data to evaluation"))
    commands.add_parser("train", help="same as launch/train.py", add_help=False)
    commands.add_parser("select-best", help="same as python -m embervlm.select_best", add_help=False)
    return parser


def _add_describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="preset in configs/model/, or a YAML")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_describe)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher_model", default="rules", help="rules is the embedded teacher")
    parser.add_argument("--input_dataset", type=Path, help="tasks to make scenes for; none: the embedded questions")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON or JSONL; pictures go to images/ beside")
    parser.add_argument("--num_samples", type=int, default=50_000)
    parser.add_argument("--questions_per_picture", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that draw; default: one per core")
    parser.set_defaults(run=_generate)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_file", type=Path, required=True, help=".json, .jsonl or .parquet")
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
    parser.add_argument("--image_root", help="folder that picture paths are relative to")
    parser.add_argument("--allow_outside", action="store_true", help="pictures outside the data folder")
    parser.add_argument("--max_reasoning_length", type=int, default=512, help="tokens of chain and answer")
    parser.add_argument("--tokenizer", help="folder of the tokenizer that counts them; default: an estimate")
    parser.add_argument("--workers", type=int, help="processes that check; default: one per core")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=int, default=4, choices=(3, 4))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--reasoning_metrics", nargs="+", default=["all"])
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--save_reasoning_samples", action="store_true", help="write the chains beside the output file")
    parser.add_argument("--num_samples", type=int, help="at most this many records of the split")
    parser.add_argument("--reasoning_data", help="default: what the checkpoint was trained on")
    parser.add_argument("--image_root")
    parser.add_argument("--max_reasoning_steps", type=int, default=10)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_evaluate)


def _add_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--smoke", action="store_true", help="the same path in a minute or two; figures mean nothing")
    parser.add_argument("--input_dataset", type=Path, help="start from tasks of others, such as robot_selection.json")
    parser.set_defaults(run=_quickstart)


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
    from embervlm.data.commands import generate

    options = {key: value for key, value in vars(args).items() if key not in ("command", "action", "run")}
    generate(**options)


def _validate(args: argparse.Namespace) -> None:
    from embervlm.data.checking import CheckOptions
    from embervlm.data.validate import validate
    from embervlm.report.validation import summary, write_reports

    options = CheckOptions(
        image_root=args.image_root, allow_outside=args.allow_outside, max_reasoning_length=args.max_reasoning_length,
        tokenizer=args.tokenizer, workers=args.workers,
    )  # fmt: skip
    report = validate(args.data_file, options)
    page = write_reports(report, args.output_report)
    print(f"{summary(report)}\n{args.output_report}, {page}")
    if not report["trains"]:
        sys.exit(1)


def _filter(args: argparse.Namespace) -> None:
    from embervlm.data.checking import CheckOptions
    from embervlm.data.quality import filter_file, rejected_path

    options = CheckOptions(
        image_root=args.image_root, allow_outside=args.allow_outside, max_reasoning_length=args.max_reasoning_length,
        tokenizer=args.tokenizer, workers=args.workers, open_pictures=False,
    )  # fmt: skip
    kept, rejected = filter_file(
        args.input, output=args.output, min_quality_score=args.min_quality_score, options=options
    )  # fmt: skip
    print(f"{kept:,} records kept in {args.output}, {rejected:,} others with reasons in {rejected_path(args.output)}")
    if args.output.resolve().parent != (root := Path(args.image_root or args.input.parent)).resolve():
        print(f"their pictures lie where they were: read {args.output} with --image_root {root}")


def _evaluate(args: argparse.Namespace) -> None:
    from embervlm.evaluation.commands import evaluate_to_file, print_result
    from embervlm.model.generation import Decoding

    decoding = Decoding(
        max_reasoning_steps=args.max_reasoning_steps, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    result = evaluate_to_file(
        args.checkpoint, split=args.split, output_file=args.output_file, save_samples=args.save_reasoning_samples,
        reasoning_metrics=tuple(args.reasoning_metrics), num_samples=args.num_samples,
        reasoning_data=args.reasoning_data, image_root=args.image_root, decoding=decoding,
    )  # fmt: skip
    print_result(result, args.output_file)


def _quickstart(args: argparse.Namespace) -> None:
    from embervlm.quickstart import Quickstart

    Quickstart(output_dir=args.output_dir, smoke=args.smoke, input_dataset=args.input_dataset).run()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = underscored(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        from embervlm.training.cli import main as train

        return train(arguments[1:])
    if arguments[:1] == ["select-best"]:
        from embervlm.select_best import main as select_best

        sys.exit(select_best(arguments[1:]))
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except ValueError as error:  # every error of ours that a user can mend is one
        if type(error) is ValueError:
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
