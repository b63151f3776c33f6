"""Data as other tools write it: pictures under other names or in the table itself, nulls, dates, members of shards."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from embervlm.cli import main
from embervlm.config import TrainConfig
from embervlm.curate.checking import check_file
from embervlm.curate.findings import CheckOptions
from embervlm.curate.quality import filter_file
from embervlm.curate.validate import validate
from embervlm.data.records import DataError, read_records, write_dataset
from embervlm.data.store import RecordStore, prepare
from embervlm.robots.domain import ROBOTS as ROBOTS_DOMAIN
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.run_data import load_data
from embervlm.world import World


def picture(shade: int = 0, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24, 24), (shade, 90, 40)).save(out, form)
    return out.getvalue()


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "instruction": f"Who brings load {number} up the stairs?",
        "reasoning": [f"Load {number} is heavy.", "Stairs need legs.", "Conclusion: Humanoid."],
        "answer": "Humanoid",
        "metadata": {"split_group": f"group {number}"},
    } | changes


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(number))
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


def told(path: Path, folder: Path) -> set[str]:
    """What is wrong with the file by all of training, validate and filter, which must agree, without record and fix."""
    with pytest.raises(DataError) as caught:
        prepare(path, folder / "cache", candidates=ROBOTS)
    trained = {problem.split(" record ", 1)[1].split(": ", 1)[1] for problem in caught.value.problems}
    problems = check_file(path, CheckOptions(unpack_dir=str(folder / "unpacked"), domain=ROBOTS_DOMAIN)).problems
    checked = {f"{p.field}: {p.what}; {p.fix}" for p in problems if p.stops_training}
    assert {text.replace('"', "") for text in checked} == {text.replace('"', "") for text in trained}
    kept, rejected = filter_file(
        path,
        output=folder / "kept.jsonl",
        min_quality_score=0,
        options=CheckOptions(open_pictures=False, domain=ROBOTS_DOMAIN),
    )
    assert kept + rejected == len(path.read_text().splitlines()) and rejected >= 1
    return trained


# ---- pictures under other names


@pytest.mark.parametrize(
    "fields",
    [
        {"file_name": "1.png"},
        {"image_path": "1.png"},
        {"img": "1.png"},
        {"images": ["1.png"]},
        {"Image": "1.png"},
        {"image": {"path": "1.png", "bytes": None}},
        {"image": ["1.png"]},
        {"image": "1.png", "file_name": "old/1.png"},
    ],
)
def test_a_picture_is_taken_by_whatever_name_it_has(fields: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, [record(1, **fields)])
    (found,) = read_records(path, candidates=ROBOTS)
    assert found.image == str(tmp_path / "1.png")
    assert validate(path, CheckOptions(domain=ROBOTS_DOMAIN))["num_text_only"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": ["1.png", "9.png"]}, "images: 9.png is not in "),
        ({"images": ["1.png"] * 17}, "images: contains 17 pictures; give 1 to 16, or leave the field out"),
        ({"image": "1.png", "image_path": "2.png"}, "image_path: names another picture than image; keep one"),
        ({"picture": "9.png"}, "picture: 9.png is not in "),
        ({"photograph": "1.png"}, "photograph: names a picture in a field that is not read; rename the field to image"),
        ({"image_paths": ["1.png"]}, "image_paths: names a picture in a field that is not read; rename the field"),
        ({"imgs": ["0.png", "1.png"]}, "imgs: names a picture in a field that is not read; rename the field"),
        ({"image_base64": "iVBORw0KGgoAAAAN"}, "image_base64: names a picture in a field that is not read"),
        ({"metadata": {"image": "1.png"}}, "image: names a picture in a field that is not read"),
        ({"instruction": "<image>\nWho goes?"}, "instruction: contains <image>, but the record has no picture"),
        ({"instruction": "<image_placeholder> Who?"}, "instruction: contains <image_placeholder>, but the record has"),
        ({"instruction": "<|image_pad|>Who?"}, "instruction: contains <|image_pad|>, but the record has no picture"),
        ({"instruction": "<start_of_image>Who?"}, "instruction: contains <start_of_image>, but the record has no"),
        ({"instruction": "<video>\nWho?", "image": "1.png"}, "instruction: contains <video>, and videos are not read"),
        (
            {"instruction": "<image> or <image>?", "image": "1.png"},
            "instruction: contains 2 picture placeholders for 1 picture(s); write one for each, or none",
        ),
    ],
)
def test_a_picture_that_cannot_be_taken_is_refused_by_every_command(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (found,) = told(write(tmp_path, [record(1, **fields), record(2, image="0.png")]), tmp_path)
    assert message in found.replace('"', "")


def test_paths_of_one_name_in_two_folders_are_two_pictures(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(picture())
    path = write(tmp_path, [record(1, image="a/1.png", image_path="b/1.png"), record(2, image="0.png")])
    (found,) = told(path, tmp_path)
    assert "names another picture than image" in found
    both = write(tmp_path, [record(1, image="a/1.png", image_path="old/a/1.png"), record(2, image="0.png")])
    assert read_records(both, candidates=ROBOTS)[0].image == str(tmp_path / "a" / "1.png")


def test_what_is_said_about_a_picture_is_no_picture(tmp_path: Path) -> None:
    about = {"image_metadata": "24 x 24", "image_source": "a camera", "image_id": "7", "tags": ["day", "sea"]}
    assert read_records(write(tmp_path, [record(1, **about)]), candidates=ROBOTS)[0].metadata.items() >= about.items()


def test_the_place_of_the_picture_is_taken_out_of_the_question(tmp_path: Path) -> None:
    (found,) = read_records(
        write(tmp_path, [record(1, image="1.png", instruction="<image>\nWho goes?")]), candidates=ROBOTS
    )
    assert found.instruction == "Who goes?"


def test_a_missing_field_that_is_there_under_another_name_is_pointed_at(tmp_path: Path) -> None:
    bare = {"image": "1.png", "instruction": "Who goes?", "rationale": "Stairs need legs.", "answers": ["Humanoid"]}
    found = told(write(tmp_path, [bare, {"conversations": [{"from": "human", "value": "?"}]}, record(2)]), tmp_path)
    assert any("reasoning: is missing (there is" in text and "rationale" in text for text in found)
    assert any("answer: is missing (there is" in text and "answers" in text for text in found)
    assert any("`embervlm data convert --from llava` reads conversations" in text for text in found)
    path = write(tmp_path, [record(1, answer="yes", choices=["yes", "no"])])
    with pytest.raises(
        DataError, match=r'answer "yes" is not one of Drone.* \(there is "choices": call it candidates\)'
    ):
        read_records(path, candidates=ROBOTS)


def test_fields_that_nothing_reads_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [record(n, image=f"{n}.png", rationale="Legs.", difficulty=3) for n in range(4)])
    assert prepare(path, tmp_path / "cache", candidates=ROBOTS).unused == {"rationale": 4, "difficulty": 4}
    main(
        [
            "data",
            "validate",
            "--data_file",
            str(path),
            "--output_report",
            str(tmp_path / "report.txt"),
            "--model",
            "quickstart",
        ]
    )
    assert "unused fields and their number of records: difficulty (4), rationale (4)" in capsys.readouterr().out


def test_boxes_in_a_spelling_of_others_are_counted_as_unused(tmp_path: Path) -> None:
    ours, theirs = [{"kind": "load", "box": [0, 0, 1, 1]}], [[0, 0, 24, 12]]
    for boxes in (theirs, {"load": theirs[0]}, [{"bbox": theirs[0]}]):
        path = write(tmp_path, [record(1, image="1.png", boxes=boxes), record(2, image="2.png", boxes=ours)])
        assert prepare(path, tmp_path / "cache", candidates=ROBOTS).unused == {"boxes": 1}


# ---- JSON that is none


def test_nan_and_fields_that_stand_twice_are_refused_with_their_record(tmp_path: Path) -> None:
    twice = json.dumps(record(2))[:-1] + ', "answer": "Drone"}'
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(record(1, score=float("nan"))), twice, json.dumps(record(3, scores=[1.0, float("inf")]))]
    lines.append(json.dumps(record(5, score=3)).replace('"score": 3', '"score": -1e999'))
    path.write_text("\n".join([*lines, json.dumps(record(4))]))
    wanted = {
        "score: is NaN, which is not JSON; write null, or leave the field out",
        '"answer": appears twice in one object; keep one of the two',
        "holds Infinity, which is not JSON; write null, or leave the field out",
        "score: is -1e999, which is larger than numbers can be; write null, or leave the field out",
    }
    with pytest.raises(DataError) as caught:
        prepare(path, tmp_path / "cache", candidates=ROBOTS)
    assert {p.split(": ", 1)[1] for p in caught.value.problems} == wanted
    report = validate(path, CheckOptions(domain=ROBOTS_DOMAIN))
    assert [p["number"] for p in report["problems"] if p["kind"] == "schema"] == [1, 2, 3, 4] and not report["trains"]
    options = CheckOptions(domain=ROBOTS_DOMAIN)
    assert filter_file(path, output=tmp_path / "kept.json", min_quality_score=0, options=options) == (1, 4)
    (tmp_path / "data.json").write_text(f"[{','.join(lines)}]")
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / "data.json", candidates=ROBOTS)
    assert {p.split(": ", 1)[1] for p in caught.value.problems} == wanted
    with pytest.raises(DataError, match="record r1: metadata: .*not JSON compliant"):
        write_dataset(tmp_path / "out.json", [record(1, score=float("nan"))])


def test_scored_chains_hold_no_nan_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "chains.jsonl", tmp_path / "scored.jsonl"
    chain = {"steps": ["2 + 3 = 5.", "So five."], "answer": "5"}
    path.write_text(f"{json.dumps(chain)}\n{json.dumps(chain | {'score': float('nan')})}\n")
    main(["score-chains", str(path), "--output_file", str(out)])
    assert f"{path} line 2: score: is NaN, which is not JSON" in capsys.readouterr().err
    assert "NaN" not in out.read_text().replace("is NaN", "")


# ---- Parquet


def parquet(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, **options), path)
    return path


def prepared(path: Path, folder: Path) -> RecordStore:
    return prepare(path, folder / "cache", candidates=ROBOTS)


def test_the_nulls_that_a_table_gives_every_row_are_absent(scene_data: Path, tmp_path: Path) -> None:
    """As `datasets` writes the product's own records: a struct of all rows' fields, null where a row has none."""
    rows = json.loads((scene_data / "reasoning_data.json").read_text())
    path = parquet(tmp_path, rows)
    assert path.stat().st_size
    options = {"image_root": scene_data, "allow_outside": True}
    wanted = read_records(scene_data / "reasoning_data.json", **options, candidates=ROBOTS)
    assert read_records(path, **options, candidates=ROBOTS) == wanted
    table = pyarrow.parquet.read_table(path).to_pylist()  # nulls and all, as `Dataset.to_json` writes them
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    assert read_records(tmp_path / "data.jsonl", **options, candidates=ROBOTS) == wanted


def test_dates_and_decimals_are_text_and_numbers_for_every_command(tmp_path: Path) -> None:
    day, moment = datetime.date(2024, 5, 6), datetime.datetime(2024, 5, 6, 7, 8)
    extra = {"day": day, "at": moment, "price": decimal.Decimal("2.50"), "count": decimal.Decimal("7")}
    path = parquet(tmp_path, [record(n) | extra for n in range(3)])
    wanted = {"day": "2024-05-06", "at": "2024-05-06T07:08:00", "price": 2.5, "count": 7}
    metadata = prepared(path, tmp_path).all()[0].metadata
    assert {name: metadata[name] for name in extra} == wanted
    assert validate(path, CheckOptions(domain=ROBOTS_DOMAIN))["trains"]
    filter_file(path, output=tmp_path / "kept.jsonl", min_quality_score=0, options=CheckOptions(domain=ROBOTS_DOMAIN))
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == 3 and {name: kept[0][name] for name in extra} == wanted


@pytest.mark.parametrize("as_struct", [True, False])
def test_pictures_in_the_table_are_read_checked_kept_and_trained_on(as_struct: bool, tmp_path: Path) -> None:
    def held(shade: int) -> Any:
        return {"bytes": picture(shade), "path": f"{shade}.png"} if as_struct else picture(shade)

    path = parquet(tmp_path, [record(n, image=held(n)) for n in range(3)])
    images = {found.image for found in prepared(path, tmp_path).all()}
    assert len(images) == 3 and all(Path(str(image)).stat().st_size for image in images)
    report = validate(path, CheckOptions(unpack_dir=str(tmp_path / "unpacked"), domain=ROBOTS_DOMAIN))
    assert report["trains"] and report["distinct"]["pictures"] == 3
    filter_file(
        path, output=tmp_path / "out" / "kept.jsonl", min_quality_score=0, options=CheckOptions(domain=ROBOTS_DOMAIN)
    )
    again = read_records(tmp_path / "out" / "kept.jsonl", candidates=ROBOTS)
    assert {Path(str(found.image)).read_bytes() for found in again} == {picture(n) for n in range(3)}


def test_a_picture_in_the_table_that_is_none_and_bytes_elsewhere_are_refused_alike(tmp_path: Path) -> None:
    path = parquet(tmp_path, [record(1, image=b"no picture"), record(2, image=picture(2))])
    report = validate(path, CheckOptions(unpack_dir=str(tmp_path / "unpacked"), domain=ROBOTS_DOMAIN))
    assert [(p["kind"], p["number"]) for p in report["problems"] if p["kind"] == "picture"] == [("picture", 1)]
    path = parquet(tmp_path, [record(1, image=picture(1), thumbnail=b"123"), record(2)])
    with pytest.raises(DataError, match='record 1: "thumbnail": contains bytes; rename the column to image'):
        prepared(path, tmp_path)
    assert not validate(path, CheckOptions(unpack_dir=str(tmp_path / "unpacked"), domain=ROBOTS_DOMAIN))["trains"]


# ---- shards


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("suffix", "form"),
    [("avif", "AVIF"), ("jfif", "JPEG"), ("jp2", "JPEG2000"), ("ppm", "PPM"), ("img", "PNG"), ("image.png", "PNG")],
)
def test_a_member_of_any_picture_format_is_the_records_picture(suffix: str, form: str, tmp_path: Path) -> None:
    members = {"0.json": json.dumps(record(1, file_name="elsewhere/0.jpg")).encode(), f"0.{suffix}": picture(9, form)}
    (found,) = prepare(shard(tmp_path / "a.tar", members), tmp_path / "cache", candidates=ROBOTS).all()
    assert Path(str(found.image)).read_bytes() == picture(9, form)


def test_members_that_nothing_reads_are_counted_and_two_pictures_refused(tmp_path: Path) -> None:
    members = {"0.json": json.dumps(record(1)).encode(), "0.png": picture(), "0.txt": b"?", "0.mask.png": picture(3)}
    assert prepare(shard(tmp_path / "a.tar", members), tmp_path / "cache", candidates=ROBOTS).unused == {
        ".txt": 1,
        ".mask.png": 1,
    }
    both = {"0.json": json.dumps(record(1)).encode(), "0.png": picture(), "0.jpg": picture(form="JPEG")}
    with pytest.raises(DataError, match=r"record 0: image: 0\.(png|jpg) and 0\.(png|jpg) are all pictures; keep one"):
        prepare(shard(tmp_path / "b.tar", both), tmp_path / "cache", candidates=ROBOTS)


def test_validate_reads_whatever_training_reads_and_finds_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("a", "b"):
        members = {"0.txt": b"?"}
        for n in range(3):
            members |= {f"{n}.json": json.dumps(record(n, id=f"{name}{n}")).encode(), f"{n}.png": picture(n)}
        shard(folder / f"{name}.tar", members)
    arguments = ["data", "validate", "--data_file", str(folder), "--model", "quickstart", "--output_report"]
    main([*arguments, str(tmp_path / "report.txt")])
    said = capsys.readouterr().out
    assert "6 records, 3 different pictures, 0 text only" in said and ".txt (2)" in said
    bare = json.dumps(record(7, answer="Boat")).encode()
    shard(folder / "c.tar", {"seven.json": bare, "seven.png": b"no picture", "eight.png": picture()})
    with pytest.raises(DataError) as caught:
        prepare(folder, tmp_path / "cache", candidates=ROBOTS)
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "report.txt")])
    report = (tmp_path / "report.txt").read_text()
    assert f"{folder / 'c.tar'} record seven: answer:" in report and '"Boat" is not one of' in report
    assert f"{folder / 'c.tar'} record eight: has no eight.json; add it" in report
    assert len(caught.value.problems) == report.count("c.tar record ") == 2
    with pytest.raises(SystemExit, match="filter reads one .json, .jsonl or .parquet file"):
        main(
            [
                "data",
                "filter",
                "--input",
                str(folder),
                "--output",
                str(tmp_path / "o.json"),
                "--min_quality_score",
                "0",
                "--model",
                "quickstart",
            ]
        )


def test_a_run_says_how_many_of_its_pictures_have_no_boxes(
    scene_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((scene_data / "reasoning_data.json").read_text())
    shutil.copytree(scene_data / "images", tmp_path / "images")
    for number in range(0, len(values), 2):
        del values[number]["metadata"]["boxes"]
    (tmp_path / "data.json").write_text(json.dumps(values))
    config = TrainConfig(reasoning_data=str(tmp_path / "data.json"), output_dir=str(tmp_path / "out"))
    load_data(config, 36, World(0, 1, torch.device("cpu")))
    assert re.search(r"\d+ of \d+ records with a picture have boxes; the others have no mul", capsys.readouterr().out)
