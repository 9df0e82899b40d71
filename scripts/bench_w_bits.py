"""What storing W in fewer bits costs: python scripts/bench_w_bits.py MODEL OUT TEXT [--tokens 8192] [--layers 24,25]

OUT is an output folder of MODEL with a plan, TEXT is for evaluation only. In PyTorch in float32; only W changes:

KL        of the next token, original model to linearized model, in nats per token; ± its standard error over documents
W alone   the same from the linearized model with W in float32 to it with W in that format
error     ‖Ŵu − Wu‖ / ‖Wu‖ over the calibration text, the largest of all linear layers
bytes     of one W

--layers takes these linear layers instead of the plan's, fitted by plain LMMSE.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality import packed

from nbl_export.blocks import block_of
from nbl_export.calibrate.moments import load_moments
from nbl_export.linearize.fits import as_layer
from nbl_export.linearize.lmmse import branch_covariances, fit_lmmse
from nbl_export.linearize.loss import Reference, compare, loss_over_documents, reference, row_logits
from nbl_export.linearize.plan import LinearLayer, load_plan
from nbl_export.linearize.swap import replaced
from nbl_export.models.load import load_model, load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.rewrite.quantize import quantize_blocks
from nbl_export.workspace import Workspace

# Bits, block size, symmetric. Exporters use 4 bits in blocks of 32 or 128.
FORMATS = [
    (4, 128, True),
    (4, 32, True),
    (4, 32, False),
    (4, 16, True),
    (4, 16, False),
    (8, 128, True),
    (8, 32, True),
]


def losses(model: torch.nn.Module, layers: Any, rows: Any, references: list[Reference], owner: Any) -> Any:
    kl, excess = [], []
    with torch.inference_mode(), replaced(model, layers, "normed"):
        for row, original in zip(rows, references, strict=True):
            row_kl, row_excess = compare(original, row_logits(model, row), row)
            kl.append(row_kl)
            excess.append(row_excess)
    return loss_over_documents(np.concatenate(kl), np.concatenate(excess), owner)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers")
    options = parser.parse_args()
    ws = Workspace(options.out)
    plan = load_plan(ws.plan)
    if plan.fit_input != "normed":
        raise SystemExit("--fit-input normed is needed")
    source = find_model(options.model)
    model, tokenizer = load_model(source), load_tokenizer(source)
    moments, _ = load_moments(ws.moments)
    layers = dict(plan.layers)
    if options.layers:
        chosen = [block_of(x) for x in options.layers.split(",")]
        layers = {i: as_layer(fit_lmmse(moments.layers[i], "normed")) for i in chosen}
    ids, documents = packed(tokenizer, options.text, options.tokens)
    rows = [torch.from_numpy(row.astype(np.int64)) for row in ids]
    owner = documents[:, 1:].reshape(-1)
    with torch.inference_mode():
        original = [reference(row_logits(model, row), row) for row in rows]
        with replaced(model, layers, "normed"):
            linear = [reference(row_logits(model, row), row) for row in rows]
    print(
        f"{options.out}: layers {', '.join(map(str, sorted(layers)))}; {len(rows)} rows of {len(rows[0])} tokens"
    )
    print("| W | bytes | error | KL | W alone |\n|---|---|---|---|---|")
    kept = losses(model, layers, rows, original, owner)
    some = next(iter(layers.values())).w
    print(f"| float32 | {some.size * 4:,} | 0 | {kept.kl:.4f} ± {kept.kl_se:.4f} | 0 |", flush=True)
    for bits, block, symmetric in FORMATS:
        stored, errors = {}, []
        for index, layer in layers.items():
            values = quantize_blocks(layer.w, bits, block, symmetric).values()
            w = values.reshape(len(layer.w), -1)[:, : layer.w.shape[1]]
            stored[index] = LinearLayer(w, layer.b)
            c = branch_covariances(moments.layers[index], "normed")
            second = c.c_uu + np.outer(c.mean_u, c.mean_u)
            off, all_ = ((m.astype(np.float64) @ second * m).sum() for m in (w - layer.w, layer.w))
            errors.append(np.sqrt(off / all_))
        own, alone = (losses(model, stored, rows, r, owner) for r in (original, linear))
        size = some.size * bits // 8 + some.size // block * (2 if symmetric else 3)
        name = f"int{bits}, block {block}{'' if symmetric else ', zero points'}"
        print(
            f"| {name} | {size:,} | {max(errors):.1%} | {own.kl:.4f} ± {own.kl_se:.4f} | "
            f"{alone.kl:.4f} ± {alone.kl_se:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
