"""Kill nbl-export at any moment, run the same command again, and compare with what an undisturbed run leaves.

    python scripts/crash.py --kills 240 --seed 0
    python scripts/crash.py --kills 20 --only rewrite,foreign

Every command is `python -m nbl_export …` in a process of its own on stories260K (from the shared test data). It ends by

    time     SIGKILL at a random moment of its undisturbed duration
    change   SIGKILL just before its n-th change of the folder (a rename, a write, an fsync …), n spread evenly
    term     SIGTERM at a random moment, after which it must have cleaned up and said one sentence

and a fifth of the second runs are killed as well. The last run must exit with 0 and leave the same files, byte for
byte, apart from what differs between undisturbed runs: times, and what is measured by the clock. No process may be
left.

Processes are forked from one that has imported the libraries, which saves seconds for each; work that checkpoints
once a minute does so at every step. Results
are printed as a table; the folders of failures are kept.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import mmap
import os
import pkgutil
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("NBL_EXPORT_SHARED", ROOT.parent / "shared")) / "data"
# onnxruntime-genai writes the commit of whatever repository is around it into its graphs.
os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "GIT_DIR": os.devnull}
sys.path.insert(0, str(ROOT))

from nbl_export.files import TEMPORARY  # noqa: E402
from tests.processes import at_changes  # noqa: E402

KINDS = ("time", "change", "time", "change", "term")
TWICE = 0.2  # of the second runs are killed too
SECONDS = 300  # before a run counts as hanging
# Parts of JSON files that the clock decides; that two undisturbed runs agree in a rounded time would be chance.
_TIMED = {"seconds", "stage_seconds", "created", "speed", "engine_speed", "detail"}
# Checks whose verdict it decides: whether a comparison is resolved, for one.
_TIMED_CHECKS = {"speed", "ceilings", "nowhere slower", "same graph twice"}
# Notes of a run that goes on from an earlier one.
_RESUMED = ("goes on from", "done already", "kept from", "run that was interrupted")


@dataclass(frozen=True)
class Scenario:
    """A command that is killed, in the place that the scenario ``after`` leaves; ``needs`` are modules."""

    name: str
    after: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def scenarios(model: Path, text: Path, task: Path) -> list[Scenario]:
    """Every stage, and the rewrite of a foreign graph. Paths are relative to the place."""
    calibrated = ("--calibration", str(text), "--samples", "32", "--seq-len", "128", "--heldout-samples", "8")
    quick = ("--contexts", "16", "--rounds", "3", "--decode-steps", "2")
    foreign = ("rewrite", "--onnx", "out/baseline", "--plan", "out/nbl/plan.json")
    return [
        Scenario("calibrate", "", ("calibrate", str(model), "-o", "out", *calibrated)),
        Scenario("select", "calibrate", ("select", "out", "--k", "2")),
        Scenario("repair", "calibrate", ("select", "out", "--k", "2", "--criterion", "cca", "--repair", "6")),
        Scenario("export", "select", ("export", "out")),
        Scenario("export genai", "select", ("export", "out", "--exporter", "genai"), ("onnxruntime_genai",)),
        Scenario("rewrite", "export", ("rewrite", "out")),
        Scenario("build", "rewrite", ("build", "out", "--trt", "rtx", "--sm", "86"), ("tensorrt_rtx",)),
        Scenario("verify", "rewrite", ("verify", "out", *quick)),
        Scenario("eval", "verify", ("eval", "out", "--tasks", str(task), "--limit", "40", "--no-retrieval")),
        Scenario(
            "bench", "verify", ("bench", "out", "--batches", "1", "--contexts", "16,32", "--rounds", "3")
        ),
        Scenario("report", "verify", ("report", "out")),
        Scenario("package", "verify", ("package", "out", "-o", "packed")),
        Scenario("package again", "package", ("package", "out", "-o", "packed")),
        Scenario("run", "", (str(model), "--k", "2", "--criterion", "cca", "-o", "out", *calibrated, *quick)),
        Scenario("foreign", "export", (*foreign, "-o", "new")),
        Scenario("over an older one", "foreign", (*foreign, "-o", "new")),
    ]


say = partial(print, flush=True)


# processes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int  # negative for a signal
    seconds: float
    changes: int
    said: str


@dataclass(frozen=True)
class Kill:
    """How a process is to end: by ``signum``, ``after`` seconds or just before the change number ``at``."""

    signum: int = signal.SIGKILL
    after: float | None = None
    at: int | None = None


def preload() -> None:
    """Import what every command needs; nothing is computed, so that no thread is there to be lost by a fork."""
    import nbl_export

    for module in pkgutil.walk_packages(nbl_export.__path__, "nbl_export."):
        # What draws binds the streams of the process that imports it; Olive need not be here.
        if not module.name.startswith(("nbl_export.__main__", "nbl_export.cli.terminal", "nbl_export.olive")):
            importlib.import_module(module.name)
    for name in ("transformers.models.llama.modeling_llama", "torch.export", "torch.onnx", "onnxscript"):
        importlib.import_module(name)


def run(command: Sequence[str], place: Path, log: Path, kill: Kill | None = None) -> Ended:
    """`nbl-export COMMAND` in ``place``, in a process and a process group of its own."""
    counter = mmap.mmap(-1, 8)
    start = time.monotonic()
    child = os.fork()
    if not child:
        _work(command, place, log, kill, counter)
    descriptor = os.pidfd_open(child)
    try:
        limit = SECONDS if kill is None or kill.after is None else kill.after
        if not select.select([descriptor], [], [], limit)[0]:
            os.kill(child, kill.signum if kill and kill.after is not None else signal.SIGKILL)
            if not select.select([descriptor], [], [], SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(descriptor)
    seconds = time.monotonic() - start
    if _survivors(child):
        os.killpg(child, signal.SIGKILL)
        raise AssertionError("a process was left behind")
    (changes,) = struct.unpack("q", counter[:])
    return Ended(os.waitstatus_to_exitcode(status), seconds, changes, log.read_text(errors="replace"))


def _survivors(group: int) -> bool:
    """Whether a process of the group is still there after a moment; a killed one may take one to end."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def _work(command: Sequence[str], place: Path, log: Path, kill: Kill | None, counter: mmap.mmap) -> None:
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        os.chdir(place)

        def changed(number: int) -> None:
            counter[:] = struct.pack("q", number + 1)
            if kill is not None and kill.at == number:
                os.kill(os.getpid(), kill.signum)

        at_changes(place, changed)
        from nbl_export.processes import Checkpoint

        Checkpoint.__init__.__defaults__ = (0.0,)  # type: ignore[attr-defined]
        sys.argv = ["nbl-export", *command]
        from nbl_export.cli import main

        main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


# comparing ---------------------------------------------------------------------------------------


def leaves(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every number, text … of a JSON value, with its place."""
    if at and at[-1] in _TIMED:
        yield at, "timed"
    elif isinstance(value, dict) and "status" in value and value.get("name") in _TIMED_CHECKS:
        yield at, value["name"]
    elif isinstance(value, dict):
        yield at, sorted(value)
        for key, inner in value.items():
            yield from leaves(inner, (*at, str(key)))
    elif isinstance(value, list):
        if at and at[-1] == "notes":
            value = [note for note in value if not any(words in str(note) for words in _RESUMED)]
        yield at, len(value)
        for number, inner in enumerate(value):
            yield from leaves(inner, (*at, str(number)))
    else:
        yield at, value


Leaves = dict[tuple[str, ...], Any]
# What is no result: the lock, and what the system said of files when they were read (inodes, times).
_NO_RESULTS = (".lock", "digests.json")


def contents(folder: Path) -> Leaves:
    """What is in a folder: each leaf of each JSON file, the bytes of all other files."""
    found: Leaves = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _NO_RESULTS):
        name = str(path.relative_to(folder))
        found[(name,)] = "is there"
        if path.suffix == ".json":
            found |= {(name, *at): value for at, value in leaves(json.loads(path.read_text()))}
        else:
            found[name, "bytes"] = path.read_bytes()
    return found


def differences(found: Leaves, expected: Leaves) -> dict[tuple[str, ...], str]:
    """Where ``found`` is not as ``expected``, and how."""
    return {
        at: f"{' / '.join(at)}: {str(found.get(at))[:60]!r}, undisturbed {str(expected.get(at))[:60]!r}"
        for at in sorted(found.keys() | expected.keys())
        if found.get(at) != expected.get(at)
    }


# trials ------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A scenario with what undisturbed runs of it leave and take; ``ignored`` is what differs between them."""

    scenario: Scenario
    before: Path
    expected: Leaves
    ignored: set[tuple[str, ...]]
    seconds: float
    changes: int
    kills: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Campaign:
    """Trials in one folder; a command always sees the same paths."""

    def __init__(self, work: Path, rng: random.Random) -> None:
        self.work, self.rng = work, rng
        self.place, self.log = work / "place", work / "log.txt"
        self.state("").mkdir(parents=True)

    def state(self, name: str) -> Path:
        """What the scenario ``name`` leaves."""
        return self.work / "states" / (name or "empty")

    def run(self, command: Sequence[str], kill: Kill | None = None) -> Ended:
        return run(command, self.place, self.log, kill)

    def reset(self, state: Path) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(state, self.place, symlinks=True)

    def prepare(self, scenario: Scenario, undisturbed: int) -> Prepared:
        """Run the scenario undisturbed; what it leaves is kept for those after it."""
        before = self.state(scenario.after)
        runs, ended = [], []
        for _ in range(undisturbed):
            self.reset(before)
            ended.append(self.run(scenario.command))
            if ended[-1].code:
                raise SystemExit(f"{scenario.name} fails undisturbed: {ended[-1].said[-2000:]}")
            runs.append(contents(self.place))
        shutil.copytree(self.place, self.state(scenario.name), symlinks=True)
        ignored = {at for other in runs[1:] for at in differences(other, runs[0])}
        seconds, changes = max(e.seconds for e in ended), min(e.changes for e in ended)
        say(f"{scenario.name}: {seconds:.1f} s and {changes} changes undisturbed")
        return Prepared(scenario, before, runs[0], ignored, seconds, changes)

    def trial(self, prepared: Prepared, kind: str, part: float) -> bool:
        """One kill and what comes of it; False if the process had ended before."""
        command, moment = prepared.scenario.command, self.rng.uniform(0.0, prepared.seconds)
        kill = Kill(signal.SIGTERM if kind == "term" else signal.SIGKILL, moment)
        if kind == "change":
            kill = Kill(at=int(part * prepared.changes))
        self.reset(prepared.before)
        wrong: list[str] = []
        try:
            ended = self.run(command, kill)
            if ended.code == 0:
                return False
            prepared.kills[kind] += 1
            wrong += self._after_kill(kill, ended)
            if self.rng.random() < TWICE:
                self.run(command, Kill(after=self.rng.uniform(0, prepared.seconds)))
            ended = self.run(command)
            if ended.code:
                wrong.append(f"the same command exits with {ended.code}: {ended.said.strip()[-400:]}")
            else:
                found = differences(contents(self.place), prepared.expected)
                wrong += [text for at, text in found.items() if at not in prepared.ignored]
        except (AssertionError, OSError, ValueError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
        if wrong:
            kept = Path(tempfile.mkdtemp(prefix="failed.", dir=self.work))
            shutil.copytree(self.place, kept, symlinks=True, dirs_exist_ok=True)
            shutil.copyfile(self.log, kept / "log.txt")
            prepared.failures.append(f"{prepared.scenario.name}, {kind} {kill}: {'; '.join(wrong[:4])}")
            say(f"FAILED {prepared.failures[-1]} (kept in {kept})")
        return True

    def _after_kill(self, kill: Kill, ended: Ended) -> list[str]:
        if kill.signum == signal.SIGKILL:
            return [] if ended.code == -signal.SIGKILL else [f"ended with {ended.code}: {ended.said[-400:]}"]
        wrong = []
        # Before our handler is there, a process ends by the signal itself.
        if ended.code not in (128 + kill.signum, -kill.signum):
            wrong.append(f"ended with {ended.code}: {ended.said[-400:]}")
        if (ended.code > 0 and ended.said.count("error: Interrupted") != 1) or "Traceback" in ended.said:
            wrong.append(f"said {ended.said[-400:]!r}")
        if ended.code > 0 and (left := [p for p in self.place.rglob("*") if p.name.endswith(TEMPORARY)]):
            wrong.append(f"left {left[0].relative_to(self.place)}")
        return wrong


def campaign(work: Path, kills: int, seed: int, only: Sequence[str]) -> list[Prepared]:
    """Spread ``kills`` over the scenarios, all or those that are named."""
    every = {s.name: s for s in scenarios(*inputs(work)) if all(importlib.util.find_spec(n) for n in s.needs)}
    if unknown := set(only) - every.keys():
        raise SystemExit(f"No such scenario: {', '.join(sorted(unknown))}; there are {', '.join(every)}.")
    trials, prepared = Campaign(work, random.Random(seed)), []
    needed = set(only or every)
    for scenario in reversed(every.values()):  # each comes after the one that it goes on from
        if scenario.name in needed:
            needed.add(scenario.after)
    for scenario in (s for s in every.values() if s.name in needed):
        wanted = not only or scenario.name in only
        made = trials.prepare(scenario, 3 if wanted else 1)
        prepared += [made] if wanted else []
    for number, one in enumerate(prepared):
        share = kills // len(prepared) + (number < kills % len(prepared))
        tries = 0
        while (done := one.kills.total()) < share and tries < 4 * share:
            trials.trial(one, KINDS[(done + number) % len(KINDS)], (done + trials.rng.random()) / share)
            tries += 1
        say(f"{one.scenario.name}: {done} kills, {len(one.failures)} failures")
    return prepared


def inputs(work: Path) -> tuple[Path, Path, Path]:
    """The model as a folder, its text, and a task; the model is made in another process, which computes."""
    source, model, task = SHARED / "models" / "stories260K", work / "stories260K", work / "task.jsonl"
    code = "import sys; from pathlib import Path; from tests.tiny import build_stories; "
    code += "build_stories(*map(Path, sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, source, model], cwd=ROOT, check=True)
    choices = [" the end", " a cat"]
    rows = [
        {"question": f"Once upon a time number {i}", "choices": choices, "gold": i % 2} for i in range(80)
    ]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, SHARED / "text" / "tinystories_exllamav2.jsonl.gz", task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of scenarios, separated by commas")
    parser.add_argument("--work", type=Path, help="folder to work in; a temporary one by default")
    asked = parser.parse_args()
    work = Path(asked.work or tempfile.mkdtemp(prefix="nbl-crash.")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    preload()
    done = campaign(work, asked.kills, asked.seed, [name for name in asked.only.split(",") if name])
    say("| scenario | undisturbed, s | changes | time | change | term | failures |\n" + "|---" * 7 + "|")
    for one in done:
        kills = " | ".join(str(one.kills[kind]) for kind in ("time", "change", "term"))
        say(f"| {one.scenario.name} | {one.seconds:.1f} | {one.changes} | {kills} | {len(one.failures)} |")
    total, failed = sum(p.kills.total() for p in done), sum(len(p.failures) for p in done)
    say(f"\n{total} kills, {failed} failures, {(time.monotonic() - start) / 60:.1f} minutes")
    if not failed and asked.work is None:
        shutil.rmtree(work)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
