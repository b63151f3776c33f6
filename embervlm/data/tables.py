"""Rows of Parquet and CSV files, and of what Hugging Face `datasets` saves: `save_to_disk`'s Arrow files, its cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from embervlm.errors import UserError

SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv")
BATCH_ROWS = 512
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val", "test": "test"}


class TableError(UserError):
    """A file that cannot be read as a table."""


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote, in order; of a dictionary of splits those of each.

    Of any other folder its `.arrow` files; [] where it has none.
    """
    if splits := _listed(folder / "dataset_dict.json", "splits"):
        return [file for name in splits if name not in (".", "..") for file in saved_files(folder / str(name))]
    named = _listed(folder / "state.json", "_data_files")
    names = [part["filename"] for part in named if isinstance(part, dict) and isinstance(part.get("filename"), str)]
    found = [folder / os.path.basename(name) for name in names]
    # `map` leaves its results beside a cache, with columns of their own
    return found or sorted(file for file in folder.glob("*.arrow") if not file.name.startswith("cache-"))


def label_of(file: Path) -> str:
    """A file's name for the ids of its records: with its split, as all splits name their files alike."""
    return file.name if _split_of(file) is None else f"{file.parent.name}/{file.name}"


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Each row; class labels by their names, and with the split of the folder that a saved data set has for each.

    Raises:
        TableError: it cannot be read.
    """
    kind, read = {".parquet": ("Parquet", _parquet_batches), ".arrow": ("Arrow", _arrow_batches)}.get(
        path.suffix.lower(), ("CSV", _csv_batches)
    )
    try:  # imported here: slow, and JSON needs none of it
        arrow = import_module("pyarrow")
    except ModuleNotFoundError as error:
        advice = "install it, or convert the file to .jsonl"
        raise TableError(f"{path}: reading {kind} needs pyarrow; {advice}") from error
    split = _split_of(path)
    try:
        for schema, batch in read(path):
            labels = _class_labels(schema)
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                for name, names in labels.items():
                    if isinstance(row.get(name), int) and 0 <= row[name] < len(names):
                        row[name] = names[row[name]]
                yield with_split(row, split)
    except (OSError, ValueError, KeyError, arrow.ArrowException) as error:
        advice = "check the path or write the file again"
        raise TableError(f"{path}: not readable as {kind} ({error}); {advice}") from error


def with_split(value: Any, split: str | None) -> Any:
    """`value` with the split that its file is called after, unless it names one itself."""
    if split is None or not isinstance(value, dict) or value.get("split"):
        return value
    metadata = value.get("metadata")
    return value if isinstance(metadata, dict) and metadata.get("split") else {**value, "split": split}


def _batch_rows(schema: Any) -> int:
    """Fewer rows at once where each may hold a picture."""
    return BATCH_ROWS // 16 if "binary" in str(schema) else BATCH_ROWS


def _parquet_batches(path: Path) -> Iterator[tuple[Any, Any]]:
    with import_module("pyarrow.parquet").ParquetFile(os.fspath(path)) as file:
        for batch in file.iter_batches(batch_size=_batch_rows(file.schema_arrow)):
            yield file.schema_arrow, batch


def _arrow_batches(path: Path) -> Iterator[tuple[Any, Any]]:
    """`datasets` writes streams; files with an index, as other tools write them, begin with their name."""
    ipc = import_module("pyarrow.ipc")
    with open(path, "rb") as raw:
        indexed = raw.read(6) == b"ARROW1"
        raw.seek(0)
        reader = ipc.open_file(raw) if indexed else ipc.open_stream(raw)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if indexed else iter(reader)
        for batch in batches:
            rows = _batch_rows(reader.schema)
            for start in range(0, batch.num_rows, rows):
                yield reader.schema, batch.slice(start, rows)


def _csv_batches(path: Path) -> Iterator[tuple[Any, Any]]:
    """Every cell is a text, so that an answer such as 007 stays as it is written; an empty one is no value."""
    arrow, csv = import_module("pyarrow"), import_module("pyarrow.csv")
    with open(path, encoding="utf-8-sig") as file:
        header = file.readline()
    parse = csv.ParseOptions(delimiter=max(",;\t", key=header.count), newlines_in_values=True)
    with csv.open_csv(path, parse_options=parse) as reader:
        names = reader.schema.names
    cells = csv.ConvertOptions(
        column_types=dict.fromkeys(names, arrow.string()), null_values=[""], strings_can_be_null=True
    )
    with csv.open_csv(path, parse_options=parse, convert_options=cells) as reader:
        for batch in reader:
            yield reader.schema, batch


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """Column -> names of its classes, as `datasets` writes them into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _split_of(file: Path) -> str | None:
    """The split of a file in a saved dictionary of splits; None elsewhere, or where none of them is a split.

    Raises:
        TableError: others of the dictionary are splits and this one is not; its records must not be trained on.
    """
    saved = file.parent.parent / "dataset_dict.json"
    if file.suffix.lower() != ".arrow" or not saved.is_file():
        return None
    own = SPLIT_NAMES.get(file.parent.name.casefold())
    if own is None and any(str(name).casefold() in SPLIT_NAMES for name in _listed(saved, "splits")):
        raise TableError(
            f"{file.parent}: is no split that is known ({', '.join(SPLIT_NAMES)}); rename the folder, here and in "
            f"{saved.name}"
        )
    return own


def _listed(path: Path, name: str) -> list[Any]:
    """The list `name` of the object in a JSON file; [] where there is none."""
    try:
        found = json.loads(path.read_text())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found if isinstance(found, list) else []
