"""`nbl-export.toml`: what it sets, what it may not set, and that the command line wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api, settings
from nbl_export.blocks import Mlp
from nbl_export.cli import main
from nbl_export.errors import InputError, NblError
from nbl_export.models.folder import task_named
from nbl_export.settings import TABLES, read_settings
from nbl_export.settings.definition import (
    settings_of,
)

FILE = """
[calibrate]
calibration = ["a.txt", "b.txt"]
samples = 64
seed = 3

[select]
k = 4
ridge = 1e-5
max-ppl-ratio = 2
criterion = "cca"

[export]
kv-cache = "static"

[build]
trt = "rtx"
sm = ["86", "89"]

[verify]
speed = false
contexts = [64, 256]

[eval]
tasks = ["arc_easy"]
min-recovery = 97

[bench]
peer = ["eager"]
"""


class Asked(NblError):
    """Carries what the command line calls the Python API with."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command line in a folder, and gives what the Python API was called with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "nbl").mkdir(parents=True)
    (tmp_path / "out" / "nbl" / "workspace.json").touch()
    calls: list[tuple[Any, ...]] = []

    def call(*given: Any, **_: Any) -> None:
        calls.append(given)
        raise Asked

    for verb in ("run", "calibrate", "select", "export", "build", "verify", "evaluate", "bench"):
        monkeypatch.setattr(api, verb, call)

    def run(*words: str) -> tuple[Any, ...]:
        monkeypatch.setattr("sys.argv", ["nbl-export", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return calls.pop() if calls else ()

    return run


def test_a_file_here_is_taken_and_said(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nbl-export.toml").write_text(FILE.replace("max-ppl-ratio = 2\n", ""))
    model, _, selection, calibration, checks, _, trust, exporting, engines, *_ = asked("model")
    assert (model, trust) == ("model", False)
    assert selection == api.SelectSettings(k=4, ridge=1e-5, criterion="cca")
    assert calibration == api.CalibrateSettings(("a.txt", "b.txt"), samples=64, seed=3)
    assert checks == api.VerifySettings(speed=False, contexts=(64, 256))
    assert exporting == api.ExportSettings(kv_cache="static")
    assert engines == api.EngineSettings("rtx", sm=("86", "89"))
    assert "Settings of nbl-export.toml." in capsys.readouterr().err
    assert asked("model", "--quiet") and "Settings of" not in capsys.readouterr().err
    # Each command reads its own table, and nothing of the others.
    assert asked("eval", "out")[1] == api.EvalSettings(("arc_easy",), min_recovery=97.0)
    assert asked("bench", "out")[1] == api.BenchSettings(peer=("eager",))
    assert asked("build", "out")[1] == engines
    assert asked("select", "out")[1] == selection


def test_the_command_line_wins(asked: Any) -> None:
    Path("other.toml").write_text(FILE)
    given = ["--config", "other.toml", "--samples", "8", "--layers", "1", "--speed", "--calibration", "c.txt"]
    _, _, selection, calibration, checks, *_ = asked("model", *given, "--seed", "9", "--contexts", "32")
    # One way of saying how many takes the place of all that the file says of it.
    assert selection == api.SelectSettings(layers=(1,), ridge=1e-5, criterion="cca", seed=9)
    assert calibration == api.CalibrateSettings(("c.txt",), samples=8, seed=9)
    assert checks == api.VerifySettings(speed=True, contexts=(32,))
    assert asked("select", "out", "--k", "auto", "--config", "other.toml")[1].budget == api.Budget(None, 1.10)


def test_a_gate_of_a_file_stays_a_gate_however_layers_are_chosen(asked: Any) -> None:
    Path("nbl-export.toml").write_text(
        "[select]\nmax-kl = 0.5\n\n[verify]\nmax-kl = 0.1\nmax-ppl-ratio = 1.5\n"
    )
    _, _, selection, _, checks, *_ = asked("model", "--k", "4")
    assert selection == api.SelectSettings(k=4)
    assert checks == api.VerifySettings(bound=api.LossBound(0.1, 1.5))
    _, _, selection, _, checks, *_ = asked("model")
    assert (selection.budget, checks.bound) == (api.Budget(0.5), api.LossBound(0.1, 1.5))
    # One option of the command line is both.
    _, _, selection, _, checks, *_ = asked("model", "--max-kl", "0.3")
    assert (selection.budget, checks.bound) == (api.Budget(0.3), api.LossBound(0.3, 1.5))
    assert asked("verify", "out", "--max-ppl-ratio", "1.2")[1].bound == api.LossBound(0.1, 1.2)


REFUSED = {
    "unknown table": ("[selection]\nk = 1", "selection is unknown; the nearest known one is select;"),
    "unknown key": ("[select]\nkay = 1", "[select] kay is unknown; the nearest known one is k"),
    "underscores": (
        "[calibrate]\nseq_len = 9",
        "[calibrate] seq_len is unknown; the nearest known one is seq-len",
    ),
    "key of another stage": ("[select]\nsamples = 1", "[select] samples is unknown"),
    "key without a table": ("k = 8", "settings stand in tables, as [select]."),
    "text for a number": ('[select]\nk = "many"', "[select] k is 'many'; give a whole number or auto."),
    "fraction": ("[calibrate]\nsamples = 1.5", "samples is '1.5'; give a whole number."),
    "truth for a number": ("[calibrate]\nsamples = true", "samples is true, which is no such value."),
    "number for truth": ("[verify]\nspeed = 1", "speed is 1, which is no such value."),
    "list for one": ("[calibrate]\nsamples = [1]", "samples is [1], which is no such value."),
    "wrong in a list": ('[verify]\ncontexts = [8, "a"]', "contexts is '8,a'; give whole numbers with commas"),
    "empty list": ("[verify]\ncontexts = []", "[verify] contexts is ''; give whole numbers with commas"),
    "table for one": ("[select.k]\na = 1", "[select] k is "),
    "infinity": ("[select]\nmax-kl = inf", "[select] max-kl is inf; give a finite number."),
    "as a whole number": (f"[bench]\nseconds = 1{'0' * 400}", "seconds is inf; give a finite number."),
    "an empty word": ('[calibrate]\ncalibration = ["a", ""]', "[calibrate] calibration is empty; give some"),
    "refused value": ("[calibrate]\nsamples = 0", "[calibrate] samples is 0; it must be at least 1."),
    "unknown choice": ('[select]\nfit = "luck"', "[select] fit 'luck' is unknown; choose one of lmmse"),
    "not TOML": ("[select\n", "is not a TOML file"),
    "remote code": ("trust-remote-code = true", "trust-remote-code would let a file run code: say"),
    "remote code in a table": ("[calibrate]\ntrust_remote_code = true", "would let a file run code: say"),
    "a program": (
        '[export]\nexporter-python = "./p"',
        "exporter-python names a program to run: say it on the",
    ),
    "a task's code": (
        '[eval]\ntasks = ["a", "b.YAML"]',
        "tasks names b.YAML, which may run code: say it on the",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_may_not_say(tmp_path: Path, name: str) -> None:
    text, said = REFUSED[name]
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_settings(tmp_path / "s.toml")
    message = str(caught.value)
    assert said in message and message.startswith(str(tmp_path / "s.toml")) and message.endswith(".")
    assert caught.value.exit_code == 2 and "\n" not in message


def test_a_file_that_is_not_there(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("select", "out", "--k", "1", "--config", "no.toml") == ()
    assert capsys.readouterr().err == "error: No such file or directory reading --config (no.toml).\n"


def test_a_refused_file_stops_before_anything(asked: Any, tmp_path: Path) -> None:
    Path("nbl-export.toml").write_text("[select]\nkay = 1\n")
    assert asked("model", "--k", "1") == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nbl-export.toml", "out"]


@pytest.mark.parametrize(
    ("words", "library", "export"),
    [
        (["--k", "2", "--trt"], "auto", ("fp16", "static")),
        (["--trt", "--k", "2"], "auto", ("fp16", "static")),
        (["--trt", "auto", "--k", "2"], "auto", ("fp16", "static")),
        (["--trt", "rtx", "--k", "2"], "rtx", ("fp16", "static")),
        (["--trt=tensorrt", "--k", "2"], "tensorrt", ("fp16", "static")),
        (["--k", "2", "--trt", "--precision", "bf16"], "auto", ("bf16", "static")),
        (["--k", "2", "--trt", "--kv-cache", "concat"], "auto", ("fp16", "concat")),
        (["--k", "2", "--precision", "fp32", "--kv-cache", "concat", "--trt"], "auto", ("fp32", "concat")),
        (["--k", "2"], None, ("fp32", "concat")),
        (["--k", "2", "--precision", "fp16"], None, ("fp16", "concat")),
        (["--k", "2", "--max-batch", "8"], None, ("fp32", "concat")),
    ],
)
def test_trt_may_stand_anywhere_and_decides_what_is_exported(
    asked: Any, words: list[str], library: str | None, export: Any
) -> None:
    model, _, selection, *_, exporting, wanted, _, _ = asked("rtx-model", *words)
    assert (model, selection.k) == ("rtx-model", 2)
    exporting = exporting.resolve(task_named("text-generation"), wanted is not None)
    assert (exporting.precision, exporting.kv_cache) == export
    assert (wanted.library if wanted else None) == library


def test_words_become_values(asked: Any) -> None:
    words = ["--samples=4", "--seq-len", "9", "--seq-len", "16", "--calibration", "b", "--calibration", "a"]
    assert asked("calibrate", "model", *words)[2] == api.CalibrateSettings(("b", "a"), samples=4, seq_len=16)
    words = ["--layers", "3, 7.mlp", "--ridge", "1e-3", "--rank", "auto", "--fit", "drop", "--max-kl", "2"]
    assert asked("select", "out", *words[:-2])[1] == api.SelectSettings(
        layers=(3, Mlp(7)), ridge=1e-3, auto_rank=True, fit="drop"
    )
    assert asked("select", "out", *words[-2:])[1].budget == api.Budget(2.0)
    assert asked("verify", "out", "--no-speed", "--contexts", "5,6")[1].contexts == (5, 6)


def test_no_number_is_infinite_and_no_text_empty() -> None:
    """A record is JSON, which has no infinity, and an empty word would be read as this folder."""
    for one in (one for cls in TABLES.values() for one in settings_of(cls)):
        odd = [float("inf"), float("-inf"), float("nan")] if one.kind is float else []
        odd += [("",) if one.many else ""] if one.kind is str else []  # type: ignore[list-item]
        for value in odd:
            with pytest.raises(InputError, match=f"--{one.key} "):
                one.check(value, f"--{one.key}")


def test_a_run_is_resolved_once_for_its_task() -> None:
    decoder, encoder = task_named("text-generation"), task_named("feature-extraction")
    asked = settings.RunSettings(settings.SelectSettings(k=1))
    engines = replace(asked, engines=settings.EngineSettings())
    for run, task, made in (
        (asked, decoder, ("fp32", "concat", "greedy")),
        (asked, encoder, ("fp32", "none", "cca")),
        (engines, decoder, ("fp16", "static", "greedy")),
    ):
        found = run.resolve(task)
        assert (found.exporting.precision, found.exporting.kv_cache, found.selection.criterion) == made
        assert found.resolve(task) == found
    with pytest.raises(InputError, match="--trt is for decoders"):
        engines.resolve(encoder)
    repair, int4 = settings.SelectSettings(k=1, repair=5), settings.ExportSettings("int4", exporter="genai")
    with pytest.raises(InputError, match=r"an int4 graph does not hold .* add --repair-rank 0"):
        settings.RunSettings(repair, exporting=int4).check()
    settings.RunSettings(replace(repair, repair_rank=0), exporting=int4).check()
    shared = settings.ExportSettings(kv_cache="shared")
    with pytest.raises(InputError, match="TensorRT does not take the graphs of --kv-cache shared"):
        replace(engines, exporting=shared).check()
