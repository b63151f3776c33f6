"""The prepared store: what it gives back, when it is built again, and that it does not grow with the data."""

import dataclasses
import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from embervlm.data.dataset import encode_direct, encode_reasoning
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.images import PictureCache
from embervlm.data.records import DataError, read_records, record_to_json
from embervlm.data.samples import Grid
from embervlm.data.splits import split_records
from embervlm.data.store import MARKED, SPLITS, has_field, picture_hashes, picture_paths, prepare, question_hashes
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

GOOD = {"instruction": "Which robot flies?", "reasoning": "Step 1: Only the drone has rotors.", "answer": "Drone"}


def write_texts(path, count, **fields):
    """JSONL of text records of about 1 KB."""
    with open(path, "w") as file:
        for number in range(count):
            chain = "\n".join(f"Step {i}: {'the wind is strong ' * 8}{number}." for i in range(1, 6))
            file.write(json.dumps({**GOOD, "instruction": f"Task {number}?", "reasoning": chain, **fields}) + "\n")
    return path


def touch(path):
    """A new time of change, however coarse the clock."""
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


def built(cache):
    return {path.name: (path / "store.json").stat().st_ino for path in cache.glob("records-*")}


def test_a_store_gives_the_records_of_the_reader_in_their_splits(scene_data, tmp_path):
    path = scene_data / "reasoning_data.json"
    store = prepare(path, tmp_path, candidates=ROBOTS)
    assert {name: list(store.split(name)) for name in SPLITS} == split_records(read_records(path, candidates=ROBOTS))


def test_a_slice_of_a_view_is_the_same_part_of_the_records(scene_data, tmp_path):
    view = prepare(scene_data / "reasoning_data.json", tmp_path, candidates=ROBOTS).split("train")
    assert list(view[2:9:3]) == list(view)[2:9:3] and view[-1] == list(view)[-1]


def test_columns_of_a_view_are_what_its_records_say(scene_data, tmp_path):
    view = prepare(scene_data / "reasoning_data.json", tmp_path, candidates=ROBOTS).split("train")
    some = list(view)
    assert (picture_hashes(view) == picture_hashes(some)).all()
    assert (question_hashes(view) == question_hashes(some)).all()
    assert all((has_field(view, name) == has_field(some, name)).all() for name in MARKED)
    assert list(picture_paths(view)) == list(dict.fromkeys(record.image for record in some))


def test_pictures_of_a_view_are_found_by_their_path(scene_data, tmp_path):
    view = prepare(scene_data / "reasoning_data.json", tmp_path, candidates=ROBOTS).split("train")
    cache = PictureCache(picture_paths(view), 16)
    whole = PictureCache([record.image for record in view], 16)
    assert all((cache[record.image] == whole[record.image]).all() for record in view)


def test_every_problem_of_a_file_is_reported_and_nothing_is_kept(tmp_path):
    values = [GOOD, {**GOOD, "answer": "Boat"}, {**GOOD, "instruction": ""}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, values)))
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "d.jsonl", tmp_path / "cache", candidates=ROBOTS)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        f"{tmp_path / 'd.jsonl'} record {number}" for number in (2, 3)
    ]
    assert not list((tmp_path / "cache").iterdir())


def test_an_unchanged_file_is_not_prepared_again(tmp_path):
    path = write_texts(tmp_path / "d.jsonl", 20)
    prepare(path, tmp_path / "cache", candidates=ROBOTS)
    before = built(tmp_path / "cache")
    assert len(prepare(path, tmp_path / "cache", candidates=ROBOTS)) == 20 and built(tmp_path / "cache") == before


def test_a_changed_file_is_prepared_again(tmp_path):
    path = write_texts(tmp_path / "d.jsonl", 20)
    prepare(path, tmp_path / "cache", candidates=ROBOTS)
    write_texts(path, 21)
    assert len(prepare(path, tmp_path / "cache", candidates=ROBOTS)) == 21


def test_a_changed_picture_is_split_anew(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    values = [{**GOOD, "image": "a.png", "split": "test"}, {**GOOD, "image": "b.png", "split": "train"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, values)))
    prepare(tmp_path / "d.jsonl", tmp_path / "cache", candidates=ROBOTS)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "b.png")
    touch(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b.png: is in test .* and in train"):
        prepare(tmp_path / "d.jsonl", tmp_path / "cache", candidates=ROBOTS)


@pytest.mark.parametrize("name", ["offsets", "marks", "questions"])
def test_a_damaged_store_is_built_again(name, tmp_path):
    path = write_texts(tmp_path / "d.jsonl", 20)
    (tmp_path / "cache").mkdir()
    (prepare(path, tmp_path / "cache", candidates=ROBOTS).folder / f"{name}.npy").write_bytes(b"cut")
    assert len(list(prepare(path, tmp_path / "cache", candidates=ROBOTS).all())) == 20


def test_token_counts_are_kept_with_the_store(tmp_path, tokenizer):
    view = prepare(write_texts(tmp_path / "d.jsonl", 20), tmp_path / "cache", candidates=ROBOTS).split("train")
    sizes = encode_reasoning(view, tokenizer, grid=Grid(3, 3), max_length=1000).sizes
    (kept,) = view.store.folder.glob("lengths-reasoning-*.npy")
    assert (np.load(kept)[:, :2] == sizes).all() and len(sizes) == len(view)
    assert (encode_reasoning(list(view), tokenizer, grid=Grid(3, 3), max_length=1000).sizes == sizes).all()


def test_chains_that_are_too_long_are_reported_from_kept_counts_too(tmp_path, tokenizer):
    view = prepare(write_texts(tmp_path / "d.jsonl", 20), tmp_path / "cache", candidates=ROBOTS).split("train")
    encode_reasoning(view, tokenizer, grid=Grid(3, 3), max_length=1000)
    with pytest.raises(DataError) as caught:
        encode_reasoning(view, tokenizer, grid=Grid(3, 3), max_length=10)
    assert len(caught.value.problems) == len(view)


def test_other_records_of_the_store_have_counts_of_their_own(tmp_path, tokenizer):
    view = prepare(write_texts(tmp_path / "d.jsonl", 20), tmp_path / "cache", candidates=ROBOTS).split("train")
    assert len(encode_direct(view, tokenizer).sizes) == len(view)
    assert len(encode_direct(view[:5], tokenizer).sizes) == 5


def test_what_preparing_holds_does_not_grow_with_the_text(tmp_path):
    """80 bytes a record for the arrays and their copies; the records themselves are of 1 KB."""

    def peak(count):
        path = write_texts(tmp_path / f"{count}.jsonl", count)
        tracemalloc.start()
        prepare(path, tmp_path / "cache", candidates=ROBOTS)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)  # what is imported and made once
    assert (peak(3000) - peak(500)) / 2500 < 200


# ---- sources


def test_reading_stops_nowhere_in_the_middle_of_a_parquet_file(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("embervlm.data.tables.BATCH_ROWS", 3)
    rows = [{**GOOD, "id": str(number)} for number in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert [record.record_id for record in read_records(tmp_path / "d.parquet", candidates=ROBOTS)] == [
        row["id"] for row in rows
    ]


def write_shards(folder, records, *, size=10):
    """Tar files as WebDataset writes them; returns their paths."""
    folder.mkdir()
    shards = []
    for start in range(0, len(records), size):
        shards.append(folder / f"robots-{start // size:03d}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for number, record in enumerate(records[start : start + size], start):
                value = {key: item for key, item in record_to_json(record).items() if key != "image"}
                parts = {"json": json.dumps(value).encode()}
                if record.image:
                    with open(record.image, "rb") as picture:
                        parts["png"] = picture.read()
                for suffix, content in parts.items():
                    entry = tarfile.TarInfo(f"scenes/{number:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return shards


@pytest.fixture
def shards(records, tmp_path):
    """Three shards of scenes, the last record without its picture."""
    some = [*records[:24], dataclasses.replace(records[24], image=None)]
    return some, write_shards(tmp_path / "shards", some)


def test_shards_of_one_name_in_two_folders_keep_their_own_pictures(tmp_path):
    """img2dataset names the shards of each part alike; both records got the picture of the last."""
    for name, shade in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "00000.tar", "w") as tar:
            picture = io.BytesIO()
            Image.new("L", (8, 8), shade).save(picture, "PNG")
            value = {
                "id": name,
                "instruction": "Dark?",
                "reasoning": "Step 1: I look.\nConclusion: Yes.",
                "answer": "yes",
            }
            for suffix, content in (("json", json.dumps(value).encode()), ("png", picture.getvalue())):
                entry = tarfile.TarInfo(f"0.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    store = prepare(tmp_path / "{a,b}" / "00000.tar", tmp_path / "cache")
    shades = {record.record_id: Image.open(record.image).getpixel((0, 0)) for record in store.all()}
    assert shades == {"a": 10, "b": 200}


def test_a_link_in_a_shard_and_an_open_brace_are_told(tmp_path):
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        entry = tarfile.TarInfo("k.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "elsewhere.png"
        tar.addfile(entry)
    with pytest.raises(DataError, match=r"k\.png is a link, whose content is not in the shard"):
        prepare(tmp_path / "l.tar", tmp_path / "cache")
    with pytest.raises(DataError, match="a brace is not closed"):
        prepare(tmp_path / "{000..099.tar", tmp_path / "cache")


@pytest.mark.parametrize("pattern", ["", "*.tar", "robots-{000..002}.tar"])
def test_shards_give_their_records_with_their_pictures(pattern, shards, tmp_path):
    some, _ = shards
    found = prepare(f"{tmp_path}/shards/{pattern}".rstrip("/"), tmp_path / "cache", candidates=ROBOTS).all()
    assert [dataclasses.replace(record, image=None) for record in found] == [
        dataclasses.replace(record, image=None) for record in some
    ]
    for record, original in zip(found, some, strict=True):
        if original.image is None:
            assert record.image is None
        else:
            with open(record.image, "rb") as copy, open(original.image, "rb") as picture:
                assert copy.read() == picture.read()


def test_a_shard_that_is_missing_from_braces_is_named(shards, tmp_path):
    with pytest.raises(DataError, match=r"robots-003\.tar: No such file"):
        prepare(tmp_path / "shards" / "robots-{000..003}.tar", tmp_path / "cache", candidates=ROBOTS)


def test_a_pattern_that_finds_nothing_says_so(tmp_path):
    with pytest.raises(DataError, match=r"no\*\.tar: no such file"):
        prepare(tmp_path / "no*.tar", tmp_path / "cache", candidates=ROBOTS)


def test_a_shard_that_is_cut_off_is_named(shards, tmp_path):
    _, paths = shards
    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    with pytest.raises(DataError, match=r"robots-001\.tar: .*; copy it again"):
        prepare(tmp_path / "shards", tmp_path / "cache", candidates=ROBOTS)


def test_a_bad_record_of_a_shard_is_named_with_shard_and_key(records, tmp_path):
    bad = dataclasses.replace(records[1], answer=("Boat",))
    write_shards(tmp_path / "shards", [records[0], bad])
    with pytest.raises(DataError, match=r'robots-000\.tar record scenes/000001: answer "Boat" is not one of'):
        prepare(tmp_path / "shards", tmp_path / "cache", candidates=ROBOTS)


def test_a_picture_without_a_record_is_reported(tmp_path):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("key.png"), io.BytesIO())
    with pytest.raises(DataError, match=r"a\.tar record key: has no key\.json; add it"):
        prepare(tmp_path / "shards", tmp_path / "cache", candidates=ROBOTS)


def test_a_shard_that_is_damaged_in_the_middle_is_named(shards, tmp_path):
    """A header that is no header would end the stream without a word."""
    _, paths = shards
    content = bytearray(paths[1].read_bytes())
    start = content.index(b"scenes/000013.json")
    content[start : start + 400] = b"\xff" * 400
    paths[1].write_bytes(content)
    with pytest.raises(DataError, match=r"robots-001\.tar: not readable as a shard .damaged or cut off at byte"):
        prepare(tmp_path / "shards", tmp_path / "cache", candidates=ROBOTS)


def test_an_id_used_twice_is_reported_with_both_places(tmp_path):
    values = [{**GOOD, "id": name} for name in ("a", "b", "a", "c", "a")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, values)))
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "d.jsonl", tmp_path / "cache", candidates=ROBOTS)
    with pytest.raises(DataError) as of_reader:
        read_records(tmp_path / "d.jsonl", candidates=ROBOTS)
    assert caught.value.problems == of_reader.value.problems and len(caught.value.problems) == 2


def test_keys_may_start_anew_in_every_shard(records, tmp_path):
    for name in "ab":
        (folder,) = {write_shards(tmp_path / name, [dataclasses.replace(records[0], image=None)])[0]}
        value = {**GOOD, "instruction": f"Which robot of {name}?"}
        with tarfile.open(folder, "w") as tar:
            entry = tarfile.TarInfo("0.json")
            entry.size = len(content := json.dumps(value).encode())
            tar.addfile(entry, io.BytesIO(content))
        folder.rename(tmp_path / f"{name}.tar")
    found = prepare(tmp_path / "*.tar", tmp_path / "cache", candidates=ROBOTS).all()
    assert [record.record_id for record in found] == ["a.tar:0", "b.tar:0"]


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "parquet folder", "shards"])
def test_every_format_gives_the_same_samples_in_the_same_order(form, records, tokenizer, tmp_path):
    """Records, splits, the batches of two epochs and their tokens; of shards the pictures' names are others."""
    import pyarrow
    import pyarrow.parquet

    some = records[:24]
    if form == "shards":
        write_shards(path := tmp_path / "data", some)
    else:
        rows = [record_to_json(record, tmp_path) for record in some]
        path = tmp_path / f"data.{form}"
        if form == "json":
            path.write_text(json.dumps(rows, indent=1))
        elif form == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            rows = [
                {**row, "answer": list(record.answer), "metadata": json.dumps(row["metadata"])}
                for row, record in zip(rows, some, strict=True)
            ]
            parts = [rows] if form == "parquet" else [rows[:10], rows[10:]]
            if form == "parquet folder":
                (path := tmp_path / "data").mkdir()
            for number, part in enumerate(parts):
                file = path if form == "parquet" else path / f"{number}.parquet"
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), file)
    train = prepare(path, tmp_path / "cache", allow_outside=True, candidates=ROBOTS).split("train")
    wanted = split_records(some)["train"]
    assert [dataclasses.replace(r, image=None) for r in train] == [dataclasses.replace(r, image=None) for r in wanted]
    plans = [
        EpochPlan(
            main=encode_reasoning(of, tokenizer, Grid(3, 3), 512),
            mixed=((encode_direct(of, tokenizer), 0.5),),
            global_batch=4,
            seed=3,
        )
        for of in (train, wanted)
    ]
    for step in range(2 * plans[0].num_steps(1)):
        ours, theirs = ([(s.record, s.prompt, s.target) for s in plan.batch(step)] for plan in plans)
        assert ours == theirs
    assert plans[0].digest() == plans[1].digest()


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train.jsonl", "val.jsonl", "test.jsonl"), {"train": 5, "val": 5, "test": 5}),
        (("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl"), {"train": 10, "val": 5}),
    ],
)
def test_files_that_are_called_after_splits_are_those(names, splits, tmp_path):
    (folder := tmp_path / "data").mkdir()
    for number, name in enumerate(names):
        rows = [{**GOOD, "id": f"{number}-{row}", "instruction": f"Task {number} {row}?"} for row in range(5)]
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    for left_out in ("train.skipped.jsonl", "train.rejected.jsonl"):  # as `convert` and `filter` write them
        (folder / left_out).write_text(json.dumps({"record": 3, "problems": ["image: is missing"]}))
    for path in (folder, folder / "*.jsonl"):
        store = prepare(path, tmp_path / "cache", candidates=ROBOTS)
        assert {name: len(store.split(name)) for name in splits} == splits


def test_a_record_that_names_its_split_stays_there_whatever_its_file_is_called(tmp_path):
    for name, split in (("train", "train"), ("test", "val")):
        row = {**GOOD, "id": name, "instruction": f"Task {name}?", "metadata": {"split": split}}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    assert len(prepare(tmp_path, tmp_path / "cache", candidates=ROBOTS).split("val")) == 1


def test_lone_surrogates_and_large_numbers_come_back_from_the_store(tmp_path):
    value = {**GOOD, "id": "r", "metadata": {"text": "\ud800 \u00e9", "n": 10**30, "f": 0.1}}
    (tmp_path / "d.jsonl").write_text(json.dumps(value))
    (record,) = prepare(tmp_path / "d.jsonl", tmp_path / "cache", candidates=ROBOTS).all()
    assert record == read_records(tmp_path / "d.jsonl", candidates=ROBOTS)[0]
