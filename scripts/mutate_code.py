"""How many wrong versions of the package its tests catch, room by room.

    python scripts/mutate_code.py --count 200 --seed 0
    python scripts/mutate_code.py --count 20 --rooms linearize graph
    python scripts/mutate_code.py --count 20 --rooms verify --tests tests/verify tests/report

A mutation changes one thing in one module: a comparison, an operator of arithmetic or logic, a constant, a condition,
which is negated, a call that is a statement, which is left out, or two arguments, which change places. Each is made in
a copy of the repository, in which the tests of the module's room run until one fails (`--tests`: those instead). A test
that fails, or takes longer than ten times what all took without a mutation, has caught it. Printed are those that
nobody caught, and a table.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = os.environ.get("NBL_EXPORT_SHARED", str(ROOT.parent / "shared"))
_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.MatMult: ast.Add,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
Change = Callable[[], None]


def mutations(tree: ast.AST) -> list[tuple[int, str, Change]]:
    """Of a module: the line of each, what it is, and what makes it in the ``tree``."""
    return [found for node in _code(tree) for found in _of(node)]


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """What runs: no annotation, no decorator, and nothing for type checkers alone."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, ast.AST):
                    yield from _code(one)


def _of(node: ast.AST) -> Iterator[tuple[int, str, Change]]:
    line = getattr(node, "lineno", 0)

    def put(name: str, value: object) -> Change:
        return lambda: setattr(node, name, value)

    if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
        other = _OPERATORS[type(node.ops[0])]()
        yield (
            line,
            f"{type(node.ops[0]).__name__} → {type(other).__name__}",
            put("ops", [other, *node.ops[1:]]),
        )
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in _OPERATORS:
        other = _OPERATORS[type(node.op)]()
        yield line, f"{type(node.op).__name__} → {type(other).__name__}", put("op", other)
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield line, f"{node.value} → {value}", put("value", value)
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        negated = ast.UnaryOp(ast.Not(), node.test)
        yield line, f"not ({ast.unparse(node.test)})", put("test", negated)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield line, f"{ast.unparse(node)} left out", put("value", ast.Constant(None))
    if isinstance(node, ast.Call) and len(node.args) > 1 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        swapped = [node.args[1], node.args[0], *node.args[2:]]
        yield line, f"arguments of {ast.unparse(node.func)} swapped", put("args", swapped)


def mutant(text: str, number: int) -> tuple[int, str, str]:
    """The ``number``-th mutation of a module: its line, what it is, and the changed module."""
    tree = copy.deepcopy(ast.parse(text))
    line, what, change = mutations(tree)[number]
    change()
    return line, what, ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def room_of(path: Path) -> str:
    return path.parts[1] if len(path.parts) > 2 else "core"


def tests_of(room: str) -> list[str]:
    """Those of a room's folder; of the modules beside the rooms, those beside the folders."""
    if room != "core":
        return [f"tests/{room}"]
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py"))]


def passes(folder: Path, tests: list[str], limit: float | None) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "NBL_EXPORT_SHARED": SHARED}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="*", help="only modules of these; 'core' for those beside the rooms")
    parser.add_argument("--tests", nargs="*", help="arguments of pytest instead of the room's tests")
    asked = parser.parse_args()
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    modules = [Path(f) for f in sorted(files) if f.startswith("nbl_export/") and f.endswith(".py")]
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in modules}
    every = [
        (path, number)
        for path, text in texts.items()
        if not asked.rooms or room_of(path) in asked.rooms
        for number in range(len(mutations(ast.parse(text))))
    ]
    chosen = random.Random(asked.seed).sample(every, min(asked.count, len(every)))
    limits: dict[str, float] = {}
    counts: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="nbl-mutate.") as temporary:
        folder = Path(temporary)
        for name in filter(None, files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        for path, number in sorted(chosen, key=lambda one: room_of(one[0])):
            room = room_of(path)
            tests = asked.tests or tests_of(room)
            if room not in limits:
                start = time.monotonic()
                if not passes(folder, tests, None):
                    raise SystemExit(f"Without any mutation the tests of {room} fail: {' '.join(tests)}")
                limits[room] = 10 * (time.monotonic() - start)
            line, what, changed = mutant(texts[path], number)
            (folder / path).write_text(changed, encoding="utf-8")
            caught = not passes(folder, tests, limits[room])
            (folder / path).write_text(texts[path], encoding="utf-8")
            found = counts.setdefault(room, [0, 0])
            found[0] += 1
            found[1] += caught
            if not caught:
                print(f"not caught: {path}:{line} {what}", flush=True)
    print("\n| room | mutations | caught | |\n|---|---|---|---|")
    for room, (made, seen) in {**counts, "all": [sum(c) for c in zip(*counts.values(), strict=True)]}.items():
        print(f"| {room} | {made} | {seen} | {seen / made:.0%} |")


if __name__ == "__main__":
    main()
