"""The real command line in its own process: exit codes, one sentence for each error, and interrupts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from nbl_export.cli.main import COMMANDS, app, words_of
from nbl_export.settings import TABLES
from nbl_export.settings.choices import CACHES, CRITERIA, LIBRARIES, PEERS, PRECISIONS, TARGETS
from nbl_export.settings.definition import UsageError, settings_of
from tests.fixtures_graph import perturb, rerecord
from tests.processes import (
    ENVIRONMENT,
    FAST,
    SMALL,
    assert_interrupted,
    assert_refused,
    interrupted,
    nbl,
    no_leftovers,
)
from tests.tiny import build


def stages(out: Path) -> set[str]:
    return set(json.loads((out / "nbl" / "workspace.json").read_text())["stages"])


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text file of half a megabyte."""
    generator = np.random.default_rng(0)
    lines = (" ".join(generator.choice(["river", "a", "the", "walks"], 12)) + ".\n" for _ in range(9000))
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def place(tiny_folder: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody works: models called `model` and `export`, and a finished run in `out`."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("model", "export"):
        shutil.copytree(tiny_folder, folder / name)
    # No subcommand: the first word is the model.
    done = nbl("model", "--k", 1, "-o", "out", "--calibration", prose, *SMALL, *FAST, cwd=folder)
    assert done.code == 0, done
    (folder / "first.txt").write_text(done.out)
    return folder


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(place / "out", tmp_path / "out", copy_function=shutil.copy2))


# success -----------------------------------------------------------------------------------------


def test_a_run_without_a_subcommand_says_what_it_did(place: Path) -> None:
    text = (place / "first.txt").read_text()
    assert re.search(r"PASS  \(.*parity.*\)", text)
    assert re.search(r"  1 of 4 attention layers of model are now linear: layer \d", text)
    for title in ("Graph", "Method loss", "Speed on ONNX Runtime", "Parity", "Checks"):
        assert title in text
    assert str(Path("out") / "model.onnx") in text
    # Progress goes to stderr: what is piped is the result.
    assert "Calibrating" not in text
    assert stages(place / "out") == {"calibrate", "select", "export", "rewrite", "verify"}


def test_a_failed_gate_exits_1_from_verify_and_report(out: Path) -> None:
    path = out / "model.onnx"
    initializers = onnx.load(str(path), load_external_data=False).graph.initializer
    name = next(t.name for t in initializers if t.name.endswith("nbl_linear.weight"))
    perturb(path, name, 1.5)
    rerecord(out, "rewrite")
    done = nbl("verify", out, "--no-quality", "--no-speed", *FAST)
    assert done.code == 1, done
    assert "FAIL  (parity)" in done.out and "is the first to leave tolerance, at its output" in done.out
    assert "Traceback" not in done.err and "error:" not in done.err
    assert nbl("report", out).code == 1
    assert nbl("inspect", out).code == 0


# help --------------------------------------------------------------------------------------------

MEASURED = """
import sys
from nbl_export.cli import main
codes = []
for arguments in {calls!r}:
    sys.argv = ["nbl-export", *arguments]
    try:
        main()
    except SystemExit as stop:
        codes.append(stop.code)
heavy = {{"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "scipy", "safetensors", "numpy", "matplotlib"}}
print("LOADED", sorted(heavy & set(sys.modules)), codes)
"""


def loaded(calls: list[list[str]]) -> tuple[set[str], list[int], str]:
    """Which heavy packages the calls load, their exit codes, and what they print."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(calls=calls)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    text, _, last = done.stdout.rpartition("LOADED ")
    modules, codes = re.findall(r"\[[^\]]*\]", last)
    return set(re.findall(r"\w+", modules)), json.loads(codes), text + done.stderr


def test_help_loads_nothing_heavy() -> None:
    verbs = ["run", "calibrate", "select", "export", "rewrite", "verify", "report", "inspect"]
    modules, codes, text = loaded([["--help"], ["-h"], ["--version"], *([v, "--help"] for v in verbs)])
    assert codes == [0] * 11
    assert modules == set()
    assert all(f" {verb} " in text for verb in verbs)


def test_a_folder_of_no_command_is_refused_at_once(tmp_path: Path) -> None:
    verbs = ["select", "export", "rewrite", "build", "verify", "eval", "bench", "convert", "generate"]
    nowhere = str(tmp_path / "nowhere")
    to_hf = {"convert": ["--to", "hf"], "select": ["--k", "1"]}
    modules, codes, text = loaded([[verb, nowhere, *to_hf.get(verb, [])] for verb in verbs])
    assert codes == [2] * len(verbs)
    assert modules <= {"numpy"}
    assert text.count("is not an output folder of nbl-export") == len(verbs)


def test_inspect_shows_every_kind_without_torch(place: Path) -> None:
    out = place / "out"
    paths = [
        out,
        out / "model.onnx",
        out / "baseline" / "model.onnx",
        out / "baseline",
        out / "nbl" / "plan.json",
        out / "nbl" / "plan.safetensors",
        out / "nbl" / "moments",
        out / "nbl" / "moments" / "001.safetensors",
        out / "report" / "report.json",
    ]
    modules, codes, text = loaded([["inspect", str(p)] for p in paths])
    assert codes == [0] * len(paths), text
    assert not {"torch", "transformers", "onnxruntime"} & modules
    for words in (
        "KV pairs",
        "rewritten by nbl-export",
        "calibration tokens",
        "energy of x",
        "Method loss: original against linearized",
        "linearized",
        "repair",
    ):
        assert words in text


# refusals ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Arguments, in which {place}, {tmp} stand for folders, and words that the sentence must have."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]


USAGE = {
    "unknown model": Case(("no/such-model", "--k", "1"), ("no/such-model",)),
    "unknown path": Case(("./no-such-folder", "--k", "1"), ("./no-such-folder does not exist",)),
    "folder without a model": Case(("{tmp}", "--k", "1"), ("is not a model", "config.json")),
    "file that is no GGUF": Case(("{tmp}/file", "--k", "1"), ("not a .gguf file",)),
    "negative K": Case(("{place}/model", "--k", "-1"), ("--k is -1",)),
    "K is no number": Case(("{place}/model", "--k", "many"), ("--k is 'many'", "a whole number or auto")),
    "K and a budget": Case(
        ("{place}/model", "--k", "3", "--min-speedup", "1.1"), ("--k", "--min-speedup", "give one")
    ),
    "unknown fit": Case(("{place}/model", "--k", "1", "--fit", "luck"), ("luck", "sequential")),
    "unknown option": Case(("{place}/model", "--k", "1", "--nope"), ("--nope", "--help")),
    "ridge is nan": Case(("{place}/model", "--k", "1", "--ridge", "nan"), ("--ridge is nan",)),
    "encoder-decoder": Case(("{tmp}/t5", "--k", "1"), ("encoder-decoder", "t5")),
    "pickled weights": Case(("{tmp}/pickled", "--k", "1"), (".safetensors",)),
    "output is a file": Case(("{place}/model", "--k", "1", "-o", "{tmp}/file"), ("is a file",)),
    "output of another model": Case(("{tmp}/other", "--k", "1", "-o", "{place}/out"), ("another model",)),
    "verify on a foreign folder": Case(("verify", "{tmp}"), ("not an output folder",)),
    "inspect something else": Case(("inspect", "{tmp}/file"), ("is not an ONNX or GGUF file, engine, plan",)),
}


@pytest.fixture(scope="module")
def junk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are no models."""
    folder = tmp_path_factory.mktemp("junk")
    (folder / "file").write_text("a file\n")
    configs = {
        "t5": {"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForCausalLM"]},
        "pickled": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        weights = "pytorch_model.bin" if name == "pickled" else "model.safetensors"
        (folder / name / weights).write_bytes(b"weights")
    build(folder / "other", seed=1, num_hidden_layers=1)
    return folder


@pytest.mark.parametrize("name", USAGE)
def test_bad_usage_and_bad_input_exit_2(place: Path, junk: Path, name: str) -> None:
    case = USAGE[name]
    arguments = [a.format(place=place, tmp=junk) for a in case.arguments]
    before = sorted(str(p) for p in place.rglob("*"))
    done = nbl(*arguments, cwd=junk)
    assert_refused(done, 2, *(w.format(place=place, tmp=junk) for w in case.words))
    assert not (junk / "nbl-out").exists(), "a refused command makes no folder"
    assert sorted(str(p) for p in place.rglob("*")) == before


def test_a_budget_that_no_k_keeps_exits_1_and_leaves_the_plan(out: Path) -> None:
    before = (out / "nbl" / "plan.json").read_bytes()
    done = nbl("select", out, "--max-kl", "1e-12")
    assert_refused(done, 1, "No K meets the budget", "K = 1 costs a KL of", quietly=False)
    assert (out / "nbl" / "plan.json").read_bytes() == before
    no_leftovers(out)


def test_unusable_text_exits_2_and_leaves_nothing_done(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    out = tmp_path / "out"
    done = nbl("calibrate", place / "model", "-o", out, "--calibration", tmp_path / "empty.txt", *SMALL)
    assert_refused(done, 2, "0 calibration tokens", quietly=False)
    assert stages(out) == set() and not (out / "nbl" / "moments").exists()
    no_leftovers(out)


# no room -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_room_for_the_graph_keeps_what_is_done(out: Path) -> None:
    """The weights of the tiny model take 180 kB, the moments less."""
    shutil.rmtree(out / "baseline")
    moments = (out / "nbl" / "moments" / "000.safetensors").stat()
    done = nbl("export", out, limit=170_000)
    assert_refused(done, 2, "No room on the disk", quietly=False)
    no_leftovers(out)
    assert not (out / "baseline" / "model.onnx").exists()
    assert not (out / "baseline" / "model.onnx.data").exists()
    assert (out / "nbl" / "moments" / "000.safetensors").stat().st_mtime_ns == moments.st_mtime_ns
    assert nbl("export", out).code == 0
    assert (out / "baseline" / "model.onnx.data").stat().st_size > 170_000


# interrupts --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on_to_the_same_bits(
    place: Path, prose: Path, tmp_path: Path
) -> None:
    long = ["--samples", "4000", "--seq-len", "64", "--heldout-samples", "4"]

    def calibrate(out: Path) -> list[object]:
        return ["calibrate", place / "model", "-o", out, "--calibration", prose, *long]

    # In the second block or a later one.
    done = interrupted(r"Calibrating layer [2-4]/4[^\n]*?\s[1-9][\d.]*k/1", *calibrate(tmp_path / "a"))
    assert_interrupted(done)
    assert stages(tmp_path / "a") == set()
    no_leftovers(tmp_path / "a")
    resumed = nbl(*calibrate(tmp_path / "a"))
    assert resumed.code == 0
    (block,) = re.findall(r"goes on at block (\d), from the states before it", resumed.err)
    assert 0 < int(block) < 4
    assert not (tmp_path / "a" / "nbl" / "moments.partial").exists()
    assert nbl(*calibrate(tmp_path / "b")).code == 0
    found, expected = ((tmp_path / name / "nbl" / "moments").iterdir() for name in ("a", "b"))
    pairs = list(zip(sorted(found), sorted(expected), strict=True))
    assert len(pairs) == 4 and all(a.read_bytes() == b.read_bytes() for a, b in pairs)


# main words ----------------------------------------------------------------------------------------

ODD: dict[tuple[str, ...], str] = {
    ("run",): "MODEL is missing",
    ("run", "--trt"): "MODEL is missing",
    ("build",): "OUT is missing",
    ("build", "--trt"): "OUT is missing",
    ("build", "--trt", "rtx"): "OUT is missing",
    ("select",): "OUT is missing",
    ("--k",): "--k needs a value",
    ("--k", "2"): "MODEL is missing",
    ("--trt",): "MODEL is missing",
    ("-o",): "--output needs a value",
    ("-o", "out"): "MODEL is missing",
    ("--",): "MODEL is missing",
    ("-",): "Unknown option: -",
    ("",): "An argument is empty",
    ("build", ""): "An argument is empty",
    ("verify", "", "--no-speed"): "An argument is empty",
    ("model", "--k", "2", "-o", ""): "-o is empty",
    ("model", "--k="): "--k is ''",
    ("selct", "out"): "selct is no command, and no model here; did you mean select.",
    ("select", "out", "--max-kl", "inf"): "--max-kl is inf; give a finite number",
    ("verify", "out", "--max-ppl-ratio", "1e400"): "--max-ppl-ratio is inf; give a finite number",
    ("bench", "out", "--seconds", "inf"): "--seconds is inf; give a finite number",
    ("calibrate", "model", "-o", "out", "--calibration="): "--calibration is empty; give some text",
    ("help",): "did you mean --help.",
    ("build", "out", "more"): "more is more than this command takes",
    ("rewrite",): "give OUT alone, or --onnx",
    ("--config",): "--config needs a value",
}


@pytest.mark.parametrize("line", ODD, ids=" ".join)
def test_an_odd_line_is_one_sentence(tmp_path: Path, line: tuple[str, ...]) -> None:
    assert_refused(nbl(*line, cwd=tmp_path), 2, ODD[line])
    assert list(tmp_path.iterdir()) == []


def test_bare_it_shows_the_help_and_fails() -> None:
    """A script that forgot its arguments must not go on."""
    done, asked = nbl(), nbl("--help")
    assert (done.code, done.out) == (2, "") and asked.code == 0
    assert done.err == asked.out


def test_a_misspelled_command_is_no_model_and_a_model_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for word, meant in {"selct": "select", "verfy": "verify", "reports": "report", "Run": "run"}.items():
        with pytest.raises(UsageError, match=f"did you mean {meant}$"):
            words_of([word, "out"])
    (tmp_path / "selct").mkdir()
    for model in ("selct", "gpt2", "t5-small", "bert-base-uncased", "owner/select", "./verfy", "clip"):
        assert words_of([model, "--k", "2"]) == ["run", model, "--k", "2"]


@pytest.fixture(scope="module")
def completion() -> str:
    """The script that a shell is given."""
    return app.generate_completion(shell="bash")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("run model --kv-cache ", CACHES),
        ("run model --kv-cache st", ("static",)),
        ("export out --precision ", PRECISIONS),
        ("run model --target ", tuple(TARGETS)),
        ("select out --criterion ", tuple(CRITERIA)),
        ("select out --k ", ("auto",)),
        ("run model --trt ", LIBRARIES),
        ("bench out --peer ", PEERS),
        ("sel", ("select",)),
    ],
)
def test_a_shell_completes_what_can_be_chosen(completion: str, typed: str, offered: tuple[str, ...]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    words = ["nbl-export", *typed.split(" ")]
    asked = (
        f"COMP_WORDS=({' '.join(shlex.quote(w) for w in words)})\nCOMP_CWORD={len(words) - 1}\n"
        '_nbl_export\necho "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run([bash, "--norc"], input=completion + asked, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == sorted(offered), done.stderr


# diff ----------------------------------------------------------------------------------------------


def test_a_worse_loss_fails_the_gate(stories_out: Path, stories_three: Path) -> None:
    done = nbl("diff", stories_out, stories_three)
    assert done.code == 0 and "PASS  (checks); " in done.out and "perplexity ratio" in done.out
    done = nbl("diff", stories_out, stories_three, "--max-ppl-increase", "1.1")
    assert done.code == 1 and done.err == ""
    assert "FAIL  (perplexity increase); " in done.out
    words = " ".join(done.out.split())
    assert "above the 1.1 asked for" in words and "added 4" in words
    assert nbl("diff", stories_three, stories_out, "--max-ppl-increase", "1.1").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{out}"], "B is missing"),
        (["{out}", "nowhere"], "nowhere does not exist: name an output folder"),
        (["{out}", "{out}/model.onnx"], "is a report and B ("),
        (["{out}", "{out}", "--max-slowdown", "0.5"], "--max-slowdown is 0.5; it must be 1 or more"),
        (["{out}", "{out}", "--markdown", "{out}/report/report.json"], "is no comparison of nbl-export"),
        (["{out}", "{out}", "--markdown", "x/y/z.md"], "name a file in a folder"),
        (["{out}", "{out}", "--markdown"], "--markdown needs a value"),
    ],
)
def test_bad_usage_is_one_sentence(stories_out: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = nbl("diff", *(word.format(out=stories_out) for word in words), cwd=tmp_path)
    assert_refused(done, 2, said)
    assert not list(tmp_path.iterdir())


# help ----------------------------------------------------------------------------------------------

COLUMNS, LINES = 100, 50


def shown(*words: str) -> str:
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "nbl_export", *words], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name in TABLES])
def test_a_command_explains_all_its_options(command: str) -> None:
    text = shown(command, "--help-all")
    for one in settings_of(TABLES[command]):
        assert f"--{one.key}" in text
        assert " ".join(one.help.split()[:3]) in re.sub(r"[│\s]+", " ", text)
