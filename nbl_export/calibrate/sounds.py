"""Sounds for calibration: files as a model's processor takes them, one channel at its sampling rate."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from nbl_export.batch.arrays import F32
from nbl_export.errors import InputError
from nbl_export.files import open_data
from nbl_export.packages import missing

# Longer than what models hear at once; decoded, an hour of stereo sound takes gigabytes.
_MOST_SECONDS = 3600


def open_sound(file: Path, rate: int) -> F32:
    """The sound of ``file`` as [samples] float32 at ``rate`` samples per second, the mean of its channels.

    Raises :class:`InputError` for what libsndfile does not read (WAV, FLAC, Ogg and MP3 it does), for an empty sound,
    for one of more than an hour, and for samples that are NaN or infinite.
    """
    try:
        import soundfile
    except ImportError:
        raise missing("soundfile", "Reading sounds") from None
    try:
        with open_data(file) as data, soundfile.SoundFile(data) as opened:
            own, frames = int(opened.samplerate), int(opened.frames)
            if frames > _MOST_SECONDS * own:
                raise InputError(f"{file} is a sound of more than {_MOST_SECONDS:,} seconds: cut it.")
            samples = opened.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, ValueError):
        raise InputError(f"{file} is not a readable sound: remove it, or download it again.") from None
    if not samples.size or not np.isfinite(samples).all():
        raise InputError(f"{file} has no samples, or some that are NaN or infinite: remove it.")
    return _resampled(samples.mean(axis=1), own, rate)


def _resampled(samples: F32, own: int, rate: int) -> F32:
    if own == rate:
        return samples
    from scipy.signal import resample_poly

    shared = math.gcd(own, rate)
    found: F32 = resample_poly(samples, rate // shared, own // shared).astype(np.float32)
    return found
