"""Every figure of an evaluation is explained, in the same words everywhere."""

from __future__ import annotations

import re

from report_run import evaluation

from embervlm.config import REPOSITORY
from embervlm.evaluation.result import METRICS
from embervlm.meanings import MEANINGS, markdown

WRITTEN = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_every_metric_and_block_of_an_evaluation_has_a_meaning() -> None:
    assert set(METRICS) <= MEANINGS.keys()
    assert {"validator", "own_steps", "attention", "calibration", "per_candidate", "gold_chains"} <= MEANINGS.keys()
    faithfulness = {name for name, value in evaluation()["faithfulness"].items() if name != "num_samples"}
    assert faithfulness <= MEANINGS.keys()
    for name, meaning in MEANINGS.items():
        assert meaning.says.endswith(".") and (not meaning.more or meaning.more.endswith(".")), name


def test_the_documents_say_it_in_the_same_words() -> None:
    assert markdown() in WRITTEN, "stale: paste what `embervlm.meanings.markdown()` gives into docs/evaluation.md"


def test_every_heading_that_is_named_exists() -> None:
    headings = re.findall(r"^#+ (.*)$", WRITTEN, re.M)
    assert {meaning.section for meaning in MEANINGS.values()} <= set(headings)
