"""Ranges are read from where they are written, and what is outside of one is found."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from nbl_export.doctor.ranges import Clash, clashes, own_ranges, within
from nbl_export.parts import ALWAYS
from tests.conftest import ROOT
from tests.test_installed import clone, site

METADATA = """Metadata-Version: 2.4
Name: nbl-export
Version: 0.1.0
Requires-Python: >=3.10
Requires-Dist: torch>=2.9
Requires-Dist: tomli>=2.0; python_version < "3"
Provides-Extra: cpu
Requires-Dist: onnxruntime>=1.23; extra == "cpu"
Provides-Extra: text
Requires-Dist: backports-zstd>=1.0; (python_version < "3") and extra == "text"
Requires-Dist: pyarrow>=15; extra == "text"
"""


def test_this_clone_is_read() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = own_ranges()
    assert f'requires-python = "{found.python}"' in text
    torch = found.takes("torch")
    assert torch is not None and f'"torch{torch.specifier}"' in text
    assert found.takes("ONNX_IR", ALWAYS) is not None
    assert found.takes("onnxruntime", "gpu") is None and found.takes("onnxruntime", "cpu") is not None
    assert (found.takes("tomli") is not None) is (sys.version_info < (3, 11))


def test_what_pip_recorded_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = site(tmp_path, monkeypatch)
    (tmp_path / "nbl_export-0.1.0.dist-info" / "METADATA").write_text(METADATA)
    found = own_ranges(package)
    assert found.python == ">=3.10"
    assert {extra: [r.name for r in each] for extra, each in found.of.items()} == {
        ALWAYS: ["torch"],
        "cpu": ["onnxruntime"],
        "text": ["pyarrow"],
    }


def test_without_a_record_nothing_is_judged(tmp_path: Path) -> None:
    (tmp_path / "nbl_export").mkdir()
    found = own_ranges(tmp_path / "nbl_export")
    assert found.python == "" and found.takes("torch") is None


def test_a_clone_without_requirements(tmp_path: Path) -> None:
    assert own_ranges(clone(tmp_path / "own") / "nbl_export").takes("torch") is None


@pytest.mark.parametrize(
    ("number", "specifier", "inside"),
    [
        ("2.9.0", ">=2.9", True),
        ("2.13.0+cpu", ">=2.9", True),
        ("2.8.1", ">=2.9", False),
        ("12.0", ">=10.15,<12", False),
        ("3.0rc1", ">=2.9", True),
        ("2.9.0a0", ">=2.9", False),
        ("built by hand", ">=2.9", True),
        ("1.0", "", True),
    ],
)
def test_a_version_is_in_a_range(number: str, specifier: str, inside: bool) -> None:
    assert within(number, specifier) is inside


def test_what_a_package_asks_of_another_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "optimum_onnx-0.1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: optimum-onnx", "Version: 0.1.0"]
    needs = ["transformers<4.58,>=4.36", "numpy>=1.0", "nobody-has-this>=3", 'rich<1; extra == "x"', "torch"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(clashes(["optimum-onnx", "nobody-has-this"]))
    if version("transformers").startswith("4."):
        assert found == []
        return
    (clash,) = found
    assert clash == Clash("optimum-onnx", "0.1.0", "transformers", "<4.58,>=4.36", version("transformers"))
