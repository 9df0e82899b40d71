"""README and docs: their commands parse, their options exist, their links resolve, their Python runs."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nbl_export.cli import DEFAULT_COMMAND, app, main
from nbl_export.cli.main import COMMANDS, words_of
from nbl_export.linearize.plan import load_plan
from nbl_export.settings import read_settings
from tests.conftest import ALL, ROOT
from tests.exporters import VARIABLE, optimum_python
from tests.fixtures_graph import perturb, rerecord

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def _shell_lines() -> list[tuple[str, str]]:
    lines = [
        (page.name, line)
        for page in PAGES
        for block in _blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [(page, line) for page, line in lines if line.strip()]


def test_every_command_in_the_docs_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nightly.toml").touch()
    checked = 0
    for page, line in _shell_lines():
        words = shlex.split(line, comments=True)
        if words[0] != "nbl-export":
            continue
        try:
            app.parse_args(words_of(words[1:]), exit_on_error=False, print_error=False)
        except Exception as error:
            pytest.fail(f"{page}: {line}: {error}")
        checked += 1
    assert checked >= 15


def test_every_file_of_settings_in_the_docs_is_taken(tmp_path: Path) -> None:
    blocks = [
        b for page in PAGES for b in _blocks(page, "toml") if re.search(r"^\[(select|calibrate)\]", b, re.M)
    ]
    assert blocks
    for block in blocks:
        (tmp_path / "nbl-export.toml").write_text(block)
        assert len(read_settings(tmp_path / "nbl-export.toml")) >= 3


def test_every_script_in_the_docs_exists() -> None:
    scripts = {
        word for _, line in _shell_lines() for word in shlex.split(line, comments=True) if "scripts/" in word
    }
    assert {"scripts/demo.sh", "scripts/test.sh"} <= scripts
    for script in scripts:
        assert (ROOT / script).exists(), script


def test_every_command_is_documented() -> None:
    text = "\n".join(line for _, line in _shell_lines())
    for name in set(COMMANDS) - {DEFAULT_COMMAND}:
        assert f"nbl-export {name} " in text, name


def test_python_in_the_docs_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # That of encoders.md runs in tests/test_encoders.py, which has an encoder.
    code = "\n".join(_blocks(ROOT / "docs" / "python.md", "python"))
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    # The page's own words, on a small model and little text.
    small = "CalibrateSettings(samples=16, seq_len=64, heldout_samples=4)"
    for words, smaller in {
        "k=8)": "k=2)",
        "CalibrateSettings(samples=128, seq_len=512)": small,
        "contexts=(128, 512)": "contexts=(16,)",
        '"out/model")\nplan': f'"out/model", api.{small})\nplan',
        "k=4": "k=1",
    }.items():
        assert words in code
        code = code.replace(words, smaller)
    space: dict[str, object] = {"__name__": "docs"}
    exec(compile(code, "docs", "exec"), space)
    said = capsys.readouterr().out
    assert "SelectSettings.k is '8'; give a whole number or 'auto'." in said
    assert "verify: done already, kept." in said
    gate = space["test_the_linearized_model_is_good_enough"]
    assert callable(gate) and gate() is None


def headings(page: Path) -> set[str]:
    """What a link to a section of the page says, as GitHub has it."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)", text, re.M))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_a_file_and_to_a_heading_in_it() -> None:
    links = [
        (p, link) for p in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", p.read_text(encoding="utf-8"))
    ]
    relative = [(page, link) for page, link in links if "://" not in link]
    assert len(relative) > 100
    for page, link in relative:
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not heading or target.suffix != ".md" or heading in headings(target), f"{page.name}: {link}"


# docs commands -------------------------------------------------------------------------------------

# What a model of 5 layers and 512 positions is asked instead.
SMALLER = {
    "--k 8": "--k 2",
    "--k 12": "--k 2",
    "--k 4": "--k 2",
    "--layers 22,25,29": "--layers 1,2",
    "--layers 7,12.mlp": "--layers 1,2.mlp",
    "--layers 8-9.span,3": "--layers 1-2.span,3",
    "--rank 128": "--rank 16",
    "--repair 200": "--repair 2",
    "--max-seq 1024 --max-context 4096": "--max-seq 64 --max-context 128",
    "--seq-len 4096": "--seq-len 128",
    "prefill=4000,decode=16@4000": "prefill=400,decode=16@400",
    "decode=16@4000,batch=4": "decode=16@400,batch=4",
    "--k auto --workload": "--k 2 --workload",
    "--max-kv-bytes 2GiB": "--max-kv-bytes 1MiB",
    "--retrieval-contexts 512,2048,4096": "--retrieval-contexts 300",
    "--contexts 4096": "--contexts 300",
    "--retrieval-contexts 512,2048": "--retrieval-contexts 300",
    "--retrieval-samples 100": "--retrieval-samples 2",
    " --peer compile": "",  # takes a C compiler, and minutes
    "--limit 200": "--limit 4",
    "path/to/python": os.environ.get(VARIABLE, ""),
}
# What is not run here, and the test that does it.
ELSEWHERE = {
    r"nbl-export doctor": "tests/test_packages.py",
    r"--device cuda": "tests/gpu",
    r"--trt tensorrt": "tests/gpu",
    r"path/to/(sentence-encoder|vit|all-MiniLM)": "tests/end_to_end/test_encoders.py",
    r"path/to/lfm2": "tests/end_to_end/test_hybrid.py",
    r"path/to/(gemma|Qwen)": "tests/end_to_end/test_multimodal.py",
    r"--exporter genai": "tests/end_to_end/test_matrix.py",  # its attention takes no heads of 8
    r"--tasks hellaswag": "tests/evaluate/test_tasks.py",  # downloads its data
}
# These may end with exit code 1 on a model as small as this.
GATES = r" (bench|diff|report) |--min-recovery|--max-ppl-ratio|--max-kl |auto|--max-kv-bytes|out/broken"
# The usual run has the page that everybody reads and the ones that others do not test.
USUAL = ("README.md", "gates.md")
SETTINGS = """
[calibrate]
calibration = ["corpus.jsonl.gz"]
samples = 16
seq-len = 64
heldout-samples = 4
selection-samples = 4

[verify]
speed = false
decode-steps = 2

[bench]
contexts = [8]
batches = [1]
rounds = 3
seconds = 1.0

[eval]
limit = 4
retrieval-contexts = [300]
retrieval-samples = 2

[generate]
max-tokens = 8
"""


def commands(page: str) -> list[str]:
    """The lines of a page that begin with nbl-export."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for name, line in _shell_lines() if name == page]
    return [line for line in lines if line.startswith("nbl-export ") and "--help" not in line]


def elsewhere(line: str) -> str | None:
    return next((test for pattern, test in ELSEWHERE.items() if re.search(pattern, line)), None)


def nbl(line: str) -> int:
    """The exit code of a command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as ended:
            main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def made(
    stories_folder: Path, stories_text: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder in which README's first command was run, with the other files that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "path" / "to" / "tasks").mkdir(parents=True)
    (folder / "path" / "to" / "model").symlink_to(stories_folder)

    def shortened(source: Path, target: str, rows: int) -> None:
        with gzip.open(source, "rt", encoding="utf-8") as lines, gzip.open(folder / target, "wt") as kept:
            kept.writelines(line for _, line in zip(range(rows), lines, strict=False))

    shortened(stories_text, "corpus.jsonl.gz", 80)
    for name, rows in {"tasks/arc.jsonl.gz": 8, "arc.jsonl.gz": 12}.items():
        shortened(shared_data / "eval" / "arc_easy_train.jsonl.gz", f"path/to/{name}", rows)
    shortened(shared_data / "eval" / "mmlu_dev.jsonl.gz", "path/to/mmlu.jsonl.gz", 12)
    (folder / "nbl-export.toml").write_text(SETTINGS)
    (folder / "nightly.toml").write_text(f"{SETTINGS}\n[select]\nk = 1\n")
    (folder / "prompt.txt").write_text("One day a little girl\n")
    first = next(line for line in commands("README.md") if line.startswith("nbl-export path/to/model --k 8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert nbl(first.replace(*next(iter(SMALLER.items())))) == 0
    out = folder / "out"
    for name in ("decoder", "optimum/export"):
        shutil.copytree(out / "model" / "baseline", folder / "path" / "to" / name)
    for name in ("before", "main", "branch", "broken", "model-int4"):
        shutil.copytree(out / "model", out / name)
    for name in ("main", "branch"):
        shutil.copytree(out / name / "report", folder / name)
    # As docs/gates.md has it, of whichever layer is the first linear one here.
    layer = load_plan(out / "broken" / "nbl" / "plan.json").chosen[0]
    perturb(out / "broken" / "model.onnx", f"layers.{layer}.nbl_linear.weight", 0.8)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which this process stands."""
    folder = shutil.copytree(made, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def runs_here(line: str) -> bool:
    return not elsewhere(line) and ("path/to/python" not in line or bool(SMALLER["path/to/python"]))


def pages() -> list[object]:
    names = [page.name for page in PAGES if any(map(runs_here, commands(page.name)))]
    skipped = pytest.mark.skipif(not ALL, reason="only with NBL_EXPORT_ALL_TESTS=1")
    return [pytest.param(name, marks=[] if name in USUAL else [skipped]) for name in names]


@pytest.mark.parametrize("page", pages())
def test_the_commands_of_a_page(page: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = 0
    for line in commands(page):
        if not runs_here(line):
            continue
        if "out/broken" in line:
            rerecord(here / "out" / "broken", "rewrite")
        small = line
        for words, fewer in SMALLER.items():
            if words in small:
                small = small.replace(words, fewer)
        code = nbl(small)
        said = capsys.readouterr()
        assert code in ((0, 1) if re.search(GATES, small) else (0,)), (small, code, said.err[-1500:])
        run += 1
    assert run


# what the pages say and show -------------------------------------------------------------------


def same(text: str) -> str:
    """``text`` on one line, with any number for any other."""
    return re.sub(r"\d[\d.,]*(e[-+]?\d+)?", "#", " ".join(text.split()))


def test_a_failed_parity_is_what_its_page_shows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited, verdict, table, _ = _blocks(ROOT / "docs" / "gates.md", "text")
    (line,) = [line for line in commands("gates.md") if " verify " in line]
    assert nbl(line) == 2
    assert capsys.readouterr().err.splitlines()[-1] == " ".join(edited.split())
    rerecord(here / "out" / "broken", "rewrite")
    assert nbl(line) == 1
    said = capsys.readouterr().out
    for shown in (verdict, table.splitlines()[1]):
        assert same(shown) in same(said)


def answer(code: str, python: str, here: Path) -> str:
    """What a program of README prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.client
def test_other_runtimes_answer_as_readme_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = {re.findall(r"\w*onnxruntime\w*|optimum", c)[0]: c for c in _blocks(ROOT / "README.md", "python")}
    assert set(codes) == {"onnxruntime_genai", "optimum", "onnxruntime"}
    prompt = "Once upon a time"
    assert nbl(f"nbl-export generate out/model --prompt '{prompt}' --max-tokens 40 --raw") == 0
    expected = capsys.readouterr().out.strip()
    assert len(expected) > 80
    assert expected in answer(codes["onnxruntime"], sys.executable, here)
    # What transformers 4.57, which optimum has, reads of a tokenizer that transformers 5 has saved.
    told = json.loads((here / "out" / "model" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["model_input_names"] == ["input_ids", "attention_mask"]
    if VARIABLE in os.environ:
        assert f"{prompt}{expected}" in answer(codes["optimum"], optimum_python(), here)
    pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: pip install '.[genai]'")
    assert f"{prompt}{expected}" in answer(codes["onnxruntime_genai"], sys.executable, here)
