"""Graphs of other exporters, run in onnxruntime by the names of their inputs, and models to export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.export.others import as_hf_folder
from nbl_export.files import TEMPORARY
from nbl_export.models.loaded import LoadedModel
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from tests.fixtures_graph import load
from tests.sessions import cpu_session, empty_past

BASE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Long enough for the slowest frequencies to turn by a visible angle.
PROMPT = [256, *range(40, 120)]


def loaded(source: Path) -> LoadedModel:
    return LoadedModel(find_model(str(source)), Silent())


def handed_off(source: Path, folder: Path) -> Path:
    return as_hf_folder(loaded(source), folder)


def torch_logits(folder: Path, ids: Sequence[int]) -> NDArray[Any]:
    """PyTorch's logits of the model in ``folder`` as the tool loads it: [tokens, vocab]."""
    with torch.no_grad():
        return load(folder)(input_ids=torch.tensor([list(ids)])).logits[0].numpy()


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


def nothing_left_over(folder: Path) -> bool:
    return not list(folder.glob(f".*{TEMPORARY}"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
