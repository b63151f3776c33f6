"""Imports flow one way: config -> data -> model -> training -> evaluation -> report."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "embervlm"
ORDER = ("base", "data", "model", "training", "evaluation", "report", "commands")
BASE = {
    "embervlm",
    "embervlm.errors",
    "embervlm.paths",
    "embervlm.ranks",
    "embervlm.config",
    "embervlm.run_dir",
    "embervlm.progress",
    "embervlm.cluster",
    "embervlm.slurm_commands",
    "embervlm.slurm_options",
}
"""Left of every folder."""
COMMANDS = {
    "embervlm.cli",
    "embervlm.quickstart",
    "embervlm.plan",
    "embervlm.slurm",
    "embervlm.submit",
    "embervlm.debug",
}
"""Right of every folder: they put everything together."""
READERS = {"embervlm.select_best"}
"""Reads an output folder; may import `base` alone, and everyone may import it."""
EXCEPTIONS = {
    ("embervlm.evaluation.commands", "embervlm.report.table"): "`embervlm evaluate` prints what it has written",
}
"""(importer, imported) -> why it may."""


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def statements(body: list[ast.stmt], *, everywhere: bool) -> Iterator[ast.stmt]:
    """Import statements; `everywhere` also those in functions and under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if everywhere or not (is_function or is_for_types):
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []), everywhere=everywhere)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, everywhere=everywhere)


def imported_by(name: str, *, everywhere: bool = False) -> set[str]:
    """Dotted names of the modules that `name` imports; of our own package down to the file."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    out = set()
    for node in statements(tree.body, everywhere=everywhere):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import; write the full name"
            of_names = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            out |= of_names or {node.module or ""}
    return out


def folder_of(name: str) -> str:
    if name in BASE or name in READERS:
        return "base"
    if name in COMMANDS:
        return "commands"
    return name.split(".")[1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_its_own_folder_and_folders_to_its_left(name: str) -> None:
    place = ORDER.index(folder_of(name))
    wrong = {
        other
        for other in imported_by(name)
        if other in MODULES and ORDER.index(folder_of(other)) > place and (name, other) not in EXCEPTIONS
    }
    assert not wrong, f"{name} imports {sorted(wrong)}, to its right; import in the function, or move what it needs"


@pytest.mark.parametrize(("name", "other"), sorted(EXCEPTIONS))
def test_an_exception_is_still_needed(name: str, other: str) -> None:
    assert other in imported_by(name), "nothing imports this any more; delete it from EXCEPTIONS"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_lies_in_a_folder_of_the_order(name: str) -> None:
    assert folder_of(name) in ORDER


@pytest.mark.parametrize("name", sorted(READERS))
def test_what_only_reads_an_output_folder_imports_nothing_but_the_base(name: str) -> None:
    assert {other for other in imported_by(name) if other in MODULES} <= BASE


@pytest.mark.parametrize(
    ("package", "engine"), [("deepspeed", "engine_deepspeed"), ("torch.distributed.fsdp", "engine_fsdp")]
)
def test_only_its_own_engine_imports_deepspeed_or_fsdp(package: str, engine: str) -> None:
    users = {
        name
        for name in MODULES
        if any(f"{other}.".startswith(f"{package}.") for other in imported_by(name, everywhere=True))
    }
    assert users == {f"embervlm.training.{engine}"}


def test_the_report_imports_neither_torch_nor_a_model() -> None:
    for name in MODULES:
        if folder_of(name) == "report":
            found = imported_by(name, everywhere=True)
            assert not {other for other in found if other.partition(".")[0] in ("torch", "transformers")}
            assert not {other for other in found if other in MODULES and folder_of(other) not in ("base", "report")}


@pytest.mark.parametrize(
    "name",
    ["embervlm", "embervlm.select_best", "embervlm.cli", "embervlm.run_dir", "embervlm.config", "embervlm.cluster",
     "embervlm.slurm", "embervlm.errors"],
)  # fmt: skip
def test_light_modules_import_where_torch_is_not_installed(name: str) -> None:
    """A login node."""
    code = f"import sys; sys.modules.update(torch=None, transformers=None, deepspeed=None); import {name}"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_no_file_in_launch_shadows_a_package() -> None:
    """That folder comes first on `sys.path`."""
    taken = {"deepspeed", "submitit", "torch", "wandb", "transformers", "embervlm", "yaml", "numpy"}
    assert not taken & {path.stem for path in (REPOSITORY / "launch").iterdir()}
