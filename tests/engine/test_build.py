"""Engines in a child process: the same settings for both, all or nothing on disk, and the same for other tools."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.engine import build as module
from nbl_export.engine.build import Source, Target, build_in_child, timing_cache
from nbl_export.engine.elsewhere import fixed_path
from nbl_export.engine.library import Library
from nbl_export.engine.manifest import Limits, Manifest, load_manifest
from nbl_export.errors import BuildError, InputError
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import trace
from nbl_export.files import sha256_of_file
from nbl_export.graph.io import save_graph
from nbl_export.graph.precision import precision_of, to_precision
from tests.finished import Graphs
from tests.fixtures_graph import load
from tests.tiny import build as tiny_model

LIMITS = Limits(2, 32, 64)
OTHER = api.EngineSettings("rtx", max_batch=1, max_seq=8, max_context=32, sm=("86",))


def build(
    library: Library, path: Path, attention: int, folder: Path, limits: Limits = LIMITS
) -> tuple[Manifest, list[int]]:
    """The engine of one graph, and its progress."""
    advanced: list[int] = []
    target, engine = Target(library, None, limits, ("SM86",)), folder / "model.engine"
    source = Source("base", path, attention, engine)
    return build_in_child(target, source, folder / "timing.cache", advanced.append), advanced


@pytest.mark.parametrize(
    ("precision", "form", "layers"),
    [("fp32", "static", (0, 3)), ("bf16", "concat", (0, 3)), ("fp16", "static", range(5))],
)
def test_every_precision_and_cache_is_built(
    rtx: Library,
    engine_graphs: Graphs,
    tmp_path: Path,
    precision: str,
    form: str,
    layers: Sequence[int],
) -> None:
    path, attention = engine_graphs(form, precision, layers), 5 - len(layers)
    before = {p.name for p in path.parent.iterdir()}
    built, advanced = build(rtx, path, attention, tmp_path)
    expected = "decomposed" if attention else "none"
    assert built.attention == expected  # heads of size 8 have no fused kernel, and float32 has none at all
    assert built.network.attention == attention and [p.name for p in built.profiles] == ["prefill", "decode"]
    assert built.size == (tmp_path / "model.engine").stat().st_size > 100_000
    assert sum(advanced) == 1000 and min(advanced) >= 0 and len(advanced) > 5
    assert {p.name for p in path.parent.iterdir()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "model.engine"]


def test_attention_is_fused_where_there_is_a_kernel(rtx: Library, tmp_path: Path) -> None:
    """In half precision and of 4 heads of size 64."""
    changes = {"num_hidden_layers": 1, "head_dim": 64, "num_key_value_heads": 1}
    model, path = load(tiny_model(tmp_path / "model", **changes)), tmp_path / "model.onnx"
    graph = trace(model, FORMS["static"])
    to_precision(graph, precision_of("fp16"), {})
    save_graph(graph, path)
    assert build(rtx, path, 1, tmp_path)[0].attention == "fused"


def test_what_is_not_built_is_told_with_its_reason(
    rtx: Library, engine_graphs: Graphs, tmp_path: Path
) -> None:
    static = engine_graphs("static", "fp16", (0, 3))
    with pytest.raises(BuildError, match=r"^The TensorRT network has 6 KV inputs, expected 4\.$"):
        build(rtx, static, 2, tmp_path)
    with pytest.raises(BuildError, match=r"refuses the decode profile.*past_key_values"):
        build(rtx, engine_graphs("concat", "fp16", (0, 3)), 3, tmp_path, Limits(1, 1, 1))
    with pytest.raises(BuildError, match=rf"does not build {static}.*less than or equal to `cache`"):
        build(rtx, static, 3, tmp_path, Limits(1, 32, 16))  # a prompt beyond the cache
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"model\.onnx"):
        build(rtx, tmp_path / "model.onnx", 2, tmp_path)


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
            "engine": sha256_of_file(engine),
            "onnx": sha256_of_file(folder / "model.onnx"),
            "onnx_data": sha256_of_file(folder / "model.onnx.data"),
        }
        if name == "model":
            expected["plan"] = sha256_of_file(built_out / "nbl" / "plan.json")
            expected["shared_data"] = sha256_of_file(built_out / "baseline" / "model.onnx.data")
        assert manifest.hashes == expected
        kept = [i for i in range(5) if name == "baseline" or i not in chosen]
        assert manifest.kv_layers == tuple(kept)
        assert manifest.linear_layers == tuple(chosen if name == "model" else ())
        assert manifest.network.attention == len(kept)
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

    def building(target: Target, source: Source, *rest: Any) -> Manifest:
        begun.append(source.role)
        built, engine = real(target, source, *rest), source.engine
        if len(begun) == 2:
            engine.write_bytes(engine.read_bytes()[: built.size // 2])
            raise error
        return built

    monkeypatch.setattr(module, "build_in_child", building)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        api.build(built_copy, OTHER)
    assert begun == ["base", "linearized"] and engines(built_copy) == before


# for other tools ----------------------------------------------------------------------------------


GRAPHS = {"model": "model.onnx", "baseline": "baseline/model.onnx"}


@pytest.mark.parametrize("name", GRAPHS)
def test_trtexec_is_told_both_profiles(built_out: Path, tmp_path: Path, name: str) -> None:
    fake = tmp_path / "trtexec"
    fake.write_text('#!/bin/sh\npwd\nfor one in "$@"; do echo "$one"; done\n')
    fake.chmod(0o755)
    script = built_out / "engine" / f"{name}.trtexec.sh"
    paths = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", script, "--verbose"], capture_output=True, text=True, env=paths, check=True)
    where, *told = done.stdout.splitlines()
    onnx = next(one.removeprefix("--onnx=") for one in told if one.startswith("--onnx="))
    assert (Path(where) / onnx).resolve() == fixed_path(built_out / GRAPHS[name]).resolve()
    assert told[1] == "--stronglyTyped" and told[-1] == "--verbose"
    for number, profile in enumerate(load_manifest(built_out / "engine" / f"{name}.engine").profiles):
        begun = told.index(f"--profile={number}") + 1
        for place, which in enumerate(("min", "opt", "max")):
            option, _, shapes = told[begun + place].partition("=")
            assert option == f"--{which}Shapes"
            assert set(shapes.split(",")) == {
                f"{n}:{'x'.join(map(str, s[place]))}" for n, s in profile.shapes.items()
            }


def test_rows_are_a_prefill_and_a_step_after_it(built_out: Path) -> None:
    loaded: Any = runpy.run_path(str(built_out / "engine" / "model_rows.py"))
    prefill, step = loaded["load_data"]()
    assert prefill["input_ids"].shape == (1, 64) and step["input_ids"].shape == (1, 1)
    assert np.array_equal(prefill["position_ids"][0], np.arange(64)) and step["position_ids"] == [[128]]
    assert prefill["write_indices"] == [0] and step["write_indices"] == [128]
    assert {a.dtype.name for n, a in prefill.items() if "past" in n} == {"float16"}


def test_polygraphy_runs_the_graph_with_those_rows(built_copy: Path) -> None:
    """It imports the rows as a module, which Python compiles beside them."""
    tool = shutil.which("polygraphy", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("needs polygraphy")
    rows = str(built_copy / "engine" / "model_rows.py")
    command = [tool, "run", str(built_copy / "model.fixed.onnx"), "--onnxrt", "--data-loader-script", rows]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
