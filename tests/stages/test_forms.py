"""Every form has a place of its own, an engine whose package is known, and says what it needs to be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import MissingDependencyError
from nbl_export.packages import part
from nbl_export.settings.graphs import PRECISIONS
from nbl_export.stages.forms import FORMS, Form
from nbl_export.stages.run import Run

CASES = [(to, precision) for to, precisions in PRECISIONS.items() for precision in precisions]


def form_of(to: str, precision: str, out: Path) -> Form:
    return FORMS[to](Run.resume(out), precision)


def test_no_two_are_in_one_place(stories_out: Path) -> None:
    places = [form_of(*case, stories_out).place for case in CASES]
    assert len(set(places)) == len(CASES) and all(stories_out in place.parents for place in places)


@pytest.mark.parametrize("to", FORMS)
def test_an_engine_that_is_not_here(to: str, stories_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of(to, PRECISIONS[to][-1], stories_out)
    assert part(form.package).use

    def away() -> Any:
        raise MissingDependencyError("away")

    monkeypatch.setattr(FORMS[to], "require", staticmethod(away))
    assert not form.is_here() and not FORMS[to].is_here()
    if form.written_without:
        form.check_engine()
    else:
        with pytest.raises(MissingDependencyError, match=f"{form.needing} needs {form.package}: pip install"):
            form.check_engine()
