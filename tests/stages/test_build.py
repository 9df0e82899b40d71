"""An output folder with engines through the command line: damage, inspection, no room, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

from nbl_export import api
from nbl_export.engine.library import find_gpu
from tests.fixtures_graph import rerecord
from tests.processes import Notes, assert_interrupted, assert_refused, interrupted, nbl, no_leftovers

FAST = ["--decode-steps", "2", "--no-quality", "--no-speed"]
SMALL = ["--trt", "rtx", "--max-batch", "1", "--max-seq", "16", "--max-context", "64", "--sm", "86"]


def engines(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "engine").iterdir()}


# damage ------------------------------------------------------------------------------------------


def test_a_damaged_engine_is_not_verified(built_copy: Path) -> None:
    path = built_copy / "engine" / "model.engine"
    raw = path.read_bytes()
    path.write_bytes(raw[:1234] + bytes([raw[1234] ^ 1]) + raw[1235:])
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
    notes = Notes()
    report = api.verify(out, settings, notes)
    found = {c.name: c for c in report.checks}
    assert "engine build" not in found and report.engines is None and report.engine_parity is None
    assert (found["engine run"].status, report.passed) == ("skipped", True)
    detail = found["engine run"].detail
    assert detail.startswith(why) and detail.endswith(f"): run `nbl-export build {out}`"), detail
    assert f"Not verified: {detail}." in notes.notes


def test_a_damaged_configuration_is_an_error_in_words(built_copy: Path) -> None:
    (built_copy / "baseline" / "config.json").write_text('{"max_position_embeddings": "many"}')
    rerecord(built_copy, "export")
    done = nbl("build", built_copy, *SMALL)
    assert_refused(done, 2, "config.json", "nbl-export export", quietly=False)


# inspect -----------------------------------------------------------------------------------------


def test_inspect_shows_an_engine(built_out: Path) -> None:
    found = json.loads((built_out / "engine" / "model.json").read_text())
    done = nbl("inspect", "engine/model.engine", cwd=built_out)
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


def test_inspect_of_half_an_engine_is_refused(built_copy: Path) -> None:
    path = built_copy / "engine" / "model.engine"
    path.write_bytes(path.read_bytes()[:2000])
    assert_refused(nbl("inspect", path), 2, str(path), "was changed")


# forms, room, interrupts -------------------------------------------------------------------------


def test_ctrl_c_while_the_library_works_leaves_what_there_was(built_copy: Path) -> None:
    before = engines(built_copy)
    done = interrupted("Building base", "build", built_copy, *SMALL, delay=0.4)
    assert_interrupted(done)
    no_leftovers(built_copy)
    assert not list(built_copy.rglob(".*.nbl.tmp"))
    assert engines(built_copy) == before
