"""The `embervlm` command: which function runs each subcommand. The options are defined beside that function."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from embervlm.errors import OneLineParser, told_in_one_line
from embervlm.signals import end_after
from embervlm.version import __version__

COMMANDS = {
    "describe": (
        "run.describe",
        "describe",
        "show the sizes of a model preset",
        "embervlm describe --model quickstart",
    ),
    "import-checkpoint": (
        "run.import_checkpoint",
        "import_checkpoint",
        "make a Stage 4 starting checkpoint from another model family",
        "embervlm import-checkpoint HuggingFaceTB/SmolVLM-256M-Instruct outputs/start",
    ),
    "new-checkpoint": (
        "run.new_checkpoint",
        "new_checkpoint",
        "put a vision encoder and a language model together, without training",
        "embervlm new-checkpoint google/vit-base-patch16-224 HuggingFaceTB/SmolLM2-135M outputs/start",
    ),
    "export": (
        "run.export",
        "export",
        "write a checkpoint for the Auto classes of transformers, in int8, or for onnxruntime",
        "embervlm export outputs/stage4/phase2/checkpoint-final exported --format int8",
    ),
    "ask": (
        "run.ask",
        "ask",
        "ask a checkpoint a question about a picture",
        "embervlm ask picture.jpg 'Which robots can carry the load to the flag?' --chains 5",
    ),
    "chat": (
        "run.chat",
        "chat",
        "ask about a picture, then follow up, in a loop",
        "embervlm chat picture.jpg --checkpoint outputs/stage4/phase2/checkpoint-final",
    ),
    "serve": (
        "run.serve",
        "serve",
        "answer OpenAI's chat completions at a port, with a page to ask from",
        "embervlm serve --checkpoint outputs/stage4/phase2/checkpoint-final --port 8000",
    ),
    "data generate": (
        "run.data",
        "generate",
        "write chains with a teacher or the model itself, or import people's",
        "embervlm data generate --teacher_model rules --output_file data/reasoning_data.json --num_samples 5000",
    ),
    "data merge": (
        "run.data",
        "merge",
        "join the shards of a job into one data set",
        "embervlm data merge data/part-0.jsonl data/part-1.jsonl --output_file data/reasoning_data.json",
    ),
    "data validate": (
        "run.data",
        "validate",
        "list every problem of a data set, and count its contents",
        "embervlm data validate --data_file data/reasoning_data.json --output_report data/report.txt",
    ),
    "data filter": (
        "run.data",
        "filter",
        "keep the records above a quality threshold",
        "embervlm data filter --input data/reasoning_data.json --min_quality_score 0.8 --output data/good.json",
    ),
    "data augment": (
        "run.data",
        "augment",
        "make more chains from a file; each is checked, no duplicates",
        "embervlm data augment --input data/reasoning_data.json --output_file data/more.json --target_samples 5000",
    ),
    "data convert": (
        "run.data",
        "convert",
        "convert other formats to the unified format",
        "embervlm data convert --from scienceqa --input scienceqa/ --output_file data/reasoning_data.json",
    ),
    "evaluate": (
        "run.evaluate",
        "evaluate",
        "compute the metrics of a checkpoint on a split",
        "embervlm evaluate --checkpoint outputs/stage4/phase2/checkpoint-final --output_file results/eval.json",
    ),
    "test-reasoning": (
        "run.debug",
        "try_reasoning",
        "show a few chains of a checkpoint and whether it reasons",
        "embervlm test-reasoning --checkpoint outputs/stage4/phase2/checkpoint-final --visualize",
    ),
    "analyze": (
        "run.debug",
        "analyze",
        "show what a checkpoint does well and badly on a test set",
        "embervlm analyze --checkpoint outputs/stage4/phase2/checkpoint-final --test_set test.json --output_dir out",
    ),
    "check-transition": (
        "run.debug",
        "check_phases",
        "show what changed from phase 1 to phase 2",
        "embervlm check-transition --phase1_checkpoint phase1/checkpoint-final --phase2_checkpoint phase2/checkpoint-9",
    ),
    "score-chains": (
        "run.score_chains",
        "score_chains",
        "score chains from any model, with reasons",
        "embervlm score-chains chains.jsonl --output_file scored.jsonl",
    ),
    "report": (
        "run.report",
        "report",
        "make figures and pages of a run from its recorded files",
        "embervlm report outputs",
    ),
    "plan": (
        "run.plan",
        "plan",
        "estimate memory, steps and time of a run in advance",
        "embervlm plan --cluster a100x4",
    ),
    "quickstart": (
        "run.quickstart",
        "quickstart",
        "do a small complete run, from data to evaluation",
        "embervlm quickstart --smoke",
    ),
    "cluster": ("cluster", "cluster", "list the node recipes for Slurm and their global batches", "embervlm cluster"),
}
"""Subcommand -> module in `embervlm`, function in it, help, example. `<function>_options(parser)` adds the flags, by
whose names the function is called."""
PROGRAMS = {
    "train": ("run.train", "same as launch/train.py"),
    "select-best": ("select_best", "same as python -m embervlm.select_best"),
}
"""Subcommands with their own command line, which `main` of the module reads."""


def program() -> None:
    """What the installed command runs."""
    end_after(main)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = underscored(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in PROGRAMS:
        module, _ = PROGRAMS[arguments[0]]
        sys.exit(import_module(f"embervlm.{module}").main(arguments[1:]))
    with told_in_one_line():
        args = build_parser(" ".join(arguments[:2])).parse_args(arguments)
        args.run(**{name: value for name, value in vars(args).items() if name not in ("run", "command", "action")})


def build_parser(asked: str | None = None) -> OneLineParser:
    """The parser of every subcommand; with `asked`, only the subcommand with these words gets its flags.

    So a subcommand imports only the libraries that it needs.
    """
    parser = OneLineParser(
        prog="embervlm",
        description="Train and use a vision-language model that reasons.",
        example='embervlm ask picture.jpg "Which robots can carry the load to the flag?"',
    )
    parser.add_argument("--version", action="version", version=f"embervlm {__version__}", help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    data_example = COMMANDS["data generate"][-1]
    data = commands.add_parser("data", help="make reasoning data", example=data_example).add_subparsers(
        required=True, dest="action", metavar="ACTION"
    )
    for words, (module, function, text, example) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        command = (data if group else commands).add_parser(name, help=text, description=text, example=example)
        if asked is None or f"{asked} ".startswith(f"{words} "):
            found = import_module(f"embervlm.{module}")
            getattr(found, f"{function}_options")(command)
            command.set_defaults(run=getattr(found, function))
    for name, (_, text) in PROGRAMS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def underscored(argv: Sequence[str]) -> list[str]:
    """`--num-samples` as the guide spells it, `--num_samples`."""
    out = []
    for item in argv:
        name, equals, value = item.partition("=")
        out.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if item.startswith("--") else item)
    return out


if __name__ == "__main__":
    program()
