"""An output folder with engines through the command line: damage, inspection, no room, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.engine.library import find_gpu
from nbl_export.workspace import Workspace
from tests.command_line import assert_interrupted, assert_refused, interrupted, nbl, no_leftovers
from tests.fixtures_graph import rerecord
from tests.listening import Notes

FAST = ["--decode-steps", "2", "--no-quality", "--no-speed"]
SMALL = ["--trt", "rtx", "--max-batch", "1", "--max-seq", "16", "--max-context", "64", "--sm", "86"]


def engines(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "engine").iterdir()}


# damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.engine", lambda raw: raw[:1234] + bytes([raw[1234] ^ 1]) + raw[1235:]),
        ("baseline.json", None),
    ],
)
def test_a_damaged_engine_is_not_verified(built_copy: Path, name: str, damage: Any) -> None:
    path = built_copy / "engine" / name
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    before = (built_copy / "report" / "report.json").read_bytes()
    assert_refused(nbl("verify", built_copy, *FAST), 2, str(path), "nbl-export build", quietly=False)
    assert (built_copy / "report" / "report.json").read_bytes() == before


def test_engines_of_another_rewrite_are_passed_over_aloud(built_copy: Path) -> None:
    """The layers are others: what was built before says nothing of them, and the report says that."""
    out = built_copy
    settings = api.VerifySettings(quality=False, speed=False)
    notes = Notes()
    assert {c.name for c in api.verify(out, settings, notes).checks} >= {"engine build", "engine run"}
    assert not any("engines" in note for note in notes.notes)
    api.select(out, api.SelectSettings(layers=(0, 1)))
    api.rewrite(out)
    why = f"the engines in {out / 'engine'} are of other graphs ("
    for attempt in range(2):  # the second keeps the report of the first
        notes = Notes()
        report = api.verify(out, settings, notes)
        found = {c.name: c for c in report.checks}
        assert "engine build" not in found and report.engines is None and report.engine_parity is None
        assert (found["engine run"].status, report.passed) == ("skipped", True)
        detail = found["engine run"].detail
        assert detail.startswith(why) and detail.endswith(f"): run `nbl-export build {out}`"), detail
        assert [f"Not verified: {detail}." in notes.notes, "verify" in notes.kept] == [
            not attempt,
            bool(attempt),
        ]
    api.build(out, api.EngineSettings("rtx", max_batch=1, max_seq=16, max_context=64, sm=("86",)))
    again = {c.name: c.detail for c in api.verify(out, settings).checks}
    assert "engine build" in again and "other graphs" not in again["engine run"]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    "content",
    ["[]", "false", '{"max_position_embeddings": "many"}', '{"text_config": 5}', '{"n_positions": [8]}'],
)
def test_a_damaged_configuration_is_an_error_in_words(built_copy: Path, content: str, sealed: bool) -> None:
    (built_copy / "baseline" / "config.json").write_text(content)
    if sealed:
        rerecord(built_copy, "export")
    done = nbl("build", built_copy, *SMALL)
    assert_refused(done, 2, "config.json", "nbl-export export", quietly=False)


def test_a_model_within_a_model_has_positions_too(built_copy: Path) -> None:
    """Configurations of several models keep the language model's under text_config."""
    path = built_copy / "baseline" / "config.json"
    config = json.loads(path.read_text())
    positions = config.pop("max_position_embeddings")
    path.write_text(json.dumps({**config, "text_config": {"max_position_embeddings": positions}}))
    rerecord(built_copy, "export")
    done = nbl("build", built_copy, "--trt", "rtx", "--max-context", "600")
    assert_refused(done, 2, "--max-context is 600", "512 positions")


# inspect -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.engine", "model.json"])
def test_inspect_shows_an_engine_by_either_file(built_out: Path, name: str) -> None:
    found = json.loads((built_out / "engine" / "model.json").read_text())
    done = nbl("inspect", f"engine/{name}", cwd=built_out)
    assert done.code == 0 and done.err == ""
    for words in (
        "linearized",
        ", ".join(map(str, found["linear_layers"])),
        ", ".join(map(str, found["kv_layers"])),
        f"tensorrt-rtx {found['library_version']}",
        found["hashes"]["engine"],
        found["hashes"]["plan"],
        "prefill: input_ids",
        "2×64",
        "decode: write_indices",
        "2×4×256×8",
        "past_key_values.2.value",
        "?×4×256×8",
        "HALF",
        "SM89, SM86",
    ):
        assert words in done.out, words
    assert "past_key_values.3" not in done.out
    if find_gpu() is None:
        assert "no: no NVIDIA GPU" in done.out


@pytest.mark.parametrize(("length", "words"), [(2000, "truncated"), (None, "does not exist")])
def test_inspect_of_half_an_engine_is_refused(built_copy: Path, length: int | None, words: str) -> None:
    path = built_copy / "engine" / "model.engine"
    if length is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:length])
    assert_refused(nbl("inspect", path), 2, str(path), words)


# forms, room, interrupts -------------------------------------------------------------------------


def test_the_configuration_for_genai_goes_with_the_growing_cache(stories_out: Path, static_out: Path) -> None:
    """onnxruntime-genai would take a static cache for one that grows."""
    paths = [folder / "genai_config.json" for folder in (stories_out / "baseline", stories_out)]
    layers = [json.loads(p.read_text())["model"]["decoder"]["num_hidden_layers"] for p in paths]
    assert layers == [5, 3]
    assert not list(static_out.rglob("genai_config.json"))
    workspace = Workspace.open(static_out)
    for stage in ("export", "rewrite"):
        record = workspace.record(stage)
        assert record is not None and not [f for f in record.files if f.endswith("genai_config.json")]
        assert workspace.damaged_file(record) is None


def test_no_room_for_an_engine(built_copy: Path) -> None:
    """An engine takes 4 MB; the graphs less than one."""
    before = engines(built_copy)
    assert min(len(raw) for name, raw in before.items() if name.endswith(".engine")) > 2_000_000
    done = nbl("build", built_copy, *SMALL, limit=1_000_000)
    assert_refused(done, 2, "No room on the disk in stage `build`", "stages are kept", quietly=False)
    no_leftovers(built_copy)
    assert not list(built_copy.rglob(".*.nbl.tmp"))
    assert engines(built_copy) == before


@pytest.mark.parametrize("delay", [0.4])
def test_ctrl_c_while_the_library_works_leaves_what_there_was(built_copy: Path, delay: float) -> None:
    before = engines(built_copy)
    done = interrupted("Building base", "build", built_copy, *SMALL, delay=delay)
    assert_interrupted(done)
    no_leftovers(built_copy)
    assert not list(built_copy.rglob(".*.nbl.tmp"))
    assert engines(built_copy) == before
