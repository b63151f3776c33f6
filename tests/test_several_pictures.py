"""Records with several pictures: each one's are laid out in one picture, which everything behind the reader takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from training_helpers import ok, train, write_model_yaml, write_run_yaml

from embervlm.curate.convert import convert_file
from embervlm.curate.findings import CheckOptions
from embervlm.curate.quality import filter_file
from embervlm.curate.validate import validate
from embervlm.data.composite import GAP, MAX_SIDE, composite, layout
from embervlm.data.images import ImageError, load_image
from embervlm.data.record_pictures import check_placeholders
from embervlm.data.records import DataError, read_records, write_records
from embervlm.data.store import prepare
from embervlm.evaluation.own_chains import save_to_dataset
from embervlm.model.interactive import Reasoning
from embervlm.report.validation import summary
from embervlm.robots.domain import NO_DOMAIN

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def cards(folder: Path) -> Path:
    """Pairs of cards, of which one is asked for, and one record with a single card."""
    for name, color in COLORS.items():
        Image.new("RGB", (40, 40), color).save(folder / f"{name}.png")
    records = []
    for number in range(18):
        first, second = (list(COLORS)[(number + shift) % 3] for shift in (0, 1 + number % 2))
        asked, color = (("first", first), ("second", second))[number % 2]
        records.append(
            {
                "id": str(number),
                "images": [f"{first}.png", f"{second}.png"],
                "instruction": f"<image>\n<image>\nGame {number}: what color is the {asked} card?",
                "reasoning": f"Step 1: The {asked} card is {color}.\nConclusion: {color}.",
                "answer": color,
            }
        )
    single = {"id": "single", "image": ["red.png"], "instruction": "<image> What color is the card?"}
    path = folder / "cards.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in [*records, {**records[0], "images": None, **single}]))
    return path


def test_pictures_are_laid_out_in_rows_in_their_order() -> None:
    assert [layout(number) for number in (2, 3, 4, 5, 7)] == [(1, 2), (2, 2), (2, 2), (2, 3), (3, 3)]
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    out = np.array(composite([Image.new("RGB", (20, 10), color) for color in colors]))
    assert out.shape == (2 * 10 + 3 * GAP, 2 * 20 + 3 * GAP, 3)
    found = [tuple(out[GAP + row * (10 + GAP) + 5, GAP + col * (20 + GAP) + 10]) for row in (0, 1) for col in (0, 1)]
    assert found == [*colors, (255, 255, 255)]


def test_a_picture_keeps_its_shape_in_its_cell_and_a_large_one_is_shrunk() -> None:
    out = np.array(composite([Image.new("RGB", (900, 300)), Image.new("RGB", (300, 900))]))
    assert out.shape == (MAX_SIDE + 2 * GAP, 2 * MAX_SIDE + 3 * GAP, 3)
    dark = (out < 128).all(-1)
    wide, tall = dark[:, : MAX_SIDE + GAP], dark[:, MAX_SIDE + GAP :]
    assert (wide.any(1).sum(), wide.any(0).sum()) == (112, 336) and (tall.any(1).sum(), tall.any(0).sum()) == (336, 112)


def test_training_and_validation_read_the_composite_and_say_so_in_a_line(tmp_path: Path) -> None:
    path = cards(tmp_path)
    store = prepare(path, tmp_path / "cache", max_closed_answers=8)
    assert store.several_pictures == {"2": 18} and store.unused == {}
    first, *_, single = store.all()
    assert first.instruction == "Game 0: what color is the first card?" and single.image == str(tmp_path / "red.png")
    assert first.metadata["composed_of"] == [str(tmp_path / "red.png"), str(tmp_path / "green.png")]
    assert first.image is not None
    left, right = (load_image(first.image)[24, column].astype(int) for column in (24, 68))
    assert np.abs(left - COLORS["red"]).max() < 4 and np.abs(right - COLORS["green"]).max() < 4
    report = validate(path, CheckOptions(unpack_dir=str(tmp_path / "unpacked"), domain=NO_DOMAIN))
    assert report["trains"] and report["distinct"]["pictures"] == 7
    line = "records with several pictures: 18 with 2; each one's are laid out in one, row by row"
    assert line in summary(report)


def test_a_changed_picture_is_noticed_although_its_composite_is_there(tmp_path: Path) -> None:
    path = cards(tmp_path)
    before = prepare(path, tmp_path / "cache").all()[0].image
    assert prepare(path, tmp_path / "cache").all()[0].image == before
    Image.new("RGB", (40, 40), (0, 0, 0)).save(tmp_path / "green.png")
    os.utime(tmp_path / "green.png", ns=(1, 1))
    after = prepare(path, tmp_path / "cache").all()[0].image
    assert before and after and after != before and load_image(after)[24, 68].max() < 8


@pytest.mark.parametrize(
    ("instruction", "num_pictures", "wanted"),
    [
        ("<image> <image>\nWhich is larger?", 2, "Which is larger?"),
        ("Is <image> like <image>?", 2, "Is picture 1 like picture 2?"),
        ("Is <image_2> like <image_1> or <image_2>?", 2, "Is picture 2 like picture 1 or picture 2?"),
        ("Which is larger?", 3, "Which is larger?"),
        ("What is in <image_1>?", 1, "What is in ?"),
    ],
)
def test_placeholders_become_the_numbers_of_the_pictures(instruction: str, num_pictures: int, wanted: str) -> None:
    problems: list[str] = []
    assert check_placeholders(instruction, num_pictures, problems.append) == wanted and problems == []


@pytest.mark.parametrize(
    ("instruction", "told"),
    [
        ("<image> Which?", "contains 1 picture placeholders for 2 picture(s); write one for each"),
        ("<image_1> or <image_3>?", "contains <image_3>, but the record has 2 picture(s); correct one of them"),
        ("<image_1> or <image>?", None),
    ],
)
def test_placeholders_are_counted_against_the_pictures(instruction: str, told: str | None) -> None:
    problems: list[str] = []
    check_placeholders(instruction, 2, problems.append)
    assert (told or "") in "".join(problems) and bool(problems) == bool(told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metadata": {"boxes": [{"kind": "card", "box": [0, 0, 1, 1]}]}}, "metadata.boxes: are places in one picture"),
        ({"images": ["red.png", "text.png"]}, "text.png: not a picture in a format that Pillow reads"),
        ({"images": ["red.png", None]}, "images: is null, not a string; give the path of the picture"),
    ],
)
def test_what_cannot_be_put_together_is_told_in_a_line(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = cards(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    value = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(value | changes))
    with pytest.raises(DataError, match="record 1: ") as caught:
        prepare(path, tmp_path / "cache")
    assert told in caught.value.problems[0] and len(caught.value.problems) == 1
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="images: contains 2 pictures, which are not put together here"):
        read_records(path)


def test_pictures_inside_a_table_stay_together_when_filtered_and_written(tmp_path: Path) -> None:
    path = cards(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()[:4]]
    for row in rows:
        row["images"] = [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in row["images"]]
        row["instruction"] = "Is <image> like <image>? Game " + row["id"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "cards.parquet")
    filter_file(
        tmp_path / "cards.parquet",
        output=tmp_path / "kept.json",
        min_quality_score=0,
        options=CheckOptions(domain=NO_DOMAIN),
    )
    kept = read_records(tmp_path / "kept.json")
    assert kept[0].metadata["composed_of"] == ["red.png", "green.png"] and len(kept) == 4
    assert kept[0].instruction == "Is picture 1 like picture 2? Game 0"
    write_records(tmp_path / "again.json", kept)
    assert read_records(tmp_path / "again.json")[0].image == kept[0].image


def test_a_conversation_keeps_the_places_of_its_pictures(tmp_path: Path) -> None:
    cards(tmp_path)
    reply = "The left one is green. Grass is green too. The answer is green."
    told = [{"from": "human", "value": "Which of <image> and <image> is like grass?"}, {"from": "gpt", "value": reply}]
    value = {"id": "1", "image": ["green.png", "red.png"], "conversations": told}
    (tmp_path / "given.json").write_text(json.dumps([value]))
    (record,) = convert_file(tmp_path / "given.json", tmp_path / "out.json", source="llava", domain=NO_DOMAIN).records
    assert record.instruction == "Which of picture 1 and picture 2 is like grass?"
    assert read_records(tmp_path / "out.json") == [record]
    (tmp_path / "given.json").write_text(json.dumps([value | {"image": ["green.png"] * 3}]))
    with pytest.raises(DataError, match=r"2 picture placeholders for 3 picture\(s\)"):
        convert_file(tmp_path / "given.json", tmp_path / "out.json", source="llava", domain=NO_DOMAIN)


def test_a_model_is_asked_about_a_list_of_pictures_laid_out_as_in_training(tmp_path: Path) -> None:
    path = cards(tmp_path)
    stored = prepare(path, tmp_path / "cache").all()[0]
    asked = load_image([tmp_path / "red.png", Image.open(tmp_path / "green.png")], size=36)
    assert stored.image is not None and np.abs(asked.astype(int) - load_image(stored.image, size=36)).max() < 8
    with pytest.raises(ImageError, match="list: 0 pictures; give 1 to 16"):
        load_image([])


def test_a_chain_about_several_pictures_is_kept_with_all_of_them(tmp_path: Path) -> None:
    cards(tmp_path)
    given = Reasoning(
        question="Which color is first?",
        steps=["The first card is red.", "Conclusion: red."],
        answer="red",
        answer_set=["red"],
        confidence=0.9,
        image=[tmp_path / "red.png", Image.open(tmp_path / "blue.png")],
        candidates=("blue", "red"),
    )
    path = save_to_dataset(given, tmp_path / "own" / "chains.jsonl")
    (record,) = prepare(path, tmp_path / "cache").all()
    assert len(record.metadata["composed_of"]) == 2 and all(Path(p).exists() for p in record.metadata["composed_of"])


@pytest.mark.slow
def test_records_with_several_pictures_train_and_are_evaluated_and_asked(tmp_path: Path) -> None:
    data = cards(tmp_path)
    run = write_run_yaml(tmp_path, write_model_yaml(tmp_path), data, engine="torch", domain="none", report=False)
    told = ok(train("python", "--config", run, "--stages", "3", "4", "--max_steps", "2", processes=1)).stdout
    assert "records with several pictures: 18 with 2" in told
    final = tmp_path / "outputs" / "stage4" / "phase2" / "checkpoint-final"

    from embervlm import EmberVLM
    from embervlm.evaluation.evaluate import evaluate_checkpoint

    assert evaluate_checkpoint(final, "train", num_samples=4, progress=False)["num_samples"] == 4
    two = [tmp_path / "red.png", tmp_path / "blue.png"]
    model = EmberVLM.from_pretrained(final)
    one = model.generate_with_reasoning(two, "What color is the first card?", max_new_tokens=8)
    batch = model.generate_with_reasoning([two, None], ["What color is the first card?"] * 2, max_new_tokens=8)
    assert one["answer"] == batch[0]["answer"]
