"""Imports go down the list of rooms, never up: also those inside functions, and those for types only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import nbl_export

# From the top of the house to its ground floor; a room imports from those below it and from itself.
ROOMS = (
    "__main__",
    "cli",
    "transformers",
    "olive",
    "api",
    "stages",
    "doctor",
    "report",
    "evaluate",
    "verify",
    "convert",
    "rewrite",
    "export",
    "runtime",
    "engine",
    "linearize",
    "calibrate",
    "graph",
    "models",
    "settings",
    "workspace",
    "batch",
    "tensorfile",
    "records",
    "processes",
    "machine",
    "ranks",
    "files",
    "progress",
    "blocks",
    "packages",
    "errors",
)
LONGEST = 400  # lines of a file; beyond that it holds more than one idea


def room(module: str) -> str | None:
    """The room of a module; None for the package itself, which holds the version alone."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def upward(known: dict[str, Path]) -> list[str]:
    """One sentence for each import that goes up."""
    found = []
    for module, path in known.items():
        for target, line in imports(path.read_text(encoding="utf-8"), known):
            here, there = room(module), room(target)
            if here is None or there is None or here == there:
                continue
            if ROOMS.index(there) < ROOMS.index(here):
                found.append(f"{path}:{line} ({here}) imports {known[target]} ({there}), which is above it")
    return found


def test_every_module_is_in_a_room() -> None:
    assert {r for module in modules() if (r := room(module))} == set(ROOMS)


def test_imports_go_down() -> None:
    assert upward(modules()) == []


def test_no_file_is_too_long() -> None:
    lines = {str(path): path.read_text(encoding="utf-8").count("\n") for path in modules().values()}
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}


# imports -------------------------------------------------------------------------------------------

PACKAGE = Path(nbl_export.__file__).parent


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module of ``package`` by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Each module of ``known`` that ``source`` imports, wherever the import stands, and its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield (inner if inner in known else str(node.module)), node.lineno
