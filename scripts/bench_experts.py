"""Experts in each form: nodes, seconds to export and to load, milliseconds for 1, 16 and 512 tokens, in turns.

    python scripts/bench_experts.py [--experts 128] [--k 8] [--layers 1] [--width 2048] [--inner 768] [--dir DIR]

A Qwen3-MoE with random weights, and no cache: ours as `moe`, `loop` and `dense`, with a product for each expert
(`each`), mobius's graph if mobius-onnx is installed, and PyTorch with transformers' own experts. All compute the same
tokens in turns, in float32 with the threads of this process; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import psutil
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from nbl_export.export import experts
from nbl_export.export.experts import DENSE, LOOP, MOE
from nbl_export.export.forms import NONE
from nbl_export.export.torch import trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.machine import cores
from nbl_export.models.running import replaced
from nbl_export.runtime.session import CPU, require_onnxruntime, session_options

EACH, MOBIUS, PYTORCH = "each", "mobius", "PyTorch"
# Dense computes all experts for more tokens than these.
_MOST_OF_DENSE = 16


def make_model(asked: argparse.Namespace) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=asked.width,
        num_hidden_layers=asked.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=asked.experts,
        num_experts_per_tok=asked.k,
        moe_intermediate_size=asked.inner,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu").float().eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.__init__(config)
    for weight in model.parameters():
        torch.nn.init.ones_(weight) if weight.ndim < 2 else weight.normal_(0, 0.02)
    return model


def session_of(path: Path) -> tuple[Any, float]:
    start = time.perf_counter()
    session = require_onnxruntime().InferenceSession(path, session_options(), providers=[CPU])
    return session, time.perf_counter() - start


def nodes_of(path: Path) -> int:
    return sum(1 for _ in ir.traversal.RecursiveGraphIterator(load_graph(path).graph))


def export_mobius(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder / "model")
    asked = ["--config", str(folder / "model"), "--dtype", "f32", str(folder / MOBIUS)]
    subprocess.run([sys.executable, "-m", "mobius", "build", *asked], check=True, capture_output=True)
    return folder / MOBIUS / "model.onnx"


def runner(session: Any) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    names = {one.name: one for one in session.get_inputs()}

    def run(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        length = ids.shape[1]
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(length)[None],
        }
        feeds: dict[str, Any] = {name: array for name, array in given.items() if name in names}
        for name, one in names.items():
            if name.startswith("past"):
                feeds[name] = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
        found: np.ndarray[Any, Any] = session.run(["logits"], feeds)[0]
        return found

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, default in (
        ("experts", 128),
        ("k", 8),
        ("layers", 1),
        ("width", 2048),
        ("inner", 768),
        ("rounds", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--dir", type=Path)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=asked.dir) as name:
        compare(asked, Path(name))


def compare(asked: argparse.Namespace, folder: Path) -> None:
    model = make_model(asked)
    rows, runs = {}, dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]]()
    for form in (MOE, LOOP, DENSE, EACH, *[MOBIUS] * bool(find_spec("mobius"))):
        start = time.perf_counter()
        if form == MOBIUS:
            path = export_mobius(model, folder)
        else:
            path = folder / f"{form}.onnx"
            with replaced(experts, "_FEW", 10**6 if form == EACH else 0):
                save_graph(trace(model, replace(NONE, experts=LOOP if form == EACH else form)), path)
        took = time.perf_counter() - start
        session, load = session_of(path)
        rows[form] = [f"{nodes_of(path):,}", f"{took:.0f}", f"{load:.1f}"]
        runs[form] = runner(session)

    def pytorch(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            logits: np.ndarray[Any, Any] = model(torch.from_numpy(ids)).logits.numpy()
        return logits

    rows[PYTORCH], runs[PYTORCH] = ["", "", ""], pytorch
    for tokens in asked.tokens:
        ids = np.random.default_rng(tokens).integers(0, 512, (1, tokens))
        expected = pytorch(ids)
        taking = {n: run for n, run in runs.items() if n != DENSE or tokens <= _MOST_OF_DENSE}
        times: dict[str, list[float]] = {form: [] for form in taking}
        for number in range(asked.rounds + 1):  # the first is not counted
            for form, run in taking.items():
                start = time.perf_counter()
                found = run(ids)
                times[form].append(time.perf_counter() - start)
                assert number or np.abs(found - expected).max() < 1e-3 * expected.std(), form
        for form in rows:
            rows[form].append(f"{1e3 * median(times[form][1:]):,.0f}" if form in taking else "")
    memory = psutil.virtual_memory().total / 2**30
    print(
        f"{asked.experts} experts, {asked.k} of them, {asked.layers} layers; {cores()} cores, {memory:.1f} GiB.\n"
    )
    print("| form | nodes | export s | load s | " + " | ".join(f"{n} tokens ms" for n in asked.tokens) + " |")
    print("|---" * (4 + len(asked.tokens)) + "|")
    for form, cells in rows.items():
        print(f"| {form} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
