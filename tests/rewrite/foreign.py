"""A decoder that somebody else exported, with the files beside it, and a plan of its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from nbl_export.linearize.plan import load_plan, save_plan
from tests.end_to_end.oracle import assert_computes, random_plan
from tests.end_to_end.random_decoder_graphs import written
from tests.end_to_end.random_decoders import Choices, random_weights

C = Choices(layers=3, width=16, heads=4, qkv_bias=True, o_bias="Add")
LAYERS = (0, 2)
DATA = "weights.data"
GENAI = {
    "model": {
        "type": "llama",
        "vocab_size": 24,
        "decoder": {
            "filename": "model.onnx",
            "num_hidden_layers": 3,
            "sliding_window": {"window_size": 8, "layers": [1, 2]},
            "head_size": 4,
        },
    },
    "search": {"max_length": 32},
}
CONFIG = {"model_type": "llama", "num_hidden_layers": 3}
TEXTS = {
    "genai_config.json": json.dumps(GENAI),
    "config.json": json.dumps(CONFIG),
    "tokenizer.json": '{"version": "1.0"}',
    "chat_template.jinja": "{{ messages }}",
}
# Weights of others; what is rewritten does not need them.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "encoder.onnx", "encoder.onnx.data", ".hidden")


@dataclass(frozen=True)
class Source:
    """A folder with a decoder whose weights are in an external file, and a plan for it elsewhere."""

    folder: Path
    plan: Path

    @property
    def graph(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def out(self) -> Path:
        return self.folder.parent / "out"

    def arguments(self, *more: object) -> tuple[object, ...]:
        return ("rewrite", "--onnx", self.folder, "--plan", self.plan, *more)


def export(folder: Path, c: Choices = C, name: str = "model.onnx", data: str = DATA) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        written(c, random_weights(c)).proto,
        str(folder / name),
        save_as_external_data=True,
        location=data,
        size_threshold=200,
    )
    return folder / name


def exported(folder: Path) -> Source:
    """The decoder with configurations, tokenizer, and other weights beside it, in ``folder`` / "source"."""
    graph = export(folder / "source")
    for name, text in TEXTS.items():
        (graph.parent / name).write_text(text)
    for name in WEIGHTS:
        (graph.parent / name).write_bytes(b"weights of something else")
    plan = folder / "plan" / "plan.json"
    plan.parent.mkdir()
    save_plan(plan, random_plan(C, random_weights(C), LAYERS, "normed"))
    return Source(graph.parent, plan)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_rewritten(path: Path, plan: Path) -> None:
    assert_computes(path, C, random_weights(C), load_plan(plan))


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "nbl" / "rewrite.json").read_text())  # type: ignore[no-any-return]
