"""Try mutants of every file that a command reads: python scripts/fuzz.py MODEL TEXT --mutants 5000 --seed 0

MODEL is a small model folder, TEXT a .jsonl.gz of documents. A run with K = 2 is made of them once, in --folder; each
mutant is a copy of it with one file changed (mutants.py), which one command then reads. The command runs in a fork of
this process, in which the libraries are loaded already, with a time and a memory limit. It may pass, refuse (exit 2, 3,
4) or fail a gate (1). Everything else is wrong and ends this with exit 1:

    internal    exit 70, a traceback, or several sentences
    crash       ended by a signal
    time        more than --seconds
    memory      more than --gib
    escape      a control character written to the terminal
    victim      a file outside was changed
    stale       verify or report passed although a graph or the plan was changed

A mutant is named by its seed and number: --seed 0 --first 1234 --mutants 1 makes it again, and --keep keeps the files.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
sys.path.insert(0, str(Path(__file__).parent.parent))

import mutants

CALIBRATE = ("--samples", "2", "--seq-len", "64", "--heldout-samples", "1", "--selection-samples", "1")
# In memory: a command waits for the disk after each file that it writes.
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
VICTIM = "a file that is not the tool's\n"


@dataclass(frozen=True)
class Command:
    """A command and the files that it reads, as patterns in the material; ``weight`` is how often it is drawn."""

    words: tuple[str, ...]
    reads: tuple[str, ...]
    weight: int = 2


OUT_FILES = ("out/*.json", "out/*.onnx*", "out/nbl/*", "out/baseline/*", "out/report/*.json")
MODEL_FILES = ("model/*",)
COMMANDS = {
    "inspect-out": Command(("inspect", "out"), ("out/nbl/*", "out/*.onnx", "out/report/*.json"), 4),
    "inspect-graph": Command(("inspect", "graph/model.onnx"), ("graph/model.onnx*",), 4),
    "inspect-rewritten": Command(("inspect", "out/model.onnx"), ("out/model.onnx*",)),
    "inspect-plan": Command(("inspect", "out/nbl/plan.json"), ("out/nbl/plan.*",)),
    "inspect-moments": Command(("inspect", "out/nbl/moments.safetensors"), ("out/nbl/moments.*",), 1),
    "inspect-engine": Command(("inspect", "engine/model.engine"), ("engine/*",), 1),
    "report": Command(("report", "out"), (*OUT_FILES, "out/report/report.json"), 4),
    "rewrite-onnx": Command(
        ("rewrite", "--onnx", "graph", "--plan", "out/nbl/plan.json", "-o", "new"),
        ("graph/*", "graph/model.onnx", "out/nbl/plan.*"),
        4,
    ),
    "calibrate": Command(
        ("calibrate", "model", "-o", "new", "--calibration", "text/a.jsonl", *CALIBRATE), MODEL_FILES, 5
    ),
    "text": Command(("calibrate", "model", "-o", "new", "--calibration", "text", *CALIBRATE), ("text/*",), 2),
    "settings": Command(
        ("calibrate", "model", "-o", "new", "--config", "settings/s.toml"), ("settings/*",), 2
    ),
    "select": Command(("select", "out", "--k", "1"), (*OUT_FILES, "out/nbl/*.json"), 3),
    "export": Command(("export", "out"), OUT_FILES, 1),
    # Exported, and not rewritten yet: otherwise the stage has nothing to do.
    "rewrite": Command(("rewrite", "half"), ("half/nbl/*", "half/baseline/*", "half/nbl/plan.*"), 3),
    "verify": Command(("verify", "out", "--no-speed", "--decode-steps", "2"), OUT_FILES, 3),
    "eval": Command(
        ("eval", "out", "--tasks", "tasks", "--limit", "2", "--no-retrieval"),
        (*OUT_FILES, "tasks/*", "out/nbl/eval/*"),
        2,
    ),
}
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


def forked(words: Sequence[str], folder: Path, seconds: float, data: int) -> Ended:
    """Run one command of nbl-export in ``folder`` in a fork of this process."""
    log = folder / "log"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(words, folder, log, data)
    watched = os.pidfd_open(child)
    try:
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
    """The material, once: the model, a finished run, a foreign graph, texts, settings, an engine."""
    if (folder / "ready").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, folder / "model")
    (folder / "text").mkdir()
    import gzip

    with gzip.open(text, "rt", encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(60), strict=False)]
    (folder / "text" / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "text" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[:20]).encode()))
    (folder / "text" / "c.txt").write_text(
        "\n".join(json.loads(x)["text"] for x in lines[:9]), encoding="utf-8"
    )
    (folder / "settings").mkdir()
    (folder / "settings" / "s.toml").write_text(SETTINGS, encoding="utf-8")
    (folder / "tasks").mkdir()
    rows = [{"question": f"Once upon {i}", "answer": "a time"} for i in range(4)]
    (folder / "tasks" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    calibration = ("--samples", "8", "--seq-len", "64", "--heldout-samples", "2", "--selection-samples", "2")
    words = (
        "run",
        "model",
        "-o",
        "out",
        "--k",
        "2",
        "--criterion",
        "greedy",
        "--calibration",
        "text/a.jsonl",
    )
    done = forked((*words, *calibration, "--no-speed"), folder, 300, 8 << 30)
    if done.code not in (0, 1):
        raise SystemExit(f"the run that everything is made of ended with {done.code}:\n{done.text}")
    done = forked(COMMANDS["eval"].words, folder, 300, 8 << 30)
    if done.code not in (0, 1):
        raise SystemExit(f"the evaluation ended with {done.code}:\n{done.text}")
    shutil.copytree(folder / "out" / "baseline", folder / "graph")
    shutil.copytree(folder / "out", folder / "half")
    record = folder / "half" / "nbl" / "workspace.json"
    state = json.loads(record.read_text(encoding="utf-8"))
    for stage in ("rewrite", "verify"):
        state["stages"].pop(stage, None)
    record.write_text(json.dumps(state), encoding="utf-8")
    _engine(folder / "engine")
    (folder / "ready").touch()


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


@dataclass(frozen=True)
class Trial:
    name: str
    file: str
    how: str
    ended: Ended
    wrong: tuple[str, ...]


def trial(number: int, options: argparse.Namespace, material: Path, names: Sequence[str]) -> Trial:
    """Make mutant ``number`` of the seed, run its command, judge it."""
    rng = random.Random(f"{options.seed}:{number}")
    name = rng.choices(names, [COMMANDS[n].weight for n in names])[0]
    command = COMMANDS[name]
    place = options.scratch / "trial"
    mutants.copy(material, place)
    victim = options.scratch / "victim"
    victim.write_text(VICTIM, encoding="utf-8")
    pattern = rng.choice(command.reads)
    found = sorted(p for p in place.glob(pattern) if p.is_file() and p.name != ".lock")
    path = rng.choice(found)
    how = mutants.mutate(path, rng, victim)
    home = place / path.relative_to(place).parts[0]
    sealed = home.name in ("out", "half") and rng.random() < 0.6
    if sealed:
        mutants.seal(home)
    before = _digest(path)
    ended = forked(command.words, place, options.seconds, options.data)
    wrong = judge(ended, options)
    if not victim.is_file() or victim.read_text(encoding="utf-8") != VICTIM:
        wrong.append("victim")
    file = str(path.relative_to(place))
    if (
        not sealed
        and ended.code == 0
        and name in ("verify", "report")
        and _is_stale(place, material, file, before)
    ):
        wrong.append("stale")
    if wrong and options.keep:
        kept = options.keep / f"{options.seed}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        place.rename(kept)  # copying would read a FIFO
    return Trial(name, file, how + (", sealed" if sealed else ""), ended, tuple(wrong))


def judge(ended: Ended, options: argparse.Namespace) -> list[str]:
    """What is wrong with how a command ended."""
    wrong = ["time"] if ended.late else ["crash"] if ended.code < 0 else []
    sentences = len(re.findall(r"^error: ", ended.text, re.M))
    if not wrong and (
        ended.code not in (0, 1, 2, 3, 4)
        or "Traceback" in ended.text
        or "Internal error" in ended.text
        or (sentences != (ended.code > 1) and ended.code != 1)
    ):
        wrong.append("internal")
    if ended.peak > options.gib * 2**30:
        wrong.append("memory")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u202a-\u202e]", ended.text.replace("\r", "")):
        wrong.append("escape")
    return wrong


def _is_stale(place: Path, material: Path, file: str, before: str) -> bool:
    """Whether a changed graph or plan was kept as it is."""
    recorded = mutants._read(material / "out" / "nbl" / "workspace.json") or {}
    now = mutants._read(place / "out" / "nbl" / "workspace.json") or {}

    if not re.fullmatch(r"out/(baseline/)?model\.onnx(\.data)?|out/nbl/plan\.(json|safetensors)", file):
        return False

    def digest(state: Any) -> str | None:
        for stage, record in state.get("stages", {}).items():
            if stage not in ("verify", "eval", "bench") and file.removeprefix("out/") in record["files"]:
                return str(record["files"][file.removeprefix("out/")])
        return None

    changed = digest(recorded) not in (None, before)
    return changed and _digest(place / file) == before and digest(now) != before


def _digest(path: Path) -> str:
    plain = path.is_file() and not path.is_symlink()
    return hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="only this one; repeatable")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--folder", type=Path, help="where the material is, or is made")
    parser.add_argument("--keep", type=Path, help="a folder for the mutants that went wrong")
    parser.add_argument("--verbose", action="store_true", help="a line for each mutant")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    options.data = int((options.gib + 2) * 2**30)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=options.keep or _MEMORY) as scratch:
        options.scratch = Path(scratch)
        material = options.folder or options.scratch / "material"
        preload()
        prepare(material, options.model, options.text)
        sys.exit(campaign(options, material))


def campaign(options: argparse.Namespace, material: Path) -> int:
    """Try all mutants; 1 if any went wrong."""
    names = options.command or list(COMMANDS)
    codes: dict[str, collections.Counter[int]] = {name: collections.Counter() for name in names}
    seconds: dict[str, float] = dict.fromkeys(names, 0.0)
    wrong, tried, slowest, most = 0, 0, 0.0, 0
    for number in range(options.first, options.first + options.mutants):
        try:
            done = trial(number, options, material, names)
        except KeyboardInterrupt:  # what was tried until now is said
            break
        tried += 1
        codes[done.name][done.ended.code] += 1
        seconds[done.name] += done.ended.seconds
        slowest, most = max(slowest, done.ended.seconds), max(most, done.ended.peak)
        if done.wrong or options.verbose:
            wrong += bool(done.wrong)
            last = [x for x in done.ended.text.strip().splitlines() if "error: " in x] or [
                done.ended.text.strip()
            ]
            print(
                f"{options.seed}:{number} {' '.join(done.wrong) or 'right'} {done.name} {done.file} ({done.how}): exit "
                f"{done.ended.code} in {done.ended.seconds:.1f} s, {done.ended.peak / 2**20:.0f} MiB: "
                f"{last[-1][-300:]!a}",
                flush=True,
            )
    for name in names:
        if count := codes[name].total():
            shown = ", ".join(f"{n} × exit {code}" for code, n in sorted(codes[name].items()))
            print(f"{name:18} {count:5} mutants, {seconds[name] / count:.2f} s each: {shown}")
    print(f"{wrong} of {tried} went wrong; at most {slowest:.1f} s and {most / 2**30:.2f} GiB")
    return int(wrong > 0)


if __name__ == "__main__":
    main()
