"""Engines in a child process: what comes out for which graph, the same settings for both, all or nothing on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest

from nbl_export import api
from nbl_export.blocks import Mlp
from nbl_export.engine import build as module
from nbl_export.engine.build import Built, Progress, Source, Target, build_in_child, timing_cache
from nbl_export.engine.library import Library
from nbl_export.engine.manifest import Manifest, load_manifest
from nbl_export.engine.network import Limits
from nbl_export.errors import BuildError, InputError
from tests.engine.conftest import Graphs, converted

LIMITS = Limits(2, 32, 64)
OTHER = api.EngineSettings("rtx", max_batch=1, max_seq=8, max_context=32, sm=("86",))
QUICK = api.VerifySettings(quality=False, speed=False)


def build(
    library: Library, path: Path, attention: int, folder: Path, limits: Limits = LIMITS
) -> tuple[Built, list[int]]:
    """The engine of one graph, and its progress."""
    advanced: list[int] = []
    target, engine = Target(library, None, limits, ("SM86",)), folder / "model.engine"
    source = Source("base", path, attention, engine)
    return build_in_child(target, source, engine, folder / "timing.cache", advanced.append), advanced


@pytest.mark.parametrize(("precision", "form"), [("fp32", "static"), ("bf16", "concat"), ("fp16", "static")])
def test_every_precision_and_cache_is_built(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path, precision: str, form: str
) -> None:
    path = graphs(precision, form).linearized
    before = {p.name for p in path.parent.iterdir()}
    built, advanced = build(rtx, path, 3, tmp_path)
    assert not built.fused  # heads of size 8 have no fused kernel, and float32 has none at all
    assert built.facts.attention == 3 and [p.name for p in built.profiles] == ["prefill", "decode"]
    assert built.size == (tmp_path / "model.engine").stat().st_size > 100_000
    assert sum(advanced) == 1000 and min(advanced) >= 0 and len(advanced) > 5
    assert {p.name for p in path.parent.iterdir()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "model.engine"]


def test_without_any_attention_there_still_is_an_engine(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path
) -> None:
    built, _ = build(rtx, graphs("fp16", "static").bare, 0, tmp_path)
    assert (built.facts.attention, built.facts.kv_cache_updates, built.fused) == (0, 0, False)
    assert [t.name for t in built.facts.outputs] == ["logits"]


@pytest.mark.parametrize(("precision", "fused"), [("fp16", True), ("fp32", False)])
def test_attention_is_fused_where_there_is_a_kernel(
    rtx: Library, fusible: Path, tmp_path: Path, precision: str, fused: bool
) -> None:
    path = converted(fusible, tmp_path / "model.onnx", precision)
    assert build(rtx, path, 1, tmp_path)[0].fused is fused


def test_what_is_not_built_is_told_with_its_reason(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path
) -> None:
    static = graphs("fp16", "static").linearized
    with pytest.raises(BuildError, match=r"^The TensorRT network has 6 KV inputs, expected 4\.$"):
        build(rtx, static, 2, tmp_path)
    with pytest.raises(BuildError, match=r"refuses the decode profile.*past_key_values"):
        build(rtx, graphs("fp16", "concat").linearized, 3, tmp_path, Limits(1, 1, 1))
    with pytest.raises(BuildError, match=rf"does not build {static}.*less than or equal to `cache`"):
        build(rtx, static, 3, tmp_path, Limits(1, 32, 16))  # a prompt beyond the cache
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"model\.onnx"):
        build(rtx, tmp_path / "model.onnx", 2, tmp_path)


BROKEN = {
    "crashes": ("import ctypes; ctypes.string_at(0)", "died by SIGSEGV"),
    "hangs": ("import time; time.sleep(600)", "made no progress in 2 s"),
    "raises": ("raise RuntimeError('of the binding')", "failed (RuntimeError: of the binding)"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_library_that_breaks_costs_a_sentence(
    built_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """One that the child alone imports; the engines of before stay, and nothing else does."""
    code, said = BROKEN[how]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tensorrt_rtx.py").write_text(
        f"__version__ = '1.7.1'\nclass ILogger:\n    {code}\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "broken")
    if how == "hangs":  # the others end by themselves, on a busy machine after more than two seconds
        monkeypatch.setattr(module, "PATIENCE", 2)
    before = engines(built_copy)
    with pytest.raises(BuildError) as caught:
        api.build(built_copy, OTHER)
    message = str(caught.value)
    graph = built_copy / "baseline" / "model.onnx"
    assert message.startswith(f"The build of an engine of {graph} with tensorrt-rtx 1."), message
    assert f" {said}: " in message and message.endswith("--precision.") and "\n" not in message
    assert engines(built_copy) == before
    assert psutil.Process().children() == []


def test_progress_only_grows_and_steps_of_any_phase_are_told() -> None:
    told: list[int] = []
    progress = Progress(told.append)
    progress.start("whole", None, 4)
    progress.step("whole", 0)
    progress.start("part", "whole", 5)
    progress.step("part", 0)
    progress.step("unknown", 3)
    progress.step("whole", 1)
    progress.start("again", None, 0)
    progress.step("again", 7)
    progress.reach(1)
    assert told == [250, 0, 0, 250, 500, 0]


class Config:
    """A builder's configuration that takes caches beginning with its own mark."""

    cache: Any = None

    def create_timing_cache(self, data: bytes) -> Any:
        return None if data == b"not a cache" else types.SimpleNamespace(data=bytes(data))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False  # timings of another GPU would be wrong ones
        if cache.data and not cache.data.startswith(b"gpu"):
            return False
        self.cache = cache
        return True


@pytest.mark.parametrize(
    ("found", "read"), [(None, b""), (b"gpu 1", b"gpu 1"), (b"another gpu's", b""), (b"not a cache", b"")]
)
def test_timings_of_this_gpu_are_read(tmp_path: Path, found: bytes | None, read: bytes) -> None:
    path, config = tmp_path / "timing.cache", Config()
    if found is not None:
        path.write_bytes(found)
    assert timing_cache(config, path) is config.cache and config.cache.data == read


# Both of a folder ---------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def engines(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "engine").iterdir()}


def manifests(out: Path) -> tuple[Manifest, Manifest]:
    base, linearized = (load_manifest(out / "engine" / f"{n}.engine") for n in ("baseline", "model"))
    return base, linearized


def test_both_are_built_from_the_same_settings(built_out: Path, rtx: Library) -> None:
    base, linearized = manifests(built_out)
    assert (base.role, linearized.role) == ("base", "linearized")
    for m in (base, linearized):
        assert m.limits == Limits(max_batch=2, max_seq=64, max_context=256)
        assert m.capabilities == ("SM89", "SM86")
        assert (m.library, m.library_version) == ("tensorrt-rtx", rtx.module.__version__)
        assert m.ahead_of_time and m.gpu is None and m.build_seconds > 0
        assert (m.precision, m.kv_cache, m.attention) == ("fp16", "static", "decomposed")
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
            expected["shared_data"] = sha256(built_out / "baseline" / "model.onnx.data")
        assert manifest.hashes == expected
        kept = [i for i in range(5) if name == "baseline" or i not in chosen]
        assert manifest.kv_layers == tuple(kept)
        assert manifest.linear_layers == tuple(chosen if name == "model" else ())
        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
        assert manifest.network.attention == len(kept)
        assert manifest.network.kv_cache_updates == 2 * len(kept)
        assert [t.name for t in manifest.network.inputs] == [i.name for i in graph.input]
    assert {p.name for p in (built_out / "engine").iterdir()} == {
        f"{name}{kind}"
        for name in ("baseline", "model")
        for kind in (".engine", ".json", ".trtexec.sh", "_rows.py")
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_failure_in_the_second_build_leaves_the_first_engines(
    built_copy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real, begun = module.build_in_child, []
    before = engines(built_copy)

    def building(target: Target, source: Source, engine: Path, *rest: Any) -> Built:
        begun.append(source.role)
        built = real(target, source, engine, *rest)
        if len(begun) == 2:
            engine.write_bytes(engine.read_bytes()[: built.size // 2])
            raise error
        return built

    monkeypatch.setattr(module, "build_in_child", building)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        api.build(built_copy, OTHER)
    assert begun == ["base", "linearized"] and engines(built_copy) == before
    monkeypatch.undo()
    # They still are what the folder's record says, and count.
    checks = {c.name: c.status for c in api.verify(built_copy, QUICK).checks}
    assert checks["engine build"] == "passed"


def test_a_full_disk_leaves_the_earlier_pair_as_it_was(built_copy: Path) -> None:
    """No room for a copy of the graph: both or none, as engines of two settings are no pair."""
    before = engines(built_copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, hard))  # the child's too
    try:
        with pytest.raises(InputError, match=r"^No room on the disk in stage `build`.*are kept\.$"):
            api.build(built_copy, OTHER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert engines(built_copy) == before


def test_engines_of_linear_mlps(rtx: Library, tiny_folder: Path, tmp_path: Path) -> None:
    blocks = (1, Mlp(2))
    report = api.run(
        tiny_folder,
        tmp_path / "out",
        api.SelectSettings(layers=blocks),
        api.CalibrateSettings(blocks="both", samples=16, seq_len=64, heldout_samples=2),
        QUICK,
        exporting=api.ExportSettings("fp16", "static"),
        engines=OTHER,
    )
    assert report.passed
    assert {c.name: c.status for c in report.checks}["engine build"] == "passed"
    base, linearized = manifests(tmp_path / "out")
    assert linearized.linear_layers == blocks and base.linear_layers == ()
    assert linearized.kv_layers == (0, 2, 3)


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
