"""A user's mistake is one line, whatever it concerns and whoever meets it."""

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embervlm import errors, run_dir
from embervlm.cli import main
from embervlm.errors import UserError, told_in_one_line

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("embervlm", "scripts", "launch") for path in (REPOSITORY / folder).rglob("*.py")]
INTERNAL = {
    "PathError",
    "Preempted",
    "NoData",
    "Rejected",
    "Unanswered",
    "_Malformed",
    "_Stuck",
    "Busy",
    "Gone",
    "Stopped",
}
"""Caught by our own code: no user sees them; the last three become a status of the port."""


def test_every_error_of_ours_has_one_base():
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    ours = {"UserError"}
    for _ in bases:
        ours |= {name for name, of in bases.items() if ours & {base.rpartition(".")[2] for base in of}}
    raised = {name for name, of in bases.items() if any(re.search(r"(Error|Exception)$", base) for base in of)}
    assert raised - ours <= INTERNAL, "derive it from UserError where a user can fix it"


def test_one_place_prints_them():
    printing = {path.name for path in SOURCES if 'f"error: {' in path.read_text(encoding="utf-8")}
    assert printing == {"errors.py", "run_onnx.py"}, "the latter is copied to boards, without this package"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "error: mend it"),
        ({"RANK": "0"}, "error: mend it"),
        ({"RANK": "1"}, 1),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1),
        ({"SLURM_PROCID": "1"}, "error: mend it"),
    ],
)
def test_of_several_processes_the_first_alone_says_it(monkeypatch, env, said):
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended, told_in_one_line():
        raise UserError("mend it")
    assert ended.value.code == said


def test_the_others_leave_process_0_the_time_to_say_it(monkeypatch):
    """torchrun kills all of them when one has ended."""
    monkeypatch.setattr(errors, "WAIT_FOR_FIRST_S", 0.3)
    took = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        began = time.monotonic()
        with pytest.raises(SystemExit), told_in_one_line():
            raise UserError("mend it")
        took[rank] = time.monotonic() - began
    assert took["0"] < 0.3 <= took["1"]


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["-m", "embervlm.cli", "describe", "--model", "none.yaml"], marks=pytest.mark.slow),
        ["-m", "embervlm.cli", "select-best", "--checkpoints_dir", "none"],
        ["launch/train.py", "--config", "none.yaml"],
        ["launch/submit.py", "--cluster", "none.yaml"],
        ["-m", "embervlm.run.slurm", "output_dir", "--config", "none.yaml"],
        ["-m", "embervlm.select_best", "--checkpoints_dir", "none"],
        pytest.param(
            ["scripts/evaluate.py", "--checkpoint", "none", "--output_file", "none.json"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_every_command_line_ends_a_users_mistake_in_one_line(argv):
    done = subprocess.run([sys.executable, *argv], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*none.*\n", done.stderr), done.stderr


@pytest.fixture
def checkpoint(tiny_model, scene_data, tmp_path):
    """A complete checkpoint of a tiny model, with every JSON file that one has."""
    part = run_dir.new_tmp_dir(tmp_path)
    tiny_model.save_pretrained(part)
    settings = {"phase": "phase 2", "config": {"reasoning_data": str(scene_data / "reasoning_data.json")}}
    run_dir.write_json_atomic(part / "state.json", {"step": 3, "settings": settings})
    path = run_dir.publish_checkpoint(part, run_dir.checkpoint_path(tmp_path, None), 3)
    run_dir.write_json_atomic(run_dir.calibration_path(path), {"temperature": 1.5})
    return path


DAMAGED = [b"", b'{"half": [1, ', b"[]", b"5", b"null", b"\xff\xfe\x00", b"{}"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("config.json", "vision"),
        ("state.json", "settings"),
        ("tokenizer.json", "model"),
        ("evals/calibration.json", "temperature"),
    ],
)
def test_a_damaged_json_file_of_a_checkpoint_is_one_line_that_names_it(checkpoint, name, key):
    argv = [
        "evaluate",
        "--checkpoint",
        str(checkpoint),
        "--output_file",
        str(checkpoint / "out.json"),
        "--num_samples",
        "1",
        "--no_comparisons",
        "--faithfulness_samples",
        "0",
        "--max_new_tokens",
        "8",
    ]
    good = json.loads((checkpoint / name).read_text())
    for content in [*DAMAGED, json.dumps({**good, key: [1]}).encode()]:
        (checkpoint / name).write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert str(ended.value.code).startswith(f"error: {checkpoint}"), content
