"""A run's recorded files, written by hand: what `embervlm report` reads, without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TYPES = ("problem_analysis", "constraint_checking", "solution_selection", "conclusion")
ROBOTS = ("Drone", "Humanoid", "Robot with Legs", "Robot with Wheels", "Underwater Robot")
COMPLEXITIES, KINDS = ("simple", "medium", "complex"), ("haul", "inspect", "wait")
METRICS = {
    "reasoning_consistency": 0.962,
    "step_completeness": 0.981,
    "logical_flow_score": 0.774,
    "final_answer_accuracy": 0.914,
    "adjacent_similarity": 0.503,
    "head_accuracy": 0.931,
    "head_agreement": 0.944,
    "unparseable_share": 0.0,
    "swapped_image_accuracy": 0.168,
    "blind_accuracy": 0.221,
    "stage4_direct_accuracy": 0.658,
    "no_reasoning_accuracy": 0.738,
    "no_reasoning_same_time_accuracy": 0.898,
}
TARGETS = {
    "reasoning_consistency": {"target": ">0.85", "met": True},
    "step_completeness": {"target": ">0.90", "met": True},
    "logical_flow_score": {"target": ">0.80", "met": False},
    "final_answer_accuracy": {"target": ">0.75", "met": True},
    "swapped_image_accuracy": {"target": "<=0.664", "met": True},
}


def sample(place: int, *, image: str | None = None, grid: int = 7) -> dict[str, Any]:
    rng = random.Random(place)
    right = place % 4 != 3
    num_steps = 4 + 3 * (place % 3)
    gold = [ROBOTS[place % 5]]
    shares = np.random.default_rng(place).dirichlet([0.3] * grid * grid, num_steps).round(4).tolist()
    steps = [f"The place is cliff, load is {place % 9}, so fact {number} holds." for number in range(1, num_steps)]
    scores = {name: round(rng.uniform(0.6, 1), 4) for name in list(METRICS)[:3]}
    return {
        "id": f"scene-{place:06d}",
        "image": image,
        "complexity": COMPLEXITIES[place % 3],
        "instruction": f"Take the load to flag {place} and inspect the site there. Which robots are suited?",
        "question_kind": KINDS[place % 3],
        "gold_steps": [*steps, f"{gold[0]}."],
        "gold_answer": gold,
        "reasoning_steps": [*steps, "Drone."],
        "answer": gold[0] if right else "Nobody",
        "answer_set": gold if right else [ROBOTS[(place + 1) % 5]],
        "correct": right,
        "confidence": round(rng.uniform(0.4, 1), 3),
        "head_answer": gold,
        "scores": {
            **scores,
            "final_answer_accuracy": float(right),
            "adjacent_similarity": 0.5,
            "reasons": [] if right else ["step 2 contradicts the fact place: cliff"],
        },
        "without_reasoning": {"answer_set": gold if place % 2 else ["Humanoid"], "correct": bool(place % 2)},
        "step_types": [TYPES[0], *[TYPES[1]] * (num_steps - 2), TYPES[3]],
        "completeness_by_type": {name: 1.0 if right else round(rng.random(), 3) for name in TYPES},
        "validator_scores": [round(rng.uniform(0.3, 1), 4) for _ in range(num_steps)],
        "attention": {"grid": [grid, grid], "steps": shares},
        "looked_at": [{"flag": [0.81, 0.16]} if number == 1 else {} for number in range(num_steps)],
        "boxes": [
            {"kind": "flag", "label": "near", "box": [0.1, 0.4, 0.4, 0.9]},
            {"kind": "sky", "label": "dawn", "box": [0.0, 0.0, 1.0, 0.4]},
        ],
    }


def evaluation(num_samples: int = 24, **changed: Any) -> dict[str, Any]:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        "format": 2,
        "embervlm_version": "0.1.0",
        "checkpoint": "outputs/run/stage4/phase2/checkpoint-final",
        "step": 550,
        "phase": "phase 2",
        "split": "test",
        "num_samples": num_samples,
        "decoding": {"max_reasoning_steps": 10, "temperature": 0.0},
        "backend": {part: {"name": "embedded", "version": "1"} for part in ("similarity", "entailment")},
        "metrics": dict(METRICS),
        "intervals": {name: [max(0, value - 0.03), min(1, value + 0.02)] for name, value in METRICS.items()},
        "targets": TARGETS,
        "accuracy_by_complexity": {"simple": 0.892, "medium": 0.975, "complex": 0.953},
        "accuracy_by_question_kind": {
            "haul": {"num": 200, "reasoning": 0.95, "no_reasoning": 0.7},
            "inspect": {"num": 160, "reasoning": 0.97, "no_reasoning": 0.81},
            "wait": {"num": 140, "reasoning": 0.7, "no_reasoning": 0.73},
        },
        "impact_by_complexity": {
            name: {"num": 160, "reasoning": 0.9 + place / 50, "no_reasoning": 0.85 - place / 10}
            for place, name in enumerate(COMPLEXITIES)
        },
        "per_candidate": {name: {"precision": 0.95, "recall": 0.9, "support": 90.0} for name in ROBOTS},
        "calibration": {
            "split_fitted": "val",
            "temperature": 1.31,
            "ece": 0.021,
            "ece_uncalibrated": 0.058,
            "bins": [
                {
                    "low": share - 0.05,
                    "high": share + 0.05,
                    "confidence": share,
                    "accuracy": share**1.2,
                    "num": int(10 + 300 * share**4),
                }
                for share in shares
            ],
        },
        "faithfulness": {
            "num_samples": 200,
            "swapped_picture_accuracy": 0.17,
            "truncated": {"0.25": 0.31, "0.5": 0.52, "0.75": 0.8},
            "planted_mistake": {"num": 180, "accuracy": 0.4, "follows_mistake": 0.55},
            "information_gain": {"per_step": [0.02, 0.05, 0.1, 0.4, 0.9, 1.4, 1.5], "num": 200},
            "forced_prefix": {
                "num": 190,
                "follows_text": 0.82,
                "follows_picture": 0.11,
                "neither": 0.07,
                "ambiguous_dropped": 10,
            },
        },
        "own_steps": {
            "temperature": 1.0,
            **{
                name: {
                    "valid": 1500,
                    "wrong": wrong,
                    "balanced_accuracy": 0.91,
                    "auroc": 0.97,
                    "right_chains": 180,
                    "right_chains_passed": 0.95,
                    "wrong_chains": 20,
                    "wrong_chains_passed": 0.1,
                }
                for name, wrong in (("greedy", 9), ("drawn", 120))
            },
        },
        "attention": {"flag": {"num": 90, "share": 0.81, "chance": 0.16}},
        "validator": {"other_picture": 0.997, "wrong_order": 1.0, "contradicted": 0.999, "repeated": 1.0},
        **changed,
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_checkpoint(folder: Path, step: int, *, final: bool = False, config: Any = None, evals: Any = None) -> None:
    path = folder / ("checkpoint-final" if final else f"checkpoint-{step}")
    write_json(path / "state.json", {"step": step, "settings": {"phase": "phase", "config": config or {}}})
    write_json(path / "COMPLETE", {"format": 1, "step": step, "files": {}})
    if evals is not None:
        write_json(path / "evals" / "val.json", evals)


def write_pictures(folder: Path, num: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place in range(num):
        rng = np.random.default_rng(place)
        ramp = np.linspace(0, 1, 160)[:, None, None]
        colors = ramp * rng.integers(60, 255, 3) + (1 - ramp) * rng.integers(0, 200, 3)
        pixels = np.broadcast_to(colors, (160, 160, 3)) + rng.normal(0, 6, (160, 160, 3))
        path = folder / f"{place:06d}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)
        paths.append(str(path))
    return paths


def write_phase3(folder: Path) -> None:
    """Log and groups of a phase 3 without checkpoints."""
    lines, groups = [], []
    for step in range(1, 121, 5):
        policy = {"reward": step / 120, "reward_answer": step / 130, "group_spread": 0.4, "equal_groups": step / 200}
        policy |= {"entropy": 0.3, "clipped": 0.01, "length": 100 + step, "distinct_chains": 0.8, "tokens_drawn": step}
        lines.append({"step": step, "epoch": 1, "loss": {"policy": 0.01}, "policy": policy, "elapsed_s": 3.0 * step})
        right = {"reasoning_steps": ["The place is cliff."], "answer": "Drone", "num_tokens": 40, "reward": 1.2}
        right |= {"rewards": {"answer": 1.0, "form": 1.0}, "advantage": 0.5}
        wrong = {**right, "answer": "", "reward": 0.0, "rewards": {"answer": 0.0, "form": 0.0}}
        question = {"instruction": f"Which robot, asked at step {step}?", "gold_answer": ["Drone"]}
        groups.append({"step": step, "id": f"r{step}", "image": None, **question, "chains": [right, wrong]})
    folder.mkdir(parents=True)
    for name, found in (("metrics.jsonl", lines), ("groups.jsonl", groups)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")


def write_run(folder: Path, *, num_samples: int = 24, config: Any = None) -> Path:
    """A finished run: logs, four evaluated checkpoints, samples of three epochs, an evaluation with samples."""
    config = config or {
        "model": "quickstart",
        "seed": 0,
        "engine": "deepspeed",
        "reasoning_data": str(folder / "data.json"),
        "stage4": {"batch_size": 8, "phase1": {"epochs": 1, "learning_rate": 0.002}, "phase2": {"epochs": 2}},
    }
    pictures = write_pictures(folder / "data" / "images", min(num_samples, 100) or 1)
    for phase, steps in ((1, 275), (2, 550)):
        lines = []
        for step in range(20, steps + 1, 20):
            loss = {
                "total": 4 * 0.99**step + 0.1,
                "reasoning": 5 * 0.985**step + 0.02,
                "consistency": 0.7 * 0.995**step,
                "answer": 0.5 * 0.993**step,
                "multimodal": 0.9 * 0.997**step,
            }
            rates = {"reasoning_module": 0.002 * (1 - step / steps) + 1e-6}
            if phase == 2:
                rates |= {
                    "language_model": rates["reasoning_module"] / 2,
                    "vision_encoder": rates["reasoning_module"] / 10,
                }
            lines.append({"step": step, "epoch": 1, "loss": loss, "learning_rate": rates, "samples_per_s": 30.0})
        path = folder / "stage4" / f"phase{phase}" / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for place, step in enumerate((steps // 2, steps)):
            grown = {name: value * (0.5 + 0.2 * phase + 0.05 * place) for name, value in METRICS.items()}
            evals = evaluation(64, metrics=grown, intervals={n: [v - 0.05, v + 0.04] for n, v in grown.items()})
            write_checkpoint(folder / "stage4" / f"phase{phase}", step, final=step == steps, config=config, evals=evals)
    write_phase3(folder / "stage4" / "phase3")
    for epoch in (1, 2, 3):
        samples = [sample(1000 + place, image=pictures[place % len(pictures)]) for place in range(4)]
        for item in samples:
            if epoch < 3:
                item["reasoning_steps"] = item["reasoning_steps"][: 2 + epoch]
                item |= {"answer_set": ["Drone"], "correct": "Drone" in item["gold_answer"]}
        write_json(folder / "stage4" / "reasoning_samples" / f"epoch_{epoch}_samples.json", samples)
    write_json(folder / "results" / "stage4_eval.json", evaluation(num_samples))
    samples = [sample(place, image=pictures[place % len(pictures)]) for place in range(num_samples)]
    write_json(folder / "results" / "stage4_eval_samples.json", samples)
    return folder
