"""What a training prints: what it is going to do, how far it is, and when it will end."""

import io
import sys
import time

import pytest

from embervlm import progress
from embervlm.config import PhaseConfig
from embervlm.config_lora import LoraConfig
from embervlm.model.lora import add_adapters
from embervlm.training.summary import duration, expected_end, saved_line, trained_parts


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_on(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0)
    with progress.progress_bar(total=3, desc="phase 1", unit="step") as bar:
        for step in (1, 2, 3):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_log_file_gets_lines_and_a_terminal_a_bar(monkeypatch):
    lines = shown_on(io.StringIO(), monkeypatch)
    assert "\r" not in lines and "\x1b" not in lines
    assert sorted({line.split(" ")[2] for line in lines.splitlines()}) == ["1/3", "2/3", "3/3"]
    assert lines.splitlines()[-1].endswith(", loss 3]")
    assert "\r" in shown_on(Terminal(), monkeypatch)


def test_a_note_stands_on_a_line_of_its_own(monkeypatch, capsys):
    with progress.progress_bar(total=2):
        progress.note("saved x")
    assert capsys.readouterr().out == "saved x\n"


def test_frozen_parts_do_not_count_as_trained(tiny_model):
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in tiny_model.named_children()}
    total, heads = sum(counts.values()), counts["reasoning_module"]
    tiny_model.freeze(("vision_encoder", "projection", "language_model"))
    only_heads = PhaseConfig(name="a", learning_rate=1, freeze_backbone=True).multipliers
    said = trained_parts(tiny_model, only_heads)
    assert said == f"{heads:,} ({heads / total:.1%}): reasoning_module {heads:,}"
    tiny_model.freeze(())
    slow = {**dict.fromkeys(counts, 1.0), "vision_encoder": 0.1, "reasoning_module": 0.0}
    said = trained_parts(tiny_model, slow)
    assert f"vision_encoder {counts['vision_encoder']:,} at 0.1 x the rate" in said and "reasoning_module" not in said


def test_adapters_are_named_apart(tiny_model):
    add_adapters(tiny_model, {"language_model": LoraConfig(rank=2)})
    tiny_model.freeze(())
    said = trained_parts(tiny_model, dict.fromkeys(dict(tiny_model.named_children()), 1.0))
    assert "language_model adapters " in said and "language_model 1" not in said.replace(" adapters", "")


def test_the_end_is_said_once_the_rate_is_known(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    assert expected_end("phase 1", 4, 60, 100) is None and expected_end("phase 1", 100, 10, 100) is None
    assert expected_end("phase 1", 100, 50, 0) is None
    at = time.strftime("%H:%M", time.localtime(1_000_000_000 + 300))
    said = expected_end("phase 1", 100, 50, 600)
    assert said == f"phase 1: 5 min to go at 2 steps a second, so it ends at about {at}"
    at_plateau = expected_end("phase 1", 100, 50, 600, at_plateau=True)
    assert at_plateau is not None and at_plateau.startswith("phase 1: at most 5 min to go at 2 steps a second; it ends")
    assert "earlier where the val loss no longer falls" in at_plateau and "--max_minutes" in at_plateau


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, "5 s"), (89, "89 s"), (120, "2 min"), (5340, "89 min"), (12_000, "3 h 20 min")]
)
def test_a_duration_is_said_in_the_unit_that_fits(seconds, said):
    assert duration(seconds) == said


def test_a_saved_checkpoint_is_named_with_its_val_loss():
    assert saved_line("a/checkpoint-5", 0.51234) == "saved a/checkpoint-5 (val loss 0.512)"
    assert saved_line("a/checkpoint-5", None) == "saved a/checkpoint-5"
