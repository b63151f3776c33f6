"""`embervlm data ...`: records before training. Nothing here imports torch before it is needed."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embervlm.config import AugmentationConfig, TrainConfig
from embervlm.config_file import brings_tokenizer, model_preset
from embervlm.options import add_flag, chosen
from embervlm.robots.domain import domain_named

if TYPE_CHECKING:
    from embervlm.curate.findings import CheckOptions


def generate_options(parser: argparse.ArgumentParser) -> None:
    from embervlm.curate.teachers.endpoint import EndpointConfig

    parser.add_argument("--source", choices=("teacher", "self", "human"), default="teacher", help="who writes chains")
    parser.add_argument("--teacher_model", default="rules", help="rules is built in; others are behind an endpoint")
    parser.add_argument("--input_dataset", type=Path, help="records or tasks; rules needs none")
    parser.add_argument(
        "--output_file", type=Path, required=True, help="JSON or JSONL; pictures go to images/ beside it"
    )
    parser.add_argument(
        "--num_samples", type=int, help="default: 50000; rules makes one for each task of --input_dataset"
    )
    parser.add_argument("--shard", metavar="I/N", help="part I (from 0) of N, such as $SLURM_ARRAY_TASK_ID/8")
    parser.add_argument("--image_root", type=Path, help="folder that the input's image paths are relative to")
    parser.add_argument("--samples_per_record", type=int, help="chains for each question; teacher 1, self 4")
    parser.add_argument("--temperature", type=float, help="default: the endpoint's own; self: 0.8")
    rules = parser.add_argument_group("--teacher_model rules")
    rules.add_argument("--questions_per_picture", type=int, default=1, help="records that share a picture")
    rules.add_argument("--seed", type=int, default=0, help="of scenes and wordings")
    rules.add_argument("--workers", type=int, help="processes that draw pictures; default: one per core")
    own = parser.add_argument_group("--source self")
    own.add_argument("--checkpoint", type=Path, help="a Stage 4 checkpoint")
    own.add_argument(
        "--max_reasoning_steps", type=int, help="maximum number of steps; default: as many as the training data needed"
    )
    other = parser.add_argument_group("other teachers, behind an OpenAI-compatible endpoint")
    for field in dataclasses.fields(EndpointConfig):
        if field.name in ("base_url", "api_key_env", "sees_pictures"):
            add_flag(other, EndpointConfig, field.name, flag=f"teacher_{field.name}")
        elif field.name not in ("teacher_model", "samples_per_record", "temperature"):  # above
            add_flag(other, EndpointConfig, field.name)
    other.add_argument(
        "--no_teacher_sees_pictures",
        dest="sees_pictures",
        action="store_false",
        help="send the facts as text (default)",
    )
    _domain_option(parser)


def generate(source: str, *, domain: str, **options: Any) -> None:
    """Make chains: by the rules, by a teacher behind an endpoint, by the model itself, or by people."""
    from embervlm.curate.commands import DEFAULT_SAMPLES, convert_annotations, generate, generate_by_teacher
    from embervlm.curate.teachers.endpoint import EndpointConfig

    common = {name: options.pop(name) for name in ("input_dataset", "output_file", "num_samples", "shard")}
    by_rules = source == "teacher" and options["teacher_model"] == "rules"
    if by_rules:
        names = ("seed", "questions_per_picture", "workers")
        return generate(**{name: options[name] for name in names}, **common)
    if common["num_samples"] is None:
        common["num_samples"] = DEFAULT_SAMPLES
    common |= {"image_root": options["image_root"], "domain": domain_named(domain)}
    if source == "human":
        return convert_annotations(**common)
    given = {name: value for name, value in options.items() if value is not None}
    if source == "self":
        from embervlm.evaluation.self_generated import SelfGeneration, generate_by_itself

        return generate_by_itself(SelfGeneration(**{"checkpoint": None, **chosen(given, SelfGeneration)}), **common)
    generate_by_teacher(EndpointConfig(**chosen(given, EndpointConfig)), **common)


def merge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARD", help="file of a shard; several")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON or JSONL of all of them")
    parser.add_argument(
        "--image_root", type=Path, help="folder that image paths are relative to; default: each file's folder"
    )
    _domain_option(parser)


def merge(domain: str, **options: Any) -> None:
    """Join the shards of a job into one data set."""
    from embervlm.curate.commands import merge

    merge(domain=domain_named(domain), **options)


def validate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data_file", type=Path, required=True, help="as --reasoning_data: a file, a folder of parts, a pattern"
    )
    parser.add_argument(
        "--output_report",
        type=Path,
        required=True,
        help="text, or JSON if it ends in .json; an HTML page goes beside it",
    )
    _check_options(parser)


def validate(data_file: Path, *, output_report: Path, **options: Any) -> None:
    """Report every problem of a data set and its contents; exit status 1 if it cannot be used for training."""
    from embervlm.curate.validate import validate
    from embervlm.report.validation import first_findings, page_beside, summary, write_reports

    page_beside(output_report)  # what is wrong with it is said before minutes of checks
    with tempfile.TemporaryDirectory() as unpack_dir:
        report = validate(data_file, _checked_as(unpack_dir=unpack_dir, **options))
        page = write_reports(report, output_report)
    print("\n".join([*first_findings(report), summary(report), f"{output_report}, {page}"]))
    if not report["trains"]:
        sys.exit(1)


def filter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help=".json, .jsonl or .parquet")
    parser.add_argument("--min_quality_score", type=float, required=True, help="from 0 to 1; docs/data.md defines it")
    parser.add_argument("--output", type=Path, required=True, help=".json or .jsonl; the rejected records go beside it")
    _check_options(parser)


def filter(input: Path, *, output: Path, min_quality_score: float, **options: Any) -> None:
    """Keep the records with at least a given quality."""
    from embervlm.curate.quality import filter_file, rejected_path

    checks = _checked_as(open_pictures=False, **options)
    kept, rejected = filter_file(input, output=output, min_quality_score=min_quality_score, options=checks)
    print(f"{kept:,} records kept in {output}, {rejected:,} rejected with reasons in {rejected_path(output)}")
    if output.resolve().parent != (root := Path(options["image_root"] or input.parent)).resolve():
        print(f"the pictures were not moved: read {output} with --image_root {root}")


def _domain_option(parser: argparse.ArgumentParser) -> None:
    add_flag(parser, TrainConfig, "domain")


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image_root", type="path", help="folder that picture paths are relative to")
    parser.add_argument("--allow_outside", action="store_true", help="accept pictures outside the data folder")
    parser.add_argument(
        "--without_chains",
        dest="require_reasoning",
        action="store_false",
        help="records need no chain, as where phase 3 trains on them",
    )
    parser.add_argument(
        "--max_reasoning_length", type=int, default=512, help="maximum number of tokens of chain and answer"
    )
    parser.add_argument(
        "--model",
        type="path",
        default=TrainConfig.model,
        help="preset that will train on the data; it limits the length of records",
    )
    parser.add_argument(
        "--tokenizer", type="path", help="folder of the tokenizer that counts tokens; default: the one a run would use"
    )
    parser.add_argument("--workers", type=int, help="processes that check records; default: one per core")
    _domain_option(parser)


def _checked_as(*, domain: str, model: str, tokenizer: str | None, **options: Any) -> CheckOptions:
    """The limits that training with these flags sets for the data."""
    from embervlm.curate.findings import CheckOptions
    from embervlm.run.plan_counts import empty_model

    settings = model_preset(model)
    built, language = empty_model(settings), settings["language"]
    return CheckOptions(
        domain=domain_named(domain),
        positions=built.language_model.max_positions,
        num_visual_tokens=built.num_visual_tokens,
        tokenizer=tokenizer or (language["name_or_path"] if brings_tokenizer(language) else None),
        chat_template=built.config.chat_template,
        vocab_size=built.language_model.vocab_size,
        **options,
    )


def augment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="JSON, JSONL or Parquet file of reasoning records")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON or JSONL; the report goes beside it")
    add_flag(parser, AugmentationConfig, "target_samples")
    add_flag(parser, AugmentationConfig, "validate_reasoning")
    parser.add_argument(
        "--no_validate_reasoning",
        action="store_false",
        dest="validate_reasoning",
        help="keep chains that the checks reject",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is changed, and how")
    _domain_option(parser)


def augment(domain: str, **options: Any) -> None:
    """Make more chains from those of a file; each is checked, and there are no duplicates."""
    from embervlm.curate.augment import augment_file

    augment_file(domain=domain_named(domain), **options)


def convert_options(parser: argparse.ArgumentParser) -> None:
    from embervlm.curate.convert import CONVERTERS

    parser.add_argument("--from", dest="source", required=True, choices=tuple(CONVERTERS), help="format of the input")
    parser.add_argument(
        "--input", type=Path, required=True, help="file: JSON, JSONL, Parquet, Arrow or CSV; or folder of tables"
    )
    parser.add_argument("--output_file", type=Path, required=True, help="JSON or JSONL, in the unified format")
    parser.add_argument(
        "--image_root", type=Path, help="folder that picture paths are relative to; default: the input's folder"
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="skip unreadable records, and list them in a file beside the output"
    )
    parser.add_argument("--allow_outside", action="store_true", help="accept pictures outside the image root")
    _domain_option(parser)


def convert(input: Path, *, output_file: Path, domain: str, **options: Any) -> None:
    """Convert other formats to the unified format."""
    from embervlm.curate.convert import convert_file, summary

    print(summary(convert_file(input, output_file, domain=domain_named(domain), **options), output_file))
