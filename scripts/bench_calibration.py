"""Calibration against the paper authors' method, and against the plain forward pass: time and peak memory.

    python scripts/bench_calibration.py MODEL TEXT [--tokens 4096 8192 16384 32768] [--out FILE.md]

Three ways to compute the same values, each in a separate process to measure its own peak memory:

forward   the model's forward pass over the tokens, nothing else
ours      `collect_moments` (streamed float64 moments, no logits) and every layer's fit and CCA bound
authors'  as in the code of arXiv 2505.21077: store every activation, then per layer in float64 the
          centred covariances, an explicit inverse, W, b, and the CCA bound through matrix square roots

The second table times the forward pass and our pass batch by batch in one process, interleaved, so that the ratio does
not depend on other load on the machine.

    python scripts/bench_calibration.py MODEL TEXT --against CHECKOUT [--rounds 5]

runs the commands `calibrate` and `select` of this version and of another checkout in turn instead, and compares the
plans: which layers, W and b.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.documents import documents
from nbl_export.calibrate.moments import Accumulator
from nbl_export.calibrate.text import pack
from nbl_export.linearize.lmmse import cca_bound, fit_lmmse
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.models.layers import attention_layers, hidden_size, observed
from nbl_export.models.load import in_precision, load_model, load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from nbl_export.report.schema import environment
from nbl_export.settings import CalibrateSettings
from nbl_export.verify.speed.memory import peak_in_bytes

SEQ_LEN = 512
BATCH = 2
HALF = "ours, the model in bfloat16"


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
    return {"seconds": seconds, "mib": peak_in_bytes(peak - before, sys.platform) / 2**20}


def in_separate_process(way: str, model: str, text: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, model, text, "--one", way, "--tokens", str(count)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    value: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return value


def interleaved(model_name: str, text: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward, forward without the head, and our pass in float32 and bfloat16, interleaved by batch."""
    model: Any = load_model(find_model(model_name))
    half: Any = in_precision(model, "bfloat16")
    tokens = tokens_of(model_name, text, BATCH * SEQ_LEN)
    ids = torch.from_numpy(tokens.astype(np.int64))
    layers = attention_layers(model)
    sums = {layer.index: Accumulator(hidden_size(model)) for layer in layers}
    times: dict[str, list[float]] = {"forward": [], "forward without head": [], "ours": [], HALF: []}

    def timed(name: str, work: Any) -> None:
        start = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - start)

    def our_pass(read: Any) -> None:
        with observed(read, layers, lambda i, h, x, y: sums[i].add(h, x, y)):
            read.base_model(input_ids=ids, use_cache=False)

    with torch.inference_mode():
        for _ in range(rounds + 1):
            timed("forward", lambda: model(input_ids=ids, use_cache=False))
            timed("forward without head", lambda: model.base_model(input_ids=ids, use_cache=False))
            timed("ours", lambda: our_pass(model))
            timed(HALF, lambda: our_pass(half))
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


_CALIBRATE = ("--samples", "32", "--seq-len", "512", "--selection-samples", "2", "--heldout-samples", "2")
_SELECT = ("--k", "8", "--criterion", "cca")


def against(checkout: Path, model: str, text: str, rounds: int) -> str:
    """Both commands of this version and of ``checkout``, in turn: seconds, their ratio, and whether the plans agree."""
    versions = {"this version": Path(__file__).parent.parent, "the other": checkout}
    times: dict[str, dict[str, list[float]]] = {c: {v: [] for v in versions} for c in ("calibrate", "select")}
    plans: dict[str, Plan] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            # Whoever comes first in a round is slower, so they take turns in that, too.
            for version, root in list(versions.items()) if turn % 2 else reversed(versions.items()):
                out = Path(scratch) / f"{version} {turn}"
                given = {
                    "calibrate": (model, "-o", str(out), "--calibration", text, *_CALIBRATE),
                    "select": (str(out), *_SELECT),
                }
                for command, words in given.items():
                    started = time.perf_counter()
                    subprocess.run(
                        [sys.executable, "-m", "nbl_export", command, *words],
                        check=True,
                        capture_output=True,
                        cwd=root.resolve(),
                    )
                    times[command][version].append(time.perf_counter() - started)
                plans[version] = load_plan(out / "nbl" / "plan.json")
        same = equal(plans["this version"], plans["the other"])  # W is read when it is asked for
    rows = [["command", *versions, "median ratio", "least", "most"]]
    for command, seconds in times.items():
        ours, theirs = seconds.values()
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        medians = [f"{statistics.median(values):.1f} s" for values in (ours, theirs)]
        rows.append(
            [
                command,
                *medians,
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f}",
                f"{max(ratios):.3f}",
            ]
        )
    agree = "the same, to the bit" if same else "NOT THE SAME"
    return f"{rounds} rounds, in turn; the plans are {agree}.\n\n{table(rows)}\n"


def equal(one: Plan, other: Plan) -> bool:
    """Whether both have the same layers with the same bits."""
    return one.chosen == other.chosen and all(
        np.array_equal(a.w, b.w) and np.array_equal(a.b, b.b)
        for a, b in zip(one.layers.values(), other.layers.values(), strict=True)
    )


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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.model, arguments.text, arguments.tokens[0])))
        return
    machine = environment()
    torch_version = machine.packages["torch"]
    measured_on = (
        f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB; torch {torch_version}.\n"
    )
    if arguments.against:
        model, source = (str(Path(name).resolve()) for name in (arguments.model, arguments.text))
        show(against(arguments.against, model, source, arguments.rounds) + "\n" + measured_on, arguments.out)
        return
    rows = [["tokens", "forward, s", "ours, s", "authors', s", "ours, MiB", "authors', MiB"]]
    for count in arguments.tokens:
        got = {way: in_separate_process(way, arguments.model, arguments.text, count) for way in WAYS}
        seconds = [f"{got[way]['seconds']:.1f}" for way in WAYS]
        memory = [f"{got[way]['mib']:,.0f}" for way in ("ours", "authors")]
        rows.append([f"{count:,}", *seconds, *memory])
        print(rows[-1], file=sys.stderr, flush=True)
    times = interleaved(arguments.model, arguments.text, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [["our pass against", "median ratio", "quartiles"]]
    for name in ("forward", "forward without head", HALF):
        pairs = [a / b for a, b in zip(times["ours"], times[name], strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4)
        ratios.append(
            [
                f"{name} ({medians[name] * 1e3:.0f} ms)",
                f"{statistics.median(pairs):.2f}",
                f"{low:.2f}–{high:.2f}",
            ]
        )
    text = (
        f"Time to all layers' W, b and scores, and peak memory above the loaded model.\n\n{table(rows)}\n\n"
        f"One batch of {BATCH} × {SEQ_LEN} tokens, in turn, {arguments.rounds} rounds.\n\n{table(ratios)}\n\n"
    )
    show(text + measured_on, arguments.out)


def show(text: str, path: Path | None) -> None:
    print(text)
    if path:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
