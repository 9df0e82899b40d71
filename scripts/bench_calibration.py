"""Calibration against the paper authors' method, and against the plain forward pass: time and peak memory.

    python scripts/bench_calibration.py MODEL TEXT [--tokens 4096 8192 16384 32768]

Three ways to compute the same values, each in a separate process to measure its own peak memory:

forward   the model's forward pass over the tokens, nothing else
ours      `collect_moments` (streamed float64 moments, no logits) and every layer's fit and CCA bound
authors'  as in the code of arXiv 2505.21077: store every activation, then per layer in float64 the
          centred covariances, an explicit inverse, W, b, and the CCA bound through matrix square roots
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Any

import numpy as np
import torch

from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.documents import documents
from nbl_export.calibrate.text import pack
from nbl_export.linearize.lmmse import cca_bound, fit_lmmse
from nbl_export.models.layers import attention_layers
from nbl_export.models.load import load_model, load_tokenizer
from nbl_export.models.running import observed
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
        documents(settings.calibration, settings.text_field),
        load_tokenizer(find_model(model)),
        settings,
        Silent(),
    )
    rows = -(-settings.samples // len(packed.calibration))
    # A short text is repeated: only time and memory are measured.
    return np.tile(packed.calibration, (rows, 1))[: settings.samples]


def forward(model: Any, tokens: Any) -> None:
    with torch.inference_mode():
        for start in range(0, len(tokens), BATCH):
            model(input_ids=torch.from_numpy(tokens[start : start + BATCH].astype(np.int64)), use_cache=False)


def ours(model: Any, tokens: Any) -> None:
    for layer in collect_moments(model, tokens).layers.values():
        fit_lmmse(layer, "normed")
        cca_bound(layer)


def authors(model: Any, tokens: Any) -> None:
    stored: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def store(index: int, h: torch.Tensor, _x: torch.Tensor, y: torch.Tensor) -> None:
        stored.setdefault(index, []).append((h.flatten(0, 1).clone(), y.flatten(0, 1).clone()))

    def inverse_root(c: torch.Tensor) -> Any:
        values, vectors = torch.linalg.eigh(c)
        return vectors @ torch.diag(values.clamp_min(1e-12).rsqrt()) @ vectors.T

    with observed(model, attention_layers(model), store):
        forward(model, tokens)
    for index in sorted(stored):
        pairs = stored.pop(index)
        h, y = (torch.cat([p[i] for p in pairs]).double() for i in range(2))
        n, mean_h, mean_y = len(h), h.mean(0), y.mean(0)
        centred_h, centred_y = h - mean_h, y - mean_y
        stream = centred_y + centred_h
        c_hh = centred_h.T @ centred_h / (n - 1)
        w = centred_y.T @ centred_h / (n - 1) @ torch.linalg.inv(c_hh)
        _ = mean_y - w @ mean_h
        c_ss, c_sh = stream.T @ stream / (n - 1), stream.T @ centred_h / (n - 1)
        torch.linalg.svdvals(inverse_root(c_ss) @ c_sh @ inverse_root(c_hh))


WAYS = {"forward": forward, "ours": ours, "authors": authors}


def measure(way: str, model_name: str, text: str, count: int) -> tuple[float, float]:
    """One way in this process: seconds, and peak memory above that of the loaded model, MiB (on Linux)."""
    tokens = tokens_of(model_name, text, count)
    model = load_model(find_model(model_name))
    forward(model, tokens[:BATCH])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    WAYS[way](model, tokens)
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    asked = parser.parse_args()
    machine = environment()
    print("Time to all layers' W, b and scores, and peak memory above the loaded model.\n")
    print("| tokens | forward, s | ours, s | authors', s | ours, MiB | authors', MiB |\n" + "|---" * 6 + "|")
    for count in asked.tokens:
        # A process for each: what one had at most says nothing of another.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as apart:
            asks = [(way, asked.model, asked.text, count) for way in WAYS]
            found = apart.starmap(measure, asks, chunksize=1)
        cells = [*(f"{seconds:.1f}" for seconds, _ in found), *(f"{mib:,.0f}" for _, mib in found[1:])]
        print(f"| {count:,} | " + " | ".join(cells) + " |", flush=True)
    print(
        f"\n{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB; torch {machine.packages['torch']}."
    )


if __name__ == "__main__":
    main()
