"""graphs/ is what the exporter and the rewrite make today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_reference_graphs_are_up_to_date(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "regenerate_graphs", ROOT / "scripts" / "regenerate_graphs.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.write_graphs(tmp_path)
    committed = sorted(p.relative_to(ROOT / "graphs") for p in (ROOT / "graphs").rglob("*.txt"))
    assert committed == sorted(p.relative_to(tmp_path) for p in written)
    for name in committed:
        fresh, kept = (tmp_path / name).read_text(), (ROOT / "graphs" / name).read_text()
        assert fresh == kept, f"{name} changed; if that is meant: python scripts/regenerate_graphs.py"
    before, after = ((ROOT / "graphs" / "torch-llama" / f"{n}.txt").read_text() for n in ("before", "after"))
    assert before.count("= Attention(") == 2
    assert after.count("= Attention(") == 1
    assert after.count("nbl_linear") == 2
