"""Prompts of held-out text, and what a rewritten graph must look like, read with onnx alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nbl_export.calibrate.text import load_text
from nbl_export.graph.cache import KV_LAYERS_KEY, LAYERS_KEY
from nbl_export.workspace import Workspace


def baseline(out: Path) -> Path:
    return out / "baseline" / "model.onnx"


def prompts(out: Path, lengths: Sequence[int]) -> list[Any]:
    """Held-out stories of ``lengths`` tokens, each after the beginning-of-text token."""
    text = load_text(Workspace.open(out).text)
    return [
        np.r_[text.start, text.heldout[i, : n - len(text.start)]].astype(np.int32)
        for i, n in enumerate(lengths)
    ]


def assert_clean(path: Path, kept: Sequence[int], layers: int) -> None:
    """Interface, metadata and liveness of a rewritten graph, read with onnx alone."""
    proto = onnx.load(str(path), load_external_data=False)
    onnx.checker.check_model(str(path), full_check=True)
    pairs = [f"{n}.{side}" for n in range(len(kept)) for side in ("key", "value")]
    inputs = [i.name for i in proto.graph.input]
    assert [i for i in inputs if i.startswith("past")] == [f"past_key_values.{p}" for p in pairs]
    assert [o.name for o in proto.graph.output] == ["logits", *(f"present.{p}" for p in pairs)]
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(metadata[KV_LAYERS_KEY]) == list(kept)
    described = json.loads(metadata[LAYERS_KEY])
    assert [(r["layer"], r["kind"]) for r in described] == [
        (i, "attention" if i in kept else "linear") for i in range(layers)
    ]
    written = {name for node in proto.graph.node for name in node.output}
    assert all(r["input"] in written and r["output"] in written for r in described)
    read = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    assert {t.name for t in proto.graph.initializer} <= read
    assert all(any(name in read for name in node.output) for node in proto.graph.node)
