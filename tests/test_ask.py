"""`embervlm ask` and `embervlm chat`, on a terminal and off one."""

import builtins
import os
import re
import sys
import webbrowser
from pathlib import Path

import pytest

from embervlm import run_dir
from embervlm.cli import main
from embervlm.errors import UserError
from embervlm.evaluation.known import KnownData, fit_known
from embervlm.model.known import UNLIKE_QUESTION
from embervlm.ranking import checkpoint_to_use
from embervlm.run.ask import HOW_TO_HEAR_IT, answer_lines
from embervlm.run.terminal import Style

QUESTION = "Which robots are suited?"
SHORT = ["--max_new_tokens", "40", "--temperature", "1.5"]


@pytest.fixture
def outputs(lively_model, tmp_path, monkeypatch):
    """A folder with the checkpoints of a run in outputs/, which is the current one."""
    monkeypatch.chdir(tmp_path)
    save(lively_model, run_dir.phase_dir("outputs/mine", 2), 3)
    return Path("outputs")


def save(model, phase, step):
    part = run_dir.new_tmp_dir(phase)
    model.save_pretrained(part)
    return run_dir.publish_checkpoint(part, run_dir.checkpoint_path(phase, step), step)


def empty_checkpoint(phase, step, **scores):
    """One that only the choice looks at; with `scores` it has been evaluated."""
    part = run_dir.new_tmp_dir(phase)
    (part / "weights").write_text("none")
    path = run_dir.publish_checkpoint(part, run_dir.checkpoint_path(phase, step), step or 9)
    if scores:
        run_dir.write_json_atomic(run_dir.eval_path(path, "val"), {"metrics": scores})
    return path


def test_a_question_gets_its_chain_as_it_is_written_and_an_answer(outputs, records, capsys):
    main(["ask", records[0].image, QUESTION, *SHORT])
    said = capsys.readouterr()
    assert said.err == (
        "asking outputs/mine/stage4/phase2/checkpoint-3, of the newest run in outputs/ (--checkpoint names another)\n"
    )
    assert re.search(r"(?m)^Answer: ", said.out) and re.search(r"(?m)^Confidence: \d+%$", said.out)
    assert said.out.startswith("Step 1: ") and "\x1b" not in said.out


def test_several_chains_are_drawn_and_the_votes_are_shown(outputs, capsys):
    main(["ask", "-", QUESTION, "--chains", "3", *SHORT])
    assert re.search(r"(?m)^Votes: .+ of 3 chains$", capsys.readouterr().out)
    found = {"answer": "A, B", "confidence": 0.5, "num_chains": 3, "votes": {"A, B": 2, "A": 0.25}}
    assert answer_lines(found, Style(sys.stdout))[-1] == "Votes: A, B: 2; A: 0.25 of 3 chains"
    refused = {"answer": None, "why": "There is no picture.", "confidence": 0.0}
    assert answer_lines(refused, Style(sys.stdout))[0] == "Answer: none. There is no picture."


def test_the_page_shows_the_picture_and_where_the_model_looked(outputs, records, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    main(["ask", records[0].image, QUESTION, "--open", *SHORT])
    page = Path(re.search(r"Page: (.*)", capsys.readouterr().out)[1])
    try:
        text = page.read_text(encoding="utf-8")
        assert opened == [page.as_uri()]
        assert "data:image/jpeg;base64," in text and "data:image/png;base64," in text and QUESTION in text
        assert "Right answer" not in text and "answer wrong" not in text
    finally:
        page.unlink()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ask", "nowhere.jpg", QUESTION], "nowhere.jpg: no such picture; give a picture file, or - "),
        (["ask", "outputs", QUESTION], "outputs: is a folder; give a picture file, or - "),
        (["ask", "-", " "], "the question is empty"),
        (["ask", "-", QUESTION, "--checkpoint", "nowhere/else"], "nowhere"),
        (["ask", "-", QUESTION, "--checkpoint", "outputs"], "give a checkpoint folder such as outputs/"),
        (["chat", "nowhere.jpg"], "nowhere.jpg: no such picture"),
    ],
)
def test_a_mistake_is_one_line(outputs, argv, said):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert str(ended.value.code).startswith("error: ") and said in str(ended.value.code)
    assert "\n" not in str(ended.value.code)


def test_without_any_checkpoint_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: outputs: no complete checkpoint in it; .*make quickstart"):
        main(["ask", "-", QUESTION])


def test_the_checkpoint_to_use_is_of_the_newest_run_and_the_best_of_its_last_stage(tmp_path):
    first = empty_checkpoint(tmp_path / "one" / "stage4" / "phase2", None)
    assert checkpoint_to_use(tmp_path) == checkpoint_to_use(tmp_path / "one") == first
    second = empty_checkpoint(tmp_path / "two" / "stage3", None)
    os.utime(second / run_dir.COMPLETE, (2e9, 2e9))
    assert checkpoint_to_use(tmp_path) == second
    good = {"final_answer_accuracy": 0.9, "reasoning_consistency": 0.9}
    best = empty_checkpoint(tmp_path / "two" / "stage4" / "phase1", 3, **good)
    empty_checkpoint(tmp_path / "two" / "stage4" / "phase1", 6, **{**good, "reasoning_consistency": 0.5})
    assert checkpoint_to_use(tmp_path) == best
    last = empty_checkpoint(tmp_path / "two" / "stage4" / "phase2", 4)
    assert checkpoint_to_use(tmp_path) == last
    with pytest.raises(UserError):
        checkpoint_to_use(tmp_path / "three")


class Terminal:
    def __init__(self, out):
        self.write, self.flush = out.write, out.flush

    def isatty(self):
        return True


def test_colours_are_for_terminals_that_want_them(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Style(Terminal(sys.stdout)).bold("a") == "\x1b[1ma\x1b[0m" and Style(sys.stdout).bold("a") == "a"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Style(Terminal(sys.stdout)).bold("a") == "a"


def talk(monkeypatch, *lines):
    """Type these lines, then Ctrl-D."""
    typed = iter(lines)

    def read(prompt=""):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def test_a_chat_follows_up_until_another_picture(outputs, records, capsys, monkeypatch):
    from embervlm.model.embervlm import EmberVLM

    asked, reason = [], EmberVLM.reason

    def noted(self, image, question, previous_reasoning=None, **settings):
        asked.append((image, question, previous_reasoning and previous_reasoning.question))
        return reason(self, image, question, previous_reasoning, **settings)

    monkeypatch.setattr(EmberVLM, "reason", noted)
    one, other = records[0].image, records[-1].image
    talk(monkeypatch, "First?", "", "Second?", f"/picture {other}", "Third?", "/new", "Fourth?", "/what", "/picture no")
    main(["chat", one, *SHORT])
    assert asked == [
        (one, "First?", None),
        (one, "Second?", "First?"),
        (other, "Third?", None),
        (other, "Fourth?", None),
    ]
    said = capsys.readouterr().out
    assert said.count("Answer: ") == 4 and said.count("/quit") == 2 and "no: no such picture" in said
    assert f"looking at {other}\n" in said


def test_a_refused_question_gets_its_reason_and_no_chain_unless_that_is_asked_for(
    outputs, lively_model, records, capsys, monkeypatch
):
    known = fit_known(lively_model, KnownData.of(records, (records * 20)[:40]))
    known.save(run_dir.checkpoint_path(run_dir.phase_dir("outputs/mine", 2), 3))
    long = ["--max_new_tokens", "200", "--temperature", "1.5"]
    main(["ask", records[0].image, "What is 2+2?", *long])
    said = capsys.readouterr().out
    assert said.startswith(f"Answer: none. {UNLIKE_QUESTION}\n") and said.endswith(f"{HOW_TO_HEAR_IT}\n")
    main(["ask", records[0].image, "What is 2+2?", *long, "--min_known", "0"])
    said = capsys.readouterr().out
    assert said.startswith("Step 1: ") and HOW_TO_HEAR_IT not in said
    talk(monkeypatch, "What is 2+2?", "/new", records[0].instruction)
    main(["chat", records[0].image, *long])
    off, asked = capsys.readouterr().out.split(HOW_TO_HEAR_IT)
    assert "Step 1: " not in off and UNLIKE_QUESTION in off and "Step 1: " in asked


def test_quit_ends_a_chat(outputs, capsys, monkeypatch):
    talk(monkeypatch, "/quit", "Never?")
    main(["chat", "-"])
    assert "Answer" not in capsys.readouterr().out
