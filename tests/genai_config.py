"""The configuration of onnxruntime-genai in a folder, changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbl_export.export.sidecars import GENAI


def change(folder: Path, how: Callable[[Any], object]) -> None:
    config = json.loads((folder / GENAI).read_text())
    how(config)
    (folder / GENAI).write_text(json.dumps(config))
