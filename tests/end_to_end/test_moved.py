"""An output folder that is moved or deleted while a stage works in it is not made anew, and nothing passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import NblError
from nbl_export.progress import Task
from tests.listening import Notes

STAGES: dict[str, Callable[[Path, Path, Any, Any], Any]] = {
    "calibrate": lambda out, model, text, to: api.calibrate(model, out, text, to),
    "select": lambda out, _m, _t, to: api.select(out, api.SelectSettings(k=1, criterion="kl"), to),
    "export in halves": lambda out, _m, _t, to: api.export(out, api.ExportSettings(precision="fp16"), to),
    "eval": lambda out, _m, _t, to: api.evaluate(out, api.EvalSettings(retrieval_samples=1), to),
}


class Taking(Notes):
    """Takes the folder away when the first task begins."""

    def __init__(self, take: Callable[[], object]) -> None:
        super().__init__()
        self.take: Callable[[], object] | None = take

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        if self.take and not title.startswith("Loading"):
            self.take()
            self.take = None
        with super().task(title, total, unit, done) as task:
            yield task


@pytest.mark.parametrize(
    ("stage", "how"),
    [("calibrate", "moved"), ("select", "deleted"), ("export in halves", "moved"), ("eval", "deleted")],
)
def test_a_folder_that_went_away_is_not_made_anew(
    stories_copy: Path, stories_folder: Path, calibration: api.CalibrateSettings, stage: str, how: str
) -> None:
    moved = stories_copy.with_name("moved")
    take = Taking(lambda: shutil.rmtree(stories_copy) if how == "deleted" else stories_copy.rename(moved))
    calibration = api.CalibrateSettings(calibration.sources, samples=16, seq_len=128, heldout_samples=8)
    with pytest.raises(NblError) as caught:
        STAGES[stage](stories_copy, stories_folder, calibration, take)
    assert take.take is None and "\n" not in str(caught.value)
    assert str(stories_copy) in str(caught.value)
    assert not stories_copy.exists()
    if how == "moved":
        assert api.report(moved).passed
