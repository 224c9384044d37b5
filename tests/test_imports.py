"""The house: folders import in one direction, and docs/walkthrough.md lists the files in that order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import cpq_hf

PACKAGE = Path(cpq_hf.__file__).parent
WALKTHROUGH = Path(__file__).parents[1] / "docs" / "walkthrough.md"
FOLDERS = ["", "tensor", "nn", "model", "training", "hf", "export", "cli"]  # "" is the top: errors, distributed
LAST = {"__init__.py"}  # of the package: names everything


def files() -> list[Path]:
    """Return every file of the package, relative to it."""
    return sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))


def folder(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else ""


def imported_files(file: Path) -> set[Path]:
    """Return the files of the package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "cpq_hf" for alias in node.names), f"{file}: import relatively"
        if not isinstance(node, ast.ImportFrom) or (not node.level and (node.module or "").split(".")[0] != "cpq_hf"):
            continue
        start = file.parts[: len(file.parts) - node.level] if node.level else ()
        base = Path(*start, *(node.module or "").removeprefix("cpq_hf.").split("."))
        for alias in node.names:
            choices = (base / f"{alias.name}.py", base / alias.name / "__init__.py", base.with_suffix(".py"))
            there = [choice for choice in choices if (PACKAGE / choice).is_file()]
            found.add(there[0] if there else base / "__init__.py")
    assert all((PACKAGE / other).is_file() for other in found), (file, found)
    return found


def test_a_folder_imports_only_from_those_before_it():
    for file in files():
        if str(file) in LAST:
            continue
        for other in imported_files(file):
            assert FOLDERS.index(folder(other)) <= FOLDERS.index(folder(file)), f"{file} imports from {other}"
            assert str(other) not in LAST, f"{file} imports from {other}"


def listed() -> list[Path]:
    """Return the files of the table, in its order."""
    rows = re.findall(r"^\| (`.*?`) \|", WALKTHROUGH.read_text(encoding="utf-8"), re.MULTILINE)
    return [Path(name) for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_the_walkthrough_lists_every_file_once():
    with_code = {file for file in files() if len(ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body) > 1}
    sources = {file.relative_to(PACKAGE) for kind in ("*.c", "*.h") for file in PACKAGE.rglob(kind)}
    assert sorted(listed()) == sorted(with_code | sources)


@pytest.mark.parametrize("file", [file for file in listed() if file.suffix == ".py"], ids=str)
def test_a_file_imports_only_from_files_above_it_in_the_walkthrough(file):
    order = listed()
    for other in imported_files(file) & set(order):
        assert order.index(other) < order.index(file), f"{file} imports from {other}, which comes after it"


def test_only_files_of_the_model_folder_walk_models():
    walkers = {
        str(file)
        for file in files()
        if any(
            isinstance(node, ast.Attribute)
            and node.attr in ("named_modules", "modules", "children")
            and ast.unparse(node) != "sys.modules"
            for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
        )
    }
    assert walkers == {f"model/{name}.py" for name in ("inspection", "selection", "conversion", "summary")}


def test_public_names():
    assert sorted(cpq_hf.__all__) == cpq_hf.__all__
    assert all(getattr(cpq_hf, name).__doc__ for name in cpq_hf.__all__)
