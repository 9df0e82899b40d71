"""Memory, time and bytes of each stage at the sizes where they matter: random checkpoints of real models' shapes.

    python scripts/bench_scale.py TOKENIZER TEXT [--shapes 135M 1B …] [--stages calibrate …] [--dir DIR]

TOKENIZER is a model folder or a .gguf file whose tokenizer the checkpoints get, TEXT is calibration text. The weights
are random (normal, standard deviation 0.02) and bfloat16, in shards; what a stage reads, holds and computes depends on
their shapes only. Each stage is one command in a process of its own. Its memory is that of it and its children,
looked at ten times a second: *anonymous* is what cannot be dropped, *RSS* has the mapped files too.

A stage that takes longer than ``--limit`` is interrupted; what one needs is in `--dry-run`.
"""

from __future__ import annotations

import argparse
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
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.report.schema import environment

# Those of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B. Of mixtures of experts a few layers, as wide as they are.
_LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
SHAPES: dict[str, dict[str, Any]] = {
    name: _LLAMA | dict(zip(_FIELDS, sizes, strict=True))
    for name, sizes in {
        "135M": (576, 1536, 30, 9, 3, 49152, True),
        "1B": (2048, 8192, 16, 32, 8, 128256, True),
        "8B": (4096, 14336, 32, 32, 8, 128256, False),
    }.items()
}
SHAPES |= {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_local_experts": 32, "num_hidden_layers": 4},
    # Three dense layers come first.
    "DeepSeek-V3": {"model_type": "deepseek_v3", "num_hidden_layers": 2},
}
# Few tokens: what is measured does not depend on their number, but the time. There must be more than the model is wide.
_ROW = 640
_TEXT = ("--samples={rows}", f"--seq-len={_ROW}", "--selection-samples=2", "--heldout-samples=2")
STAGES: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", "{model}", "-o", "{out}", "--calibration", "{text}", *_TEXT),
    "select cca": ("select", "{out}", "--k", "{k}", "--criterion", "cca"),
    "select kl": ("select", "{out}", "--k", "{k}", "--criterion", "kl"),
    "export": ("export", "{out}", "--precision", "bf16"),
    "rewrite": ("rewrite", "{out}"),
    "verify": ("verify", "{out}"),
}


def make_checkpoint(fields: dict[str, Any], folder: Path, tokenizer: str) -> int:
    """Write the checkpoint, unless it is there already; returns its bytes."""
    if not (folder / "tokenizer.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        config = AutoConfig.for_model(**fields)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.data.normal_(0.0, 0.02, generator=generator)
            else:
                weight.data.fill_(float(not name.endswith("bias")))
        kept = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in kept:
                buffer.zero_()
        model.save_pretrained(folder, max_shard_size="2GB")
        load_tokenizer(find_model(tokenizer)).save_pretrained(folder)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


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
        rows = max(8, AutoConfig.from_pretrained(model).hidden_size // _ROW + 1)
        for stage in asked.stages:
            k = min(12, SHAPES[name]["num_hidden_layers"] // 2)
            values = {"model": model, "out": out, "text": asked.text, "k": k, "rows": rows}
            words = [word.format(**values) for word in STAGES[stage]]
            used, ended = run(words, 60 * asked.limit)
            anonymous, rss, read, written = (
                f"{used[one] / 2**20:,.0f}" for one in ("RssAnon:", "VmRSS:", "read", "written")
            )
            share = f"{used['RssAnon:'] / size:.2f}"
            cells = (name, stage, anonymous, rss, share, f"{used['seconds']:,}", read, written, ended)
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
