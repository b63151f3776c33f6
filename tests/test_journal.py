"""Entries survive what a process and a disk can do."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from embervlm.config import ConfigError
from embervlm.errors import UserError
from embervlm.journal import Journal

SETTINGS = {"--teacher_model": "a"}


def filled(path, number=3):
    with Journal(path, SETTINGS) as journal:
        for index in range(number):
            journal.append([{"key": index}])
    return path


def keys(path):
    with Journal(path, SETTINGS) as journal:
        return [entry["key"] for entry in journal.take()]


def test_entries_come_back_in_their_order(tmp_path):
    assert keys(filled(tmp_path / "j.jsonl")) == [0, 1, 2]


@pytest.mark.parametrize("left", range(1, 12))
def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path, left):
    path = filled(tmp_path / "j.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: min(left, len(lines[-1]) - 1)])
    assert keys(path) == [0, 1]


def test_what_is_appended_after_a_torn_line_is_whole(tmp_path):
    path = filled(tmp_path / "j.jsonl")
    path.write_bytes(path.read_bytes()[:-4])
    with Journal(path, SETTINGS) as journal:
        journal.append([{"key": "new"}])
    assert keys(path) == [0, 1, "new"]


def test_a_torn_first_line_is_an_empty_journal(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"format"')
    assert keys(path) == []


def test_a_line_break_in_a_text_does_not_end_the_entry(tmp_path):
    with Journal(tmp_path / "j.jsonl", SETTINGS) as journal:
        journal.append([{"key": "a\nb\u2028c\x1e\x85"}])
    assert keys(tmp_path / "j.jsonl") == ["a\nb\u2028c\x1e\x85"]


def test_damage_in_the_middle_names_the_line(tmp_path):
    path = filled(tmp_path / "j.jsonl")
    lines = path.read_text().splitlines()
    lines[2] = "rubbish"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"j\.jsonl line 3: damaged"):
        Journal(path, SETTINGS)


def test_entries_without_settings_are_lists_and_have_no_head(tmp_path):
    path = tmp_path / "j.jsonl"
    for number in range(2):
        with Journal(path) as journal:
            journal.append([["chains", number]])
        with path.open("a") as file:
            file.write('["chai')  # killed in the middle of the next one
    with Journal(path) as journal:
        assert journal.take() == [["chains", 0], ["chains", 1]]


def test_other_settings_are_refused_by_name(tmp_path):
    path = filled(tmp_path / "j.jsonl")
    with pytest.raises(ConfigError, match="started with --teacher_model a, not b"):
        Journal(path, {"--teacher_model": "b"})


def test_a_file_of_someone_else_is_not_touched(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps({"id": 1}) + "\n")
    with pytest.raises(ConfigError, match="not written by this command"):
        Journal(path, SETTINGS)
    assert json.loads(path.read_text()) == {"id": 1}


def test_a_second_process_is_kept_out(tmp_path):
    path = tmp_path / "j.jsonl"
    code = (
        "import sys; from pathlib import Path; from embervlm.journal import Journal;"
        "Journal(Path(sys.argv[1]), {'--teacher_model': 'a'})"
    )
    with Journal(path, SETTINGS):
        found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "another process is writing to it" in found.stderr


def test_a_full_disk_leaves_what_stood_there(tmp_path):
    path = filled(tmp_path / "j.jsonl")
    before = path.read_bytes()
    code = (
        "import resource, signal, sys; from pathlib import Path; from embervlm.journal import Journal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"  # then a write past the limit fails instead
        "j = Journal(Path(sys.argv[1]), {'--teacher_model': 'a'});"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 20}, resource.RLIM_INFINITY));"
        "j.append([{'key': 'x' * 100}])"
    )
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "OSError" in found.stderr
    assert path.read_bytes() == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_answers_that_a_full_disk_refuses_are_an_error_that_says_what_to_do(tmp_path):
    path = tmp_path / "data.rejected.jsonl"
    code = (
        "import resource, signal, sys; from pathlib import Path;"
        "from embervlm.curate.teachers.collection import Answer, Collection;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "c = Collection(Path(sys.argv[1]), [], image_root=Path('.'), settings={'--teacher_model': 'a'});"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (120, resource.RLIM_INFINITY));"
        "c.add([Answer(key='q:0', reason='x' * 200, details={})])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data.json")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "DataError" in found.stderr and "the earlier content is intact" in found.stderr
    assert keys(path) == []
