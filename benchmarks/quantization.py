"""What each export format costs and gives: size, memory, speed, and answers beside the original.

    python benchmarks/quantization.py --checkpoint outputs/quickstart/stage4/phase2/checkpoint-final \\
        --data outputs/quickstart/data/reasoning_data.json [--num_samples 200] [--formats hf int8 onnx onnx-int8]
    python benchmarks/quantization.py --preset embervlm-39m     # random weights: no answers, sizes and speed alone

Every format is exported, and asked in a process of its own, which has nothing else in its memory. `memory` is the most
that it held, libraries included. `start`: from the process's begin until the model is loaded. `first step`: from the
question to its 20th token, which is about what a first step has; the best of 5 questions, as is the rate. Tokens a
second are those of a processor, so that other work on the machine counts less. One thread, unless `--threads` says
otherwise. `same tokens` are texts that are, token for token, those of `hf`; a third of the questions have no picture.
`right` counts those with one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
FORMATS = ("hf", "int8", "onnx", "onnx-int8")
NUM_FIRST, NUM_TIMED, ROUNDS = 20, 128, 5
Ask = Callable[..., dict[str, Any]]
"""(picture, question, heard, most tokens) -> answer_set and ids; `heard` is called with every token."""


def opened_by_torch(folder: Path, threads: int) -> Ask:
    import torch

    from embervlm.model.decoding import Decoding
    from embervlm.model.embervlm import EmberVLM
    from embervlm.model.generation import generate_answers

    torch.set_num_threads(threads)
    model = EmberVLM.from_pretrained(folder)

    def ask(picture: str | None, question: str, heard: Callable[[], None], most: int | None) -> dict[str, Any]:
        ids: list[int] = []

        def on_token(_: int, token: int) -> None:
            ids.append(token)
            heard()

        decoding = Decoding(min_known=0, max_new_tokens=most)
        (result,) = generate_answers(model, [picture], [question], decoding, on_token)
        return {"answer_set": result["answer_set"], "ids": ids}

    return ask


def opened_by_onnxruntime(folder: Path, threads: int) -> Ask:
    spec = importlib.util.spec_from_file_location("run_onnx", folder / "run_onnx.py")
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    sys.modules["run_onnx"] = runner
    spec.loader.exec_module(runner)

    class Heard(runner.Model):  # type: ignore[misc, name-defined]
        heard: Callable[[], None]

        def _follow(self, chain: Any, token: int) -> bool:
            self.heard()
            return bool(super()._follow(chain, token))

    model = Heard(folder, threads)

    def ask(picture: str | None, question: str, heard: Callable[[], None], most: int | None) -> dict[str, Any]:
        model.heard = heard
        found = model.ask(picture, question, min_known=0, max_new_tokens=most)
        return {"answer_set": found["answer_set"], "ids": found["ids"]}

    return ask


def measure_one(folder: Path, threads: int, questions: list[tuple[str | None, str]]) -> dict[str, Any]:
    """To be run in a process of its own."""
    opened = opened_by_onnxruntime if (folder / "run_onnx.py").exists() else opened_by_torch
    ask, loaded = opened(folder, threads), time.perf_counter() - BEGAN
    firsts, rates = [], []
    for picture, question in (questions * ROUNDS)[:ROUNDS]:
        times: list[float] = []
        begun, busy = time.perf_counter(), time.process_time()
        found = ask(picture, question, lambda times=times: times.append(time.perf_counter()), NUM_TIMED)
        rates.append(len(found["ids"]) / (time.process_time() - busy))
        firsts.append(times[min(NUM_FIRST, len(times)) - 1] - begun)
    memory = most_memory()
    answers = [ask(picture, question, lambda: None, None) for picture, question in questions]
    return {
        "start_s": loaded,
        "first_step_s": min(firsts),
        "tokens_per_s": max(rates),
        "memory_bytes": memory,
        "answers": answers,
    }


def most_memory() -> int:
    """Bytes that this process held at most; what its parent held when it was forked does not count (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def random_checkpoint(preset: str, folder: Path) -> None:
    import torch

    from embervlm.config_file import model_preset
    from embervlm.data.tokenizer import ReasoningTokenizer, train_tokenizer
    from embervlm.model.embervlm import build_model
    from embervlm.robots.rules import ROBOT_ORDER

    torch.manual_seed(0)
    model = build_model({**model_preset(preset), "candidates": list(ROBOT_ORDER)}, load_pretrained=False)
    torch.nn.init.normal_(model.reasoning_module.reasoning_head.output.weight, std=0.02)
    model.attach_tokenizer(ReasoningTokenizer(train_tokenizer(["Which robot should go?"], 300)))
    model.save_pretrained(folder)


def test_questions(data: Path, count: int) -> tuple[list[tuple[str | None, str]], list[Any]]:
    from embervlm.data.records import read_records
    from embervlm.data.splits import split_records

    records = split_records(read_records(data))["test"][:count]
    return [(record.image if place % 3 else None, record.instruction) for place, record in enumerate(records)], records


def shown(name: str, found: dict[str, Any], first: dict[str, Any], records: list[Any]) -> str:
    disk, memory = found["disk_bytes"] / 1e6, found["memory_bytes"] / 1e6
    times = f"{found['start_s']:.1f} s | {found['first_step_s']:.2f} s | {found['tokens_per_s']:.0f}"
    line = f"| {name} | {disk:.1f} MB | {memory:.0f} MB | {times} |"
    if not records:
        return line
    from embervlm.judge.metrics import is_right

    same = sum(a["ids"] == b["ids"] for a, b in zip(found["answers"], first["answers"]))
    right = [is_right(a["answer_set"], r) for place, (a, r) in enumerate(zip(found["answers"], records)) if place % 3]
    return f"{line} {same} of {len(records)} | {sum(right)} of {len(right)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--preset", help="a model preset with random weights, in place of a checkpoint")
    parser.add_argument("--data", type=Path, help="records, for the answers of their test split")
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure_one(args.one, args.threads, [tuple(pair) for pair in json.load(sys.stdin)])))
        return
    questions, records = test_questions(args.data, args.num_samples) if args.data else ([], [])
    from embervlm.run.export import export

    print("| format | on disk | memory | start | first step | tokens/s | same tokens | right |\n|" + "---|" * 8)
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.preset:
            random_checkpoint(args.preset, folder / "checkpoint")
        for format in args.formats:
            out = folder / format
            export(str(args.checkpoint or folder / "checkpoint"), out, format)
            one = [sys.executable, __file__, "--one", str(out), "--threads", str(args.threads)]
            given = json.dumps(questions or [(None, "Which robot should go?")])
            done = subprocess.run(one, input=given, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            found["disk_bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            measured.append(found)
            print(shown(format, found, measured[0], records), flush=True)


if __name__ == "__main__":
    main()
