"""The house has floors: a file imports only from files below it, or from its own room without going in circles."""

from __future__ import annotations

import ast
from pathlib import Path

import cpq_hf

PACKAGE = Path(cpq_hf.__file__).parent
RANKS = [
    {"errors", "spec", "packing", "schedule", "kernels", "sharding", "version", "private_apis", "torch_private"},
    {"fitting", "grid", "learned_width", "plan", "recompute"},
    {"quantizer"},
    {"activation_quantizer"},
    {"nn"},
    {"contents", "selection", "surgery", "summary"},
    {"costs", "lengths", "distillation", "oscillation", "inference"},
    {"controller"},
    {"hf", "export"},
    {"verbs"},
    {"cli", "start"},
    {"__init__"},
]
# within a rank, in this order
WITHIN = {
    "spec": {"errors"},
    "kernels": {"packing", "spec"},
    "sharding": {"torch_private"},
    "plan": {"grid"},
    "recompute": {"grid"},
    "surgery": {"contents", "selection"},
    "summary": {"contents"},
}


def rank(room: str) -> int:
    return next(number for number, rooms in enumerate(RANKS) if room in rooms)


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, as dotted names relative to the package."""
    here = file.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*base, *name.split(".")]) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cpq_hf":
            found.add((node.module or "").partition(".")[2])
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "cpq_hf"}
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_file_has_a_rank():
    assert {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in files()} <= set().union(*RANKS)


def test_imports_go_down():
    for file in files():
        room = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(file):
            other = name.split(".")[0]
            allowed = other == room or rank(other) < rank(room) or other in WITHIN.get(room, set())
            assert allowed, f"{file.relative_to(PACKAGE)} (rank {rank(room)}) imports {name} (rank {rank(other)})"


def test_no_circles_inside_a_room():
    for room in ("nn", "hf", "export"):
        graph = {file.stem: set() for file in (PACKAGE / room).glob("*.py")}
        for file in (PACKAGE / room).glob("*.py"):
            graph[file.stem] = {name.split(".")[1] for name in imports(file) if name.startswith(f"{room}.")}
        order: list[str] = []
        while len(order) < len(graph):
            ready = [stem for stem in graph if stem not in order and graph[stem] <= set(order)]
            assert ready, f"{room}/ imports in a circle among {sorted(set(graph) - set(order))}"
            order += ready
        assert order[-1] == "__init__"


def test_only_surgery_and_summary_walk_models():
    walkers = {
        str(file.relative_to(PACKAGE))
        for file in files()
        if any(
            isinstance(node, ast.Attribute)
            and node.attr in ("named_modules", "modules", "children")
            and ast.unparse(node) != "sys.modules"
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        )
    }
    assert walkers == {"contents.py", "selection.py", "surgery.py", "summary.py"}


def test_public_names():
    assert sorted(cpq_hf.__all__) == cpq_hf.__all__
    assert all(getattr(cpq_hf, name).__doc__ for name in cpq_hf.__all__)
