"""Every command's help says its defaults and ends with an example; a mistyped word gets a suggestion in one line."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest

from embervlm import cli, select_best
from embervlm.errors import UsageError
from embervlm.run import slurm, submit, train, train_flags
from embervlm.version import __version__


def parsers_of(parser):
    """The parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers_of(inner)


COMMANDS = [
    found
    for found in parsers_of(cli.build_parser())
    if not found.prog.endswith(tuple(f" {name}" for name in cli.PROGRAMS))  # they bring a parser of their own, below
]
PARSERS = [*COMMANDS, train_flags.parser(), submit.parser(), select_best.build_parser(), slurm._parser()]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_help_says_every_default_and_ends_with_an_example(parser):
    text = parser.format_help()
    assert text.rstrip().splitlines()[-1].strip() == parser.example and f"\nexample:\n  {parser.example}\n" in text
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, f"{parser.prog} {action.option_strings or action.dest} has no help"
        if action.option_strings and action.nargs != 0:
            shown = parser._get_formatter()._get_help_string(action)
            says = "default" in shown.lower() or "required" in shown
            assert says or action.default in (None, []), f"{parser.prog} {action.option_strings[0]}: {shown}"


@pytest.mark.parametrize("parser", COMMANDS, ids=lambda parser: parser.prog)
def test_an_example_can_be_parsed(parser):
    program, *words = shlex.split(parser.example)
    assert program == "embervlm"
    cli.build_parser().parse_args(cli.underscored(words))


def test_the_examples_of_the_other_programs_can_be_parsed():
    for parser in (train_flags.parser(), select_best.build_parser()):
        words = shlex.split(parser.example)
        parser.parse_args(words[next(place for place, word in enumerate(words) if word.startswith("--")) :])


def said(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["evalute", "--split", "val"], "no command 'evalute'; did you mean evaluate?"),
        (["data", "convrt"], "embervlm data: no command 'convrt'; did you mean convert?"),
        (["xyzzy"], "no command 'xyzzy' (--help lists the commands)"),
        (["describe", "--modle", "quickstart"], "--modle quickstart; did you mean --model?"),
        (["report", "outputs", "--num-sample5", "3"], "did you mean --num_samples?"),
        (["data", "generate", "--source", "teecher"], "'teecher' is not one of teacher, self, human; did you mean "),
    ],
)
def test_a_mistyped_word_gets_a_suggestion_in_one_line(argv, hint, capsys):
    assert hint in said(argv, capsys)


def test_a_mistyped_flag_of_training_gets_one_too():
    with pytest.raises(UsageError, match="did you mean --phase1_epochs"):
        train_flags.parser().parse_args(["--phase1_epoch", "3"])


@pytest.mark.parametrize(
    ("main", "words"),
    [(select_best.main, []), (train.main, []), (submit.main, ["--cluster", "a100x4"]), (slurm.main, ["output_dir"])],
    ids=lambda value: getattr(value, "__module__", " ".join(value) if isinstance(value, list) else ""),
)
def test_a_wrong_flag_of_every_other_program_is_one_line(main, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--no_such_flag", "3"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    assert "--no_such_flag" in error


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"embervlm {__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "embervlm", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"embervlm {__version__}\n"
