"""Write graphs/: small reference graphs before and after the rewrite, as text that a diff can show.

    python scripts/regenerate_graphs.py [FOLDER]

Each is a 2-layer random decoder of one exporter, with layer 1 linearized. A golden test compares a new run with the
committed files, which shows any change of an exporter or of the rewrite. Optimum runs in the environment named by
NBL_EXPORT_OPTIMUM_PYTHON; without it its graphs are not changed.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PhiConfig, PhiForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nbl_export.calibrate.probe import probe_model  # noqa: E402
from nbl_export.graph.io import load_graph  # noqa: E402
from nbl_export.linearize.plan import LinearLayer, Plan  # noqa: E402
from nbl_export.rewrite.replace import rewrite_file  # noqa: E402
from tests import exporters as made_by_tests  # noqa: E402
from tests.tiny import save_tokenizer  # noqa: E402

WIDTH, VOCAB = 64, 40  # a vocabulary as wide as a projection would be mistaken for one
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# llama: grouped-query attention, RMSNorm. biases: MHA with a bias in every projection. phi3: packed q, k, v.
# phi: attention and MLP in parallel, LayerNorm, biases, rotary embedding of half the head_dim. (The genai builder
# writes 1e-6 into every LayerNorm, whatever the model has.)
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, num_key_value_heads=2, original_max_position_embeddings=64)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**{**SIZES, "num_attention_heads": 2}, layer_norm_eps=1e-6)),
}


# As the tests have them, each from a model folder to a folder with a graph.
EXPORTERS = {"torch": "ours-concat", "torch-shared": "ours-shared", "torch-static": "ours-static"}
EXPORTERS |= {"genai": "genai-fp32", "genai-int4": "genai-int4", "optimum": "optimum"}
# Every exporter with the first family, and the other families where their graphs differ.
PAIRS = [
    *((exporter, "llama") for exporter in EXPORTERS),
    *(
        (exporter, family)
        for family in ("biases", "phi3", "phi")
        for exporter in ("torch", "genai", "optimum")
    ),
]


def write_graphs(folder: Path, pairs: Iterable[tuple[str, str]] = PAIRS) -> list[Path]:
    """Write before.txt and after.txt of every pair in ``folder``; returns the paths.

    As a test it is skipped for an exporter that is not installed.
    """
    written = []
    for exporter, family in pairs:
        torch.manual_seed(0)
        model = MODELS[family]().eval().requires_grad_(False)
        for weight in model.parameters():
            if weight.ndim == 1:  # those of new norms and biases are all the same, unlike in a trained model
                weight.add_(0.1 * torch.randn_like(weight))
        with tempfile.TemporaryDirectory() as temporary:
            before, after = (Path(temporary) / stage / "model.onnx" for stage in ("before", "after"))
            own = Path(temporary) / "model"
            model.save_pretrained(own)
            save_tokenizer(own)
            before.parent.mkdir()
            made_by_tests.EXPORTERS[EXPORTERS[exporter]](own, before.parent)
            rewrite_file(before, _plan(model), after)
            for stage, path in (("before", before), ("after", after)):
                target = folder / f"{exporter}-{family}" / f"{stage}.txt"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(graph_text(load_graph(path)), encoding="utf-8")
                written.append(target)
    return written


def _plan(model: torch.nn.Module) -> Plan:
    rows = np.arange(2 * 24, dtype=np.int32).reshape(2, 24) % VOCAB
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
        probe={n: probe.inputs[n] for n in ("input_ids", "attention_mask", "position_ids")},
        probe_u=probe.x,
        probe_y=probe.y,
    )


def graph_text(model: ir.Model) -> str:
    """One line for each input, output, weight and node; intermediate tensors are numbered, so names do not matter."""
    graph = model.graph
    names: dict[ir.Value, str] = {}

    def name(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        if value in names:
            return names[value]
        maker = value.producer()
        constant = maker is not None and maker.op_type == "Constant" and "value" in maker.attributes
        if (value.is_initializer() and not value.is_graph_input()) or constant:
            tensor = maker.attributes["value"].as_tensor() if maker and constant else value.const_value
            assert tensor is not None
            if tensor.size <= 8 and (constant or tensor.dtype != ir.DataType.FLOAT):
                return str(tensor.numpy().tolist())
            # Exporters number folded constants; the number has no meaning.
            known = "folded" if re.fullmatch(r"(onnx::\w+|val)_\d+", str(value.name)) else value.name
            return f"{known}{list(tensor.shape)}"
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
        if node.op_type == "Constant":
            continue
        attributes = ", ".join(f"{k}={a.value}" for k, a in sorted(node.attributes.items()))
        inputs = ", ".join(name(v) for v in node.inputs)
        outputs = ", ".join(name(v) for v in node.outputs)
        lines.append(f"{outputs} = {node.op_type}({inputs})" + (f" {{{attributes}}}" if attributes else ""))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "graphs"
    for pair in PAIRS:
        try:
            print(*write_graphs(root, [pair]), sep="\n")
        except pytest.skip.Exception as error:
            print(f"{'-'.join(pair)} is not changed: {error}", file=sys.stderr)
