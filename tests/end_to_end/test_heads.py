"""Decoders that give one result for a text: by the scores, or by the states, of its last token.

A row has the result of its text alone, on whichever side it is padded, by transformers' own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from nbl_export import api
from nbl_export.batch.names import MASK, TOKENS
from nbl_export.batch.rows import batch_of_rows
from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.runtime.ort import OrtEncoder
from nbl_export.workspace import Workspace
from tests import encoders

TEXT = {"samples": 8, "seq_len": 64, "heldout_samples": 4}
CHECKS = api.VerifySettings(contexts=(16,), rounds=3, speed=False)
SIZES = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "vocab_size": encoders.VOCAB,
    "bos_token_id": encoders.CLS,
    "eos_token_id": encoders.SEP,
}
HEADS = {
    # One layer keeps a state, which padding must not change.
    "state": (
        "minimax",
        "MiniMaxForSequenceClassification",
        {
            **SIZES,
            "head_dim": 12,
            "layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 8,
            "num_labels": 3,
        },
    ),
    "embedding": ("qwen3", "Qwen3ForCausalLM", {**SIZES, "head_dim": 12}),
}


def own(model: Any, row: dict[str, Any], embedding: bool) -> Any:
    """What transformers gives for the one text of ``row``, [1, tokens] each."""
    output = model(**{name: torch.from_numpy(array) for name, array in row.items()})
    return (
        torch.nn.functional.normalize(output.last_hidden_state[:, -1], dim=-1) if embedding else output.logits
    )


@pytest.mark.parametrize("head", ["state", "embedding"])
def test_a_row_has_the_result_of_its_text_wherever_it_is_padded(head: str, tmp_path: Path) -> None:
    kind, name, fields = HEADS[head]
    folder, embedding = tmp_path / "model", head == "embedding"
    encoders.build(folder, kind, name, **fields)
    encoders.save_tokenizer(folder)
    if embedding:
        encoders.as_sentence_transformer(folder, "lasttoken")
    text = api.CalibrateSettings(sources=(str(encoders.write_text(tmp_path / "text.jsonl")),), **TEXT)
    report = api.run(folder, tmp_path / "out", api.SelectSettings(k=1), text, CHECKS)
    assert report.passed and report.method_loss is not None
    assert report.model.task == ("feature-extraction" if embedding else "text-classification")

    plan = load_plan(Workspace.open(tmp_path / "out").plan)
    made = AutoModel if embedding else AutoModelForSequenceClassification
    model = made.from_pretrained(folder).eval()
    graph = OrtEncoder(tmp_path / "out" / "model.onnx")
    output = "sentence_embedding" if embedding else "logits"
    rows = [{TOKENS: np.random.default_rng(n).integers(5, 250, (1, n))} for n in (12, 5, 9)]
    with torch.inference_mode(), linearized(model, plan):
        expected = np.concatenate([own(model, row, embedding).numpy() for row in rows])
    for left in (True, False):
        batch = batch_of_rows(rows, encoders.PAD, left)
        assert batch[MASK].min() == 0
        np.testing.assert_allclose(graph(batch)[output], expected, rtol=0, atol=2e-5)
