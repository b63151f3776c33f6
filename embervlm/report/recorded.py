"""The records of a run, read from its folder: settings, curves, evaluations, samples. Nothing is computed again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.errors import UNREADABLE, UserError
from embervlm.ranking import rank_checkpoints

CHAIN_METRICS = ("reasoning_consistency", "step_completeness", "logical_flow_score", "final_answer_accuracy")
"""The four metrics with a target in the guide."""
_EPOCH_FILE = re.compile(r"epoch_(\d+)_samples\.json")


class ReportError(UserError):
    """Recorded files that cannot be used for a report. The message says which file, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Where the reasoning head looked, step by step."""

    grid: tuple[int, int]
    """Rows and columns of visual tokens."""
    steps: list[list[float]]
    """For each step the share of the attention on each visual token, row by row."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with its chain. Every text was written by a model or by a stranger."""

    id: str
    image: str | None
    instruction: str
    complexity: str | None
    question_kind: str | None
    gold_steps: list[str]
    gold_answer: list[str]
    steps: list[str]
    answer: str
    answer_set: list[str]
    correct: bool
    confidence: float | None
    head_answer: list[str]
    scores: dict[str, float | None]
    reasons: list[str]
    """Reasons why a chain lost points, a sentence each."""
    without_reasoning: dict[str, Any] | None
    """`answer_set` and `correct` of the no-reasoning baseline on the same record."""
    completeness_by_type: dict[str, float]
    validator_scores: list[float | None]
    attention: Attention | None
    looked_at: list[dict[str, tuple[float, float]]]
    """Of each step, thing that it reads -> share of its attention in the thing's box, and the box's of the picture."""
    boxes: list[dict[str, Any]]
    """Known boxes: `kind`, `label` and `box` (left, top, right, bottom in [0, 1])."""

    @property
    def answers(self) -> list[str]:
        """Every answer that is right or was given."""
        return sorted({*self.gold_answer, *self.answer_set})


PHASES = (1, 2, 3)
STAGE3 = 0
"""Stage 3 among the phases."""


def training_name(phase: int) -> str:
    return f"Phase {phase}" if phase else "Stage 3"


@dataclass(frozen=True, kw_only=True)
class CheckpointResult:
    """The evaluation that a checkpoint carries."""

    phase: int
    name: str
    step: int
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    num_samples: int | None
    selected: bool = False
    reason: str | None = None
    """Why it was not eligible."""


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Samples that were written together, such as those of an epoch."""

    name: str
    samples: list[Sample]


@dataclass(kw_only=True)
class RunRecord:
    """Everything that a report shows."""

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Phase, or `STAGE3`, -> lines of its log."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Of phase 3: chains that were drawn for one question, with their rewards, by step."""
    checkpoints: list[CheckpointResult] = field(default_factory=list)
    result: dict[str, Any] | None = None
    """The evaluation of the chosen checkpoint."""
    samples: list[Sample] = field(default_factory=list)
    sample_sets: list[SampleSet] = field(default_factory=list)
    """For the side-by-side: those of the epochs, of the checkpoints, and `samples`."""
    result_path: Path | None = None
    """Where `result` was read."""
    notices: list[str] = field(default_factory=list)
    """Notes on missing, damaged or omitted files, and what to do about them."""

    @property
    def metrics(self) -> dict[str, float | None]:
        return part(self.result, "metrics")

    @property
    def targets(self) -> dict[str, dict[str, Any]]:
        """Metric -> `target` (text) and `met`; a metric that was not measured has met nothing."""
        known = {name for name, value in self.metrics.items() if value is not None}
        return {
            name: target if name in known else {**target, "met": None}
            for name, target in part(self.result, "targets").items()
        }

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return intervals(part(self.result, "intervals"))


def part(of: Mapping[str, Any] | None, *names: str) -> dict[str, Any]:
    """The mapping at `names` in an evaluation, one inside the other; {} where it was not measured."""
    found: Any = of
    for name in names:
        found = (found or {}).get(name)
    return found or {}


def intervals(found: Mapping[str, Sequence[float | None]]) -> dict[str, tuple[float, float]]:
    """The pairs of which both ends are known."""
    return {name: (low, high) for name, (low, high) in found.items() if low is not None and high is not None}


def read_run(folder: str | Path, *, results: str | Path | None = None) -> RunRecord:
    """What the run in `folder` has recorded so far.

    Args:
        results: the evaluation to show; default: `results/stage4_eval.json` in `folder`, else the newest that a
            checkpoint of Stage 4 carries of the test split.
    Raises:
        ReportError: no such folder, nothing in it, or an evaluation of another format.
    """
    folder = Path(folder)
    if folder.name == "stage4" and not (folder / "stage4").is_dir() and (folder / "phase1").is_dir():
        folder = folder.parent
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; give the --output_dir of a training run")
    record = RunRecord(name=folder.resolve().name, folder=folder)
    stage3 = run_dir.stage3_dir(folder)
    if stage3.is_dir():
        record.curves[STAGE3] = _read_log(run_dir.metrics_log_path(stage3), record.notices)
    phases = [phase for phase in PHASES if phase < 3 or run_dir.phase_dir(folder, phase).is_dir()]
    for phase in phases:
        record.curves[phase] = _read_log(run_dir.metrics_log_path(run_dir.phase_dir(folder, phase)), record.notices)
        record.checkpoints += _read_checkpoints(folder, phase, record)
    record.groups = _read_log(run_dir.phase_dir(folder, 3) / run_dir.GROUPS, record.notices)
    record.config = _read_config(folder, record.notices)
    places = [Path(results)] if results is not None else _evaluation_places(folder)
    path = places[0]
    if (found := next((place for place in places if place.exists()), None)) is not None:
        path = record.result_path = found
        record.result = read_result(path)
        beside = samples_path(path)
        if beside.exists():
            record.samples = read_samples(beside)
        else:
            record.notices.append(
                f"{beside} does not exist: evaluate with --save_reasoning_samples to see chains here."
            )
    elif results is not None:
        raise ReportError(f"{path}: no such file; make it with `embervlm evaluate --output_file {path}`")
    else:
        record.notices.append(
            f"No evaluation: looked for {', '.join(map(str, places))}. `embervlm evaluate --split test` writes one; "
            "choose another with --results."
        )
    _read_sample_sets(folder, record)
    if not (record.result or record.checkpoints or record.sample_sets or any(record.curves.values())):
        raise ReportError(
            f"{folder}: nothing to report; looked for metrics.jsonl in stage3/ and stage4/phase1|phase2|phase3/, "
            f"evaluations in checkpoints, stage4/reasoning_samples/ and {path}"
        )
    return record


def _evaluation_places(folder: Path) -> list[Path]:
    """Where the evaluation of a run may be, the first choice first; each checkpoint carries its last one."""
    carried = [
        run_dir.eval_path(checkpoint.path, "test")
        for phase in reversed(PHASES)
        for checkpoint in reversed(run_dir.list_checkpoints(run_dir.phase_dir(folder, phase)))
    ]
    carried.sort(key=lambda path: path.stat().st_mtime if path.exists() else 0, reverse=True)
    return [run_dir.eval_results_path(folder), *carried]


def evaluation_alone(path: Path) -> RunRecord:
    """One evaluation with the samples beside it, and nothing of its run."""
    beside = samples_path(path)
    samples = read_samples(beside) if beside.exists() else []
    return RunRecord(name=path.stem, folder=path.parent, result=read_result(path), samples=samples)


def samples_path(eval_file: Path) -> Path:
    """The samples beside an evaluation."""
    return eval_file.with_name(f"{eval_file.stem}_samples.json")


def read_result(path: Path) -> dict[str, Any]:
    """An evaluation of `run_dir.EVAL_FORMAT`; ReportError for any other file."""
    with _naming_damage(path):
        return run_dir.read_eval(path)


def read_samples(path: Path) -> list[Sample]:
    """The samples in a file; ReportError where it is damaged."""
    with _naming_damage(path):
        found = run_dir.read_json(path)
    if not isinstance(found, list):
        raise ReportError(f"{path}: not a list of samples; evaluate again with --save_reasoning_samples")
    samples = []
    for place, item in enumerate(found):
        with _naming_damage(f"{path} sample {place}"):
            samples.append(as_sample(item))
    return samples


@contextmanager
def _naming_damage(where: object) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise ReportError(str(error)) from error
    except UNREADABLE as error:
        raise ReportError(f"{where}: damaged ({error}); evaluate again with --save_reasoning_samples") from error


def as_sample(raw: Mapping[str, Any]) -> Sample:
    """A sample as an evaluation writes it; those of an epoch know less. TypeError or ValueError where it is damaged."""
    if not isinstance(raw, Mapping):
        raise TypeError("not an object")
    names = ("gold_steps", "gold_answer", "reasoning_steps", "answer_set", "head_answer", "validator_scores", "boxes")
    lists = {name: raw.get(name) or [] for name in (*names, "looked_at")}
    if wrong := [name for name, value in lists.items() if not isinstance(value, list)]:
        raise TypeError(f"{wrong[0]}: not a list")
    judged = dict(raw.get("scores") or {})
    scores = {name: value for name, value in judged.items() if value is None or isinstance(value, (int, float))}
    right = _folded(lists["gold_answer"]) == _folded(lists["answer_set"])
    return Sample(
        id=str(raw.get("id", "")),
        image=raw.get("image"),
        instruction=raw["instruction"],
        complexity=_name(raw.get("complexity")),
        question_kind=_name(raw.get("question_kind")),
        gold_steps=lists["gold_steps"],
        gold_answer=lists["gold_answer"],
        steps=lists["reasoning_steps"],
        answer=raw.get("answer") or "",
        answer_set=lists["answer_set"],
        correct=raw.get("correct", right),
        confidence=raw.get("confidence"),
        head_answer=lists["head_answer"],
        scores=scores,
        reasons=judged.get("reasons") or [],
        without_reasoning=raw.get("without_reasoning"),
        completeness_by_type=raw.get("completeness_by_type") or {},
        validator_scores=lists["validator_scores"],
        attention=_attention(raw.get("attention")),
        looked_at=[intervals(step) for step in lists["looked_at"]],
        boxes=[{"label": box["kind"], **box} for box in lists["boxes"]],
    )


def _name(value: object) -> str | None:
    """What a record's own metadata names, which may be a number there."""
    return None if value in (None, "") else str(value)


def _folded(names: Iterable[str]) -> set[str]:
    return {name.strip().casefold() for name in names}


def _attention(found: Mapping[str, Any] | None) -> Attention | None:
    if found is None:
        return None
    rows, columns = found["grid"]
    if any(len(step) != rows * columns for step in found["steps"]):
        raise ValueError(f"attention: a step does not have {rows} x {columns} shares")
    return Attention(grid=(rows, columns), steps=found["steps"])


# ---- files


def _read_log(path: Path, notices: list[str]) -> list[dict[str, Any]]:
    """The lines of a log, by step; a line that cannot be read, as a killed run may leave, is left out."""
    if not path.exists():
        return []
    lines, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and "step" in entry:
            lines.append(entry)
        else:
            bad += 1
    if bad:
        notices.append(f"{path}: {bad} unreadable line{'s' if bad > 1 else ''} left out.")
    return sorted(lines, key=lambda entry: float(entry["step"]))


def _read_checkpoints(folder: Path, phase: int, record: RunRecord) -> list[CheckpointResult]:
    """The evaluated checkpoints of a phase, each step once, with the choice that `select_best` makes among them."""
    found: dict[int, CheckpointResult] = {}
    for checkpoint in run_dir.list_checkpoints(run_dir.phase_dir(folder, phase)):
        path = run_dir.eval_path(checkpoint.path, "val")
        if not path.exists():
            continue
        try:
            evaluation = read_result(path)
        except ReportError as error:
            record.notices.append(f"Left out: {error}")
            continue
        found[checkpoint.step] = CheckpointResult(
            phase=phase,
            name=checkpoint.path.name,
            step=checkpoint.step,
            metrics=evaluation["metrics"],
            intervals=intervals(part(evaluation, "intervals")),
            num_samples=evaluation.get("num_samples"),
        )
    is_last = not any(run_dir.list_checkpoints(run_dir.phase_dir(folder, later)) for later in PHASES[phase:])
    if phase > 1 and is_last and found:
        try:
            ranking = rank_checkpoints(run_dir.phase_dir(folder, phase))
        except UserError as error:
            record.notices.append(f"No checkpoint is marked as the selected one: {error}")
            ranking = []
        for place, ranked in enumerate(ranking):
            if (of_step := found.get(ranked.step)) is not None:
                selected = place == 0 and ranked.eligible
                found[ranked.step] = replace(of_step, selected=selected, reason=ranked.reason)
    return [found[step] for step in sorted(found)]


def _read_config(folder: Path, notices: list[str]) -> dict[str, Any]:
    """The settings that the run's newest checkpoint was trained with."""
    for place in (*(run_dir.phase_dir(folder, phase) for phase in reversed(PHASES)), run_dir.stage3_dir(folder)):
        for checkpoint in reversed(run_dir.list_checkpoints(place)):
            with _naming_damage(checkpoint.path):
                if config := run_dir.trained_with(checkpoint.path):
                    return config
    notices.append("No checkpoint with its settings was found, so the configuration is not shown.")
    return {}


def _read_sample_sets(folder: Path, record: RunRecord) -> None:
    by_epoch = {}
    for path in (folder / "stage4" / "reasoning_samples").glob("epoch_*_samples.json"):
        if match := _EPOCH_FILE.fullmatch(path.name):
            by_epoch[int(match[1])] = path
    files = [(f"Epoch {epoch}", by_epoch[epoch]) for epoch in sorted(by_epoch)]
    for phase in PHASES:
        for checkpoint in run_dir.list_checkpoints(run_dir.phase_dir(folder, phase)):
            for path in sorted((checkpoint.path / run_dir.EVALS).glob("*_samples.json")):
                if record.result_path is not None and path == samples_path(record.result_path):
                    continue  # they come below
                split = path.name.removesuffix("_samples.json")
                files.append((f"Phase {phase}, {checkpoint.path.name} ({split})", path))
    for name, path in files:
        try:
            record.sample_sets.append(SampleSet(name=name, samples=read_samples(path)))
        except ReportError as error:
            record.notices.append(f"Left out: {error}")
    if record.samples:
        result = record.result or {}
        of, split = Path(result.get("checkpoint", "checkpoint")).name, result.get("split", "")
        record.sample_sets.append(SampleSet(name=f"Evaluation of {of} ({split})", samples=record.samples))


def flat(config: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and value of every setting."""
    out = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out += flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            out.append((f"{prefix}{key}", shown))
    return out


def groups(samples: Sequence[Sample], of: str) -> dict[str, list[Sample]]:
    """Samples by their `complexity` or `question_kind`, without those that name none."""
    out: dict[str, list[Sample]] = {}
    for sample in samples:
        if (name := getattr(sample, of)) is not None:
            out.setdefault(name, []).append(sample)
    return dict(sorted(out.items(), key=lambda item: by_difficulty(item[0])))


def by_difficulty(name: str) -> tuple[int, str]:
    """Sorts the complexities that we know from simple to complex, and before all other names."""
    known = ("simple", "medium", "complex")
    return (known.index(name) if name in known else len(known), name)
