"""Experts in each form: nodes, seconds to export and to load, memory, milliseconds of a prefill and a step, in turns.

    python scripts/bench_experts.py [--experts 128] [--k 8] [--layers 1] [--width 2048] [--inner 768] [--dir DIR]

A Qwen3-MoE with random weights: ours as `moe`, `loop` and `dense`, with a product for each expert (`each`), as `moe` in
integers (`int4`), mobius's graph if mobius-onnx is installed, and PyTorch with transformers' own experts. All compute
the same tokens in turns, in float32 with the threads of this process; the median of the rounds counts. Memory is what
this process cannot drop of a session that has run.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import psutil
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3MoeConfig

from nbl_export.export import experts
from nbl_export.export.experts import DENSE, LOOP, MOE
from nbl_export.export.forms import CONCAT
from nbl_export.export.torch import trace
from nbl_export.graph.integers import to_integers
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.machine import cores
from nbl_export.models.running import replaced
from nbl_export.runtime.session import CPU, require_onnxruntime, session_options

EACH, INT4, MOBIUS, PYTORCH = "each", "int4", "mobius", "PyTorch"
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


# Token ids and the keys and values before them, to logits and all keys and values.
Run = Callable[[np.ndarray[Any, Any], Sequence[Any]], tuple[np.ndarray[Any, Any], Sequence[Any]]]


def runner(session: Any) -> Run:
    inputs = {one.name: one for one in session.get_inputs()}
    past = [name for name in inputs if name.startswith("past")]
    kept = [name.replace("past_key_values", "present") for name in past]

    def run(ids: np.ndarray[Any, Any], before: Sequence[Any]) -> tuple[np.ndarray[Any, Any], Sequence[Any]]:
        shapes = [inputs[name].shape for name in past]
        before = before or [np.zeros((1, shape[1], 0, shape[3]), np.float32) for shape in shapes]
        start = before[0].shape[2]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, start + ids.shape[1]), np.int64),
            "position_ids": np.arange(start, start + ids.shape[1])[None],
            **dict(zip(past, before, strict=True)),
        }
        logits, *after = session.run(["logits", *kept], {n: a for n, a in feeds.items() if n in inputs})
        return logits, after

    return run


def in_pytorch(model: Any) -> Run:
    def run(ids: np.ndarray[Any, Any], before: Sequence[Any]) -> tuple[np.ndarray[Any, Any], Sequence[Any]]:
        cache = DynamicCache(list(zip(before[::2], before[1::2], strict=True)))
        with torch.inference_mode():
            output = model(torch.from_numpy(ids), past_key_values=cache, use_cache=True)
        return output.logits.numpy(), [side for one in cache.layers for side in (one.keys, one.values)]

    return run


def anonymous() -> float:
    """MiB of this process that cannot be dropped."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


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
    rows, runs = {}, dict[str, Run]()
    for form in (MOE, LOOP, DENSE, EACH, INT4, *[MOBIUS] * bool(find_spec("mobius"))):
        start = time.perf_counter()
        if form == MOBIUS:
            path = export_mobius(model, folder)
        else:
            path = folder / form / "model.onnx"
            path.parent.mkdir()
            with replaced(experts, "_FEW", 10**6 if form == EACH else 0):
                graph = trace(model, replace(CONCAT, experts={EACH: LOOP, INT4: MOE}.get(form, form)))
                if form == INT4:
                    to_integers(graph, 4)
                save_graph(graph, path)
        took, before = time.perf_counter() - start, anonymous()
        session, load = session_of(path)
        runs[form] = runner(session)
        runs[form](np.zeros((1, max(asked.tokens[:-1])), np.int64), [])
        rows[form] = [f"{nodes_of(path):,}", f"{took:.0f}", f"{load:.1f}", f"{anonymous() - before:,.0f}"]
    rows[PYTORCH], runs[PYTORCH] = [""] * 4, in_pytorch(model)
    for tokens, context in (*((n, 0) for n in asked.tokens), (1, asked.tokens[-1])):
        ids = np.random.default_rng(tokens).integers(0, 512, (1, context + tokens))
        taking = {n: run for n, run in runs.items() if n != DENSE or tokens <= _MOST_OF_DENSE}
        kept = {form: run(ids[:, :context], [])[1] if context else [] for form, run in taking.items()}
        expected = runs[PYTORCH](ids[:, context:], kept[PYTORCH])[0]
        times: dict[str, list[float]] = {form: [] for form in taking}
        for number in range(asked.rounds + 1):  # the first is not counted
            for form, run in taking.items():
                start = time.perf_counter()
                found = run(ids[:, context:], kept[form])[0]
                times[form].append(time.perf_counter() - start)
                right = np.abs(found[:, -1] - expected[:, -1]).max() < 1e-3 * expected.std()
                assert number or form == INT4 or right, form
        for form in rows:
            rows[form].append(f"{1e3 * median(times[form][1:]):,.0f}" if form in taking else "")
    memory = psutil.virtual_memory().total / 2**30
    print(
        f"{asked.experts} experts, {asked.k} of them, {asked.layers} layers; {cores()} cores, {memory:.1f} GiB.\n"
    )
    timed = [*(f"{n} tokens ms" for n in asked.tokens), f"a step after {asked.tokens[-1]} ms"]
    print("| form | nodes | export s | load s | memory MiB | " + " | ".join(timed) + " |")
    print("|---" * (5 + len(timed)) + "|")
    for form, cells in rows.items():
        print(f"| {form} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
