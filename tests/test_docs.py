"""README and docs: their commands parse, their options exist, their links resolve, their Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer.main

from nbl_export import options
from nbl_export.cli import DEFAULT_COMMAND, app
from nbl_export.engine.library import CHOICES
from nbl_export.export.choices import EXPORTERS
from nbl_export.export.forms import FORMS
from nbl_export.graph.precision import PRECISIONS
from nbl_export.linearize.lmmse import FitInput, FitName
from nbl_export.linearize.scores import CRITERIA
from nbl_export.settings import (
    BenchSettings,
    CalibrateSettings,
    EngineSettings,
    SelectSettings,
    VerifySettings,
)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


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


def test_every_command_in_the_docs_parses() -> None:
    checked = 0
    for page, line in _shell_lines():
        words = shlex.split(line, comments=True)
        if words[0] != "nbl-export":
            continue
        name = words[1] if words[1] in COMMANDS else DEFAULT_COMMAND
        rest = words[2:] if words[1] in COMMANDS else words[1:]
        command = COMMANDS[name]
        try:
            command.make_context(name, rest)
        except Exception as error:
            pytest.fail(f"{page}: {line}: {error}")
        checked += 1
    assert checked >= 15


def test_every_script_in_the_docs_exists() -> None:
    scripts = {
        word for _, line in _shell_lines() for word in shlex.split(line, comments=True) if "scripts/" in word
    }
    assert {"scripts/demo.sh", "scripts/test.sh"} <= scripts
    for script in scripts:
        assert (ROOT / script).exists(), script


def test_relative_links_resolve() -> None:
    links = [
        (p, link) for p in PAGES for link in re.findall(r"\]\(([^)#]+)\)", p.read_text(encoding="utf-8"))
    ]
    relative = [(p, link) for p, link in links if "://" not in link]
    assert relative
    for page, link in relative:
        assert (page.parent / link).exists(), f"{page.name}: {link}"


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


def test_defaults_of_the_command_line_are_those_of_the_settings() -> None:
    # The command line spells its defaults itself, so that --help need not import NumPy.
    given = {p.name: p.default for p in COMMANDS[DEFAULT_COMMAND].params}
    text, selection, checks = CalibrateSettings(), SelectSettings(), VerifySettings()
    same = {
        "samples": text.samples,
        "seq_len": text.seq_len,
        "selection_samples": text.selection_samples,
        "heldout_samples": text.heldout_samples,
        "text_field": text.field,
        "seed": text.seed,
        "criterion": selection.criterion,
        "fit_input": selection.fit_input,
        "fit": selection.fit,
        "repair": selection.repair,
        "k": selection.k,
        "max_kl": selection.budget.max_kl,
        "max_ppl_ratio": selection.budget.max_perplexity_ratio,
        "min_speedup": selection.budget.min_speedup,
        "decode_steps": checks.decode_steps,
        "rounds": checks.rounds,
        "contexts": ",".join(map(str, checks.contexts)),
        "quality": checks.quality,
        "speed": checks.speed,
        "max_batch": EngineSettings().max_batch,
        "max_seq": None,
        "max_context": None,
    }
    assert {name: given[name] for name in same} == same
    assert selection.ridge == float(given["ridge"])  # an option of numbers or a word is text
    given, bench = {p.name: p.default for p in COMMANDS["bench"].params}, BenchSettings()
    same = {
        "batches": ",".join(map(str, bench.batches)),
        "contexts": ",".join(map(str, bench.contexts)),
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "device": bench.device,
        "memory": bench.memory,
    }
    assert {name: given[name] for name in same} == same


def test_choices_of_the_command_line_are_those_of_the_code() -> None:
    for option, known in (
        (options.ExporterOpt, EXPORTERS),
        (options.PrecisionOpt, dict.fromkeys(p for c in EXPORTERS.values() for p in c.precisions)),
        (options.CacheOpt, FORMS),
        (options.TrtOpt, CHOICES),
        (options.CriterionOpt, CRITERIA),
    ):
        kind = get_args(option)[0]
        literal = kind if get_origin(kind) is Literal else get_args(kind)[0]
        assert get_args(literal) == tuple(known)
    for option, known in ((options.FitOpt, FitName), (options.FitInputOpt, FitInput)):
        assert get_args(get_args(option)[0]) == get_args(known)
    assert options.TRT_CHOICES == CHOICES
    assert EXPORTERS["torch"].precisions == tuple(PRECISIONS)
