"""Peak memory of a training process for a number of records: write text records of 1 KB, train a few steps.

    python scripts/measure_scale.py --num_records 50000 --folder /tmp/scale
    torchrun --nproc_per_node=2 scripts/measure_scale.py --num_records 500000 --folder /tmp/scale

Prints for every process the seconds it took and the most memory it had held by the end of each phase. Nothing is
deleted: the same command again shows what starting from the prepared data costs.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import time
from pathlib import Path

from embervlm.config import TrainConfig, from_mapping
from embervlm.data.records import ROBOTS
from embervlm.progress import progress_bar

TINY_MODEL = {
    "vision": {"config": {
        "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 36, "patch_size": 12,
    }},
    "language": {"config": {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }},
    "image_size": 36, "projection_hidden_size": 24, "reasoning_width": 16, "reasoning_ffn": 24, "reasoning_heads": 2,
    "validator_width": 16, "validator_ffn": 24, "validator_heads": 2,
}  # fmt: skip
WORDS = (
    "the a crate tunnel river flooded lifts robot heavy shelf wind carries sees night narrow stairs sand mud box field "
    "bridge under over slowly across roof cable wheel arm leg rotor tide harbour forest rubble ladder is are can cannot"
).split()


def write_records(path: Path, num_records: int) -> None:
    """JSONL of about 1 KB a line, no two instructions alike."""
    rng = random.Random(0)
    steps = [" ".join(rng.choices(WORDS, k=30)) for _ in range(10_000)]
    with open(path, "w", encoding="utf-8") as file:
        for number in progress_bar(range(num_records), desc="write", unit="record", delay=2):
            chain = [f"Step {i}: {rng.choice(steps)}." for i in range(1, 6)]
            answer = ROBOTS[number % len(ROBOTS)]
            record = {
                "instruction": f"Task {number}: which robot? {rng.choice(steps)}",
                "reasoning": "\n".join([*chain, f"Conclusion: {answer}."]),
                "answer": answer,
            }
            file.write(json.dumps(record) + "\n")


def peak_mib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="records and the run's output go here")
    parser.add_argument("--max_steps", type=int, default=5, help="updates of each phase")
    args = parser.parse_args()

    from embervlm.training.engine import World
    from embervlm.training.phases import Run

    world = World.join()
    folder = args.folder / str(args.num_records)
    path, model = folder / "records.jsonl", folder / "model.yaml"
    if world.rank == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        model.write_text(json.dumps(TINY_MODEL), encoding="utf-8")  # JSON is YAML
        write_records(path.with_suffix(".tmp"), args.num_records)
        path.with_suffix(".tmp").rename(path)
    world.barrier()
    output = folder / f"run-{world.size}"
    if world.rank == 0:
        for name in ("stage3", "stage4"):  # a finished run would return at once; its cache stays
            shutil.rmtree(output / name, ignore_errors=True)
    world.barrier()
    peaks = {"start": peak_mib()}
    config = from_mapping(TrainConfig, {
        "model": str(model), "output_dir": str(output), "reasoning_data": str(path), "engine": "torch",
        "precision": "fp32", "max_steps": args.max_steps, "sample_records": 1,
        "stage4": {"max_reasoning_length": 700, "batch_size": 8},
    })  # fmt: skip
    began = time.monotonic()
    run = Run(config, world)
    for name, stages, phase in (("stage 3", ["3"], None), ("phase 1", ["4"], 1), ("phase 2", ["4"], 2)):
        run.go(stages, phase)
        peaks[name] = peak_mib()
    held = ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items())
    seconds = time.monotonic() - began
    print(f"rank {world.rank}: {args.num_records} records in {seconds:.0f} s; peak MiB up to: {held}", flush=True)


if __name__ == "__main__":
    main()
