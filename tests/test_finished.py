"""The verbs on what a run has finished are those of the API, and refuse a folder that no run has made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export import api, finished
from nbl_export.errors import InputError

VERBS: dict[str, Callable[[Path], object]] = {
    "generate": lambda out: api.generate(out, "Once"),
    "chat": lambda out: api.chat(out).__enter__(),
    "package": lambda out: api.package(out, out.with_name("package")),
    "verify_package": lambda out: api.verify_package(out, out),
    "report": api.report,
    "inspect": api.inspect,
    "diff": lambda out: api.diff(out, out),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_folder_that_no_run_has_made_is_refused_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    assert getattr(api, name) is getattr(finished, name) and name in api.__all__
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError) as caught:
        VERBS[name](out)
    assert str(out) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(out.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["out"]
