"""Sounds: one channel at the rate that is asked for; what is none is refused in a sentence."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.sounds import open_sound
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.packages import pip_line

soundfile = pytest.importorskip("soundfile", reason="needs soundfile: pip install 'nbl-export[audio]'")


def tone(rate: int, frequency: float = 200.0, seconds: float = 0.5) -> Any:
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_two_channels_become_one(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([tone(16_000), np.zeros(8_000)], 1), 16_000)
    found = open_sound(path, 16_000)
    assert found.shape == (8_000,) and found.dtype == np.float32
    np.testing.assert_allclose(found[500:-500], tone(16_000)[500:-500] / 2, atol=0.02)


@pytest.mark.parametrize("own", [8_000, 22_050, 44_100])
def test_it_is_resampled(own: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(own), own, subtype="FLOAT")
    found = open_sound(tmp_path / "a.wav", 16_000)
    assert abs(len(found) - 8_000) <= 1
    np.testing.assert_allclose(found[500:7_400], tone(16_000)[500:7_400], atol=0.01)


def test_what_is_no_sound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, empty, nan, long = (tmp_path / f"{name}.wav" for name in ("text", "empty", "nan", "long"))
    text.write_text("no sound")
    soundfile.write(empty, np.zeros(0), 16_000)
    soundfile.write(nan, np.full(9, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(long, np.zeros(3_601 * 2, np.float32), 2)
    for path, said in (
        (text, "text.wav is not a readable sound"),
        (tmp_path / "missing.wav", "missing.wav is not a readable sound"),
        (empty, "empty.wav has no samples"),
        (nan, "NaN or infinite"),
        (long, "is a sound of more than 3,600 seconds: cut it"),
    ):
        with pytest.raises(InputError, match=said):
            open_sound(path, 16_000)
    monkeypatch.setitem(sys.modules, "soundfile", None)  # as if it was not installed
    with pytest.raises(MissingDependencyError, match=re.escape(pip_line("audio"))):
        open_sound(text, 16_000)
