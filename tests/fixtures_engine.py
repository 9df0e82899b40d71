"""TensorRT for RTX, which builds without a GPU, and a finished run with engines, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.engine.library import Library, import_library
from nbl_export.engine.manifest import Manifest, manifest_path
from nbl_export.engine.manifest import save_manifest as save_at


@pytest.fixture(scope="session")
def rtx() -> Library:
    """The real library, which builds ahead of time without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'nbl-export[rtx]'")
    return import_library("tensorrt-rtx")


@pytest.fixture(scope="session")
def built_out(rtx: Library, stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run in float16 with a static cache, and its engines; copy it before changing it."""
    out = tmp_path_factory.mktemp("built") / "out"
    shutil.copytree(stories_out, out, copy_function=shutil.copy2)
    api.export(out, api.ExportSettings("fp16", "static"))
    api.rewrite(out)
    api.build(out, api.EngineSettings("rtx", max_batch=2, max_seq=64, max_context=256, sm=("89", "86")))
    return out


@pytest.fixture
def built_copy(built_out: Path, tmp_path: Path) -> Path:
    """A copy of the run with engines, to be changed or damaged."""
    return Path(shutil.copytree(built_out, tmp_path / "out", copy_function=shutil.copy2))


@pytest.fixture(scope="session")
def static_out(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, exported and rewritten again with a static cache; read only."""
    out = tmp_path_factory.mktemp("static") / "out"
    shutil.copytree(stories_out, out, copy_function=shutil.copy2)
    api.export(out, api.ExportSettings("fp32", "static"))
    api.rewrite(out)
    return out


def save_manifest(engine: Path, manifest: Manifest) -> Path:
    """Write the manifest of an existing ``engine``."""
    save_at(manifest_path(engine), manifest)
    return manifest_path(engine)
