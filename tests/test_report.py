"""The report of a run: what is in it, what it says of bad input, and that nothing recorded becomes markup."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from report_run import METRICS, evaluation, sample, write_checkpoint, write_json, write_run

from embervlm import run_dir
from embervlm.meanings import MEANINGS
from embervlm.report import curves, drawing, figures
from embervlm.report.build import Report, write_report
from embervlm.report.pages import best_examples, failure_cases, index_page, samples_page
from embervlm.report.pictures import file_name, overlay_png, relative_attention
from embervlm.report.recorded import ReportError, RunRecord, as_sample, read_run, read_samples
from embervlm.select_best import select_best_checkpoint

GUIDE_TREE = (
    "reasoning_quality/step_distribution.png",
    "reasoning_quality/consistency_scores.png",
    "reasoning_quality/completeness_heatmap.png",
    "comparison/with_vs_without_reasoning.png",
    "comparison/reasoning_impact.png",
    "samples/best_reasoning_examples.html",
    "samples/failure_cases.html",
)
HOSTILE = (
    "<script>window.hit=1</script><img src=x onerror='window.hit=1'>\"'><svg/onload=window.hit=1></script></style><!--"
    "{{ 7*7 }}{% raw %}$\\frac{1}$\u2028\ud800\x00\u202e"
)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, addresses, and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        self.text += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def report(run: Path) -> Report:
    return write_report(run)


def bare_index(folder: Path) -> Page:
    """The page of the run in `folder` without its figures, which take seconds."""
    captions = {name: caption for name, (caption, _) in figures.FIGURES.items()}
    path = index_page(read_run(folder), folder / "index.html", svgs={}, captions=captions, missing=captions)
    return Page(path)


def edited(folder: Path, path: str, **changed: Any) -> None:
    value = json.loads((folder / path).read_text())
    write_json(folder / path, {**value, **changed})


# ---- what is there


def test_the_guides_tree_is_written(report: Report) -> None:
    out = report.index.parent
    assert out.parts[-2:] == ("stage4", "visualizations")
    for name in GUIDE_TREE:
        assert (out / name).stat().st_size > 1000, name
    for part in ("reasoning_attention", "multimodal_grounding"):
        assert len(list((out / "attention_maps" / part).glob("*.png"))) == figures.ATTENTION_SAMPLES


def test_every_figure_is_drawn_and_stands_in_the_page(report: Report) -> None:
    page = Page(report.index)
    assert set(figures.FIGURES) <= report.figures.keys()
    assert sum(tag == "svg" for tag, _ in page.elements) == 2 * len(figures.FIGURES), "each wide and narrow"
    for path in report.figures.values():
        with Image.open(path) as image:
            assert min(image.size) > 200 and len(set(image.convert("L").getdata())) > 20, path


def test_the_page_holds_every_sample_with_its_steps_and_attention(run: Path, report: Report) -> None:
    written = json.loads((run / "results" / "stage4_eval_samples.json").read_text())
    data = Page(report.index).data
    assert [found["id"] for found in data["samples"]] == [item["id"] for item in written]
    for found, item in zip(data["samples"], written, strict=True):
        assert found["steps"] == item["reasoning_steps"] and found["correct"] == item["correct"]
        assert len(found["attention"]) == len(found["validator"]) == len(item["reasoning_steps"])
        assert data["pictures"][found["picture"]].startswith("data:image/jpeg;base64,")


def test_the_pages_header_names_the_phase_once(report: Report) -> None:
    page = report.index.read_text(encoding="utf-8")
    assert "phase 2, step 550" in page and "phase phase" not in page


def test_every_metric_is_explained_in_a_sentence_and_a_link_leads_further(report: Report) -> None:
    page = Page(report.index)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert {link[1:] for link in links if link and link.startswith("#")} <= ids
    for name in METRICS:
        assert f"#meaning-{name}" in links and page.text.count(MEANINGS[name].says.replace("`", "")) >= 1, name
    assert "Low is good." in page.text


def test_the_pages_say_what_the_number_beside_a_step_is_and_how_far_to_trust_it(report: Report, tmp_path: Path) -> None:
    about = "step validator: its probability that the step is valid. It judges 91% of the model's own steps correctly"
    for path in (report.index, report.index.parent / "samples" / "failure_cases.html"):
        assert about in " ".join(Page(path).text.split()), path
    assert about in Page(report.index).data["validatorNote"]
    path = samples_page([sample(0)], tmp_path / "page.html", "Without an evaluation")
    assert "the model's own mistakes was not measured" in Page(path).text


def test_the_pages_say_how_much_attention_lies_on_each_thing(report: Report, tmp_path: Path) -> None:
    shown, item = Page(report.index).data["samples"][0], sample(0)
    assert [name for name, _ in shown["things"]] == ["flag", "sky"] and shown["reads"][:2] == [[], [0]]
    for step, (flag, sky) in zip(item["attention"]["steps"], shown["shares"], strict=True):
        shares = np.reshape(step, (7, 7)) / sum(step)
        assert sky == round(100 * shares[:3].sum()), "of 0 to 0.4 the upper three rows are touched"
        assert flag == round(100 * shares[2:7, :3].sum())
    text = Page(samples_page([item], tmp_path / "page.html", "One")).text
    assert f"{shown['shares'][1][0]}% on flag (31% of the picture)" in text and "Attention: most, " in text
    assert "Attention of the steps that read a thing" in Page(report.index).text


def test_attention_without_known_things_is_shown_only_where_it_is_asked_for(tmp_path: Path) -> None:
    item = sample(0) | {"boxes": None, "looked_at": None}
    plain = samples_page([item], tmp_path / "plain.html", "One").read_text()
    assert "Attention is not shown. What is where in this picture is not recorded" in plain and "image/png" not in plain
    asked = samples_page([item], tmp_path / "asked.html", "One", unmeasured=True).read_text()
    assert "What is where in this picture is not recorded" in asked and asked.count("image/png") == 4
    assert not figures.write_attention([as_sample(item)], tmp_path)
    folder = write_run(tmp_path / "run", num_samples=2)
    write_json(folder / "results" / "stage4_eval_samples.json", [item])
    assert bare_index(folder).data["samples"][0]["attention"] == []


def test_the_marked_checkpoint_is_the_one_that_select_best_takes(run: Path) -> None:
    marked = [item for item in read_run(run).checkpoints if item.selected]
    assert [item.name for item in marked] == [select_best_checkpoint(run_dir.phase_dir(run, 2)).name]


def test_epochs_and_their_common_questions_can_be_compared(report: Report) -> None:
    sets = Page(report.index).data["sets"]
    assert [found["name"] for found in sets] == ["Epoch 1", "Epoch 2", "Epoch 3"]
    assert len({tuple(item["id"] for item in found["samples"]) for found in sets}) == 1


def test_the_pages_load_nothing_from_anywhere(report: Report) -> None:
    for path in (report.index, *(report.index.parent / "samples").glob("*.html")):
        page = Page(path)
        for tag, attributes in page.elements:
            assert tag not in ("iframe", "object", "embed", "base", "form") or "action" not in attributes
            if "src" in attributes:
                assert (attributes["src"] or "").startswith("data:"), path
            if tag == "link":
                assert attributes["href"] == "data:,"
            if tag == "a":
                assert not re.match(r"\w+:", attributes["href"] or "")
        assert "url(http" not in path.read_text() and "@import" not in path.read_text()


def test_only_the_pages_own_script_may_run(report: Report) -> None:
    page = Page(report.index)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a) or ""
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    gallery = Page(report.index.parent / "samples" / "failure_cases.html")
    assert not gallery.scripts


def test_the_report_needs_no_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, deepspeed=None);"
        "from embervlm.report import build, figures; from embervlm.report.recorded import read_run;"
        f"print(len(read_run({str(run)!r}).samples))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stdout == "24\n", found.stderr


@pytest.mark.slow
def test_two_hundred_samples_with_photos_stay_below_five_megabytes(tmp_path: Path, report: Report) -> None:
    folder = write_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    for place in range(200):  # noise is what a JPEG can least make small
        pixels = rng.integers(0, 255, (320, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{place}.jpg", quality=95)
    samples = [sample(place, image=str(folder / "data" / f"{place}.jpg"), grid=24) for place in range(200)]
    write_json(folder / "results" / "stage4_eval_samples.json", samples)
    began = time.process_time()
    page = bare_index(folder)
    assert time.process_time() - began < 20
    svgs = sum(len(figures.inline_svg(figure, name)) for name, figure in figures.draw_all(read_run(folder))[0].items())
    assert (folder / "index.html").stat().st_size + 2 * svgs < 5_000_000
    assert len(page.data["samples"]) == 200 and all(found["picture"] is not None for found in page.data["samples"])


def test_a_page_says_how_many_of_the_samples_it_shows(run: Path, tmp_path: Path) -> None:
    path = index_page(
        read_run(run),
        tmp_path / "i.html",
        svgs={},
        num_samples=5,
        captions={n: n for n in figures.FIGURES},
        missing={n: n for n in figures.FIGURES},
    )
    page = Page(path)
    assert len(page.data["samples"]) == 5 and "The first 5 of 24" in page.text


# ---- untrusted text


def hostile_run(folder: Path) -> Path:
    """A run in which every recorded text is hostile."""
    config = {"model": HOSTILE, HOSTILE: {"seed": HOSTILE}, "reasoning_data": HOSTILE}
    write_run(folder, num_samples=4, config=config)
    items = []
    for place in range(4):
        item = sample(place, image=str(folder / "data" / HOSTILE.replace("\x00", "").replace("/", "")))
        texts = ("id", "complexity", "question_kind", "instruction", "answer")
        item |= {name: f"{HOSTILE}{place}" for name in texts}
        item |= {
            name: [HOSTILE] * 3
            for name in ("reasoning_steps", "gold_steps", "gold_answer", "answer_set", "head_answer")
        }
        item["scores"] |= {HOSTILE: 0.5, "reasons": [HOSTILE]}
        item["completeness_by_type"] = {HOSTILE: 0.5}
        item["without_reasoning"] = {"answer_set": [HOSTILE], "correct": False}
        item["boxes"] = [{"kind": HOSTILE, "label": HOSTILE, "box": [0.1, 0.1, 0.5, 0.5]}]
        items.append(item | {"correct": place % 2 == 0})
    write_json(folder / "results" / "stage4_eval_samples.json", items)
    for epoch in (1, 2, 3):
        write_json(folder / "stage4" / "reasoning_samples" / f"epoch_{epoch}_samples.json", items)
    entry = {"num": 4, "reasoning": 0.5, "no_reasoning": 0.25}
    edited(
        folder,
        "results/stage4_eval.json",
        checkpoint=HOSTILE,
        split=HOSTILE,
        embervlm_version=HOSTILE,
        backend={HOSTILE: {"name": HOSTILE, "version": HOSTILE}},
        metrics={**METRICS, HOSTILE: 0.5},
        targets={"final_answer_accuracy": {"target": HOSTILE, "met": True}, HOSTILE: {"target": HOSTILE, "met": False}},
        per_candidate={HOSTILE: {"precision": 0.5, "recall": 0.5, "support": 2}},
        validator={HOSTILE: 0.5},
        accuracy_by_question_kind={HOSTILE: entry},
        impact_by_complexity={HOSTILE: entry},
        phase=HOSTILE,
        faithfulness={HOSTILE: HOSTILE, "truncated": {"0.5": 0.5}},
    )
    for phase in (1, 2):
        log = run_dir.metrics_log_path(run_dir.phase_dir(folder, phase))
        lines = [
            {"step": step, "loss": {HOSTILE: 1 / step}, "learning_rate": {HOSTILE: 1 / step}} for step in (1, 2, 3)
        ]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines) + HOSTILE.replace("\ud800", ""))
    return folder


@pytest.mark.slow
def test_no_recorded_text_becomes_markup_or_a_script(tmp_path: Path) -> None:
    folder = hostile_run(tmp_path / "<img src=x onerror=window.hit=1>")
    report = write_report(folder)
    for path in (report.index, *(report.index.parent / "samples").glob("*.html")):
        page = Page(path)
        assert len(page.scripts) == (2 if path == report.index else 0)
        for tag, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on")], (path, tag)
            assert (attributes.get("src") or "data:").startswith("data:"), (path, tag)
        assert page.text.count("window.hit=1") > 5, "it is shown as text"
        assert "{{ 7*7 }}" in page.text
    shown = Page(report.index).data["samples"][0]
    assert shown["instruction"] == f"{HOSTILE}0" and shown["steps"] == [HOSTILE] * 3
    assert "</script" not in re.search(r'id="data">(.*?)</script>', report.index.read_text(), re.S)[1]  # type: ignore[index]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b\\c", "", "..", "x" * 500, "<script>", "\u0430\u0431", "CON:"]
)
def test_the_name_of_a_file_is_only_letters_and_digits(name: str) -> None:
    assert re.fullmatch(r"007_[A-Za-z0-9-]{1,60}", file_name(7, name))


def test_a_very_long_text_is_cut(tmp_path: Path) -> None:
    path = samples_page([{**sample(0), "instruction": "word " * 100_000}], tmp_path / "page.html", "Long")
    assert path.stat().st_size < 200_000 and "more characters" in path.read_text()


# ---- bad input


def test_an_evaluation_of_an_older_version_says_evaluate_again(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=2)
    edited(folder, "results/stage4_eval.json", format=1)
    with pytest.raises(
        ReportError, match=r"stage4_eval.json: evaluation of format 1.*evaluate again: `embervlm evaluate"
    ):
        read_run(folder)


def test_a_checkpoints_older_evaluation_is_left_out_and_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=2)
    edited(folder, "stage4/phase2/checkpoint-275/evals/val.json", format=1)
    record = read_run(folder)
    assert [item.name for item in record.checkpoints if item.phase == 2] == ["checkpoint-final"]
    assert any("checkpoint-275/evals/val.json" in notice and "format 1" in notice for notice in record.notices)


def test_metrics_that_are_not_numbers_are_shown_as_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=3)
    nothing = {name: float("nan") for name in METRICS}
    edited(folder, "results/stage4_eval.json", metrics=nothing, intervals={n: [float("nan"), 1] for n in METRICS})
    items = [
        {
            **sample(0),
            "confidence": float("nan"),
            "validator_scores": [float("inf")] * 4,
            "scores": {"reasoning_consistency": float("nan")},
        }
    ]
    write_json(folder / "results" / "stage4_eval_samples.json", items)
    page = bare_index(folder)
    assert page.text.count("n/a") >= len(METRICS) and "nan" not in page.text.split()
    assert page.data["samples"][0]["confidence"] is None and page.data["samples"][0]["validator"] == [None] * 4
    assert "0 of 5 targets met, 5 not measured" in page.text


def test_figures_say_what_they_lack(tmp_path: Path) -> None:
    write_json(
        tmp_path / "results" / "stage4_eval.json",
        evaluation(
            0, metrics={}, calibration=None, faithfulness=None, accuracy_by_question_kind={}, impact_by_complexity={}
        ),
    )
    drawn, missing = figures.draw_all(read_run(tmp_path))
    assert not drawn and missing.keys() == figures.FIGURES.keys()
    assert all(reason.endswith(".") for reason in missing.values())


def test_losses_keep_to_four_decades_and_name_what_falls_below(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=2)
    lines = [{"step": step, "loss": {"answer": 2.0 / step, "multimodal": 10.0**-step}} for step in range(1, 9)]
    lines.append({"step": 9, "loss": {"answer": 0.2, "multimodal": 0.0, "policy": -0.5}})
    run_dir.metrics_log_path(run_dir.phase_dir(folder, 2)).write_text("\n".join(map(json.dumps, lines)))
    figure = figures.draw_all(read_run(folder))[0]["training/losses"]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert high / low <= 1.001e4 and low < 0.2
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "multimodal (down to 0)" in named and "policy (down to -0.5)" in named and "answer" in named


def test_no_two_figures_draw_the_same_bars(run: Path) -> None:
    drawn, _ = figures.draw_all(read_run(run))
    for first, second in itertools.combinations([drawn[name] for name in sorted(drawn)], 2):
        for a, b in itertools.product(first.axes, second.axes):
            assert not (bars_and_lines(a) & bars_and_lines(b)), (a.get_title(), b.get_title())


def bars_and_lines(axes: Axes) -> set[Any]:
    """Lengths of the bars, and heights of the curves, as far as they say something."""
    lines = {tuple(np.asarray(line.get_ydata(), float).round(6)) for line in axes.lines}
    bars = tuple(tuple(sorted((bar.get_width(), bar.get_height()))) for bar in axes.patches)
    return {line for line in lines if len(set(line)) > 2} | ({bars} if len(bars) > 1 else set())


def test_kinds_that_are_complexities_are_drawn_once(tmp_path: Path) -> None:
    groups = {name: {"num": 10 + place, "reasoning": 0.9, "no_reasoning": 0.5} for place, name in enumerate("ab")}
    other = {f"{name} too": row for name, row in groups.items()}
    changed = evaluation(0, accuracy_by_question_kind=groups, impact_by_complexity=other)
    write_json(tmp_path / "results" / "stage4_eval.json", changed)
    (axes,) = figures.draw_all(read_run(tmp_path))[0]["comparison/reasoning_impact"].axes
    names = sorted(text.get_text().split("\n")[0] for text in axes.get_yticklabels())
    assert names == ["a too, a", "b too, b"]


def test_a_figure_that_nothing_is_left_for_is_removed(run: Path, tmp_path: Path) -> None:
    stale = tmp_path / "comparison" / "faithfulness.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    figures.save_figures({}, tmp_path)
    assert not stale.exists()


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    path = samples_page([sample(0, image="/gone/picture.jpg"), sample(1)], tmp_path / "page.html", "Gone")
    assert "picture not found: /gone/picture.jpg" in Page(path).text and "text only, no picture" in Page(path).text


@pytest.mark.parametrize("content", [b"", b"no picture", b"\xff\xd8\xff\xe0 half a JPEG"])
def test_a_damaged_picture_is_treated_as_missing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    path = samples_page([sample(0, image=str(tmp_path / "bad.jpg"))], tmp_path / "page.html", "Bad")
    assert "picture not found" in Page(path).text


def test_no_samples_at_all_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=2)
    write_json(folder / "results" / "stage4_eval_samples.json", [])
    page = bare_index(folder)
    assert "The evaluation holds no sample." in " ".join(page.text.split()) and page.data["samples"] == []
    path = samples_page([], tmp_path / "none.html", "None", nothing="Nothing was recorded.")
    assert "Nothing was recorded." in Page(path).text


def test_without_saved_samples_the_page_says_how_to_get_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=2)
    (folder / "results" / "stage4_eval_samples.json").unlink()
    assert any("--save_reasoning_samples" in notice for notice in read_run(folder).notices)


@pytest.mark.parametrize(
    ("content", "says"), [("{", "not valid JSON"), ("[]", "has no 'metrics'"), ('{"metrics": 3}', "has no 'metrics'")]
)
def test_a_damaged_evaluation_is_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "results" / "stage4_eval.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ReportError, match=f"stage4_eval.json: .*{says}"):
        read_run(tmp_path)


@pytest.mark.parametrize(("content", "says"), [({}, "not a list"), ([1], r"sample 0: damaged \(not an object")])
def test_damaged_samples_are_named(tmp_path: Path, content: Any, says: str) -> None:
    write_json(tmp_path / "samples.json", content)
    with pytest.raises(ReportError, match=says):
        read_samples(tmp_path / "samples.json")


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nothing to report; looked for"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="no such folder"):
        read_run(tmp_path / "typo")


def test_a_run_that_has_stage_3_alone_shows_its_losses(tmp_path: Path) -> None:
    (tmp_path / "stage3").mkdir()
    line = {"step": 1, "loss": {"direct": 2.0}, "learning_rate": {"vision_encoder": 1e-3}, "elapsed_s": 60.0}
    lines = [line, {**line, "step": 2, "loss": {"direct": 1.0}}]
    (tmp_path / "stage3" / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    report = write_report(tmp_path)
    page = report.index.read_text(encoding="utf-8")
    assert "training/losses" in report.figures and "Stage 3 took" in page and "1.0 min, 2 steps" in page
    titles = [axes.get_title("left") for axes in figures.draw_all(read_run(tmp_path))[0]["training/losses"].axes]
    assert titles == ["Stage 3"]


def test_half_a_log_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=2)
    log = run_dir.metrics_log_path(run_dir.phase_dir(folder, 1))
    num_lines = len(log.read_text().splitlines())
    with log.open("a") as file:
        file.write('{"step": 300, "lo')
    record = read_run(folder)
    assert len(record.curves[1]) == num_lines and any("1 unreadable line" in notice for notice in record.notices)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"reasoning_steps": "one step"}, "reasoning_steps: not a list"),
        ({"scores": 3}, "'int' object is not iterable"),
        ({"attention": {"grid": [2, 2], "steps": [[1]]}}, "a step does not have 2 x 2 shares"),
        ({"boxes": [3]}, "not subscriptable"),
    ],
)
def test_a_damaged_sample_is_named(tmp_path: Path, damage: dict[str, Any], says: str) -> None:
    write_json(tmp_path / "samples.json", [sample(0), {**sample(1), **damage}])
    with pytest.raises(ReportError, match=rf"samples.json sample 1: damaged \(.*{says}.*evaluate again"):
        read_samples(tmp_path / "samples.json")


# ---- what is chosen and drawn


def test_best_examples_are_right_and_of_every_kind() -> None:
    samples = [as_sample(sample(place)) for place in range(24)]
    best = best_examples(samples, 6)
    assert all(item.correct for item in best)
    assert {item.complexity for item in best} == {"simple", "medium", "complex"}


def test_failure_cases_begin_with_the_surest_wrong_answers() -> None:
    samples = [as_sample(sample(place)) for place in range(24)]
    failed = failure_cases(samples, 12)
    wrong = [item for item in failed if not item.correct]
    assert wrong == failed[: len(wrong)] and len(wrong) == 6
    assert [item.confidence for item in wrong] == sorted((item.confidence for item in wrong), reverse=True)


def test_the_veil_is_clear_where_a_step_looked_most() -> None:
    shares = [0.0, 0.1, 0.2, 0.7]
    assert relative_attention(shares, (2, 2)).tolist() == [[0, pytest.approx(1 / 7)], [pytest.approx(2 / 7), 1]]
    png = Image.open(io.BytesIO(base64.b64decode(overlay_png(shares, (2, 2)))))
    opacity = np.asarray(png)[..., 1]
    assert png.size == (2, 2) and opacity[1, 1] == 0 and opacity[0, 0] == opacity.max() > 200


def test_a_fine_grid_is_averaged_and_keeps_its_place() -> None:
    shares = np.zeros((40, 24))
    shares[39, 23] = 1
    small = relative_attention(shares.ravel().tolist(), (40, 24))
    assert small.shape == (16, 16) and small[15, 15] == 1 and small.sum() == 1


def test_wilsons_interval_of_a_hand_worked_case() -> None:
    assert drawing.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert drawing.wilson(1.0, 10)[1] == 1.0 and drawing.wilson(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-3)


def test_figures_are_told_apart_without_colour() -> None:
    looks = [(str(dashes), marker) for _, dashes, marker in drawing.SERIES]
    assert len(set(looks)) == len(looks) and len({marker for _, marker in looks}) == len(looks)


def test_every_curve_is_drawn_however_many_there_are() -> None:
    terms = {f"term {number}": 1.0 for number in range(17)}
    rewards = {f"reward part {number}": 0.5 for number in range(17)}
    lines = [{"step": step, "loss": terms, "policy": rewards} for step in (1, 2)]
    record = RunRecord(name="run", folder=Path("run"), curves={3: lines})
    assert len(curves.losses(record).axes[0].lines) == len(terms)
    assert len(curves.reinforcement(record).axes[0].lines) == len(rewards)


# ---- commands


def test_the_commands_error_is_one_line(run: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "embervlm.cli", "report", str(run / "nowhere")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1 and found.stderr.startswith("error: ") and "no such folder" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_trained_run_does_not_fail_by_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from embervlm.config import TrainConfig
    from embervlm.run.report import write_run_report

    write_run_report(TrainConfig(output_dir=str(tmp_path / "gone")))
    assert "no report (ReportError" in capsys.readouterr().out


@pytest.mark.slow
def test_figures_reach_the_phases_own_wandb_run(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run, offline: what a later `wandb sync` sends."""
    from embervlm.training.tracking import Tracker, log_figures

    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(
        tmp_path, active=True, name="phase 2", first_step=0, total_steps=1, project="embervlm", settings={"seed": 0}
    )
    values = {"loss": {"total": 1.0}, "learning_rate": {"all": 0.1}, "samples_per_s": 1.0, "epoch": 1}
    tracker.advance(1, values)
    tracker.close()
    chosen = {name: report.figures[name] for name in ("comparison/reasoning_impact", "training/losses")}
    assert log_figures(tmp_path, chosen, project="embervlm")
    assert not log_figures(tmp_path / "other", chosen, project="embervlm")
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    # offline-run-<time>-<id>, and -<n> behind it for the second within one second
    assert {path.name.split("-")[3] for path in runs} == {tracker.wandb_run_id}
    sent = [path.read_bytes() for path in (tmp_path / "wandb").rglob("files/media/images/report/**/*.png")]
    assert sorted(sent) == sorted(path.read_bytes() for path in chosen.values())


def test_a_run_that_is_only_trained_has_curves_but_no_metrics(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=2)
    for name in ("stage4_eval.json", "stage4_eval_samples.json"):
        (folder / "results" / name).unlink()
    record = read_run(folder)
    assert record.result is None and record.curves[2] and len(record.sample_sets) == 3
    assert "No evaluation has been recorded" in bare_index(folder).text


def test_a_checkpoint_without_evaluation_does_not_need_a_model(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=2)
    write_checkpoint(folder / "stage4" / "phase2", 400)
    before = copy.deepcopy([item.name for item in read_run(folder).checkpoints])
    assert "checkpoint-400" not in before and any(item.selected for item in read_run(folder).checkpoints)
