"""The device that PyTorch runs on: found, or refused in one sentence. Other machines are made of fake answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.errors import MissingDependencyError
from nbl_export.models.device import (
    check_device,
    described,
    exact_float32,
    find_device,
    hindrance,
)

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a machine with so many devices of each kind, of which some have no float64."""

    real = torch.ones

    def make(cuda: int = 0, xpu: int = 0, without_float64: tuple[str, ...] = ()) -> None:
        for name, count in {"cuda": cuda, "xpu": xpu}.items():
            own = SimpleNamespace(
                is_available=lambda count=count: count > 0, device_count=lambda count=count: count
            )
            monkeypatch.setattr(torch, name, own)

        def ones(*shape: int, device: torch.device, **more: Any) -> torch.Tensor:
            if device.type in without_float64:
                raise RuntimeError("no float64 here.\nand more")
            return real(*shape, **more)

        monkeypatch.setattr(torch, "ones", ones)

    return make


def test_auto_is_the_cpu_where_there_is_no_gpu(machine: Any) -> None:
    machine()
    assert find_device("auto") == find_device("cpu") == CPU


def test_auto_is_the_first_gpu_that_has_float64(machine: Any) -> None:
    machine(cuda=2, xpu=1)
    assert find_device("auto") == torch.device("cuda", 0)
    machine(xpu=1)
    assert find_device("auto") == torch.device("xpu", 0)
    machine(cuda=1, xpu=1, without_float64=("cuda",))
    assert find_device("auto") == torch.device("xpu", 0)
    machine(xpu=1, without_float64=("xpu",))
    assert find_device("auto") == CPU


def test_a_device_has_its_number(machine: Any) -> None:
    """Tensors are on cuda:0; to torch, cuda is another device."""
    machine(cuda=2)
    assert find_device("cuda") == torch.device("cuda:0") and find_device("cuda:1") == torch.device("cuda:1")


def test_each_of_several_processes_has_its_own(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(cuda=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cuda") == torch.device("cuda:0")  # torchrun did not start this one
    for name, value in {"RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert find_device("cuda") == find_device("auto") == torch.device("cuda:1")
    assert find_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert find_device("cuda") == torch.device("cuda:0")


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:9", "xpu"])
def test_a_device_that_is_not_there_is_refused(machine: Any, asked: str) -> None:
    machine()
    for find in (find_device, check_device):
        with pytest.raises(
            MissingDependencyError, match=rf"^--device {asked}: .*: say --device cpu"
        ) as raised:
            find(asked)
        assert raised.value.exit_code == 3 and str(raised.value).count(". ") == 0


def test_a_number_beyond_those_there_are_is_refused(machine: Any) -> None:
    machine(cuda=1)
    with pytest.raises(MissingDependencyError, match=r"^--device cuda:9: torch sees only cuda:0 here"):
        find_device("cuda:9")
    machine(cuda=4)
    with pytest.raises(
        MissingDependencyError, match=r"^--device cuda:4: torch sees only cuda:0 to cuda:3 here"
    ):
        find_device("cuda:4")


def test_a_device_that_cannot_sum_is_refused_with_the_reason(machine: Any) -> None:
    machine(xpu=1, without_float64=("xpu",))
    with pytest.raises(MissingDependencyError, match=r"float64 \(no float64 here\): say --device cpu"):
        find_device("xpu")


def test_a_record_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert described(CPU) == "cpu"
    own = SimpleNamespace(get_device_name=lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch, "get_device_module", lambda _device: own)
    assert described(torch.device("cuda:1")) == "cuda:1, GPU 1"


PLACES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def precisions() -> list[str]:
    return [place.fp32_precision for place in PLACES]


def by_flag(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def one_by_one(precision: str) -> None:
    for place in PLACES:
        place.fp32_precision = precision


@pytest.mark.parametrize(
    "how",
    [
        lambda: None,
        lambda: by_flag(True),
        lambda: by_flag(False),
        lambda: one_by_one("ieee"),
        lambda: one_by_one("tf32"),
    ],
)
def test_float32_is_multiplied_as_such(how: Any) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        how()
        before = precisions()
        with pytest.raises(ZeroDivisionError), exact_float32():
            assert "tf32" not in precisions() and not matmul.allow_tf32 and not cudnn.allow_tf32
            raise ZeroDivisionError
        assert precisions() == before
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = False, True  # torch's own defaults


def test_why_a_gpu_is_not_used(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA" in hindrance("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert hindrance("cuda") == "torch sees no cuda device here"
    machine(cuda=1, without_float64=("cuda",))
    assert "no float64 here" in hindrance("cuda")
