"""How long `embervlm score-chains` takes: chains of the rule teacher, no two alike, with facts and gold answer.

    python benchmarks/scoring_speed.py [--chains 10000] [--fitted]

With `--fitted` the order and the rarity of words are learned first, from 1,000 other chains, as in an evaluation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from perturbations import Chain, scene_chains  # noqa: E402


def write_chains(chains: list[Chain], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, chain in enumerate(chains):
            context = chain.context
            steps = [f"{step} [{number}.{place}]" for place, step in enumerate(chain.steps)]  # nothing is in a cache
            file.write(
                json.dumps(
                    {
                        "steps": steps,
                        "answer": sorted(context.answer),
                        "gold_answer": sorted(context.gold_answer),
                        "instruction": context.instruction,
                        "facts": dict(context.facts),
                        "candidates": sorted(context.candidates),
                    }
                )
                + "\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=10_000)
    parser.add_argument("--fitted", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chains, train = Path(folder) / "chains.jsonl", Path(folder) / "train.jsonl"
        write_chains(scene_chains(held_out=True, number=args.chains), chains)
        write_chains(scene_chains(held_out=False, number=1000, seed=1), train)
        command = [sys.executable, "-m", "embervlm.cli", "score-chains", str(chains), "--json"]
        started = time.perf_counter()
        subprocess.run(
            command + (["--reference", str(train)] if args.fitted else []),
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=REPOSITORY,
        )
        print(f"{args.chains:,} chains: {time.perf_counter() - started:.1f} s, start of the command included")


if __name__ == "__main__":
    main()
