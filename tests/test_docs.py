"""README and docs: their commands parse, their options exist, their links resolve, their Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nbl_export.cli import DEFAULT_COMMAND, app
from nbl_export.cli.main import COMMANDS, words_of
from nbl_export.settings.file import read_settings

ROOT = Path(__file__).parent.parent
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


def test_every_pipeline_in_the_docs_asks_for_what_there_is() -> None:
    yaml = pytest.importorskip("yaml", reason="needs pyyaml: pip install '.[dev]'")
    inputs = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"]
    found = [yaml.safe_load(b) for p in PAGES for b in _blocks(p, "yaml")]
    steps = [step for one in found if isinstance(one, list) for step in one]
    jobs = [job for one in found if isinstance(one, dict) for job in one.get("jobs", one).values()]
    steps += [step for job in jobs for step in job.get("steps", ())]
    actions = [step["with"] for step in steps if step["uses"].startswith("./")]
    scripts = [line for job in jobs for line in job.get("script", ())]
    assert len(actions) >= 2 and scripts
    for asked in actions:
        assert set(asked) <= set(inputs), asked
    lines = [f"nbl-export run {asked['model']} {asked['arguments']}" for asked in actions]
    for line in [*lines, *(line for line in scripts if line.startswith("nbl-export"))]:
        app.parse_args(words_of(shlex.split(line)[1:]), exit_on_error=False, print_error=False)


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


def test_python_in_the_docs_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # That of encoders.md runs in tests/test_encoders.py, which has an encoder.
    (code,) = _blocks(ROOT / "docs" / "output-folder.md", "python")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    # The page's own words, on a small model and little text.
    small = "CalibrateSettings(samples=16, seq_len=64, heldout_samples=4)"
    code = code.replace(
        "SelectSettings(k=8))",
        f"SelectSettings(k=2), api.{small}, api.VerifySettings(speed=False))",
    )
    code = code.replace('"out/model")\nplan', f'"out/model", api.{small})\nplan').replace("k=4", "k=1")
    exec(compile(code, "docs", "exec"), {})


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
