"""Imports flow one way, from the base down to the command line; every import counts, wherever it stands."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "embervlm"
ORDER = (
    "base",
    "words",
    "data",
    "judge",
    "robots",
    "curate",
    "report",
    "model",
    "engines",
    "training",
    "evaluation",
    "serve",
    "run",
    "top",
)
"""A folder imports itself and those to its left. `base` is what lies beside the folders."""
PLACES = {"embervlm": "top", "embervlm.__main__": "top", "embervlm.cli": "top", "embervlm.select_best": "run"}
"""Files beside the folders that put parts together."""
LAZY = {
    "embervlm": "the package must import where torch is not installed",
    "embervlm.select_best": "torch is needed only for a checkpoint without an evaluation",
    "embervlm.data.record_pictures": "records are read without numpy, but for those with several pictures",
    "embervlm.curate": "data commands start without torch or transformers",
    "embervlm.curate.teachers": "so do teachers",
    "embervlm.engines.build": "DeepSpeed takes seconds to import",
    "embervlm.run": "launchers and Slurm's helpers run on login nodes",
}
"""Module or folder whose functions may import our own modules, and why."""


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str, *, at_start: bool = False) -> set[str]:
    """Dotted names of the modules that `name` imports; of our own package down to the file.

    `at_start` leaves out what stands in functions.
    """
    out: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if at_start and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                out.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{name}: relative import; write the full name"
                names = {f"{child.module}.{alias.name}" for alias in child.names} & MODULES.keys()
                out.update(names or {child.module or ""})
            visit(child)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return out


IMPORTS = {name: imports_of(name) & MODULES.keys() for name in MODULES}


def folder_of(name: str) -> str:
    if name in PLACES:
        return PLACES[name]
    is_beside_the_folders = MODULES[name].parent == PACKAGE
    return "base" if is_beside_the_folders else name.split(".")[1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_its_own_folder_and_folders_to_its_left(name: str) -> None:
    place = ORDER.index(folder_of(name))
    wrong = {other for other in IMPORTS[name] if ORDER.index(folder_of(other)) > place}
    assert not wrong, f"{name} imports {sorted(wrong)}, to its right; move what it needs, or hand it in"


def test_no_imports_form_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_our_own_modules_are_imported_in_functions_only_where_start_up_needs_it(name: str) -> None:
    late = IMPORTS[name] - imports_of(name, at_start=True)
    may = name in LAZY or name.rpartition(".")[0] in LAZY
    assert may or not late, f"{name} imports {sorted(late)} in a function; import at the top"


def test_this_test_sees_imports_in_functions_and_for_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "odd.py"
    written.write_text("def f():\n    import embervlm.config\nif TYPE_CHECKING:\n    from embervlm import errors\n")
    monkeypatch.setitem(MODULES, "odd", written)
    assert imports_of("odd") == {"embervlm.config", "embervlm.errors"}
    assert imports_of("odd", at_start=True) == {"embervlm.errors"}


@pytest.mark.parametrize(("package", "engine"), [("deepspeed", "deepspeed"), ("torch.distributed.fsdp", "fsdp")])
def test_only_its_own_engine_imports_deepspeed_or_fsdp(package: str, engine: str) -> None:
    users = {name for name in MODULES if any(f"{other}.".startswith(f"{package}.") for other in imports_of(name))}
    assert users == {f"embervlm.engines.{engine}"}


def test_the_report_imports_neither_torch_nor_a_model() -> None:
    for name in MODULES:
        if folder_of(name) == "report":
            found = imports_of(name)
            assert not {other for other in found if other.partition(".")[0] in ("torch", "transformers")}
            assert not {other for other in found if other in MODULES and folder_of(other) not in ("base", "report")}


@pytest.mark.parametrize(
    "name",
    [
        "embervlm",
        "embervlm.select_best",
        "embervlm.cli",
        "embervlm.run_dir",
        "embervlm.config",
        "embervlm.cluster",
        "embervlm.run.slurm",
        "embervlm.errors",
    ],
)
def test_light_modules_import_where_torch_is_not_installed(name: str) -> None:
    """A login node."""
    code = f"import sys; sys.modules.update(torch=None, transformers=None, deepspeed=None); import {name}"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_do_not_wait_busily_for_each_other_unless_the_user_says_so(given: str | None, found: str) -> None:
    """OpenMP reads the variable when torch is imported, so the package sets it at once."""
    code = "import os, sys, embervlm; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if given is None else {"OMP_WAIT_POLICY": given}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True).stdout
    assert out.split() == [found, "False"]


@pytest.mark.parametrize("folder", ["launch", "scripts", "benchmarks", "examples"])
def test_no_program_shadows_a_package(folder: str) -> None:
    """Its folder comes first on `sys.path`."""
    taken = {"deepspeed", "submitit", "torch", "wandb", "transformers", "embervlm", "yaml", "numpy"}
    found = {path.stem for path in (REPOSITORY / folder).glob("*.py")}
    assert not (taken | sys.stdlib_module_names) & found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_file_is_longer_than_450_lines_and_no_function_than_60(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450, f"{name}: split it by purpose"
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = {f.name: lines for f in functions if (lines := (f.end_lineno or 0) - f.lineno + 1) > 60}
    assert not long, f"{name}: split {long}"
