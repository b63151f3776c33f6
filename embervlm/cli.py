"""The `embervlm` command: which function runs a subcommand; its options stand beside that function."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from embervlm.errors import OneLineParser, told_in_one_line

COMMANDS = {
    "describe": ("run.describe", "describe", "sizes of a model preset"),
    "import-checkpoint": (
        "run.import_checkpoint",
        "import_checkpoint",
        "a checkpoint of another family as one that Stage 4 starts from",
    ),
    "data generate": ("run.data", "generate", "chains by a teacher, by the model itself, or by people"),
    "data merge": ("run.data", "merge", "one data set from the shards of a job"),
    "data validate": ("run.data", "validate", "every problem of a data set, and what is in it"),
    "data filter": ("run.data", "filter", "keep the records of at least a quality"),
    "data augment": ("run.data", "augment", "more chains from those of a file, each checked, none twice"),
    "data convert": ("run.data", "convert", "other formats to the unified spelling"),
    "evaluate": ("run.evaluate", "evaluate", "metrics of a checkpoint on a split"),
    "test-reasoning": ("run.debug", "try_reasoning", "a few chains of a checkpoint, and whether it reasons"),
    "analyze": ("run.debug", "analyze", "what a checkpoint does well and badly on a test set"),
    "check-transition": ("run.debug", "check_phases", "what moved at the switch from phase 1 to phase 2"),
    "score-chains": ("run.score_chains", "score_chains", "metrics of chains from any model, with reasons"),
    "report": ("run.report", "report", "figures and pages of a run, from its recorded files"),
    "plan": ("run.plan", "plan", "memory, steps and time of a run, before anything is booked"),
    "quickstart": ("run.quickstart", "quickstart", "the newcomer's run, from data to evaluation"),
    "cluster": ("cluster", "cluster", "node recipes for Slurm and the global batch of each"),
}
"""Subcommand -> module in `embervlm`, function in it, help. `<function>_options(parser)` adds the flags, by whose names
the function is called."""
PROGRAMS = {
    "train": ("run.train", "same as launch/train.py"),
    "select-best": ("select_best", "same as python -m embervlm.select_best"),
}
"""Subcommands with a command line of their own, read by `main` of the module."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = underscored(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in PROGRAMS:
        module, _ = PROGRAMS[arguments[0]]
        sys.exit(import_module(f"embervlm.{module}").main(arguments[1:]))
    with told_in_one_line():
        args = build_parser(" ".join(arguments[:2])).parse_args(arguments)
        args.run(**{name: value for name, value in vars(args).items() if name not in ("run", "command", "action")})


def build_parser(asked: str | None = None) -> OneLineParser:
    """The parser of every subcommand; given the words that were `asked`, only theirs is filled in.

    That way a subcommand imports its own libraries and no others.
    """
    parser = OneLineParser(prog="embervlm", description="Train and use a vision-language model that reasons.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    data = commands.add_parser("data", help="make reasoning data").add_subparsers(required=True, dest="action")
    for words, (module, function, text) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        command = (data if group else commands).add_parser(name, help=text)
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
    main()
