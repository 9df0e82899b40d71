"""Models and plans in OpenVINO against PyTorch, with their caches, and folders that are wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nbl_export.blocks import Mlp
from nbl_export.convert.openvino import write_openvino
from nbl_export.errors import BuildError
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.progress import Silent
from nbl_export.runtime.openvino import FILE, OpenVinoStream
from nbl_export.stages.forms import OpenVino
from tests.convert.test_mlx import NoTokenizer
from tests.converting import needs, stream_parity
from tests.exhaustive import exhaustive
from tests.families import DECODERS, Calibrated, build, calibrated
from tests.fixtures_graph import ragged_rows

pytestmark = needs(OpenVino)
# What keeps states of another kind; tests/convert/test_openvino.py sees it refused.
USUAL = ("gemma2", "gpt_oss", "falcon-alibi")
HYBRIDS = {"lfm2", "bamba", "nemotron_h", "falcon_h1", "qwen3_next", "minimax"}


def opened(folder: Path, case: Calibrated, plan: Plan) -> OpenVinoStream:
    write_openvino(folder, case.model, plan, NoTokenizer(), "float32", Silent())
    return OpenVinoStream(folder)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return calibrated(build("llama", tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize(
    "name",
    [n if n in USUAL else pytest.param(n, marks=exhaustive) for n in sorted(set(DECODERS) - HYBRIDS)],
)
def test_every_kind_of_attention(name: str, tmp_path: Path) -> None:
    case = calibrated(build(name, tmp_path / "model"))
    plan = case.plan((1, Mlp(0)))
    stream = opened(tmp_path / "form", case, plan)
    found = stream_parity(stream, case.model, plan)
    assert found.failures() == [] and all(step.kv_max_rel > 0 for step in found.steps)
    assert stream.cached == len(stream.kv_layers) and 1 not in stream.kv_layers


def test_a_wrong_folder_is_seen(case: Calibrated, tmp_path: Path) -> None:
    plan = case.plan((1,))
    (own,) = plan.layers.values()
    stream = opened(tmp_path / "form", case, plan)
    for wrong in (LinearLayer(own.w * np.float32(1.01), own.b), LinearLayer(own.w, np.zeros_like(own.b))):
        assert stream_parity(stream, case.model, replace(plan, layers={1: wrong})).failures() != []


def test_what_is_timed_has_the_last_logits_alone(case: Calibrated, tmp_path: Path) -> None:
    stream = opened(tmp_path, case, case.plan((1,)))
    rows = ragged_rows([9, 9], case.model.config.vocab_size)
    expected = stream.prefill_last(rows), stream.decode([5, 6])
    timed = OpenVinoStream(tmp_path, defaults=True)
    for found, own in zip((timed.prefill_last(rows), timed.decode([5, 6])), expected, strict=True):
        assert found.shape == own.shape and np.abs(found - own).max() < 0.05 * np.abs(own).max()
    assert timed.prefill_last(rows).tobytes() and timed._run(timed._begin(rows)).shape[1] == 1


def test_no_folder_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"OpenVINO does not load .*: "):
        OpenVinoStream(tmp_path)
    (tmp_path / FILE).write_text("<net>")
    with pytest.raises(BuildError, match=r"OpenVINO does not load .*: "):
        OpenVinoStream(tmp_path)


TWO = """
import os, signal, sys
from pathlib import Path
from nbl_export.runtime.openvino import OpenVinoStream

signal.signal(signal.SIGINT, signal.default_int_handler)
a, b = (OpenVinoStream(Path(sys.argv[1])) for _ in range(2))
del a, b
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("no interrupt")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_after_two_of_them_is_one(case: Calibrated, tmp_path: Path) -> None:
    """OpenVINO would leave a stack of signal handlers that is freed, and Ctrl-C be a segmentation fault."""
    opened(tmp_path, case, case.plan((1,)))
    done = subprocess.run([sys.executable, "-c", TWO, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done
