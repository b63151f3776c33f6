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
    _add_evaluate(commands.add_parser("evaluate", help="metrics of a checkpoint on a split"))
    _add_plan(commands.add_parser("plan", help="memory, steps and time of a run, before anything is booked"))
    _add_quickstart(commands.add_parser("quickstart", help="the newcomer's run, from data to evaluation"))
    _add_cluster(commands.add_parser("cluster", help="node recipes for Slurm and the global batch of each"))
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


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", required=True, help="recipe in configs/cluster/, or a YAML")
    parser.add_argument("--model", help="preset in configs/model/, or a YAML; default: the run's")
    parser.add_argument("--config", help="the run's YAML; default: configs/training_stages.yaml")
    parser.add_argument("--records", type=int, help="records of all splits together; default: target_samples")
    parser.add_argument("--question_tokens", type=int, help="tokens of a question; default: the most that count")
    parser.add_argument("--chain_tokens", type=int, help="tokens of chain and answer; default: max_reasoning_length")
    parser.add_argument(
        "--utilisation", type=float, help="share of the GPU's rated speed that is reached; see the plan's assumptions"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from embervlm.plan import run_plan

    run_plan(
        cluster=args.cluster, model=args.model, config=args.config, records=args.records,
        question_tokens=args.question_tokens, chain_tokens=args.chain_tokens, utilisation=args.utilisation,
        as_json=args.json,
    )  # fmt: skip


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="an error where they differ; it is always looked at")
    parser.set_defaults(run=_cluster)


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


def _cluster(args: argparse.Namespace) -> None:
    from embervlm.cluster import check_recipes

    print(check_recipes())


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
