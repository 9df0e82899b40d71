"""What scripts/fuzz.py makes its mutants of, and how it runs a command: in a fork of a process that has all loaded."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = """[calibrate]
calibration = ["text/a.jsonl"]
samples = 2
seq-len = 64
heldout-samples = 1
selection-samples = 1

[select]
k = 2
criterion = "cca"

[export]
precision = "fp32"
"""


CALIBRATE = ("--samples", "2", "--seq-len", "64", "--heldout-samples", "1", "--selection-samples", "1")
ENCODER = ("--k", "1", "--samples", "8", "--heldout-samples", "2", "--criterion", "cca", "--no-speed")
STAGES = ("calibrate", "select", "export", "rewrite", "build", "verify", "eval", "bench")
EVAL = ("eval", "out", "--tasks", "tasks", "--limit", "2", "--no-retrieval")
BENCH = ("bench", "timed", "--batches", "1", "--contexts", "8,12", "--rounds", "6", "--seconds", "2")
LONG = (
    *("calibrate", "model", "-o", "calibrating", "--calibration", "long/a.jsonl"),
    *("--samples", "400", "--seq-len", "64", "--heldout-samples", "1", "--selection-samples", "1"),
)


@dataclass(frozen=True)
class Ended:
    """How a forked command ended: its exit code (negative: the signal), what it wrote, seconds and peak bytes."""

    code: int
    text: str
    seconds: float
    peak: int
    late: bool


def preload() -> None:
    """Import once what every command imports: a fork then has it for nothing."""
    import gc

    import gguf  # noqa: F401
    import jinja2  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    from nbl_export import api, cli  # noqa: F401
    from nbl_export.cli import main, terminal  # noqa: F401
    from nbl_export.stages import evaluate, inspection, rewrite, verify  # noqa: F401

    torch.set_num_threads(1)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    gc.collect()
    gc.freeze()


def forked(
    words: Sequence[str], folder: Path, seconds: float, data: int, interrupt: float | None = None
) -> Ended:
    """Run one command of nbl-export in ``folder`` in a fork of this process.

    It is killed after ``seconds``, and sent SIGTERM after ``interrupt`` seconds.
    """
    log = folder / "log"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(words, folder, log, data)
    watched = os.pidfd_open(child)
    try:
        if interrupt is not None and not select.select([watched], [], [], interrupt)[0]:
            os.kill(child, signal.SIGTERM)
        late = not select.select([watched], [], [], seconds)[0]
    finally:
        os.close(watched)
    if late:
        os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    took = time.monotonic() - started
    with log.open("rb") as file:
        text = file.read(1 << 20).decode("utf-8", "replace")
    return Ended(os.waitstatus_to_exitcode(status), text, took, used.ru_maxrss * 1024, late)


def other_outputs(right: Path, mutant: Path) -> bool:
    """Whether a graph gives other first outputs than the right one, by 0.01, for twelve tokens."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # the mutant may do anything
        try:
            from nbl_export.runtime.ort import run_outputs

            tokens = np.arange(3, 15, dtype=np.int64)[None]
            inputs = {"input_ids": tokens, "attention_mask": tokens * 0 + 1, "token_type_ids": tokens * 0}
            rows: Any = [tokens[0]] if right.parent.name == "unverified" else inputs
            a, b = (next(iter(run_outputs(path, rows).values())) for path in (right, mutant))
            same = a.shape == b.shape and bool(np.allclose(a, b, rtol=0, atol=0.01))
            os.write(writing, b"same" if same else b"other")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return found != b"same"


def _child(words: Sequence[str], folder: Path, log: Path, data: int) -> None:
    """Never returns: a fork that went on would be a second fuzzer."""
    code = 99
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (data, data))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30, 2 << 30))
        os.chdir(folder)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for place, source in ((0, nothing), (1, target), (2, target)):
            os.dup2(source, place)
        sys.argv = ["nbl-export", *words]
        from nbl_export import cli

        cli.main()
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def prepare(folder: Path, model: Path, text: Path) -> None:
    """The material, once: models, finished and unfinished runs, a foreign graph, texts, images, settings, an engine."""
    if (folder / "ready").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, folder / "model")
    _texts(folder, text)
    _models(folder)
    _runs(folder)
    _engine(folder / "engine")
    (folder / "ready").touch()


def _texts(folder: Path, text: Path) -> None:
    for name in ("long", "text", "settings", "tasks"):
        (folder / name).mkdir()
    with gzip.open(text, "rt", encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(600), strict=False)]
    (folder / "long" / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    del lines[60:]
    (folder / "text" / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "text" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[:20]).encode()))
    documents = [json.loads(line)["text"] for line in lines[:9]]
    (folder / "text" / "c.txt").write_text("\n".join(documents), encoding="utf-8")
    (folder / "settings" / "s.toml").write_text(SETTINGS, encoding="utf-8")
    rows = [{"question": f"Once upon {i}", "answer": "a time"} for i in range(4)]
    (folder / "tasks" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _models(folder: Path) -> None:
    """A GGUF file, an encoder of texts and one of images; random weights of the sizes of tests."""
    from tests import encoders

    (folder / "gguf").mkdir()
    _gguf(folder / "gguf" / "m.gguf", folder / "model")
    encoders.as_sentence_transformer(encoders.text_encoder(folder / "encoder"))
    encoders.vision_encoder(folder / "vision")
    encoders.write_images(folder / "images", 12)


def _gguf(path: Path, model: Path) -> None:
    """The Llama of ``model`` as GGUF, with a byte-level vocabulary. The heads of Q and K are not interleaved."""
    import gguf
    from safetensors.numpy import load_file
    from tokenizers.pre_tokenizers import ByteLevel

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    weights = load_file(model / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "cd"]
    tokens += [f"<{i}>" for i in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in weights.items():
        writer.add_tensor(str(names.get_name(name, (".weight", ".bias"))), weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _runs(folder: Path) -> None:
    """Finished runs, and such as were interrupted in calibrate and in bench."""
    run = ("--k", "2", "--samples", "8", "--seq-len", "64", "--heldout-samples", "2", "--no-speed")
    text = ("--calibration", "text/a.jsonl", "--selection-samples", "2", "--criterion", "greedy")
    _done(("run", "model", "-o", "out", *run, *text), folder)
    _done(EVAL, folder)
    shutil.copytree(folder / "out" / "baseline", folder / "graph")
    _done(("run", "encoder", "-o", "encoder-out", "--calibration", "text/a.jsonl", *ENCODER), folder)
    shutil.copytree(folder / "out", folder / "timed")
    # A stage that is done has nothing to do: these are done up to one of them.
    for name, last in (("planned", "select"), ("half", "export"), ("unverified", "rewrite")):
        shutil.copytree(folder / "out", folder / name)
        _forget(folder / name, last)
    _forget(folder / "encoder-out", "rewrite")
    _interrupted(BENCH, folder, "timed/nbl/bench.partial.json")
    _interrupted(LONG, folder, "calibrating/nbl/moments.partial/states.safetensors")


def _forget(out: Path, last: str) -> None:
    """Make the records of ``out`` end with the stage ``last``."""
    record = out / "nbl" / "workspace.json"
    state = json.loads(record.read_text(encoding="utf-8"))
    for stage in STAGES[STAGES.index(last) + 1 :]:
        state["stages"].pop(stage, None)
    record.write_text(json.dumps(state), encoding="utf-8")


def _done(words: Sequence[str], folder: Path) -> None:
    done = forked(words, folder, 300, 8 << 30)
    if done.code not in (0, 1):
        raise SystemExit(f"{words[0]}, of which mutants are made, ended with {done.code}:\n{done.text}")


def _interrupted(words: Sequence[str], folder: Path, partial: str) -> None:
    """Interrupt a command until it leaves ``partial`` behind."""
    for delay in np.geomspace(0.3, 20, 25):
        forked(words, folder, 300, 8 << 30, float(delay))
        if (folder / partial).exists():
            return
    raise SystemExit(f"{words[0]} left no {partial}, whenever it was interrupted")


def _engine(folder: Path) -> None:
    """An engine that no library built, with its manifest."""
    from nbl_export.engine import manifest
    from nbl_export.engine.network import NetworkFacts
    from nbl_export.engine.profiles import Limits

    folder.mkdir()
    engine = b"no engine" * 100
    (folder / "model.engine").write_bytes(engine)
    facts: dict[str, Any] = {
        "role": "linearized",
        "library": "tensorrt_rtx",
        "library_version": "1.5",
        "ahead_of_time": True,
        "capabilities": ("8.6",),
        "gpu": None,
        "precision": "fp32",
        "kv_cache": "static",
        "limits": _filled(Limits),
        "profiles": (),
        "kv_layers": (0, 1, 2),
        "linear_layers": (3, 4),
        "attention": "fused",
        "network": _filled(NetworkFacts),
        "hashes": {"engine": hashlib.sha256(engine).hexdigest()},
        "build_seconds": 1.0,
        "size": len(engine),
        "created_by": "nbl-export",
    }
    text = manifest.manifest_text(manifest.Manifest(**facts))
    (folder / "model.json").write_text(text, encoding="utf-8")


def _filled(kind: Any) -> Any:
    """A dataclass with a plain value of its type in every field that has no default."""
    import dataclasses

    plain = {"int": 1, "str": "x", "float": 1.0, "bool": True}
    needed = [f for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    needed = [f for f in needed if f.default_factory is dataclasses.MISSING]
    return kind(**{f.name: plain.get(str(f.type), {} if "Mapping" in str(f.type) else ()) for f in needed})
