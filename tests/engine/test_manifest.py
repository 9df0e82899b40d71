"""The manifest binds an engine to what it is: round trip, damage anywhere in either file, and where it runs."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nbl_export.engine.library import Gpu
from nbl_export.engine.manifest import check_runs, load_manifest
from nbl_export.errors import InputError, MissingDependencyError, NblError
from nbl_export.packages import pip_line
from nbl_export.records import to_json
from tests.engine.conftest import manifest_by_hand
from tests.fixtures_engine import save_manifest

ENGINE = random.Random(0).randbytes(1000)
HASHES = {"engine": hashlib.sha256(ENGINE).hexdigest(), "onnx": "1" * 64, "plan": "2" * 64}
MANIFEST = manifest_by_hand(size=len(ENGINE), hashes=HASHES, gpu="NVIDIA é")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine with its manifest beside it."""
    path = tmp_path / "model.engine"
    path.write_bytes(ENGINE)
    save_manifest(path, MANIFEST)
    return path


def refused(engine: Path, *words: str) -> None:
    """One sentence that says what does not fit."""
    with pytest.raises(InputError) as caught:
        load_manifest(engine)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in (*words, "nbl-export build"):
        assert word in message, message


def test_what_is_saved_is_what_is_loaded(engine: Path) -> None:
    assert load_manifest(engine) == MANIFEST
    body = json.loads(engine.with_name("model.json").read_text())
    assert body.pop("format") == "nbl-export/engine/1" and len(body.pop("sha256")) == 64
    assert body == to_json(MANIFEST)


@pytest.mark.parametrize("place", [0, 500, 999])
def test_another_byte_in_the_engine_is_refused(engine: Path, place: int) -> None:
    engine.write_bytes(ENGINE[:place] + bytes([ENGINE[place] ^ 1]) + ENGINE[place + 1 :])
    refused(engine, str(engine), "was changed", "SHA-256")
    engine.write_bytes(ENGINE[:place])
    refused(engine, "is truncated", f"{place} bytes", "1,000")
    engine.write_bytes(ENGINE + b"\0")
    refused(engine, "1,001 bytes, the manifest says 1,000")


def test_what_is_missing_or_cut_is_named(engine: Path) -> None:
    file = engine.with_name("model.json")
    file.write_bytes(file.read_bytes()[:-3])
    refused(engine, str(file), "damaged")
    file.unlink()
    refused(engine, str(file), "missing")
    engine.unlink()
    refused(engine, str(engine), "does not exist")


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number in a table": lambda m: m["limits"].update(max_batch=8),
    "a shape": lambda m: m["profiles"][0]["shapes"]["input_ids"][2].__setitem__(0, 16),
    "a capability more": lambda m: m["capabilities"].append("SM120"),
    "a layer less": lambda m: m["linear_layers"].pop(),
    "no digest": lambda m: m.pop("sha256"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_by_hand_is_refused(engine: Path, name: str) -> None:
    file = engine.with_name("model.json")
    body = json.loads(file.read_text())
    EDITS[name](body)
    file.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
    refused(engine, str(file), "was changed after it was written")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format="nbl-export/engine/2"), "not an engine manifest of nbl-export"),
        (lambda m: m.pop("profiles"), "damaged"),
        (lambda m: m.update(note="of a later release"), "damaged"),
        (lambda m: m.update(size="1000"), "damaged"),
        (lambda m: m["hashes"].pop("engine"), "SHA-256"),
    ],
)
def test_a_manifest_with_other_fields_is_refused(
    engine: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    """Changed and signed anew, as whoever wrote it differently would have."""
    file = engine.with_name("model.json")
    body = json.loads(file.read_text())
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    refused(engine, words)


ADA = Gpu("NVIDIA GeForce RTX 4090", "8.9")


@pytest.mark.parametrize(
    ("version", "gpu", "error", "words"),
    [
        ("1.7.1.116", ADA, None, ()),
        ("1.7.1.116", None, MissingDependencyError, ("no NVIDIA GPU",)),
        (None, ADA, MissingDependencyError, ("tensorrt-rtx", pip_line("rtx"))),
        ("1.7.1.117", ADA, InputError, ("1.7.1.116", "1.7.1.117", "nbl-export build")),
        ("1.7.1.116", Gpu("NVIDIA H100", "9.0"), InputError, ("SM86, SM89", "NVIDIA H100", "9.0")),
    ],
)
def test_where_it_runs(
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    gpu: Gpu | None,
    error: type[NblError] | None,
    words: tuple[str, ...],
) -> None:
    module: Any = ModuleType("tensorrt_rtx") if version else None
    if version:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    if error is None:
        assert check_runs(manifest_by_hand(), gpu).module is module
        return
    with pytest.raises(error) as caught:
        check_runs(replace(manifest_by_hand()), gpu)
    assert all(word in str(caught.value) for word in words)
