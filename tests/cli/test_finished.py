"""`nbl-export diff` as a user runs it: exit codes, what stdout holds, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from tests.command_line import ENVIRONMENT, assert_refused, nbl


def edited(out: Path, folder: Path, **changes: Any) -> Path:
    """The report of ``out`` with other sections, as a file of its own."""
    raw = json.loads((out / "report" / "report.json").read_text())
    path = folder / "report.json"
    path.write_text(json.dumps({**raw, **changes}))
    return path


def test_the_same_twice(stories_out: Path) -> None:
    done = nbl("diff", stories_out, stories_out, "--max-ppl-increase", 1, "--max-size-increase", 1)
    assert done.code == 0, done
    assert done.out.rstrip().endswith("PASS  (checks, perplexity increase, size increase); no difference")
    assert done.err == ""


def test_a_worse_loss_fails_the_gate(stories_out: Path, stories_three: Path) -> None:
    done = nbl("diff", stories_out, stories_three)
    assert done.code == 0 and "PASS  (checks); " in done.out and "perplexity ratio" in done.out
    done = nbl("diff", stories_out, stories_three, "--max-ppl-increase", "1.1")
    assert done.code == 1 and done.err == ""
    assert "FAIL  (perplexity increase); " in done.out
    words = " ".join(done.out.split())
    assert "above the 1.1 asked for" in words and "added 4" in words
    assert nbl("diff", stories_three, stories_out, "--max-ppl-increase", "1.1").code == 0


def test_a_check_that_failed_fails_without_a_bound(stories_out: Path, tmp_path: Path) -> None:
    checks = [{"name": "parity", "status": "failed", "detail": "max |Δlogit| is 3"}]
    done = nbl("diff", stories_out / "report" / "report.json", edited(stories_out, tmp_path, checks=checks))
    assert done.code == 1
    assert "parity failed in B and was passed in A (max |Δlogit| is 3)" in " ".join(done.out.split())


def test_markdown_alone_on_the_output(stories_out: Path, stories_three: Path, tmp_path: Path) -> None:
    words = ["diff", stories_out, stories_three, "--max-ppl-increase", "1.1", "--markdown"]
    piped, written = nbl(*words, "-"), nbl(*words, tmp_path / "diff.md")
    assert piped.code == written.code == 1
    assert piped.out.startswith("# nbl-export diff: FAIL\n\n**FAIL** (perplexity increase)")
    assert (tmp_path / "diff.md").read_text() == piped.out
    assert "FAIL  (perplexity increase)" in written.out and "<details>" not in written.out


def test_graphs(stories_out: Path) -> None:
    done = nbl("diff", stories_out / "baseline", stories_out / "model.onnx", "--max-size-increase", 1)
    assert done.code == 0 and "linear layers in the graph" in done.out and "Environment" not in done.out
    done = nbl("diff", stories_out / "model.onnx", stories_out / "baseline")
    assert done.code == 0 and "PASS" not in done.out
    assert "figures differ: 2 worse" in done.out.splitlines()[-1]


def test_bounds_stand_in_a_file(stories_out: Path, stories_three: Path, tmp_path: Path) -> None:
    (tmp_path / "nbl-export.toml").write_text("[diff]\nmax-ppl-increase = 1.1\n")
    assert nbl("diff", stories_out, stories_three, cwd=tmp_path).code == 1
    assert nbl("diff", stories_out, stories_three, "--max-ppl-increase", 9, cwd=tmp_path).code == 0


@pytest.mark.parametrize("columns", ["80", "120"])
def test_it_fits_a_terminal(stories_out: Path, stories_three: Path, columns: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nbl_export", "diff", str(stories_out), str(stories_three)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "COLUMNS": columns},
    )
    assert max(map(len, done.stdout.splitlines())) <= int(columns)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{out}"], "B is missing"),
        (["{out}", "nowhere"], "nowhere does not exist: name an output folder"),
        (["{out}", "{out}/model.onnx"], "is a report and B ("),
        (["{out}", "{out}/config.json"], "is no report, bench or evaluation of nbl-export"),
        (["{out}", "{out}", "--max-slowdown", "0.5"], "--max-slowdown is 0.5; it must be 1 or more"),
        (["{out}", "{out}", "--max-slowdown", "nan"], "--max-slowdown is nan"),
        (["{out}", "{out}", "--markdown", "{out}/report/report.json"], "is no comparison of nbl-export"),
        (["{out}", "{out}", "--markdown", "{out}"], "is a folder"),
        (["{out}", "{out}", "--markdown", "x/y/z.md"], "there is no folder x/y"),
        (["{out}", "{out}", "--markdown"], "--markdown needs a value"),
    ],
)
def test_bad_usage_is_one_sentence(stories_out: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = nbl("diff", *(word.format(out=stories_out) for word in words), cwd=tmp_path)
    assert_refused(done, 2, said)
    assert not list(tmp_path.iterdir())


def test_a_name_that_a_terminal_obeys_is_shown_as_text(stories_out: Path, tmp_path: Path) -> None:
    evil = "\x1b[2J[red]<script>|\u202e"
    raw = json.loads((stories_out / "report" / "report.json").read_text())
    other = edited(stories_out, tmp_path, model={**raw["model"], "source": evil})
    for more in ([], ["--markdown", "-"]):
        done = nbl("diff", stories_out, other, *more)
        assert done.code == 0 and "\x1b" not in done.out and "\u202e" not in done.out
        assert ("&lt;script&gt;" if more else "[red]<script>") in done.out


def test_the_api_takes_names_and_no_bounds(stories_out: Path, tmp_path: Path) -> None:
    value = api.diff(str(stories_out), str(stories_out), markdown=str(tmp_path / "d.md"))
    assert value.passed and value.difference == "none" and (tmp_path / "d.md").is_file()
    with pytest.raises(api.NblError, match="--max-slowdown is 0"):
        api.diff(stories_out, stories_out, api.DiffBounds(max_slowdown=0.0))


def test_a_comparison_imports_neither_torch_nor_a_runtime(stories_out: Path) -> None:
    code = (
        "import sys\nfrom nbl_export import api\n"
        f"api.diff({str(stories_out)!r}, {str(stories_out)!r})\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == "[]\n", done


def test_a_folder_is_only_read(stories_out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stories_out, tmp_path / "out", copy_function=shutil.copy2))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert nbl("diff", copy, stories_out).code == 0
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
