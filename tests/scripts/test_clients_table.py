"""The table of engines names tests that there are, and says of each what became of it."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("clients_table", ROOT / "scripts" / "clients_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_test_that_it_names_is_there(script: Any) -> None:
    for row in script.ROWS:
        assert set(row.tests) <= set(script.PRECISIONS) and row.refused <= set(row.tests)
        for test in row.tests.values():
            path, _, name = test.partition("::")
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name.partition("[")[0] in functions, test


def test_the_page_is_of_these_rows(script: Any) -> None:
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    for row in script.ROWS:
        assert f"| {row.engine} | {row.reads} | " in text, "make it again: python scripts/clients_table.py"
    assert script.FAILS not in text.split("| engine |")[1]
