"""The guide's commands and Python snippets, run as it prints them; see guide_snippets.yaml."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from smoke import Smoke, smoke_run
from training_helpers import REPOSITORY, free_port, ok, run

from embervlm.data.records import read_records
from embervlm.data.splits import split_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.owner import OWNER

HERE = Path(__file__).resolve().parent
GUIDE = REPOSITORY.parent / "shared" / "spec" / "stage4_guide.md"
SNIPPETS: list[dict[str, Any]] = yaml.safe_load((HERE / "guide_snippets.yaml").read_text(encoding="utf-8"))
OUR_OWN = {"best checkpoint selection on a login node", "best checkpoint of the guide's folder"}
"""Not in the guide, but promised beside it."""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    found = smoke_run(tmp_path_factory)
    ok(found.first)
    return found


@pytest.fixture
def workplace(smoke: Smoke, tmp_path: Path) -> Path:
    """A folder that looks like the repository after training."""
    for name in ("scripts", "launch", "configs", "embervlm"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    # not its owner: another test may be running the quickstart there again at this moment
    shutil.copytree(smoke.output, tmp_path / "outputs", ignore=shutil.ignore_patterns("data", "cache", OWNER))
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" / "stage4"
    shutil.copytree(smoke.output / "data", data)
    records = read_records(data / "reasoning_data.json", candidates=ROBOTS)
    test = {record.record_id for record in split_records(records)["test"][:6]}
    raw = json.loads((data / "reasoning_data.json").read_text())
    (data / "test.json").write_text(json.dumps([item for item in raw if item["id"] in test]))
    shutil.copy(next((smoke.output / "data" / "images").glob("*.jpg")), tmp_path / "warehouse.jpg")
    return tmp_path


def shell_line(snippet: dict[str, Any]) -> str:
    lines = [line for line in snippet["shell"].splitlines() if not line.startswith("#")]
    line = "\n".join(lines).rstrip() + " " + snippet.get("append", "").format(repository=REPOSITORY)
    return line.replace("torchrun ", f"torchrun --master_port={free_port()} ", 1)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet["name"].replace(" ", "_"))
def test_a_snippet_of_the_guide_runs_as_printed(snippet: dict[str, Any], workplace: Path) -> None:
    if doomed := snippet.get("without"):
        shutil.rmtree(workplace / "outputs" / doomed)
    for made, source in snippet.get("copies", {}).items():
        shutil.copytree(workplace / "outputs" / source, workplace / "outputs" / made)
    if "python" in snippet:
        parts = (snippet.get("prelude", ""), snippet["python"], snippet.get("after", ""))
        argv = [sys.executable, "-c", "\n".join(parts)]
    else:
        argv = ["bash", "-euc", shell_line(snippet)]
    result = ok(run(argv, cwd=workplace, timeout_s=120, WANDB_MODE="offline", WANDB_SILENT="true"))
    for text in snippet.get("prints", ()):
        assert text in result.stdout, result.stdout[-3000:]
    if created := snippet.get("creates"):
        assert (workplace / created).is_file()


@pytest.mark.skipif(not GUIDE.exists(), reason="the guide does not lie beside this checkout")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet["name"].replace(" ", "_"))
def test_a_snippet_stands_in_the_guide_word_for_word(snippet: dict[str, Any]) -> None:
    if snippet["name"] in OUR_OWN:
        return
    printed = " ".join(GUIDE.read_text(encoding="utf-8").split())
    assert " ".join((snippet.get("shell") or snippet["python"]).split()) in printed
