"""Base and linearized engine: the same settings for both, sizes that fit, and all or nothing on disk."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.engine import pair as module
from nbl_export.engine.build import Built
from nbl_export.engine.library import Library
from nbl_export.engine.manifest import Manifest, load_manifest
from nbl_export.engine.network import NetworkFacts
from nbl_export.engine.pair import check_shrinks
from nbl_export.engine.profiles import Limits
from nbl_export.errors import BuildError, InputError
from nbl_export.progress import Silent, Task
from tests.fixtures_engine import save_manifest
from tests.listening import Notes

OTHER = api.EngineSettings("rtx", max_batch=1, max_seq=8, max_context=32, sm=("86",))
QUICK = api.VerifySettings(quality=False, speed=False)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def engines(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "engine").iterdir()}


def manifests(out: Path) -> tuple[Manifest, Manifest]:
    base, linearized = (load_manifest(out / "engine" / f"{n}.engine") for n in ("baseline", "model"))
    return base, linearized


# what belongs together ---------------------------------------------------------------------------


def test_both_are_built_from_the_same_settings(built_out: Path, rtx: Library) -> None:
    base, linearized = manifests(built_out)
    assert (base.role, linearized.role) == ("base", "linearized")
    for m in (base, linearized):
        assert m.limits == Limits(max_batch=2, max_seq=64, max_context=256)
        assert m.capabilities == ("SM89", "SM86")
        assert (m.library, m.library_version) == ("tensorrt-rtx", rtx.module.__version__)
        assert m.ahead_of_time and m.gpu is None
        assert (m.precision, m.kv_cache, m.attention) == ("fp16", "static", "decomposed")
        assert [p.name for p in m.profiles] == ["prefill", "decode"]
    for of_base, of_linearized in zip(base.profiles, linearized.profiles, strict=True):
        shapes = of_linearized.shapes
        # Two pairs of keys and values are gone; whatever both have has the same shapes.
        assert of_base.shapes.keys() - shapes.keys() == {
            f"past_key_values.{i}.{side}" for i in (3, 4) for side in ("key", "value")
        }
        assert {name: of_base.shapes[name] for name in shapes} == shapes


def test_the_manifests_describe_the_files(built_out: Path) -> None:
    plan = json.loads((built_out / "nbl" / "plan.json").read_text())
    chosen = sorted(int(layer) for layer in plan["layers"])
    for manifest, name, folder in zip(
        manifests(built_out), ("baseline", "model"), (built_out / "baseline", built_out), strict=True
    ):
        engine = built_out / "engine" / f"{name}.engine"
        assert manifest.size == engine.stat().st_size
        expected = {
            "engine": sha256(engine),
            "onnx": sha256(folder / "model.onnx"),
            "onnx_data": sha256(folder / "model.onnx.data"),
        }
        if name == "model":
            expected["plan"] = sha256(built_out / "nbl" / "plan.json")
        assert manifest.hashes == expected
        kept = [i for i in range(5) if name == "baseline" or i not in chosen]
        assert manifest.kv_layers == tuple(kept)
        assert manifest.linear_layers == tuple(chosen if name == "model" else ())
        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
        assert manifest.network.attention == len(kept)
        assert manifest.network.kv_cache_updates == 2 * len(kept)
        assert [t.name for t in manifest.network.inputs] == [i.name for i in graph.input]
        assert manifest.build_seconds > 0
    assert {p.name for p in (built_out / "engine").iterdir()} == {
        f"{name}.{kind}" for name in ("baseline", "model") for kind in ("engine", "json")
    }


# check_shrinks -----------------------------------------------------------------------------------

MIB = 1 << 20


class Sized:
    """Serialized data of which only the size counts."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def of(size: float, weights: float) -> Built:
    """An engine of ``size`` MiB with ``weights`` MiB of weights."""
    facts = NetworkFacts(9, 3, 6, (), (), {"HALF": round(weights * MIB) - 1000, "FLOAT": 1000})
    return Built(Sized(round(size * MIB)), facts, (), True, 1.0)


@pytest.mark.parametrize(
    ("base", "linearized"),
    [
        (of(104, 100), of(74, 70)),  # exactly what was removed
        (of(104, 100), of(71, 70)),  # and code for it
        (of(104, 100), of(70, 70)),  # and all of the code
        (of(104, 100), of(76.9, 70)),  # almost: weights may be laid out in another way
        (of(104, 100), of(104, 100)),  # nothing was linearized
        (of(104, 100), of(104.05, 100)),
        (of(0.5, 1), of(0.3, 0.8)),  # an engine may be smaller than its weights
    ],
)
def test_what_shrinks_by_what_was_removed_is_accepted(base: Built, linearized: Built) -> None:
    check_shrinks({BASE: base, LINEARIZED: linearized})


@pytest.mark.parametrize(
    ("base", "linearized"),
    [
        (of(104, 100), of(104, 70)),  # the base twice
        (of(74, 100), of(74, 70)),  # the linearized twice
        (of(74, 70), of(104, 100)),  # the roles swapped
        (of(74, 100), of(104, 70)),  # the engines swapped
        (of(104, 100), of(80, 70)),  # too little
        (of(104, 100), of(60, 70)),  # more than there was
        (of(104, 100), of(105, 100)),  # grew by nothing removed
    ],
)
def test_engines_that_do_not_belong_together_are_refused(base: Built, linearized: Built) -> None:
    with pytest.raises(BuildError) as caught:
        check_shrinks({BASE: base, LINEARIZED: linearized})
    message = str(caught.value)
    assert "do not belong together" in message and "\n" not in message
    assert f"{base.size - linearized.size:,} bytes smaller" in message


# all or nothing ----------------------------------------------------------------------------------


def second_fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    """Let the build of the linearized engine raise; returns the graphs that were begun."""
    real, begun = module.build_engine, []

    def building(library: Library, path: Path, *rest: Any) -> Built:
        begun.append(path.parent.name)
        if len(begun) == 2:
            raise error
        return real(library, path, *rest)

    monkeypatch.setattr(module, "build_engine", building)
    return begun


@pytest.mark.parametrize(
    "error", [BuildError("No."), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")]
)
def test_a_failure_in_the_second_build_leaves_the_first_engines(
    built_copy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = engines(built_copy)
    begun = second_fails(monkeypatch, error)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        api.build(built_copy, OTHER)
    assert len(begun) == 2
    assert engines(built_copy) == before
    monkeypatch.undo()
    # They still are what the folder's record says, and count.
    checks = {c.name: c.status for c in api.verify(built_copy, QUICK).checks}
    assert checks["engine build"] == "passed"


class Interrupting(Silent):
    """Ctrl-C while the task with this word in its title goes on."""

    def __init__(self, word: str) -> None:
        self.word = word

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        task = Notes()
        if self.word in title:

            def advance(amount: int) -> None:
                raise KeyboardInterrupt

            task.advance = advance  # type: ignore[method-assign]
        yield task


@pytest.mark.parametrize("word", ["base", "linearized"])
def test_ctrl_c_in_either_build_leaves_no_files(built_copy: Path, word: str) -> None:
    for path in (built_copy / "engine").iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        api.build(built_copy, OTHER, Interrupting(word))
    assert engines(built_copy) == {}
    assert not list(built_copy.rglob(".*.tmp"))


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No room for the file called ``name``: half of it is written."""
    real = Path.write_bytes

    def write(path: Path, data: Any) -> int:
        if path.name.startswith(f".{name}."):
            real(path, bytes(memoryview(data)[: len(memoryview(data)) // 2]))
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("name", ["baseline.engine", "model.engine"])
def test_a_full_disk_leaves_the_earlier_pair_as_it_was(
    built_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Both or none: engines of two settings are no pair."""
    before = engines(built_copy)
    full_disk(monkeypatch, name)
    with pytest.raises(InputError, match=r"^No room on the disk in stage `build` .*are kept\.$"):
        api.build(built_copy, OTHER)
    assert engines(built_copy).keys() == before.keys(), "a half-written file is left"
    assert engines(built_copy) == before


@pytest.mark.parametrize("name", ["baseline", "model"])
def test_an_engine_that_the_folder_does_not_record_is_not_verified(built_copy: Path, name: str) -> None:
    """One of another graph in its place, with its own good manifest."""
    engine = built_copy / "engine" / f"{name}.engine"
    manifest = load_manifest(engine)
    engine.write_bytes(engine.read_bytes()[::-1])
    save_manifest(engine, replace(manifest, hashes={**manifest.hashes, "engine": sha256(engine)}))
    load_manifest(engine)
    with pytest.raises(InputError, match=r"engine/\w+\.(engine|json) .*nbl-export build"):
        api.verify(built_copy, QUICK)


def test_swapped_engines_are_not_verified(built_copy: Path) -> None:
    """With their manifests, so that each pair of files is sound."""
    folder = built_copy / "engine"
    for kind in ("engine", "json"):
        files = [folder / f"{n}.{kind}" for n in ("baseline", "model")]
        contents = [f.read_bytes() for f in files]
        for file, content in zip(files, reversed(contents), strict=True):
            file.write_bytes(content)
    with pytest.raises(InputError, match=r"engine/\w+\.(engine|json) .*nbl-export build"):
        api.verify(built_copy, QUICK)


def test_a_pair_that_does_not_shrink_is_not_written(
    built_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, first = module.build_engine, []

    def same_twice(library: Library, path: Path, attention: int, *rest: Any) -> Built:
        found = first[0] if first else real(library, path, attention, *rest)
        first.append(found)
        facts = replace(found.facts, weight_bytes={"HALF": 1000})
        return found if len(first) == 1 else replace(found, facts=facts)

    before = engines(built_copy)
    monkeypatch.setattr(module, "build_engine", same_twice)
    with pytest.raises(BuildError, match="do not belong together"):
        api.build(built_copy, OTHER)
    assert engines(built_copy) == before
