"""The guide's debug commands: what they find, and that they say it in words."""

import json

import pytest
import torch
from report_run import evaluation
from training_helpers import TINY, make_tokenizer

from embervlm import run_dir
from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.evaluation.analysis import analysis_text, common_faults, first_faults, sample_text, samples_verdict
from embervlm.evaluation.transition import check_transition, compare_losses, transition_text
from embervlm.model.embervlm import build_model
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

# ---- the switch from phase 1 to phase 2


def save(folder, weights, name, phase=None, **config):
    part = run_dir.new_tmp_dir(folder)
    torch.save(weights, part / "pytorch_model.bin")
    if phase:
        run_dir.write_json_atomic(part / "state.json", {"settings": {"phase": phase, "config": config}})
    path = run_dir.checkpoint_path(folder, name)
    return run_dir.publish_checkpoint(part, path, name or 9)


def log(folder, values):
    lines = [json.dumps({"step": step, "loss": {"reasoning": value}}) for step, value in enumerate(values, 1)]
    run_dir.metrics_log_path(folder).write_text("\n".join(lines) + '\n{"step": 99, "lo')


@pytest.fixture
def phases(tmp_path, records):
    """The checkpoints of a run, and a function that changes one of them: `change(number, *prefixes)`."""
    torch.manual_seed(0)
    model = build_model({**TINY, "candidates": ROBOTS})
    model.attach_tokenizer(make_tokenizer(records))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    of_phase = {number: run_dir.phase_dir(tmp_path, number) for number in (1, 2)}
    everything = ("vision_encoder", "projection", "language_model", "reasoning_module")

    def write(moved1=("reasoning_module",), moved2=everything, multipliers=None, losses=((0.5, 0.4), (0.4, 0.3))):
        def moved(weights, parts):
            return {
                name: value + 0.1 if name.startswith(tuple(parts)) and value.is_floating_point() else value
                for name, value in weights.items()
            }

        backbone = {name: value for name, value in start.items() if not name.startswith("reasoning_module")}
        save(run_dir.stage3_dir(tmp_path), backbone, None)
        first = moved(start, moved1)
        config = {"stage4": {"phase2": {"learning_rate_multipliers": multipliers or {}}}}
        out = (
            save(of_phase[1], first, None, "phase 1", **config),
            save(of_phase[2], moved(first, moved2), 5, "phase 2", **config),
        )
        for number, values in enumerate(losses, 1):
            log(of_phase[number], values)
        return out

    return write


def test_a_run_as_it_should_be_is_found_right(phases, capsys):
    first, second = phases()
    main(["check-transition", "--phase1_checkpoint", str(first), "--phase2_checkpoint", str(second)])
    said = capsys.readouterr().out
    assert "Verdict: the transition looks right." in said
    assert "phase 1 left the backbone as it was, bit for bit" in said.lower() and "no loss term jumped" in said
    found = check_transition(first, second)
    assert [part.part for part in found.moved] == [
        "vision_encoder",
        "projection",
        "language_model",
        "reasoning_head",
        "step_validator",
        "answer_head",
    ]
    assert all(part.num_changed and part.relative > 0 for part in found.moved) and len(found.frozen) == 3


def test_a_backbone_that_phase_1_changed_is_an_error(phases, capsys):
    first, second = phases(moved1=("reasoning_module", "projection.norm"))
    with pytest.raises(SystemExit) as ended:
        main(["check-transition", "--phase1_checkpoint", str(first), "--phase2_checkpoint", str(second)])
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "Verdict: something is wrong." in said
    assert "Phase 1 changed projection, which should not change it: 2 of" in said


def test_a_single_bit_of_the_backbone_is_seen(phases):
    first, second = phases()
    weights = torch.load(first / "pytorch_model.bin", weights_only=True)
    bits = weights["language_model.backbone.model.norm.weight"].view(torch.int32)
    bits[0] ^= 1
    torch.save(weights, first / "pytorch_model.bin")
    (changed,) = [part for part in check_transition(first, second).frozen if part.num_changed]
    assert changed.part == "language_model" and changed.num_changed == 1 and changed.relative < 1e-6


def test_a_part_that_stands_still_is_named_unless_its_multiplier_is_0(phases):
    parts = ("projection", "language_model", "reasoning_module")
    (problem,) = check_transition(*phases(moved2=parts)).problems
    assert "vision_encoder did not move in phase 2" in problem
    assert not check_transition(*phases(moved2=parts, multipliers={"vision_encoder": 0.0})).problems
    (problem,) = check_transition(*phases(multipliers={"vision_encoder": 0.0})).problems
    assert "vision_encoder moved in phase 2 although" in problem


def test_a_loss_that_jumps_and_stays_is_a_problem_with_the_guides_advice(phases):
    flat = (0.30, 0.31, 0.30, 0.29, 0.30)
    found = check_transition(*phases(losses=(flat, (0.9, 0.8, 0.7, 0.6))))
    (problem,) = found.problems
    assert "reasoning loss jumped at the switch, from 0.300 to 0.900" in problem
    assert "--phase2_learning_rate" in problem and "--phase2_warmup_steps" in problem
    back = check_transition(*phases(losses=(flat, (0.9, 0.8, 0.2, 0.1))))
    assert not back.problems and "came back by step 3" in transition_text(back)
    assert not check_transition(*phases(losses=(flat, (0.31, 0.32, 0.3)))).losses[0].jumped
    assert check_transition(*phases(losses=(flat, (float("nan"),)))).problems


def test_only_terms_that_both_phases_have_are_compared():
    phase1 = [(step, {"reasoning": 0.5, "answer": 0.4}) for step in range(9)]
    phase2 = [(step, {"reasoning": 0.6, "multimodal": 0.1}) for step in range(9)]
    (term,) = compare_losses(phase1, phase2)
    assert (term.name, term.before, term.after, term.back_at) == ("reasoning", 0.5, 0.6, None)
    assert compare_losses([], phase2) == [] == compare_losses(phase1, [])


def test_what_cannot_be_checked_is_said(phases, tmp_path):
    first, second = phases()
    run_dir.metrics_log_path(second.parent).unlink()
    found = check_transition(first, second, start=tmp_path / "nowhere")
    said = transition_text(found)
    assert "--start_checkpoint" in said and "nowhere does not exist" in said and "metrics.jsonl is not there" in said


def test_checkpoints_that_do_not_belong_together_are_refused(phases, tmp_path):
    first, second = phases()
    with pytest.raises(ConfigError, match="--phase1_checkpoint .* is of phase 2"):
        check_transition(second, second)
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        check_transition(first, tmp_path / "nowhere")
    other = save(tmp_path / "other", {"projection.norm.weight": torch.zeros(3)}, None)
    with pytest.raises(ConfigError, match="different models"):
        check_transition(first, other)


# ---- verdicts


def sample(number=0, steps=("Look.", "Then go.", "Conclusion: Drone."), correct=True, reasons=()):
    return {
        "instruction": f"Which, {number}?",
        "image": f"{number}.jpg",
        "reasoning_steps": list(steps),
        "answer": "Drone",
        "gold_answer": ["Humanoid"],
        "correct": correct,
        "confidence": 0.5,
        "validator_scores": None,
        "scores": {"reasons": list(reasons)},
    }


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([sample(n, (f"Look {n}.", "Conclusion: Drone.")) for n in range(4)], "the model reasons"),
        ([sample(n, (), correct=False) for n in range(4)], "does not write chains yet"),
        ([sample(n) for n in range(4)], "same chain for every question"),
        ([sample(n, (f"Look {n}.", "Go.")) for n in range(4)], "chains begin but do not end"),
        ([sample(n, (f"{n}.", "Conclusion: Drone."), reasons=["step 1 is wrong"]) for n in range(4)], "faulty step"),
        ([sample(n, (f"{n}.", "Conclusion: Drone."), correct=False) for n in range(4)], "most answers are wrong"),
    ],
)
def test_the_verdict_on_a_few_samples(samples, expected):
    assert expected in samples_verdict(samples).splitlines()[0]


def test_a_sample_reads_as_steps_with_the_answer_and_what_is_wrong():
    said = sample_text({**sample(reasons=["step 1 looks away"], correct=False), "validator_scores": [0.9, 0.1, 1]}, 3)
    assert "[3] Which, 0?" in said and "Step 1: Look.  (0.90)" in said and "Conclusion: Drone.  (1.00)" in said
    assert "Answer: Drone (50% sure): wrong, it is Humanoid" in said and "! step 1 looks away" in said


def test_faults_are_counted_once_a_chain_and_by_where_they_begin():
    samples = [sample(reasons=["step 4 says so", "step 2 says so"]), sample(reasons=["step 2 says so"]), sample()]
    assert common_faults(samples) == [("says so", 2)] and first_faults(samples) == {2: 2}


def test_the_analysis_says_what_is_missed_and_what_helps():
    samples = [sample(n, reasons=["step 2 contradicts step 1"] if n < 2 else ()) for n in range(4)]
    result = {
        **evaluation(),
        "gains": {
            "no_reasoning_accuracy": {"gain": 0.176, "interval": [0.1, 0.25]},
            "swapped_image_accuracy": {"gain": 0.7, "interval": [0.6, 0.8]},
            "blind_accuracy": {"gain": 0.01, "interval": [-0.02, 0.04]},
        },
    }
    said = analysis_text(result, samples)
    assert "1 of 5 targets are not met: logical_flow_score." in said and "consistency_loss_weight" in said
    assert "Reasoning helps: +17.6 points" in said and "The picture is used: with another picture" in said
    assert "The picture does not seem to be used: with no picture" in said
    assert "2 of 4 chains have a faulty step" in said and "contradicts step 1" in said
    assert "These are only 4 questions" in said
    result["gains"]["no_reasoning_accuracy"] = {"gain": -0.2, "interval": [-0.3, -0.1]}
    assert "Reasoning hurts: -20.0 points" in analysis_text(result, samples)
    bare = {**result, "gains": {}, "targets": {}, "calibration": None, "faithfulness": None}
    assert "no baseline was trained" in analysis_text(bare, []) and "no target was measured" in analysis_text(bare, [])
