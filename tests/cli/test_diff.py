"""`nbl-export diff` as a user runs it: exit codes, what stdout holds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import assert_refused, nbl


def test_a_worse_loss_fails_the_gate(stories_out: Path, stories_three: Path) -> None:
    done = nbl("diff", stories_out, stories_three)
    assert done.code == 0 and "PASS  (checks); " in done.out and "perplexity ratio" in done.out
    done = nbl("diff", stories_out, stories_three, "--max-ppl-increase", "1.1")
    assert done.code == 1 and done.err == ""
    assert "FAIL  (perplexity increase); " in done.out
    words = " ".join(done.out.split())
    assert "above the 1.1 asked for" in words and "added 4" in words
    assert nbl("diff", stories_three, stories_out, "--max-ppl-increase", "1.1").code == 0


def test_markdown_alone_on_the_output(stories_out: Path, stories_three: Path, tmp_path: Path) -> None:
    words = ["diff", stories_out, stories_three, "--max-ppl-increase", "1.1", "--markdown"]
    piped, written = nbl(*words, "-"), nbl(*words, tmp_path / "diff.md")
    assert piped.code == written.code == 1
    assert piped.out.startswith("# nbl-export diff: FAIL\n\n**FAIL** (perplexity increase)")
    assert (tmp_path / "diff.md").read_text() == piped.out
    assert "FAIL  (perplexity increase)" in written.out and "<details>" not in written.out


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
        (["{out}", "{out}", "--markdown", "{out}"], "name a file in a folder"),
        (["{out}", "{out}", "--markdown", "x/y/z.md"], "name a file in a folder"),
        (["{out}", "{out}", "--markdown"], "--markdown needs a value"),
    ],
)
def test_bad_usage_is_one_sentence(stories_out: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = nbl("diff", *(word.format(out=stories_out) for word in words), cwd=tmp_path)
    assert_refused(done, 2, said)
    assert not list(tmp_path.iterdir())
