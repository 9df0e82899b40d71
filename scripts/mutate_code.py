"""How many wrong versions of the package its tests catch, room by room.

    python scripts/mutate_code.py --count 200 --seed 0
    python scripts/mutate_code.py --count 20 --rooms linearize graph --lines lines.json

A mutation changes one thing in one module: a comparison, an operator of arithmetic or logic, a constant, a condition,
which is negated, a call that is a statement, which is left out, or two arguments, which change places. Only what a test
runs can be caught, so all tests run once first, and which of them run which line is written to `--lines`, and read from
there if it is there. Each mutation is made in a copy of the repository, in which the tests that run its line, the
fastest first and as many as take a third of `--limit` seconds, run until one fails. One that runs for the whole limit
hangs, and is caught. Printed are those that nobody caught, and a table.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from xml.etree import ElementTree

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
# The order of their arguments says nothing.
_SYMMETRIC = frozenset({"min", "max", "np.array_equal", "np.maximum", "np.minimum", "torch.equal"})
Change = Callable[[], None]


def mutations(tree: ast.AST) -> list[tuple[int, str, Change]]:
    """Of a module: the line of each, what it is, and what makes it in the ``tree``."""
    return [found for node in _code(tree) for found in _of(node)]


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """What runs: no annotation, no decorator, nothing for type checkers alone, and no zip's check of lengths."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
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
        swapped, name = [node.args[1], node.args[0], *node.args[2:]], ast.unparse(node.func)
        if name not in _SYMMETRIC:
            yield line, f"arguments of {name} swapped", put("args", swapped)


def mutant(text: str, number: int) -> tuple[int, str, str]:
    """The ``number``-th mutation of a module: its line, what it is, and the changed module."""
    tree = copy.deepcopy(ast.parse(text))
    line, what, change = mutations(tree)[number]
    change()
    return line, what, ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def room_of(path: Path) -> str:
    return path.parts[1] if len(path.parts) > 2 else "core"


def pytest(folder: Path, *arguments: str, limit: float | None = None) -> bool:
    """Whether the tests pass in ``folder`` within the ``limit`` in seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "NBL_EXPORT_SHARED": SHARED,
        "OMP_NUM_THREADS": "1",
    }
    # A wrong loop may have started processes of its own, which go with their group.
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tests_of_lines(folder: Path, limit: float) -> dict[str, dict[int, list[str]]]:
    """Of each module, the tests for each line, as many as take the ``limit`` in seconds; all tests are run for it.

    First those that run it, then others of their files, which may share what they made; each time the fastest first.
    What runs when the module is imported, line 0, has the tests of all its lines.
    """
    from coverage import CoverageData

    workers = ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
    measured = ["--cov=nbl_export", "--cov-context=test", "--cov-report=", "--junit-xml=junit.xml"]
    if not pytest(folder, *workers, *measured):
        print("Some tests fail without any mutation; they are not asked.", flush=True)
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(folder / "junit.xml").iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            seconds[name] = float(case.get("time", 0))
    data = CoverageData(str(folder / ".coverage"))
    data.read()
    of_file: dict[str, list[str]] = {}
    for name in seconds:
        of_file.setdefault(name.partition("::")[0], []).append(name)
    found = {}
    for file in data.measured_files():
        by_line = {
            line: {context.rpartition("|")[0] for context in contexts} & seconds.keys()
            for line, contexts in data.contexts_by_lineno(file).items()
        }
        lines = {}
        for line, tests in {**by_line, 0: set[str]().union(*by_line.values())}.items():
            beside = {other for name in tests for other in of_file[name.partition("::")[0]]} - tests
            ordered = [name for of in (tests, beside) for name in sorted(of, key=seconds.__getitem__)]
            ends = accumulate(seconds[name] for name in ordered)
            lines[line] = [name for name, end in zip(ordered, ends, strict=True) if end <= limit]
        found[Path(file).relative_to(folder).as_posix()] = lines
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="*", help="only modules of these; 'core' for those beside the rooms")
    parser.add_argument("--lines", type=Path, default=Path("lines.json"), help="which tests run which line")
    parser.add_argument("--limit", type=float, default=300, help="seconds of tests for a mutation")
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
    counts: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="nbl-mutate.") as temporary:
        folder = Path(temporary)
        for name in filter(None, files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        if not asked.lines.exists():
            asked.lines.write_text(json.dumps(tests_of_lines(folder, asked.limit / 3)), encoding="utf-8")
        lines = json.loads(asked.lines.read_text(encoding="utf-8"))
        for path, number in sorted(chosen, key=lambda one: room_of(one[0])):
            line, what, changed = mutant(texts[path], number)
            (folder / path).write_text(changed, encoding="utf-8")
            of_module = lines.get(path.as_posix(), {})
            tests = of_module.get(str(line)) or of_module.get("0", [])
            caught = bool(tests) and not pytest(folder, "-x", *tests, limit=asked.limit)
            (folder / path).write_text(texts[path], encoding="utf-8")
            found = counts.setdefault(room_of(path), [0, 0])
            found[0] += 1
            found[1] += caught
            if not caught:
                print(f"not caught by {len(tests)} tests: {path}:{line} {what}", flush=True)
    print("\n| room | mutations | caught | |\n|---|---|---|---|")
    for room, (made, seen) in {**counts, "all": [sum(c) for c in zip(*counts.values(), strict=True)]}.items():
        print(f"| {room} | {made} | {seen} | {seen / made:.0%} |")


if __name__ == "__main__":
    main()
