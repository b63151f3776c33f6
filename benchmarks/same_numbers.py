"""Whether a change of the code changes any number: losses, the metrics of an evaluation, the scores of chains.

    python benchmarks/same_numbers.py before.json                       # at the commit before
    python benchmarks/same_numbers.py after.json --compare before.json  # at the commit after; exit 1 where they differ

Everything goes through the commands that users call, so the two commits may be laid out differently. `--tree` measures
another checkout with the environment of this one. Takes about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CHAIN_FILES = ("everyday_chains", "arithmetic_chains", "independent_chains", "unseen_chains")
STEPS = 6
TERMS = ("reasoning", "consistency", "answer", "multimodal", "direct", "dense")


class Tree:
    """A checkout whose commands are run in a folder of their own."""

    def __init__(self, path: Path, work: Path) -> None:
        self.path, self.work = path, work
        self.env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def run(self, *command: str) -> str:
        found = subprocess.run(
            [sys.executable, *command], cwd=self.path, env=self.env, capture_output=True, text=True, check=False
        )
        if found.returncode:
            sys.exit(f"{' '.join(command)} ended with {found.returncode}:\n{found.stderr[-3000:]}")
        return found.stdout

    def embervlm(self, *arguments: str) -> str:
        return self.run("-m", "embervlm.cli", *arguments)


def make_data(tree: Tree) -> Path:
    data = tree.work / "data" / "reasoning_data.json"
    tree.embervlm("data", "generate", "--teacher_model", "rules", "--num_samples", "240", "--output_file", str(data))
    return data


def losses(tree: Tree, data: Path, engine: str, processes: int) -> dict[str, list[dict[str, float]]]:
    """Loss terms of every step of Stage 3 and both phases."""
    output = tree.work / f"{engine}-{processes}"
    arguments = ["launch/train.py", "--config", "configs/quickstart.yaml", "--output_dir", str(output)]
    arguments += ["--reasoning_data", str(data), "--stages", "3", "4", "--engine", engine, "--max_steps", str(STEPS)]
    arguments += ["--log_steps", "1", "--set", "sample_records=0", "report=false"]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        arguments = [*launcher, *arguments]
    tree.run(*arguments)
    curves = {}
    for folder in ("stage3", "stage4/phase1", "stage4/phase2"):
        lines = (output / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        curves[folder] = [numbers_of(json.loads(line), TERMS) for line in lines]
    return curves


def numbers_of(values: dict[str, Any], wanted: tuple[str, ...] = ()) -> dict[str, float]:
    """Every finite number in `values`, nested ones as `outer/inner`; with `wanted` those whose last part it names."""
    out: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= {f"{name}/{inner}": number for inner, number in numbers_of(value, wanted).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            if not wanted or any(name == term or name.endswith(f"/{term}") for term in wanted):
                out[name] = float(value)
    return out


def evaluation(tree: Tree, data: Path, checkpoint: Path) -> dict[str, float]:
    output = tree.work / "eval.json"
    arguments = ["--checkpoint", str(checkpoint), "--split", "test", "--num_samples", "12", "--no_wandb"]
    tree.embervlm("evaluate", *arguments, "--reasoning_data", str(data), "--output_file", str(output))
    result = json.loads(output.read_text(encoding="utf-8"))
    return numbers_of({part: result[part] for part in ("metrics", "validator", "faithfulness") if result.get(part)})


def chain_scores(tree: Tree) -> dict[str, float]:
    """Mean of each score over each file of chains that comes with the tests."""
    out: dict[str, float] = {}
    for name in CHAIN_FILES:
        file = REPOSITORY / "tests" / "data" / f"{name}.jsonl"
        lines = tree.embervlm("score-chains", str(file), "--json").splitlines()
        scored = [numbers_of(json.loads(line)) for line in lines if line.startswith("{")]
        for key in sorted({key for line in scored for key in line}):
            found = [line[key] for line in scored if key in line]
            out[f"{name}/{key}"] = sum(found) / len(found)
    return out


def measure(tree: Tree) -> dict[str, Any]:
    data = make_data(tree)
    curves = {f"{e}-{n}": losses(tree, data, e, n) for e, n in (("torch", 1), ("torch", 2), ("deepspeed", 2))}
    checkpoint = tree.work / "torch-1" / "stage4" / "phase2" / "checkpoint-final"
    return {"losses": curves, "evaluation": evaluation(tree, data, checkpoint), "chains": chain_scores(tree)}


def flat(values: Any, name: str = "") -> dict[str, float]:
    if isinstance(values, dict):
        return {key: value for inner in values for key, value in flat(values[inner], f"{name}/{inner}").items()}
    if isinstance(values, list):
        return {key: value for at, inner in enumerate(values) for key, value in flat(inner, f"{name}/{at}").items()}
    return {name: float(values)}


def differences(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> list[str]:
    """A line for each number that is missing on one side or differs by more than `tolerance`, relative to its size."""
    old, new = flat(before), flat(after)
    lines = [f"{name}: only {'before' if name in old else 'after'}" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        if not math.isclose(old[name], new[name], rel_tol=tolerance, abs_tol=tolerance):
            lines.append(f"{name}: {old[name]:.6g} before, {new[name]:.6g} after")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_file", type=Path)
    parser.add_argument("--compare", type=Path, help="what was measured at another commit")
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="checkout to measure; default: this one")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative; sums of two processes may differ so")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure(Tree(args.tree.resolve(), Path(work)))
    args.output_file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(flat(found))} numbers in {args.output_file}")
    if args.compare:
        lines = differences(json.loads(args.compare.read_text(encoding="utf-8")), found, args.tolerance)
        print("\n".join(lines[:200]) or "all equal")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()
