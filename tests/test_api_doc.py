"""docs/api.md names every public method, and its snippets run.

`python tests/test_api_doc.py docs/api.md`, run where `outputs/quickstart` is, puts what they print under them.
"""

import contextlib
import inspect
import io
import re
import shutil
import sys
from pathlib import Path

import pytest

import embervlm
from embervlm import run_dir
from embervlm.config import REPOSITORY
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.interactive import Reasoning

PAGE = REPOSITORY / "docs" / "api.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(\n```text\n.*?```\n)?", re.DOTALL)


def printed(page):
    """What each snippet of `page` prints; they share their names."""
    names: dict = {}
    out = []
    for found in BLOCK.finditer(page):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(found[1], "docs/api.md", "exec"), names)
        out.append(said.getvalue())
    return out


def with_output(page):
    said = iter(printed(page))

    def filled(found):
        text = next(said).strip("\n")
        return f"```python\n{found[1]}```\n" + (f"\n```text\n{text}\n```\n" if text else "")

    return BLOCK.sub(filled, page)


def test_every_public_name_is_described():
    page = PAGE.read_text(encoding="utf-8")
    own = [name for name, _ in inspect.getmembers(EmberVLM, inspect.isroutine) if name in vars(EmberVLM)]
    names = [name for name in own if not name.startswith("_")] + list(embervlm.__all__)
    fields = [*Decoding.__dataclass_fields__, *Reasoning.__dataclass_fields__]
    assert not [name for name in [*names, *fields] if name != "__version__" and name not in page]


@pytest.mark.slow
def test_every_snippet_runs(lively_model, records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = run_dir.new_tmp_dir(run_dir.phase_dir("outputs/quickstart", 2))
    lively_model.save_pretrained(part)
    run_dir.publish_checkpoint(part, run_dir.checkpoint_path(part.parent, None), 3)
    images = Path("outputs/quickstart/data/images")
    images.mkdir(parents=True)
    shutil.copy(records[0].image, images / "000000.jpg")
    said = printed(PAGE.read_text(encoding="utf-8"))
    assert len(said) > 8 and said[1] == "outputs/quickstart/stage4/phase2/checkpoint-final\n"


def test_the_output_is_put_under_a_snippet_once():
    page = "a\n\n```python\nprint(1)\n```\n\nb\n"
    once = with_output(page)
    assert once == "a\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\nb\n"
    assert with_output(once) == once


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    path.write_text(with_output(path.read_text(encoding="utf-8")), encoding="utf-8")
