"""Speed of hybrids: our graph in onnxruntime beside transformers in PyTorch, eager, on the CPU.

    python scripts/bench_hybrids.py [lfm2 bamba qwen3_next] [--rounds 5] [--lengths 128 512 2048]

Makes a small model of each family with random weights (about 100 MB of float32), exports it in fp32 and runs both
sides in turns: a prefill of each length, and one decode step after each. Both have one thread, and its time on the
core is what counts, so that what else runs on the machine does not. Prints a Markdown table of medians, and of which
share of the graph's time its recurrences take, by onnxruntime's profile. What both compute is compared first: a fast
wrong graph is no result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.batch.arrays import I64
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch
from nbl_export.graph.io import load_graph
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.session import CPU, require_onnxruntime, session_options
from nbl_export.runtime.torch import TorchDecoder

LAYERS, WIDTH, VOCAB = 8, 512, 4096
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Two layers of softmax attention each; the heads and states of the others are those of the released models.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lfm2": ("lfm2", {"layer_types": (["conv"] * 3 + ["full_attention"]) * 2}),
    "bamba": (
        "bamba",
        {
            "attn_layer_indices": [3, 7],
            "mamba_n_heads": 16,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 256,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
            "linear_num_value_heads": 8,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "mlp_only_layers": list(range(LAYERS)),  # experts are not what is timed
            "num_experts": 4,
        },
    ),
}
_WARM_UP = 1


def built(family: str) -> Any:
    """The model of a family with random weights, as it is served."""
    model_type, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_COMMON, **fields})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def inputs(length: int, past: int = 0) -> tuple[I64, I64, I64]:
    """Ids, mask and positions of one row of ``length`` tokens after ``past``."""
    ids = np.random.default_rng(length + past).integers(3, VOCAB, (1, length))
    return ids, np.ones((1, past + length), np.int64), past + np.arange(length)[None]


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each side, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(_WARM_UP + rounds):
        for name, run in sides.items():
            start = time.thread_time()
            run()
            if number >= _WARM_UP:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def in_one_thread(path: Path, profile: Path | None = None) -> OrtDecoder:
    """The graph in a session that computes in the thread that calls it."""
    graph, options = OrtDecoder(path), session_options()
    options.intra_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    graph.session = require_onnxruntime().InferenceSession(str(path), options, providers=[CPU])
    return graph


def passed(decoder: Any, fed: tuple[I64, I64, I64], past: Any) -> Callable[[], Any]:
    """One pass of a decoder, to be timed; without a ``past`` after none."""
    return lambda: decoder(*fed, decoder.empty_past(1) if past is None else past)


def recurrence_share(path: Path, feeds: tuple[I64, I64, I64], folder: Path) -> float:
    """The share of a run's time in operators that its recurrences take."""
    graph = in_one_thread(path, folder / "profile")
    graph(*feeds, graph.empty_past(1))
    events = json.loads(Path(graph.session.end_profiling()).read_text(encoding="utf-8"))
    # What prepares a chunk is named after its Scan; the operators inside have events of their own.
    scans = tuple(str(node.name) for node in load_graph(path).graph if node.op_type == "Scan")
    own = ("chunk/", "recurrence/")
    times = [
        (e["name"], e["dur"]) for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")
    ]
    outer = [(name, spent) for name, spent in times if not name.startswith(own)]
    within = sum(spent for name, spent in outer if name.startswith(scans or "none"))
    return float(within / sum(spent for _, spent in outer))


def measure(family: str, lengths: Sequence[int], rounds: int) -> list[str]:
    model = built(family)
    size = sum(p.nbytes for p in model.parameters()) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "model.onnx"
        export_torch(model, path, form=FORMS["concat"])
        theirs, graph = TorchDecoder(model), in_one_thread(path)
        for length in lengths:
            feeds, step = inputs(length), inputs(1, length)
            sides: Mapping[str, Any] = {"torch": theirs, "graph": graph}
            given = {name: passed(side, feeds, None)() for name, side in sides.items()}
            apart = float(np.abs(given["torch"].logits - given["graph"].logits).max())
            prefill = interleaved({n: passed(side, feeds, None) for n, side in sides.items()}, rounds)
            decode = interleaved(
                {n: passed(side, step, given[n].present) for n, side in sides.items()}, 4 * rounds
            )
            share = recurrence_share(path, feeds, Path(root))
            cells = [f"{1e3 * side[name]:,.1f}" for side in (prefill, decode) for name in ("torch", "graph")]
            rows.append(
                f"| {family} ({size:.0f} MB) | {length:,} | {' | '.join(cells)} | {share:.0%} | {apart:.0e} |"
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, one thread of {os.cpu_count()} cores; milliseconds on the core\n")
    print(
        "| model | tokens | prefill PyTorch | prefill graph | step PyTorch | step graph | recurrence | max Δlogit |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for family in arguments.families:
        measure(family, arguments.lengths, arguments.rounds)


if __name__ == "__main__":
    main()
