"""The manifest binds an engine to what it is: round trip, damage anywhere in either file, and where it runs."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_export.engine.gpu import Gpu
from nbl_export.engine.manifest import Manifest, check_runs, load_manifest, manifest_path
from nbl_export.errors import InputError, MissingDependencyError, NblError
from nbl_export.packages import pip_line
from nbl_export.records import to_json
from tests.engine.conftest import manifest_by_hand
from tests.fixtures_engine import save_manifest

ENGINE = random.Random(0).randbytes(1000)


@dataclass(frozen=True)
class Pair:
    """An engine, its manifest, and the manifest's file."""

    engine: Path
    manifest: Manifest
    file: Path


def pair(folder: Path, content: bytes = ENGINE, **changes: Any) -> Pair:
    folder.mkdir(exist_ok=True)
    engine = folder / "model.engine"
    engine.write_bytes(content)
    hashes = {"engine": hashlib.sha256(content).hexdigest(), "onnx": "1" * 64, "plan": "2" * 64}
    manifest = manifest_by_hand(size=len(content), hashes=hashes, **changes)
    return Pair(engine, manifest, save_manifest(engine, manifest))


@pytest.fixture
def made(tmp_path: Path) -> Pair:
    return pair(tmp_path / "engine")


@pytest.fixture(scope="session")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One that each example damages and mends."""
    return pair(tmp_path_factory.mktemp("fixed"))


def refused(engine: Path, *words: str, error: type[NblError] = InputError) -> str:
    """One sentence that says what does not fit."""
    with pytest.raises(error) as caught:
        load_manifest(engine)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message, message
    return message


# round trip --------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(made: Pair) -> None:
    found = load_manifest(made.engine)
    assert found == made.manifest
    assert made.file == made.engine.with_name("model.json") == manifest_path(made.engine)
    for name in ("capabilities", "profiles", "kv_layers", "linear_layers"):
        assert type(getattr(found, name)) is tuple
    body = json.loads(made.file.read_text())
    assert body["format"] == "nbl-export/engine/1"
    assert {k: v for k, v in body.items() if k not in ("format", "sha256")} == to_json(made.manifest)


def test_an_engine_without_attention_has_a_manifest_too(tmp_path: Path) -> None:
    made = pair(tmp_path / "engine", kv_layers=(), attention="none", linear_layers=(0, 1), gpu="NVIDIA é")
    assert load_manifest(made.engine) == made.manifest


def test_both_files_may_be_moved_and_renamed_together(made: Pair, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    engine = tmp_path / "elsewhere" / "llama.v2.engine"
    shutil.move(made.engine, engine)
    shutil.move(made.file, tmp_path / "elsewhere" / "llama.v2.json")
    assert load_manifest(engine) == made.manifest


# damage ------------------------------------------------------------------------------------------


def damaged(path: Path, place: int, value: int) -> bytes:
    """Write ``value`` at ``place`` of the file; returns what was there."""
    raw = path.read_bytes()
    path.write_bytes(raw[:place] + bytes([value]) + raw[place + 1 :])
    return raw


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, len(ENGINE) - 1), change=st.integers(1, 255))
def test_any_other_byte_in_the_engine_is_refused(fixed: Pair, place: int, change: int) -> None:
    raw = damaged(fixed.engine, place, ENGINE[place] ^ change)
    try:
        refused(fixed.engine, str(fixed.engine), "was changed", "SHA-256", "nbl-export build")
    finally:
        fixed.engine.write_bytes(raw)
    assert load_manifest(fixed.engine) == fixed.manifest


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_other_byte_in_the_manifest_is_refused(fixed: Pair, data: st.DataObject) -> None:
    """Also one that is no UTF-8, ends a string, or makes another number."""
    raw = fixed.file.read_bytes()
    # A blank between two values is tried below.
    places = [i for i, byte in enumerate(raw) if byte not in b" \n"]
    place = data.draw(st.sampled_from(places))
    damaged(fixed.file, place, raw[place] ^ data.draw(st.integers(1, 255)))
    try:
        refused(fixed.engine, str(fixed.file))
    finally:
        fixed.file.write_bytes(raw)
    assert load_manifest(fixed.engine) == fixed.manifest


@pytest.mark.parametrize("value", [b" ", b"\t"])
def test_another_blank_in_the_manifest_is_refused_too(made: Pair, value: bytes) -> None:
    raw = made.file.read_bytes()
    damaged(made.file, raw.index(b"\n"), value[0])
    refused(made.engine, str(made.file), "was changed")


@pytest.mark.parametrize("length", [0, 1, 500, 999])
def test_a_truncated_engine_is_called_truncated(made: Pair, length: int) -> None:
    made.engine.write_bytes(ENGINE[:length])
    refused(made.engine, "is truncated", f"{length} bytes", "1,000", "nbl-export build")


def test_an_engine_that_grew_is_not_called_truncated(made: Pair) -> None:
    made.engine.write_bytes(ENGINE + b"\0")
    assert "truncated" not in refused(made.engine, "1,001 bytes", "the manifest says 1,000")


@pytest.mark.parametrize("length", [0, 1, 100, -2])
def test_a_truncated_manifest_is_damaged(made: Pair, length: int) -> None:
    made.file.write_bytes(made.file.read_bytes()[:length])
    refused(made.engine, str(made.file), "damaged", "nbl-export build")


@pytest.mark.parametrize("missing", ["engine", "file"])
def test_what_is_missing_is_named(made: Pair, missing: str) -> None:
    path: Path = getattr(made, missing)
    path.unlink()
    refused(made.engine, str(path))
    path.mkdir()
    refused(made.engine, str(path))


def test_the_manifest_of_another_engine_is_refused(made: Pair, tmp_path: Path) -> None:
    """Of the same size, so that only the digest can tell."""
    other = pair(tmp_path / "other", bytes(1000))
    shutil.copyfile(other.file, made.file)
    refused(made.engine, str(made.engine), "SHA-256")
    shorter = pair(tmp_path / "shorter", bytes(10))
    shutil.copyfile(shorter.file, made.file)
    refused(made.engine, "1,000 bytes, the manifest says 10")


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number": lambda m: m.update(build_seconds=0.5),
    "a number in a table": lambda m: m["limits"].update(max_batch=8),
    "a shape": lambda m: m["profiles"][0]["shapes"]["input_ids"][2].__setitem__(0, 16),
    "the library's version": lambda m: m.update(library_version="1.8.0"),
    "a capability more": lambda m: m["capabilities"].append("SM120"),
    "a layer less": lambda m: m["linear_layers"].pop(),
    "the digest": lambda m: m.update(sha256="0" * 64),
    "no digest": lambda m: m.pop("sha256"),
    "a key more": lambda m: m.update(note="mine"),
    "a key less": lambda m: m.pop("attention"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_by_hand_is_refused(made: Pair, name: str) -> None:
    body = json.loads(made.file.read_text())
    before = json.dumps(body)
    EDITS[name](body)
    assert json.dumps(body) != before
    made.file.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
    refused(made.engine, str(made.file), "was changed after it was written", "nbl-export build")


def signed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and sign it anew, as whoever wrote it differently would have."""
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")


def test_the_signature_is_the_digest_of_the_content(made: Pair) -> None:
    before = made.file.read_text()
    signed(made.file, lambda m: None)
    assert made.file.read_text() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format="nbl-export/engine/2"), "not an engine manifest of nbl-export"),
        (lambda m: m.pop("format"), "not an engine manifest of nbl-export"),
        (lambda m: m.pop("profiles"), "damaged"),
        (lambda m: m.pop("attention"), "damaged"),
        (lambda m: m.update(note="of a later release"), "damaged"),
        (lambda m: m.update(capabilities=None), "damaged"),
        (lambda m: m["hashes"].pop("engine"), "damaged"),
        (lambda m: m.update(hashes=None), "damaged"),
        (lambda m: m.update(size="1000"), "damaged"),
    ],
)
def test_a_manifest_with_other_fields_is_refused(
    made: Pair, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    signed(made.file, change)
    refused(made.engine, str(made.file), words, "nbl-export build")


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e999"])
def test_a_number_that_json_does_not_have_is_refused(made: Pair, number: str) -> None:
    content = made.file.read_text()
    (limit,) = re.findall(r'"max_context": (\d+)', content)
    made.file.write_text(content.replace(f'"max_context": {limit}', f'"max_context": {number}'))
    refused(made.engine, str(made.file), "damaged")


@pytest.mark.parametrize("content", ["[]", "null", "{}", '"nbl-export/engine/1"', "12"])
def test_other_json_is_no_manifest(made: Pair, content: str) -> None:
    made.file.write_text(content)
    refused(made.engine, str(made.file), "not an engine manifest")


# where it runs -----------------------------------------------------------------------------------

ADA = Gpu("NVIDIA GeForce RTX 4090", "8.9")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Called with a version of tensorrt-rtx to be installed, or None."""

    def install(version: str | None) -> None:
        module: Any = ModuleType("tensorrt_rtx") if version else None
        if version:
            module.__version__ = version
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)

    return install


def test_an_engine_runs_where_everything_fits(installed: Callable[[str | None], None]) -> None:
    installed("1.7.1.116")
    library = check_runs(manifest_by_hand(), ADA)
    assert str(library) == "tensorrt-rtx 1.7.1.116" and library.module is sys.modules["tensorrt_rtx"]


@pytest.mark.parametrize(
    ("version", "gpu", "changes", "error", "words"),
    [
        ("1.7.1.116", None, {}, MissingDependencyError, ("no NVIDIA GPU",)),
        (None, ADA, {}, MissingDependencyError, ("tensorrt-rtx", pip_line("rtx"))),
        ("1.4.0", ADA, {}, MissingDependencyError, ("1.4.0", "too old", "pip install")),
        ("1.8.0.5", ADA, {}, InputError, ("1.7.1.116", "1.8.0.5", "nbl-export build")),
        ("1.7.1.117", ADA, {}, InputError, ("1.7.1.116", "1.7.1.117")),
        ("1.7.1.116", Gpu("NVIDIA H100", "9.0"), {}, InputError, ("SM86, SM89", "NVIDIA H100", "9.0")),
        ("1.7.1.116", Gpu("NVIDIA Test", "8.0"), {}, InputError, ("SM86, SM89", "8.0")),
        ("1.7.1.116", ADA, {"library": "openvino"}, InputError, ("'openvino'",)),
    ],
)
def test_where_it_does_not_run_is_said_with_the_reason(
    installed: Callable[[str | None], None],
    version: str | None,
    gpu: Gpu | None,
    changes: dict[str, Any],
    error: type[NblError],
    words: tuple[str, ...],
) -> None:
    installed(version)
    with pytest.raises(error) as caught:
        check_runs(replace(manifest_by_hand(), **changes), gpu)
    assert type(caught.value) is error and caught.value.exit_code == (3 if error is not InputError else 2)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
