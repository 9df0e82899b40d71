"""An output folder from somebody else is data: it runs no code, fetches nothing, and reaches no file outside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api
from nbl_export.errors import InputError, NblError
from nbl_export.models.source import find_model, same_model
from tests.finished import QUICK, TWO
from tests.processes import ENVIRONMENT, Done, files_in
from tests.tiny import build

CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

if "RAN" in os.environ:
    Path(os.environ["RAN"]).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
USES: dict[str, Callable[[Path], Any]] = {
    "select": lambda out: api.select(out, api.SelectSettings(k=1, criterion="kl")),
    "export": lambda out: api.export(out, api.ExportSettings(kv_cache="none")),
    "verify": lambda out: api.verify(out, api.VerifySettings(decode_steps=3, speed=False)),
    "eval": lambda out: api.evaluate(out, api.EvalSettings(retrieval_contexts=(400,), retrieval_samples=1)),
    "bench": lambda out: api.bench(out, api.BenchSettings(peer=("eager",), batches=(1,), contexts=(8,))),
}
# Commands that read a finished folder.
READS: dict[str, Callable[[Path], Any]] = {
    **USES,
    "rewrite": api.rewrite,
    "report": api.report,
    "inspect": api.inspect,
}


def edit(out: Path, change: Callable[[Any], None]) -> None:
    path = out / "nbl" / "workspace.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


# code --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory, stories_text: Path) -> tuple[Path, Path]:
    """A model with code of its own, and a finished output folder of it."""
    place = tmp_path_factory.mktemp("own")
    model = build(place / "model", max_position_embeddings=512)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(CODE)
    calibration = api.CalibrateSettings((str(stories_text),), samples=32, seq_len=64, heldout_samples=8)
    report = api.run(model, place / "out", TWO, calibration, QUICK, trust_remote_code=True)
    assert report.passed and report.model.trust_remote_code
    return model, place / "out"


@pytest.mark.parametrize("command", USES)
def test_a_folder_cannot_say_that_code_runs(
    own_code: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Not even one of an earlier release, which recorded the flag."""
    out = Path(shutil.copytree(own_code[1], tmp_path / "out"))
    assert "trust_remote_code" not in (out / "nbl" / "workspace.json").read_text()
    edit(out, lambda state: state["model"].update(trust_remote_code=True))
    imported: list[Any] = []
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.get_class_in_module", lambda *a, **_: imported.append(a)
    )
    if command in (
        "eval",
        "bench",
    ):  # the tokenizer has no code; PyTorch is left out of a bench, with the reason
        said = str(USES[command](out))
        assert command == "eval" or "comes with code of its own" in said
    else:
        with pytest.raises(
            InputError, match=r"comes with code of its own.* then give --trust-remote-code\.$"
        ):
            USES[command](out)
    assert not imported


def test_code_runs_where_the_flag_is_given_and_only_there(
    own_code: tuple[Path, Path], tmp_path: Path
) -> None:
    out, ran = Path(shutil.copytree(own_code[1], tmp_path / "out")), tmp_path / "ran"
    verify = ["verify", str(out), "--no-quality", "--no-speed", "--decode-steps", "2"]

    def verified(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nbl_export", *verify, *more]  # this process has imported the code
        return subprocess.run(command, env={**ENVIRONMENT, "RAN": str(ran)}, capture_output=True, text=True)

    done = verified()
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr and not ran.exists()
    done = verified("--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert ran.exists()


# names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", READS)
def test_no_command_reaches_a_recorded_name_outside(stories_copy: Path, tmp_path: Path, command: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("somebody's")
    name = os.path.relpath(victim, stories_copy)

    def change(state: Any) -> None:
        for record in state["stages"].values():
            record["files"][name] = "0" * 64

    edit(stories_copy, change)
    with pytest.raises(NblError, match="not the name of a file in"):
        READS[command](stories_copy)
    assert victim.read_text() == "somebody's"


# the recorded model ------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was looked for on the Hub."""
    asked: list[str] = []

    def snapshot(repo: str, **options: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if not options.get("local_files_only"):
            asked.append(repo)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "somebody/model"}, "is not there any more"),
        ({"path": "/nowhere/model"}, "is not there any more"),
        (
            {"kind": "hub", "source": "somebody/model", "path": "/nowhere"},
            "is not on this machine: fetch it with `hf",
        ),
        ({"kind": "hub", "source": "../model", "path": "/nowhere"}, "is not on this machine"),
        ({"kind": "gguf", "gguf_file": "../m.gguf"}, "not the name of a file in"),
        ({"fingerprint": "0" * 64}, "has changed since"),
    ],
)
def test_the_recorded_model_is_found_here_or_refused(
    tiny_folder: Path, no_hub: list[str], change: dict[str, Any], words: str
) -> None:
    info = find_model(str(tiny_folder)).as_json()
    assert same_model(info) == find_model(str(tiny_folder))
    with pytest.raises(InputError, match=words):
        same_model({**info, **change})
    assert no_hub == []


# where the output goes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "words"),
    [("model", "is the model"), (".", "holds the model"), ("model/out", "lies in the model")],
)
def test_the_output_folder_is_apart_from_the_model(tmp_path: Path, out: str, words: str) -> None:
    place = tmp_path / "place"
    model = build(place / "model")
    before = {name: (place / name).read_bytes() for name in files_in(place)}
    (tmp_path / "link").symlink_to(place)
    target = tmp_path / "link" / out
    with pytest.raises(InputError, match=words):
        api.calibrate(model, target)
    assert {name: (place / name).read_bytes() for name in files_in(place)} == before


# names of things ---------------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e<script>alert(1)</script>|`[/b](javascript:x)"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def nbl(*arguments: object, cwd: Path, **environment: str) -> Done:
    """`nbl-export ARGUMENTS` with other variables; names that are not UTF-8 are given as bytes."""
    command = [
        sys.executable,
        "-m",
        "nbl_export",
        *(a if isinstance(a, bytes) else str(a) for a in arguments),
    ]
    done = subprocess.run(
        command, capture_output=True, env={**ENVIRONMENT, **environment}, cwd=cwd, timeout=120
    )
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    assert "Traceback" not in err and "Internal error" not in err, err
    assert not OBEYED.search(out + err), ascii(out + err)
    return Done(done.returncode, out, err)


@pytest.fixture
def graph(stories_out: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stories_out / "baseline", tmp_path / "graph") / "model.onnx"


def edited(path: Path, change: Callable[[Any], object]) -> Path:
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


GRAPHS: dict[str, Callable[[Any], object]] = {
    "producer": lambda m: setattr(m, "producer_name", EVIL),
    "operator": lambda m: m.graph.node.extend(
        [onnx.helper.make_node(EVIL, ["input_ids"], ["q"], domain="x")]
    ),
    "opset": lambda m: m.opset_import.extend([onnx.helper.make_opsetid(EVIL, 1)]),
}


@pytest.mark.parametrize("where", GRAPHS)
def test_names_in_a_graph(graph: Path, where: str) -> None:
    done = nbl("inspect", edited(graph, GRAPHS[where]), cwd=graph.parent)
    assert done.code in (0, 2)
    assert "\N{REPLACEMENT CHARACTER}" in done.out + done.err


@pytest.mark.parametrize("command", ["report", "--help"])
def test_a_terminal_of_ascii(stories_copy: Path, command: str) -> None:
    words = {"--help": ["--help"]}.get(command, [command, stories_copy])
    done = nbl(*words, cwd=stories_copy, PYTHONCOERCECLOCALE="0", LC_ALL="C", PYTHONUTF8="0")
    assert done.code == 0, done
    assert (done.out + done.err).strip()
