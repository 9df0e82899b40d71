"""Write graphs/: small reference graphs before and after the rewrite, as text that a diff can show.

    python scripts/regenerate_graphs.py [FOLDER]

Each is a 2-layer random decoder, exported, with layer 1 linearized. A golden test compares a fresh
run with what is committed: a change of the exporter or of the rewrite shows here first.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbl_export.calibrate.probe import probe_model
from nbl_export.export.torch import export_torch
from nbl_export.graph.io import load_graph
from nbl_export.graph.rewrite import rewrite_file
from nbl_export.linearize.plan import LinearLayer, Plan

WIDTH = 16


def llama() -> torch.nn.Module:
    """Grouped-query attention, rotary embedding, RMSNorm, tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)


MODELS = {"torch-llama": llama}


def write_graphs(folder: Path) -> list[Path]:
    """Write before.txt and after.txt of every model below ``folder``; returns the paths."""
    written = []
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as temporary:
            before, after = (
                Path(temporary) / "before" / "model.onnx",
                Path(temporary) / "after" / "model.onnx",
            )
            model = make()
            export_torch(model, before)
            rewrite_file(before, _plan(model), after)
            for stage, path in (("before", before), ("after", after)):
                target = folder / name / f"{stage}.txt"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(graph_text(load_graph(path)), encoding="utf-8")
                written.append(target)
    return written


def _plan(model: torch.nn.Module) -> Plan:
    rows = np.arange(2 * 24, dtype=np.int32).reshape(2, 24) % 32
    probe = probe_model(model, rows)
    w = np.eye(WIDTH, dtype=np.float32)
    return Plan(
        model="reference graph",
        hidden_size=WIDTH,
        layer_count=2,
        fit_input="normed",
        criterion="by hand",
        ridge=0.0,
        calibration_tokens=0,
        layers={1: LinearLayer(w, w[0])},
        probe={n: getattr(probe, n) for n in ("input_ids", "attention_mask", "position_ids")},
        probe_u=probe.x,
        probe_y=probe.y,
    )


def graph_text(model: ir.Model) -> str:
    """One line for each input, output, weight and node; inner values are numbered, so names do not matter."""
    graph = model.graph
    names: dict[ir.Value, str] = {}

    def name(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        if value in names:
            return names[value]
        if value.is_initializer():
            tensor = value.const_value
            assert tensor is not None
            if tensor.size <= 8 and tensor.dtype != ir.DataType.FLOAT:
                return str(tensor.numpy().tolist())
            return f"{value.name}{list(value.shape or [])}"
        names[value] = (
            str(value.name) if value.is_graph_input() or value.is_graph_output() else f"%{len(names)}"
        )
        return names[value]

    def typed(value: ir.Value) -> str:
        return f"{name(value)}: {value.dtype}{list(map(str, value.shape or []))}".replace("'", "")

    lines = [f"opset {graph.opset_imports.get('')}"]
    lines += [f"input  {typed(v)}" for v in graph.inputs]
    lines += [f"output {typed(v)}" for v in graph.outputs]
    lines.append("")
    for node in graph:
        attributes = ", ".join(f"{k}={a.value}" for k, a in sorted(node.attributes.items()))
        inputs = ", ".join(name(v) for v in node.inputs)
        outputs = ", ".join(name(v) for v in node.outputs)
        lines.append(f"{outputs} = {node.op_type}({inputs})" + (f" {{{attributes}}}" if attributes else ""))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "graphs"
    for path in write_graphs(root):
        print(path)
