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
    stale       a kept verification or a report passed although a graph or the plan was changed
    passed      verify passed a graph whose logits on a row of tokens are others

A mutant is named by its seed and number: --seed 0 --first 1234 --mutants 1 makes it again, and --keep keeps the files.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
sys.path.insert(0, str(Path(__file__).parent.parent))

import mutants
from fuzz_material import (
    BENCH,
    CALIBRATE,
    ENCODER,
    EVAL,
    LONG,
    Ended,
    forked,
    other_outputs,
    preload,
    prepare,
)

# In memory: a command waits for the disk after each file that it writes.
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
VERIFY = ("--no-speed", "--decode-steps", "2")
VICTIM = "a file that is not the tool's\n"


@dataclass(frozen=True)
class Command:
    """A command and the files that it reads, as patterns in the material; ``weight`` is how often it is drawn."""

    words: tuple[str, ...]
    reads: tuple[str, ...]
    weight: int = 2


def parts(out: str) -> tuple[str, ...]:
    """The files of an output folder that commands read."""
    names = "*.json", "*.onnx*", "nbl/*", "nbl/moments/*", "baseline/*", "report/*.json"
    return tuple(f"{out}/{name}" for name in names)


OUT_FILES = parts("out")
MODEL_FILES = ("model/*",)
COMMANDS = {
    "inspect-out": Command(("inspect", "out"), ("out/nbl/*", "out/*.onnx", "out/report/*.json"), 4),
    "inspect-graph": Command(("inspect", "graph/model.onnx"), ("graph/model.onnx*",), 4),
    "inspect-rewritten": Command(("inspect", "out/model.onnx"), ("out/model.onnx*",)),
    "inspect-plan": Command(("inspect", "out/nbl/plan.json"), ("out/nbl/plan.*",)),
    "inspect-moments": Command(("inspect", "out/nbl/moments"), ("out/nbl/moments/*",), 1),
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
    "export": Command(("export", "planned"), ("planned/nbl/*", "planned/*.json"), 1),
    "rewrite": Command(("rewrite", "half"), ("half/nbl/*", "half/baseline/*", "half/nbl/plan.*"), 3),
    "verified": Command(("verify", "out", *VERIFY), OUT_FILES, 1),
    "verify": Command(("verify", "unverified", *VERIFY), parts("unverified"), 3),
    "eval": Command(EVAL, (*OUT_FILES, "tasks/*", "out/nbl/eval/*"), 2),
    "bench": Command(BENCH, ("timed/nbl/bench.partial.json", "timed/nbl/*", "timed/report/*.json"), 1),
    "resume": Command(LONG, ("calibrating/nbl/*", "calibrating/nbl/moments.partial/*"), 2),
    "gguf": Command(
        ("calibrate", "gguf/m.gguf", "-o", "new", "--calibration", "text/a.jsonl", *CALIBRATE), ("gguf/*",), 2
    ),
    "encoder": Command(
        ("run", "encoder", "-o", "new", "--calibration", "text/a.jsonl", *ENCODER),
        ("encoder/*", "encoder/*/*.json"),
        2,
    ),
    "images": Command(
        ("calibrate", "vision", "-o", "new", "--calibration", "images", "--samples", "8"),
        ("vision/*", "images/*"),
        2,
    ),
    "verify-encoder": Command(("verify", "encoder-out", *VERIFY), parts("encoder-out"), 1),
}


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
    sealed = (home / "nbl").is_dir() and rng.random() < 0.6
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
        and name in ("verified", "report")
        and _is_stale(place, material, file, before)
    ):
        wrong.append("stale")
    if ended.code == 0 and name.startswith("verify") and re.fullmatch(r"[\w-]+/model\.onnx(\.data)?", file):
        graph = path.with_name("model.onnx")
        if name != "verified" and other_outputs(material / graph.relative_to(place), graph):
            wrong.append("passed")
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
