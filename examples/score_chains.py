"""Score a file of chains, from any model and about anything, and print the weakest with the reasons.

    python examples/score_chains.py CHAINS.jsonl [HOW_MANY]

A line: {"steps": ["...", ...], "answer": "...", "gold_answer"?, "instruction"?, "image"?, "facts"?,
"gold_steps"?}. The more is known about the question, the more the scores find; docs/evaluation.md has the formulas.
`embervlm score-chains` does the same from the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path

from embervlm.judge.chain_file import read_lines, score_lines, scorer_for

SCORES = ("reasoning_consistency", "step_completeness", "logical_flow_score")


def weakest(path: Path, how_many: int) -> list[dict]:
    """The chains with the lowest mean score, each with its `scores`."""
    scorer, domains = scorer_for(None)
    scored = score_lines(read_lines(path), scorer, domains)
    return sorted(scored, key=lambda line: sum(line["scores"][name] for name in SCORES))[:how_many]


def main(path: str, how_many: str = "5") -> None:
    for line in weakest(Path(path), int(how_many)):
        scores = line["scores"]
        print(line.get("instruction") or line.get("id") or "a chain")
        print("  " + ", ".join(f"{name} {scores[name]:.2f}" for name in SCORES))
        for reason in scores["reasons"]:
            print(f"  {reason}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
