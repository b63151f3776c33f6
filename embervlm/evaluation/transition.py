"""Checks the switch from phase 1 to phase 2, from two checkpoints and the logs beside them, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embervlm import run_dir
from embervlm.config import BACKBONE, REASONING_PARTS, ConfigError, PhaseConfig
from embervlm.config_file import from_mapping
from embervlm.model.storage import WEIGHT_FILES, read_weights

LINES = 5
"""Log lines on each side of the switch that are compared."""
JUMP = 0.1
"""A loss term that rises by less than this share of itself has not jumped."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The distance of one part of the model from its earlier weights."""

    part: str
    num_tensors: int
    num_changed: int
    """Tensors that are not the same, bit for bit."""
    relative: float
    """Length of the difference over the length of the old weights."""


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One loss term at the switch."""

    name: str
    before: float
    """Mean over the last lines of phase 1."""
    after: float
    """Mean over the first lines of phase 2."""
    noise: float
    """Standard deviation of a line at the end of phase 1."""
    back_at: int | None
    """First step of phase 2 by which it is at most `before`; None: not yet."""

    @property
    def jumped(self) -> bool:
        return not self.after - self.before <= max(JUMP * self.before, 2 * self.noise)  # NaN has jumped, too


@dataclass(kw_only=True)
class Transition:
    """The findings of `check_transition`."""

    moved: list[Moved]
    """Between the phase 1 and the phase 2 checkpoint."""
    frozen: list[Moved]
    """The backbone between where phase 1 started and its checkpoint; [] where that is not there to compare."""
    start: Path | None
    losses: list[LossTerm]
    should_move: dict[str, bool] = field(default_factory=dict)
    """By the settings of phase 2; {} where they are not recorded."""
    notes: list[str] = field(default_factory=list)
    """The checks that were not possible, and why."""

    @property
    def problems(self) -> list[str]:
        out = [
            f"Phase 1 changed {part.part}, which should not change it: {part.num_changed} of {part.num_tensors} "
            "tensors differ. Check freeze_backbone and learning_rate_multipliers of phase 1."
            for part in self.frozen
            if part.num_changed
        ]
        for part in self.moved:
            if part.num_changed == 0 and self.should_move.get(part.part, True):
                out.append(
                    f"{part.part} did not move in phase 2: its learning rate multiplier, its loss weight, or the "
                    "number of steps is 0."
                )
            if part.num_changed and not self.should_move.get(part.part, True):
                out.append(f"{part.part} moved in phase 2 although its learning rate multiplier is 0.")
            if not np.isfinite(part.relative):
                out.append(f"{part.part} contains values that are not finite; go back to an earlier checkpoint.")
        out += [
            f"The {term.name} loss jumped at the switch, from {term.before:.3f} to {term.after:.3f}, and has not come "
            "back. Lower --phase2_learning_rate, raise --phase2_warmup_steps, or lower the multipliers of "
            "vision_encoder and language_model."
            for term in self.losses
            if term.jumped and term.back_at is None
        ]
        return out


def check_transition(phase1: Path, phase2: Path, start: Path | None = None) -> Transition:
    """Compare the checkpoints of both phases.

    Args:
        start: The checkpoint that phase 1 started from; None takes what the run recorded.
    Raises:
        ConfigError: a checkpoint is missing, or of another model.
    """
    weights1, weights2 = _weights(phase1), _weights(phase2)
    settings = _settings(phase2)
    _check_phases(phase1, phase2)
    out = Transition(moved=_compare(weights1, weights2, phase1, phase2), frozen=[], start=None, losses=[])
    config = settings.get("config", {})
    if multipliers := _multipliers(config):
        out.should_move = {
            part.part: multipliers["reasoning_module" if part.part in REASONING_PARTS else part.part] > 0
            for part in out.moved
        }
    start = start or _recorded_start(phase1)
    if start is None or not any((start / name).is_file() for name in WEIGHT_FILES):
        where = f"{start} does not exist" if start is not None else "it is not recorded"
        out.notes.append(
            f"Not checked: whether phase 1 left the backbone unchanged. This needs the checkpoint that phase 1 started "
            f"from, and {where}. Give it with --start_checkpoint."
        )
    else:
        out.start = start
        before = _weights(start)
        kept = {name: weights1[name] for name in before if name in weights1 and _part(name) in BACKBONE}
        out.frozen = _compare({name: before[name] for name in kept}, kept, start, phase1)
    logs = [run_dir.metrics_log_path(path.absolute().parent) for path in (phase1, phase2)]
    if missing := [str(path) for path in logs if not path.is_file()]:
        out.notes.append(f"The loss at the switch was not checked: {', '.join(missing)} is not there.")
    else:
        out.losses = compare_losses(*(_losses(path) for path in logs))
    return out


def _check_phases(phase1: Path, phase2: Path) -> None:
    for path, number in ((phase1, 1), (phase2, 2)):
        found = _settings(path).get("phase")
        if found not in (None, f"phase {number}"):
            raise ConfigError(f"--phase{number}_checkpoint {path}: is of {found}; give a checkpoint of phase {number}")


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint}: no such checkpoint folder")
    return read_weights(checkpoint)[1]


def _settings(checkpoint: Path) -> dict[str, Any]:
    settings: dict[str, Any] = run_dir.read_state(checkpoint).get("settings", {})
    return settings


def _recorded_start(phase1: Path) -> Path | None:
    config = _settings(phase1).get("config", {})
    if config.get("resume_from"):
        return Path(config["resume_from"])
    of_run = phase1.absolute().parents[2] / "stage3"  # also of a run that was moved
    return run_dir.checkpoint_path(of_run, None)


def _multipliers(config: Mapping[str, Any]) -> dict[str, float]:
    phase = config.get("stage4", {}).get("phase2")
    return from_mapping(PhaseConfig, phase).multipliers if phase else {}


def _part(name: str) -> str:
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "reasoning_module" else first


def _compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor], one: Path, other: Path) -> list[Moved]:
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        raise ConfigError(f"{one} and {other} contain different models; compare checkpoints of one run")
    out = []
    for part in (*BACKBONE, *REASONING_PARTS):
        names = [name for name in before if _part(name) == part]
        if not names:
            continue
        changed = sum(not torch.equal(before[name], after[name]) for name in names)
        pairs = [(before[name].double(), after[name].double()) for name in names]
        length = sum(float(old.square().sum()) for old, _ in pairs) ** 0.5
        moved = sum(float((new - old).square().sum()) for old, new in pairs) ** 0.5
        out.append(Moved(part=part, num_tensors=len(names), num_changed=changed, relative=moved / max(length, 1e-12)))
    return out


def _losses(log: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and loss terms of each line; the unfinished last line of a killed run is left out."""
    out = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("loss"), dict) and "step" in found:
            out.append((int(found["step"]), found["loss"]))
    return out


def compare_losses(
    phase1: Sequence[tuple[int, Mapping[str, float]]], phase2: Sequence[tuple[int, Mapping[str, float]]]
) -> list[LossTerm]:
    """The terms that both phases have, at the switch; each side holds step and terms of the log's lines."""
    last = phase1[-LINES:]
    out = []
    for name in last[-1][1] if last and phase2 else ():
        before = [line[name] for _, line in last if name in line]
        curve = [(step, line[name]) for step, line in phase2 if name in line]
        if not curve:
            continue
        level = float(np.mean(before))
        after = [value for _, value in curve[: min(LINES, max(1, len(curve) // 4))]]
        out.append(
            LossTerm(
                name=name,
                before=level,
                after=float(np.mean(after)),
                noise=float(np.std(before)),
                back_at=next((step for step, value in curve if value <= level), None),
            )
        )
    return out


def transition_text(found: Transition) -> str:
    """Figures, then the verdict in words."""
    lines = ["weights, phase 1 -> phase 2", f"{'part':<16}  {'changed tensors':>15}  {'relative change':>15}"]
    for part in found.moved:
        counts = f"{part.num_changed} of {part.num_tensors}"
        lines.append(f"{part.part:<16}  {counts:>15}  {part.relative:>15.2e}")
    if found.frozen:
        lines += ["", f"backbone, {found.start} -> phase 1"]
        for part in found.frozen:
            same = "bit for bit the same" if not part.num_changed else f"{part.num_changed} tensors CHANGED"
            lines.append(f"{part.part:<16}  {part.num_tensors} tensors, {same}")
    if found.losses:
        lines += ["", f"{'loss':<16}  {'end of phase 1':>15}  {'start of phase 2':>16}"]
        for term in found.losses:
            said = "no jump"
            if term.jumped:
                back = f"back by step {term.back_at}" if term.back_at is not None else "not back yet"
                said = f"jumped by {term.after / max(term.before, 1e-12) - 1:+.0%}, {back}"
            lines.append(f"{term.name:<16}  {term.before:>15.4f}  {term.after:>16.4f}  {said}")
    return "\n".join([*lines, "", *_verdict(found)])


def _verdict(found: Transition) -> list[str]:
    good = []
    if found.frozen and not any(part.num_changed for part in found.frozen):
        good.append("phase 1 left the backbone as it was, bit for bit")
    moved = [part.part for part in found.moved if part.num_changed]
    if moved:
        good.append(f"phase 2 moved {', '.join(moved)}")
    jumped = [term for term in found.losses if term.jumped]
    if found.losses and not jumped:
        good.append("no loss term jumped at the switch")
    elif jumped and all(term.back_at is not None for term in jumped):
        names = ", ".join(term.name for term in jumped)
        last = max(term.back_at or 0 for term in jumped)
        good.append(f"{names} rose when the rates warmed up again and came back by step {last}, as is usual")
    problems = found.problems
    out = ["Verdict: the transition looks right." if not problems else "Verdict: something is wrong."]
    out += [f"- {problem}" for problem in problems]
    if good:
        out.append("- " + "; ".join(good)[0].upper() + "; ".join(good)[1:] + ".")
    return [*out, *(f"- {note}" for note in found.notes)]
