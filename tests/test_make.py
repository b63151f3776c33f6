"""`make install`, in a folder of its own and without the network: as far as the environment itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def without_pip(folder):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)


def half_of_pip(folder):
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    (package,) = (folder / ".venv").glob("lib/python*/site-packages/pip")
    shutil.rmtree(package / "_internal")


def of_a_python_that_is_gone(folder):
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(folder / "nowhere" / "python3.9")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize("interrupted", [without_pip, half_of_pip, of_a_python_that_is_gone])
def test_an_install_that_was_interrupted_heals(tmp_path, interrupted):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    interrupted(tmp_path)
    done = subprocess.run(
        ["make", "install", f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PIP_NO_INDEX": "1"},
    )
    assert "torch" in done.stderr and "No such file" not in done.stderr, done.stderr  # the first thing from outside
    pip = subprocess.run([tmp_path / ".venv/bin/pip", "--version"], capture_output=True, text=True, check=False)
    assert f"from {tmp_path}/.venv" in pip.stdout, pip.stderr
