"""An output folder to talk with: stories260K with a chat template, and two tokens that end an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

# The start token, and an end after each answer: what was said before stays as it was read.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'system' %}{{ '\\n' }}"
    "{% elif m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
START, END, OTHER_END = 1, 2, 511


@pytest.fixture(scope="session")
def talking_out(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported and rewritten; copy it before changing it."""
    from nbl_export import api

    place = tmp_path_factory.mktemp("talking")
    model = Path(shutil.copytree(stories_folder, place / "model"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, OTHER_END]}))
    out = place / "out"
    text = api.CalibrateSettings((str(stories_text),), samples=8, seq_len=64, heldout_samples=4)
    api.calibrate(model, out, text)
    api.select(out, api.SelectSettings(layers=(1, 3)))
    api.export(out)
    api.rewrite(out)
    shutil.rmtree(model)  # the folder is enough
    return out


@pytest.fixture
def talking_copy(talking_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(talking_out, tmp_path / "out", copy_function=shutil.copy2))
