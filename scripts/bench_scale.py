"""Memory, time and bytes of each stage at the sizes where they matter: random checkpoints of real models' shapes.

    python scripts/bench_scale.py TOKENIZER TEXT [--shapes 135M 1B 8B] [--stages calibrate …] [--dir DIR]

TOKENIZER is a model folder or a .gguf file whose tokenizer the checkpoints get, TEXT is calibration text. The weights
are random (normal, standard deviation 0.02) and bfloat16, in shards; what a stage reads, holds and computes depends on
their shapes only. Each stage is one command in a process of its own. Its memory is that of it and its children,
looked at ten times a second: *anonymous* is what cannot be dropped, *RSS* has the mapped files too.

A stage is skipped, with the reason, if it would take more memory than is free by the formulas of `--dry-run`; one that
takes longer than ``--limit`` is interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from nbl_export.digests import Unread
from nbl_export.models.load import fast_dtype, load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.models.tasks import task_named
from nbl_export.report.schema import environment
from nbl_export.settings import CalibrateSettings, ExportSettings, RunSettings, SelectSettings
from nbl_export.stages.needs import lacks_memory, memory, sizes_of_source

_MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A Llama; ``like`` is the model that has this shape."""

    like: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "135M": Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, True),
    "1B": Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, True),
    "8B": Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256, False),
}
# Few tokens: what is measured does not depend on their number, but the time.
_TEXT: dict[str, Any] = {"samples": 8, "seq_len": 640, "selection_samples": 2, "heldout_samples": 2}
_K, _PRECISION = 12, "bf16"
_CALIBRATE = [f"--{name.replace('_', '-')}={value}" for name, value in _TEXT.items()]
STAGES: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", "{model}", "-o", "{out}", "--calibration", "{text}", *_CALIBRATE),
    "select cca": ("select", "{out}", "--k", str(_K), "--criterion", "cca"),
    "select kl": ("select", "{out}", "--k", str(_K), "--criterion", "kl"),
    "export": ("export", "{out}", "--precision", _PRECISION),
    "rewrite": ("rewrite", "{out}"),
    "verify": ("verify", "{out}"),
}


@dataclass
class Used:
    """What a command took: seconds, peak bytes, bytes that it read and wrote, its exit code and last line."""

    seconds: float = 0.0
    anonymous: int = 0
    rss: int = 0
    read: int = 0
    written: int = 0
    code: int = 0
    last: str = ""

    def ended(self, limit: float) -> str:
        """How it ended; empty if it did all its work. It was given ``limit`` minutes."""
        if self.code == 0:
            return ""
        late = self.seconds > 60 * limit
        return f"skipped: not done in {limit:g} min" if late else f"exit {self.code}: {self.last}"


def make_checkpoint(shape: Shape, folder: Path, tokenizer: str) -> int:
    """Write the checkpoint, unless it is there already; returns its bytes."""
    done = folder / "model.safetensors.index.json"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        load_tokenizer(find_model(tokenizer)).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
        done.write_text(json.dumps({"metadata": {}, "weight_map": _write_shards(shape, folder)}))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _write_shards(shape: Shape, folder: Path) -> dict[str, str]:
    d, inner, kv = shape.hidden, shape.inner, shape.hidden // shape.heads * shape.kv_heads
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
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (shape.vocab, d)}]
    for i in range(shape.layers):
        shards.append({f"model.layers.{i}.{name}.weight": size for name, size in block.items()})
    last: dict[str, tuple[int, ...]] = {"model.norm.weight": (d,)}
    shards.append(last if shape.tied else {**last, "lm_head.weight": (shape.vocab, d)})
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


def hindrance(model: Path, text: str, stage: str) -> str:
    """Why a stage does not fit into the memory that is free; empty if it does."""
    found = find_model(str(model), digests=Unread())
    name, _, criterion = stage.partition(" ")
    asked = RunSettings(
        SelectSettings(k=_K, criterion=criterion or "cca"),
        CalibrateSettings((text,), **_TEXT),
        exporting=ExportSettings(_PRECISION),
    ).resolve(task_named(found.task))
    dtype = getattr(torch, fast_dtype())
    free = psutil.virtual_memory().available
    taken = memory(sizes_of_source(found), asked, dtype.itemsize, free)
    return lacks_memory(name, taken[name], free)


def run(arguments: list[str], limit: float) -> Used:
    """Run the command and look at it until it ends, or is interrupted after ``limit`` seconds."""
    used, began = Used(), time.monotonic()
    command = [sys.executable, "-m", "nbl_export", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        watched = psutil.Process(child.pid)
        io: dict[int, tuple[int, int]] = {}
        while child.poll() is None:
            look(watched, used, io)
            if time.monotonic() - began > limit:
                child.send_signal(signal.SIGINT)
                child.wait()
            time.sleep(0.1)
        assert child.stdout is not None
        lines = child.stdout.read().strip().splitlines()
    used.read, used.written = (sum(pair[i] for pair in io.values()) for i in (0, 1))
    used.seconds, used.code, used.last = (
        time.monotonic() - began,
        child.returncode,
        lines[-1] if lines else "",
    )
    return used


def look(process: psutil.Process, used: Used, io: dict[int, tuple[int, int]]) -> None:
    """Note what the process and its children have now."""
    anonymous = rss = 0
    try:
        for one in (process, *process.children(recursive=True)):
            sizes = _memory(one.pid)
            anonymous, rss = anonymous + sizes["RssAnon"], rss + sizes["VmRSS"]
            counts: Any = one.io_counters()
            io[one.pid] = counts.read_bytes, counts.write_bytes
    except (psutil.Error, OSError, KeyError):
        return  # it has just ended
    used.anonymous, used.rss = max(used.anonymous, anonymous), max(used.rss, rss)


def _memory(pid: int) -> dict[str, int]:
    # smaps_rollup would walk every mapped page, which takes longer than the work itself for a mapped model.
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        line.split(":")[0]: 1024 * int(line.split()[1])
        for line in lines
        if line.startswith(("VmRSS", "RssAnon"))
    }


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
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    columns = "model", "stage", "anonymous MiB", "RSS MiB", "× file", "seconds", "read MiB", "written MiB", ""
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name in arguments.shapes:
        model, out = arguments.dir / f"model-{name}", arguments.dir / f"out-{name}"
        size = make_checkpoint(SHAPES[name], model, arguments.tokenizer)
        for stage in arguments.stages:
            if reason := hindrance(model, arguments.text, stage):
                rows.append(f"| {name} | {stage} | | | | | | | {reason} |")
                print(rows[-1], flush=True)
                continue
            words = {"model": str(model), "out": str(out), "text": arguments.text}
            used = run([word.format(**words) for word in STAGES[stage]], 60 * arguments.limit)
            figures = (used.anonymous / _MIB, used.rss / _MIB)
            rows.append(
                f"| {name} | {stage} | {figures[0]:,.0f} | {figures[1]:,.0f} | {used.anonymous / size:.2f} | "
                f"{used.seconds:,.0f} | {used.read / _MIB:,.0f} | {used.written / _MIB:,.0f} | "
                f"{used.ended(arguments.limit)} |"
            )
            print(rows[-1], flush=True)
    machine = environment()
    text = "\n".join(
        [f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB.", "", *rows, ""]
    )
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
