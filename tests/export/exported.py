"""A graph of any exporter, run in onnxruntime by the names of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.sessions import cpu_session, empty_past


def graph_logits(graph: Path, ids: Sequence[int], cut: int, head_size: int = 8) -> NDArray[Any]:
    """Logits of ``ids`` from the graph: ``cut`` tokens in one prefill, the others one decode step each."""
    session = cpu_session(graph)
    names = [o.name for o in session.get_outputs()]
    feeds = empty_past(session, 1, head_size)
    asked = {i.name for i in session.get_inputs()}
    rows, done = [], 0
    for step in [list(ids[:cut]), *([token] for token in ids[cut:])]:
        done += len(step)
        feeds["input_ids"] = np.array([step], dtype=np.int64)
        feeds["attention_mask"] = np.ones((1, done), dtype=np.int64)
        feeds["position_ids"] = np.arange(done - len(step), done)[None]
        outputs = dict(zip(names, session.run(names, {k: feeds[k] for k in asked}), strict=True))
        feeds |= {n.replace("present", "past_key_values"): v for n, v in outputs.items() if n != "logits"}
        rows.append(outputs["logits"][0])
    return np.concatenate(rows)
