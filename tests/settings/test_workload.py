"""Workloads in words, and what is none."""

from __future__ import annotations

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.models.tasks import task_named
from nbl_export.settings.workload import Workload, workload_of


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prefill=512", Workload(prefill=512)),
        ("decode=128@4096", Workload(decode=128, context=4096)),
        ("prefill=512,decode=128@4096,batch=4", Workload(512, 128, 4096, 4)),
        ("prefill=512, decode=128", Workload(512, 128, 512)),
        ("batch=2,weight=0.25,prefill=8", Workload(8, batch=2, weight=0.25)),
    ],
)
def test_a_workload_is_what_it_says(text: str, found: Workload) -> None:
    assert workload_of(text) == found
    settings = api.SelectSettings(k=1, workload=(text, "prefill=1"))
    settings.check()
    assert settings.workloads == (found, Workload(prefill=1))


def test_its_longest_row_ends_with_what_is_decoded() -> None:
    assert workload_of("prefill=512,decode=128").longest == 640
    assert workload_of("prefill=9000,decode=128@4096").longest == 9000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "512",
        "prefill",
        "prefill=",
        "prefill=0",
        "prefill=-5",
        "prefill=1e3",
        "prefill=512,prefill=8",
        "prefill=512@8",
        "decode=128",
        "decode=128@0",
        "decode=@512",
        "batch=4",
        "prefill=8,batch=0",
        "prefill=8,weight=0",
        "prefill=8,weight=inf",
        "prefill=8,rows=2",
        "prefill=8;batch=2",
        f"prefill={'9' * 10}",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        workload_of(text)
    with pytest.raises(
        InputError, match=r"^--workload is .*; give a prefill, .*, or both, as prefill=512,decode="
    ):
        api.SelectSettings(k=1, workload=(text,)).check()


def test_layers_are_named_or_chosen_for_a_workload() -> None:
    with pytest.raises(InputError, match=r"--layers names the layers, and --workload chooses them"):
        api.SelectSettings(layers=(1,), workload=("prefill=8",)).check()


def test_an_encoder_has_none() -> None:
    encoder = task_named("feature-extraction")
    with pytest.raises(InputError, match=r"--workload is measured by what a decoder predicts"):
        api.SelectSettings(k=1, workload=("prefill=8",)).resolve(encoder)
