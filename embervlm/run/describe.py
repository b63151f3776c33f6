"""`embervlm describe`: sizes of a model preset."""

from __future__ import annotations

import argparse
import json

from embervlm.config import ConfigError, StageConfig
from embervlm.config_file import brings_tokenizer, load_train_config, model_preset
from embervlm.model.preprocessor import preprocessor_notes
from embervlm.run.config_reference import reference
from embervlm.run.plan_counts import count_parameters, empty_model


def describe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type="path", help="preset in configs/model/, or a YAML; default: that of --config")
    parser.add_argument("--config", type="path", help="a run's YAML, for what it trains; default: the guide's phases")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    parser.add_argument(
        "--config_reference", action="store_true", help="print docs/configuration.md: every key of the YAML files"
    )


def describe(model: str | None, config: str | None, *, as_json: bool, config_reference: bool = False) -> None:
    """Print the parameters of each part, how many are trained in each phase, and the visual tokens of a picture."""
    if config_reference:
        print(reference(), end="")
        return
    run = load_train_config(config) if config else None
    model = model or (run.model if run else None)
    if model is None:
        raise ConfigError("give --model, or the --config of a run")
    settings, stage = model_preset(model), run.stage4 if run else StageConfig()
    built = empty_model(settings)
    parts = built.parameter_counts()
    total = sum(parts.values())
    (_, phase1), (with_adapters, phase2) = (count_parameters(settings, phase) for phase in (stage.phase1, stage.phase2))
    report = {
        "model": model,
        "components": parts,
        "total": total,
        "adapters": with_adapters - total,
        "trainable": {"phase1": phase1, "phase2": phase2},
        "visual_tokens": built.num_visual_tokens,
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for name, count in parts.items():
        print(f"{name:<16} {count:>12,}  {count / total:6.1%}")
    print(f"{'total':<16} {total:>12,}")
    if stage.phase2.lora:
        print(f"{'adapters':<16} {with_adapters - total:>12,}  in phase 2: {', '.join(stage.phase2.lora)}")
    share = phase2 / with_adapters
    print(f"trainable in phase 1: {phase1:,} ({phase1 / total:.1%}), in phase 2: {phase2:,} ({share:.1%})")
    print(f"visual tokens: {built.num_visual_tokens}")
    if not brings_tokenizer(settings["language"]) and "built" not in settings["language"]:
        rows, width = built.language_model.vocab_size, built.language_model.hidden_size
        print(
            f"vocabulary: up to {rows:,} tokens ({rows * width:,} parameters); a run that makes its tokenizer from its "
            "data keeps as many rows as that has"
        )
    for line in preprocessor_notes(settings):
        print(line)
