"""Train a small model on a file of your own records, both phases, and ask it one of its questions.

    python examples/train_on_your_file.py RECORDS.jsonl OUTPUT_DIR [flags of launch/train.py]

A line of the file: {"instruction": "...", "reasoning": "Step 1: ...\\nStep 2: ...\\nConclusion: ...", "answer": "...",
"image": "relative/path.jpg"}. `image` may be left out. docs/data.md has the other forms, and `embervlm data convert`
makes records of ScienceQA, A-OKVQA, LLaVA and others.
"""

from __future__ import annotations

import sys
from pathlib import Path

from embervlm import EmberVLM
from embervlm.cli import main as embervlm
from embervlm.data.records import read_records
from embervlm.run.train import main as train
from embervlm.run_dir import checkpoint_path, phase_dir

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "own_data.yaml"


def main(records: str, output_dir: str, *flags: str) -> None:
    own = ["--model", "own_data", "--domain", "none"]  # the answers come from your file, not from the embedded robots

    # every problem in the file, with its line and what to do; ends here where one would stop training
    report = Path(output_dir) / "validation.txt"
    embervlm(["data", "validate", "--data_file", records, "--output_report", str(report), *own])

    # Stage 3 (perception and answers), then both phases of Stage 4; the same command again resumes
    stages = ["--config", str(RECIPE), "--stages", "3", "4"]
    train([*stages, "--reasoning_data", records, "--output_dir", output_dir, *flags])

    model = EmberVLM.from_pretrained(checkpoint_path(phase_dir(output_dir, 2), None))
    record = read_records(Path(records), candidates=model.config.candidates)[0]
    result = model.generate_with_reasoning(record.image, record.instruction)
    print("\n".join([record.instruction, *result["reasoning_steps"]]))
    print(f"Answer: {result['answer']} (given: {', '.join(record.answer)})")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
