"""`embervlm describe`: sizes of a model preset."""

from __future__ import annotations

import argparse
import json

from embervlm.config import BACKBONE
from embervlm.config_file import model_preset
from embervlm.model.embervlm import build_model
from embervlm.model.preprocessor import preprocessor_notes


def describe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type="path", required=True, help="preset in configs/model/, or a YAML")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")


def describe(model: str, *, as_json: bool) -> None:
    """Print the parameters of each part, how many are trained in each phase, and the visual tokens of a picture."""
    built = build_model(model_preset(model), load_pretrained=False)
    parts = built.parameter_counts()
    total = sum(parts.values())
    phase1 = total - sum(parts[name] for name in BACKBONE)
    report = {
        "model": model,
        "components": parts,
        "total": total,
        "trainable": {"phase1": phase1, "phase2": total},
        "visual_tokens": built.num_visual_tokens,
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for name, count in parts.items():
        print(f"{name:<16} {count:>12,}  {count / total:6.1%}")
    print(f"{'total':<16} {total:>12,}")
    print(f"trainable in phase 1: {phase1:,} ({phase1 / total:.1%}), in phase 2: {total:,} (100.0%)")
    print(f"visual tokens: {built.num_visual_tokens}")
    for line in preprocessor_notes(model_preset(model)):
        print(line)
