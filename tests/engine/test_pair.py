"""Base and linearized engine: the same settings for both, and all or nothing on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.blocks import Mlp
from nbl_export.engine import pair as module
from nbl_export.engine.build import Built
from nbl_export.engine.library import Library
from nbl_export.engine.manifest import Manifest, load_manifest
from nbl_export.engine.network import NetworkFacts
from nbl_export.engine.pair import Source, Target, build_pair
from nbl_export.engine.profiles import Limits
from nbl_export.engine.weights import NetworkWeights
from nbl_export.errors import BuildError, InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.progress import Silent, Task
from nbl_export.stages import build as stage
from nbl_export.workspace import Workspace
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
            expected["shared_data"] = sha256(built_out / "baseline" / "model.onnx.data")
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
        f"{name}{kind}"
        for name in ("baseline", "model")
        for kind in (".engine", ".json", ".trtexec.sh", "_rows.py")
    }


# all or nothing ----------------------------------------------------------------------------------


def second_fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    """Let the build of the linearized engine raise when half of it is written; returns the graphs that were begun."""
    real, begun = module.build_in_child, []

    def building(library: Library, path: Path, *rest: Any) -> Built:
        begun.append(path.parent.name)
        built = real(library, path, *rest)
        if len(begun) == 2:
            engine = rest[3]
            engine.write_bytes(engine.read_bytes()[: built.size // 2])
            raise error
        return built

    monkeypatch.setattr(module, "build_in_child", building)
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


def test_engines_of_linear_mlps(
    rtx: Library, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    before = engines(tmp_path / "out")
    monkeypatch.setattr(stage, "mlp_weights", lambda *_: {Mlp(2): ("lm_head.weight",)})
    with pytest.raises(BuildError, match=r"1 of 1 weights of the MLP of layer 2 are in both"):
        api.build(tmp_path / "out", replace(OTHER, max_seq=16))
    assert engines(tmp_path / "out") == before


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


@pytest.mark.parametrize("limit", [1 << 12, 1 << 22])
def test_a_full_disk_leaves_the_earlier_pair_as_it_was(built_copy: Path, limit: int) -> None:
    """No room for a copy of the graph, or for an engine: both or none, as engines of two settings are no pair."""
    before = engines(built_copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the child's too
    try:
        with pytest.raises(InputError, match=r"^No room on the disk in stage `build`.*are kept\.$"):
            api.build(built_copy, OTHER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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


def test_a_pair_that_does_not_belong_together_is_not_written(
    built_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, first = module.build_in_child, []

    def same_twice(*arguments: Any) -> Built:
        first.extend([] if first else [real(*arguments)])
        return first[0]

    before = engines(built_copy)
    monkeypatch.setattr(module, "build_in_child", same_twice)
    with pytest.raises(BuildError, match="do not belong together"):
        api.build(built_copy, OTHER)
    assert engines(built_copy) == before


def test_an_engine_may_be_larger_than_the_one_of_the_base(built_copy: Path) -> None:
    """Without layers 0 and 3, and for these shapes, the library makes 250 KB more code than it saves in weights."""
    settings = api.EngineSettings("rtx", max_batch=1, max_seq=32, max_context=64, sm=("86",))
    api.select(built_copy, api.SelectSettings(layers=(0, 3)))
    api.rewrite(built_copy)
    base, linearized = api.build(built_copy, settings)
    removed = [sum(e.manifest.network.weight_bytes.values()) for e in (base, linearized)]
    assert removed[0] > removed[1]
    if base.manifest.library_version == "1.7.1.116":
        assert base.manifest.size < linearized.manifest.size


class Timed:
    """A build on a GPU, which adds its own to the timings that it finds."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.found: list[bytes] = []

    def __call__(self, library: Library, graph: Path, *rest: Any) -> Built:
        timings = rest[4]
        self.found.append(timings.read_bytes() if timings.is_file() else b"")
        timings.write_bytes(self.found[-1] + b"+" + graph.parent.name.encode())
        if self.fails and len(self.found) == 2:
            raise BuildError("No.")
        return Built(NetworkFacts(1, 0, 0, (), (), {}), NetworkWeights((), (), ()), (), False, 1.0, 0)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("earlier", [b"", b"earlier"])
def test_timings_go_from_build_to_build_and_are_kept_at_the_end(
    built_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bytes, fails: bool
) -> None:
    """They are those of one GPU: nothing that a failed build left is believed."""
    timed = Timed(fails)
    monkeypatch.setattr(module, "build_in_child", timed)
    monkeypatch.setattr(module, "check_pair", lambda *_: None)
    path = tmp_path / "engine" / "timing.cache"
    if earlier:
        path.parent.mkdir()
        path.write_bytes(earlier)
    library = Library("tensorrt", "10.15", None, ahead_of_time=False, own_cuda_graphs=False)
    graphs = {BASE: built_out / "baseline" / "model.onnx", LINEARIZED: built_out / "model.onnx"}
    sources = [Source(r, g, 5, path.with_name(f"{r}.engine")) for r, g in graphs.items()]
    target = Target(library, None, Limits(1, 8, 16), ())
    plan = load_plan(Workspace.open(built_out).plan)
    if fails:
        with pytest.raises(BuildError):
            build_pair(target, sources, plan, "", {}, Silent())
        assert (path.read_bytes() if path.is_file() else b"") == earlier
        assert set(path.parent.iterdir()) <= {path}
    else:
        _, files = build_pair(target, sources, plan, "", {}, Silent())
        assert path in files and path.read_bytes().startswith(timed.found[1])
        assert not list(path.parent.glob(".*"))
    assert timed.found[0] == earlier and timed.found[1] == earlier + b"+baseline"
