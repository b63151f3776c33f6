"""Tables with pictures: Parquet, and folders in the layout of `save_to_disk` of Hugging Face `datasets`."""

import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from embervlm.curate.convert import convert_file
from embervlm.data.domain import NO_DOMAIN
from embervlm.data.records import DataError, read_records
from embervlm.data.sources import source_files
from embervlm.data.store import prepare


def png(shade):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def rows(start, num):
    return [
        {"image": png(shade), "question": f"Is it {shade}?", "reasoning": ["I look.", "I see."], "answer": shade % 2}
        for shade in range(start, start + num)
    ]


def table(values, **classes):
    """With the names of class labels in the schema, as `datasets` writes them."""
    features = {name: {"names": names, "_type": "ClassLabel"} for name, names in classes.items()}
    made = pa.Table.from_pylist(values)
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save(folder, made, num_files=1):
    """As `Dataset.save_to_disk` does: streams of record batches, and `state.json` that lists them."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{num_files:05}.arrow" for number in range(num_files)]
    size = -(-made.num_rows // num_files)
    for number, name in enumerate(names):
        part = made.slice(number * size, size)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_data_set_is_read_for_training_with_pictures_and_class_names(tmp_path):
    folder = save(tmp_path / "saved", table(rows(0, 50), answer=["no", "yes"]), num_files=3)
    (folder / "cache-1.arrow").write_bytes(b"of map")
    assert [file.name for file in source_files(folder)] == [f"data-{n:05}-of-00003.arrow" for n in range(3)]
    store = prepare(folder, tmp_path / "cache", max_closed_answers=64)
    records = list(store.all())
    assert len(records) == 50 and {record.answer[0] for record in records} == {"no", "yes"}
    assert Image.open(records[49].image).getpixel((0, 0)) == (49, 0, 0)


def test_the_splits_of_a_saved_dictionary_are_kept(tmp_path):
    folder = tmp_path / "saved"
    for name, start, num in (("train", 0, 12), ("validation", 20, 3), ("test", 30, 3)):
        save(folder / name, table(rows(start, num), answer=["no", "yes"]))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    store = prepare(folder, tmp_path / "cache", max_closed_answers=64)
    records = list(store.all())
    assert [record.metadata["split"] for record in records] == ["train"] * 12 + ["val"] * 3 + ["test"] * 3
    assert len({record.record_id for record in records}) == 18, "files of all splits have the same names"


def test_a_split_of_another_name_beside_known_ones_is_refused_and_not_trained_on(tmp_path):
    folder = tmp_path / "saved"
    for name, start in (("train", 0), ("testmini", 20)):
        save(folder / name, table(rows(start, 3), answer=["no", "yes"]))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "testmini"]}))
    with pytest.raises(DataError, match=r"testmini: is no split that is known .*; rename the folder"):
        prepare(folder, tmp_path / "cache", max_closed_answers=64)


def test_convert_takes_a_saved_data_set_and_writes_its_pictures_beside_the_output(tmp_path):
    turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "I look. It is. Yes."}]
    values = [{"image": png(shade), "conversations": turns} for shade in (1, 2, 3)]
    folder = save(tmp_path / "in" / "saved", table(values), num_files=2)
    out = tmp_path / "out" / "records.json"
    made = convert_file(folder, out, source="llava", progress=False, domain=NO_DOMAIN)
    records = read_records(out)
    assert records == made.records and [record.answer for record in records] == [("Yes",)] * 3
    assert [Image.open(record.image).getpixel((0, 0))[0] for record in records] == [1, 2, 3]


@pytest.mark.parametrize("source", ["scienceqa", "aokvqa", "human", "alpaca"])
def test_convert_takes_parquet_with_the_pictures_themselves(tmp_path, source):
    choice = {"question": "Which?", "choices": ["red", "blue"], "image": png(5)}
    value = {
        "scienceqa": choice | {"answer": 0, "hint": "", "lecture": "", "solution": "I look. It is red."},
        "aokvqa": choice | {"correct_choice_idx": 0, "question_id": "q", "rationales": ["It is red."]},
        "human": {"image": png(5), "question": "Which?", "reasoning_steps": ["I look."], "answer": "red"},
        "alpaca": {"images": [png(5)], "problem": "<image>Which?", "solution": "I look. I see.", "answer": "red"},
    }[source]
    pa.parquet.write_table(pa.Table.from_pylist([value]), tmp_path / "in.parquet")
    out = tmp_path / "out" / "records.json"
    (record,) = convert_file(tmp_path / "in.parquet", out, source=source, progress=False, domain=NO_DOMAIN).records
    assert read_records(out) == [record] and record.answer == ("red",)
    assert Image.open(record.image).getpixel((0, 0))[0] == 5


def parquet(path, *values):
    path.parent.mkdir(exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(list(values)), path)
    return path


def test_a_picture_in_the_table_may_have_its_old_path_beside_it_but_not_another_picture(tmp_path):
    row = rows(5, 1)[0] | {"answer": "yes"}
    (record,) = prepare(parquet(tmp_path / "a.parquet", row | {"filename": "old/5.png"}), tmp_path / "a").all()
    assert Image.open(record.image).getpixel((0, 0))[0] == 5
    with pytest.raises(DataError, match="names another picture than image; keep one"):
        prepare(parquet(tmp_path / "b.parquet", row | {"picture": png(6)}), tmp_path / "b")


@pytest.mark.parametrize("other", ["extra.parquet", "testmini.parquet"])
def test_a_table_of_no_known_split_beside_those_of_splits_is_refused_and_not_trained_on(tmp_path, other):
    for name in ("train-00000-of-00001.parquet", "test.parquet", other):
        parquet(tmp_path / "in" / name, *rows(0, 2))
    with pytest.raises(
        DataError, match=rf"{other}: other files of this folder are called after splits .* move it away"
    ):
        prepare(tmp_path / "in", tmp_path / "cache")


def test_files_of_splits_of_two_kinds_are_refused_and_none_is_left_out(tmp_path):
    parquet(tmp_path / "in" / "test.parquet", *rows(0, 2))
    (tmp_path / "in" / "train.jsonl").write_text("{}\n")
    with pytest.raises(
        DataError, match=r"holds test.parquet and train.jsonl, files of two kinds; give those .*\*.parquet"
    ):
        prepare(tmp_path / "in", tmp_path / "cache")


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_a_csv_file_is_read_with_every_cell_as_it_is_written(tmp_path, name, mark):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        ["image", "question", "reasoning", "answer", "source"],
        ["a.png", "Which number?", '"Step 1: I look, twice.\nStep 2: It says ""007""."', "007", "x"],
        ["", '"Is it, really?"', "Step 1: It is.", "yes", ""],
    ]
    text = "\ufeff" + "".join(mark.join(row) + "\r\n" for row in rows)
    (tmp_path / name).write_bytes(text.encode())
    first, second = read_records(tmp_path / name)
    assert (first.image, first.answer, first.metadata["source"]) == (str(tmp_path / "a.png"), ("007",), "x")
    assert first.steps == ("I look, twice.", 'It says "007".')
    assert (second.image, second.instruction, second.steps) == (None, "Is it, really?", ("It is.",))
    assert "source" not in second.metadata


def test_csv_files_of_splits_in_a_folder_keep_their_splits_and_not_with_others_beside_them(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(f"question,reasoning,answer\nIs it {name}?,Step 1: I look.,yes\n")
    records = list(prepare(tmp_path, tmp_path / "cache").all())
    assert sorted((record.instruction, record.metadata["split"]) for record in records) == [
        ("Is it test?", "test"),
        ("Is it train?", "train"),
    ]
    (tmp_path / "val.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"holds val.jsonl and test.csv, files of two kinds"):
        prepare(tmp_path, tmp_path / "cache2")


def test_a_csv_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"question,answer\nWhat?,caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.csv: not readable as CSV .*; check the path or write the file again"):
        read_records(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("question,answer\nWhat?,a,b\n")
    with pytest.raises(DataError, match=r"b\.csv: not readable as CSV .*Expected 2 columns, got 3"):
        read_records(tmp_path / "b.csv")


@pytest.mark.parametrize("index", [True, False])
def test_an_arrow_file_alone_may_have_an_index_or_not(tmp_path, index):
    made = pa.Table.from_pylist([{"question": "Is it?", "reasoning": ["I look."], "answer": "yes"}])
    new = pa.ipc.new_file if index else pa.ipc.new_stream
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, new(file, made.schema) as writer:
        writer.write_table(made)
    assert read_records(tmp_path / "a.arrow")[0].answer == ("yes",)


def test_a_broken_or_missing_part_is_named(tmp_path):
    folder = save(tmp_path / "saved", table(rows(0, 4), answer=["no", "yes"]), num_files=2)
    (folder / "data-00001-of-00002.arrow").write_bytes(b"\xff\xff\xff\xff broken")
    with pytest.raises(DataError, match="data-00001-of-00002.arrow: not readable as Arrow"):
        prepare(folder, tmp_path / "cache")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises((DataError, OSError), match="data-00001-of-00002.arrow"):
        prepare(folder, tmp_path / "cache")


def test_a_folder_without_data_is_an_error_of_convert(tmp_path):
    with pytest.raises(DataError, match="contains no data file; give one, or a folder of Parquet files"):
        convert_file(tmp_path, tmp_path / "out.json", source="llava", progress=False, domain=NO_DOMAIN)
