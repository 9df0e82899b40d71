"""Memory, time and bytes of each stage at the sizes where they matter: random checkpoints of real models' shapes.

    python scripts/bench_scale.py TOKENIZER TEXT [--shapes 135M 1B 8B] [--stages calibrate …] [--dir DIR]

TOKENIZER is a model folder or a .gguf file whose tokenizer the checkpoints get, TEXT is calibration text. The weights
are random (normal, standard deviation 0.02) and bfloat16, in shards; what a stage reads, holds and computes depends on
their shapes only. Each stage is one command in a process of its own. Its memory is that of it and its children,
looked at ten times a second: *anonymous* is what cannot be dropped, *RSS* has the mapped files too.

A stage that takes longer than ``--limit`` is interrupted; what one needs is in `--dry-run`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.report.schema import environment

# A Llama by the name of what it is as large as; SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B have these shapes.
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    name: _COMMON | dict(zip(_FIELDS, sizes, strict=True))
    for name, sizes in {
        "135M": (576, 1536, 30, 9, 3, 49152, True),
        "1B": (2048, 8192, 16, 32, 8, 128256, True),
        "8B": (4096, 14336, 32, 32, 8, 128256, False),
    }.items()
}
# Few tokens: what is measured does not depend on their number, but the time.
_TEXT = ("--samples=8", "--seq-len=640", "--selection-samples=2", "--heldout-samples=2")
STAGES: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", "{model}", "-o", "{out}", "--calibration", "{text}", *_TEXT),
    "select cca": ("select", "{out}", "--k", "12", "--criterion", "cca"),
    "select kl": ("select", "{out}", "--k", "12", "--criterion", "kl"),
    "export": ("export", "{out}", "--precision", "bf16"),
    "rewrite": ("rewrite", "{out}"),
    "verify": ("verify", "{out}"),
}


def make_checkpoint(config: dict[str, Any], folder: Path, tokenizer: str) -> int:
    """Write the checkpoint, unless it is there already; returns its bytes."""
    done = folder / "model.safetensors.index.json"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        load_tokenizer(find_model(tokenizer)).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        done.write_text(json.dumps({"metadata": {}, "weight_map": _write_shards(config, folder)}))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _write_shards(config: dict[str, Any], folder: Path) -> dict[str, str]:
    d, inner, layers, heads, kv_heads, vocab, tied = (config[name] for name in _FIELDS)
    kv = d // heads * kv_heads
    block = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocab, d)},
        *({f"model.layers.{i}.{name}.weight": size for name, size in block.items()} for i in range(layers)),
        {"model.norm.weight": (d,)} if tied else {"model.norm.weight": (d,), "lm_head.weight": (vocab, d)},
    ]
    places: dict[str, str] = {}
    for number, shard in enumerate(shards):
        generator = torch.Generator().manual_seed(number)
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {
            key: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
            for key, size in shard.items()
        }
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
    return places


def run(arguments: list[str], limit: float) -> tuple[Counter[str], str]:
    """What the command took: seconds, peak bytes, bytes that it read and wrote; and how it ended, if not well.

    It is interrupted after ``limit`` seconds.
    """
    used: Counter[str] = Counter()
    io: dict[int, Any] = {}
    began = time.monotonic()
    command = [sys.executable, "-m", "nbl_export", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        while child.poll() is None:
            with suppress(psutil.Error, OSError, KeyError):  # it has just ended
                used |= look(psutil.Process(child.pid), io)
            if time.monotonic() - began > limit:
                child.send_signal(signal.SIGINT)
                child.wait()
            time.sleep(0.1)
        assert child.stdout is not None
        last = (child.stdout.read().strip().splitlines() or [""])[-1]
    seconds = time.monotonic() - began
    used.update(seconds=int(seconds), read=sum(c.read_bytes for c in io.values()))
    used.update(written=sum(c.write_bytes for c in io.values()))
    if seconds > limit:
        return used, f"skipped: not done in {limit / 60:g} min"
    return used, f"exit {child.returncode}: {last}" if child.returncode else ""


def look(process: psutil.Process, io: dict[int, Any]) -> Counter[str]:
    """The bytes that the process and its children have now; what they have read and written so far is put in ``io``."""
    found: Counter[str] = Counter()
    for one in (process, *process.children(recursive=True)):
        # smaps_rollup would walk every mapped page, which takes longer than the work itself for a mapped model.
        lines = (line.split() for line in Path(f"/proc/{one.pid}/status").read_text().splitlines())
        found.update({line[0]: 1024 * int(line[1]) for line in lines if line[0] in ("VmRSS:", "RssAnon:")})
        io[one.pid] = one.io_counters()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer")
    parser.add_argument("text")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--dir", type=Path, default=Path("scale"), help="where checkpoints and outputs go")
    parser.add_argument("--limit", type=float, default=60.0, help="minutes that a stage may take")
    asked = parser.parse_args()
    machine = environment()
    print(f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB.\n")
    columns = "model", "stage", "anonymous MiB", "RSS MiB", "× file", "seconds", "read MiB", "written MiB", ""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in asked.shapes:
        model, out = asked.dir / f"model-{name}", asked.dir / f"out-{name}"
        size = make_checkpoint(SHAPES[name], model, asked.tokenizer)
        for stage in asked.stages:
            words = [word.format(model=model, out=out, text=asked.text) for word in STAGES[stage]]
            used, ended = run(words, 60 * asked.limit)
            anonymous, rss, read, written = (
                f"{used[one] / 2**20:,.0f}" for one in ("RssAnon:", "VmRSS:", "read", "written")
            )
            share = f"{used['RssAnon:'] / size:.2f}"
            cells = (name, stage, anonymous, rss, share, f"{used['seconds']:,}", read, written, ended)
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
