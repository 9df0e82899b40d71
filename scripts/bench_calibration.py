"""Calibration against the paper authors' method, and against the plain forward pass: time and peak memory.

    python scripts/bench_calibration.py MODEL TEXT [--tokens 4096 8192 16384 32768] [--out FILE.md]

Three ways to compute the same values, each in a separate process to measure its own peak memory:

forward   the model's forward pass over the tokens, nothing else
ours      `collect_moments` (streamed float64 moments, no logits) and every layer's fit and CCA bound
authors'  as in the code of arXiv 2505.21077: store every activation, then per layer in float64 the
          centred covariances, an explicit inverse, W, b, and the CCA bound through matrix square roots
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.documents import documents
from nbl_export.calibrate.text import pack
from nbl_export.linearize.lmmse import cca_bound, fit_lmmse
from nbl_export.models.hooks import observed
from nbl_export.models.layers import attention_layers
from nbl_export.models.load import load_model, load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from nbl_export.report.schema import environment
from nbl_export.settings import CalibrateSettings

SEQ_LEN = 512
BATCH = 2


def tokens_of(model: str, text: str, count: int) -> Any:
    """``count`` tokens of ``text`` packed into rows of SEQ_LEN."""
    settings = CalibrateSettings((text,), samples=count // SEQ_LEN, seq_len=SEQ_LEN, heldout_samples=1)
    packed = pack(
        documents(settings.sources, settings.field), load_tokenizer(find_model(model)), settings, Silent()
    )
    rows = -(-settings.samples // len(packed.calibration))
    # A short text is repeated: only time and memory are measured.
    return np.tile(packed.calibration, (rows, 1))[: settings.samples]


def forward(model: Any, tokens: Any) -> None:
    with torch.inference_mode():
        for start in range(0, len(tokens), BATCH):
            model(input_ids=torch.from_numpy(tokens[start : start + BATCH].astype(np.int64)), use_cache=False)


def ours(model: Any, tokens: Any) -> None:
    moments = collect_moments(model, tokens)
    for layer in moments.layers.values():
        fit_lmmse(layer, "normed")
        cca_bound(layer)


def authors(model: Any, tokens: Any) -> None:
    stored: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def store(index: int, h: torch.Tensor, _x: torch.Tensor, y: torch.Tensor) -> None:
        stored.setdefault(index, []).append((h.flatten(0, 1).clone(), y.flatten(0, 1).clone()))

    with observed(model, attention_layers(model), store):
        forward(model, tokens)
    for index in sorted(stored):
        pairs = stored.pop(index)
        h, y = (torch.cat([p[i] for p in pairs]).double() for i in range(2))
        _fit_with_inverse(h, y)


def _fit_with_inverse(h: torch.Tensor, y: torch.Tensor) -> None:
    n = len(h)
    mean_h, mean_y = h.mean(0), y.mean(0)
    centred_h, centred_y = h - mean_h, y - mean_y
    stream = centred_y + centred_h
    c_hh = centred_h.T @ centred_h / (n - 1)
    c_yh = centred_y.T @ centred_h / (n - 1)
    w = c_yh @ torch.linalg.inv(c_hh)
    _ = mean_y - w @ mean_h

    def inverse_root(c: torch.Tensor) -> Any:
        values, vectors = torch.linalg.eigh(c)
        return vectors @ torch.diag(values.clamp_min(1e-12).rsqrt()) @ vectors.T

    c_ss, c_sh = stream.T @ stream / (n - 1), stream.T @ centred_h / (n - 1)
    torch.linalg.svdvals(inverse_root(c_ss) @ c_sh @ inverse_root(c_hh))


WAYS = {"forward": forward, "ours": ours, "authors": authors}


def measure(way: str, model_name: str, text: str, count: int) -> dict[str, float]:
    """One way in this process: seconds, and peak memory above that of the loaded model, MiB."""
    tokens = tokens_of(model_name, text, count)
    model = load_model(find_model(model_name))
    forward(model, tokens[:BATCH])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    WAYS[way](model, tokens)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": (peak - before) / (2**20 if sys.platform == "darwin" else 2**10)}


def in_separate_process(way: str, model: str, text: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, model, text, "--one", way, "--tokens", str(count)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    value: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return value


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.model, arguments.text, arguments.tokens[0])))
        return
    rows = [["tokens", "forward, s", "ours, s", "authors', s", "ours, MiB", "authors', MiB"]]
    for count in arguments.tokens:
        got = {way: in_separate_process(way, arguments.model, arguments.text, count) for way in WAYS}
        seconds = [f"{got[way]['seconds']:.1f}" for way in WAYS]
        memory = [f"{got[way]['mib']:,.0f}" for way in ("ours", "authors")]
        rows.append([f"{count:,}", *seconds, *memory])
        print(rows[-1], file=sys.stderr, flush=True)
    machine = environment()
    text = (
        f"Time to all layers' W, b and scores, and peak memory above the loaded model.\n\n{table(rows)}\n\n"
        f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB; torch {machine.packages['torch']}.\n"
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
