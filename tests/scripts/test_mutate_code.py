"""Each mutation of a module changes it, and leaves Python."""

from __future__ import annotations

import ast
from pathlib import Path

import nbl_export.linearize.lmmse as lmmse
from scripts.mutate_code import mutant, mutations


def test_every_mutation_changes_the_code_and_parses() -> None:
    assert lmmse.__file__
    text = Path(lmmse.__file__).read_text(encoding="utf-8")
    count = len(mutations(ast.parse(text)))
    plain, found = ast.unparse(ast.parse(text)) + "\n", set()
    for number in range(count):
        line, what, changed = mutant(text, number)
        assert line and what and changed != plain
        ast.parse(changed)
        found.add(changed)
    assert count > 20 and len(found) == count
