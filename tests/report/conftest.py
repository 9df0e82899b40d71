"""A real report, for tests that change one thing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.report.schema import Report, load_report


@pytest.fixture
def report(stories_out: Path) -> Report:
    return load_report(stories_out / "report" / "report.json")
