"""Memory of phase 2 with adapters on a model of the size of SmolLM2-135M: peak RSS of the largest process.

    python benchmarks/lora_memory.py --work_dir /tmp/lora
    python benchmarks/lora_memory.py --work_dir /tmp/lora --without_lora
    python benchmarks/lora_memory.py --work_dir /tmp/lora --engine deepspeed --processes 2 --batch_size 2

A Llama of SmolLM2-135M's shape behind a vision encoder of DINOv2-small's (64 visual tokens), both with random weights,
which take as much memory as trained ones. Its tokenizer has as many tokens as the embedding has rows. Phase 2 of
`configs/training_stages.yaml` on generated scenes through `launch/train.py`: an update or two, saves included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_run import REPOSITORY, make_data

from embervlm import run_dir
from embervlm.config_file import model_preset, read_yaml
from embervlm.data.records import read_records
from embervlm.data.tokenizer import ReasoningTokenizer, train_tokenizer
from embervlm.model.embervlm import build_model
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.words.chain_text import format_reasoning

TARGET_GB = 6.0
SETTINGS: dict[str, Any] = {
    "vision": {
        "config": {
            "model_type": "dinov2",
            "hidden_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 224,
            "patch_size": 14,
        }
    },
    "language": {
        "config": {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }
    },
    "image_size": 224,
    "connector": {"kind": "pixel_shuffle", "factor": 2},
}
LORA = {"language_model": {"rank": 16}, "vision_encoder": {"rank": 8}}
SCENES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="torch", choices=("deepspeed", "fsdp", "torch"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=4, help="records of each process")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--max_steps", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=420, help="420 make chains as long as SmolLM2 does")
    parser.add_argument("--without_lora", action="store_true", help="train all weights")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--work_dir", type=Path, required=True)
    args = parser.parse_args()
    folder = args.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model.yaml", make_data(folder, SCENES)
    reasoning = {key: value for key, value in model_preset("embervlm-39m").items() if key.startswith(("reas", "valid"))}
    model.write_text(yaml.safe_dump({**SETTINGS, **reasoning}), encoding="utf-8")
    start = folder / "start" / run_dir.FINAL_NAME
    if not start.exists():
        write_start({**SETTINGS, **reasoning}, data, start, args.vocabulary)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(run_settings(args, model, data)), encoding="utf-8")
    # ru_maxrss of a child begins at what its parent held, and this process has held the whole model
    shown = subprocess.run([sys.executable, __file__, "--measure", *command(args, config, start)], capture_output=True)
    sys.stderr.write(shown.stderr.decode(errors="replace")[-3000:] if shown.returncode else "")
    if shown.returncode:
        sys.exit(shown.returncode)
    *_, last = shown.stdout.decode().splitlines()
    print_report(args, float(last))


def write_start(settings: dict[str, Any], data: Path, start: Path, vocabulary: int) -> None:
    """An untrained Stage 3 checkpoint, whose tokenizer has a token for every row of the embedding."""
    records = read_records(data, candidates=ROBOTS)
    texts = [text for record in records for text in (record.instruction, format_reasoning(record.steps))]
    words = train_tokenizer(texts, vocabulary)
    rows = settings["language"]["config"]["vocab_size"]
    words.add_tokens([f"<unused {number}>" for number in range(rows - len(words))])
    torch.manual_seed(0)
    model = build_model({**settings, "stage": 3, "candidates": ROBOTS}, load_pretrained=False)
    model.attach_tokenizer(ReasoningTokenizer(words))
    part = run_dir.new_tmp_dir(start.parent)
    model.save_pretrained(part)
    run_dir.publish_checkpoint(part, start, step=0)


def run_settings(args: argparse.Namespace, model: Path, data: Path) -> dict[str, Any]:
    values = read_yaml(REPOSITORY / "configs" / "training_stages.yaml")
    values |= {"model": str(model), "reasoning_data": str(data), "engine": args.engine, "precision": args.precision}
    values |= {"max_steps": args.max_steps, "save_steps": 1, "log_steps": 1, "sample_records": 1, "report": False}
    values["stage4"] |= {"batch_size": args.batch_size, "gradient_checkpointing": args.gradient_checkpointing}
    if not args.without_lora:
        values["stage4"]["phase2"]["lora"] = LORA
    return values


def command(args: argparse.Namespace, config: Path, start: Path) -> list[str]:
    out = [sys.executable]
    if args.processes > 1:
        out += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
    out += [str(REPOSITORY / "launch" / "train.py"), "--config", str(config), "--phase", "2"]
    output = output_of(args)
    if output.exists():
        sys.exit(f"error: {output} exists; name a new --work_dir or delete it")
    return [*out, "--resume_from", str(start), "--output_dir", str(output)]


def output_of(args: argparse.Namespace) -> Path:
    name = f"{args.engine}-{args.processes}-{'whole' if args.without_lora else 'lora'}"
    return args.work_dir / f"{name}{'-checkpointed' if args.gradient_checkpointing else ''}"


def measure(argv: list[str]) -> None:
    """Run `argv` and print the peak RSS of its largest process in GB."""
    env = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(argv, check=True, env=env)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9)


def print_report(args: argparse.Namespace, peak_gb: float) -> None:
    output = output_of(args)
    lines = run_dir.metrics_log_path(run_dir.phase_dir(output, 2)).read_text(encoding="utf-8").splitlines()
    final = run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None)
    sizes = {path.relative_to(final): path.stat().st_size / 1e6 for path in final.rglob("*") if path.is_file()}
    print(f"{output.name}, batch {args.batch_size}, {args.precision}")
    print(f"peak RSS of the largest process   {peak_gb:.2f} GB (target {TARGET_GB:g} GB)")
    print(f"records a second                  {json.loads(lines[-1])['samples_per_s']:.2f}")
    for name, megabytes in sizes.items():
        if megabytes > 1:
            print(f"{name!s:<50} {megabytes:,.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    else:
        main()
