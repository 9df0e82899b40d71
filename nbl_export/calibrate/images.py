"""Images for calibration and held-out evaluation: files, folders and glob patterns, scaled by the model's processor.

Every eighth image is held out from the fit.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.batch.arrays import F32
from nbl_export.batch.names import PIXELS
from nbl_export.calibrate.moments import CALIBRATE_AGAIN
from nbl_export.calibrate.text import HELD_OUT_EVERY
from nbl_export.errors import InputError
from nbl_export.files import open_data, user_path
from nbl_export.packages import missing
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings
from nbl_export.tensorfile import load_as, save_tensors

FORMAT = "nbl-export/images/1"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class CalibrationImages:
    """``calibration`` and ``heldout``, each [images, channels, height, width] float32, as the model reads them."""

    calibration: F32
    heldout: F32


def image_files(sources: Iterable[str]) -> list[Path]:
    """The image files that ``sources`` name, in order; raises :class:`InputError` for a source without images."""
    found: list[Path] = []
    for source in sources:
        path = user_path(source, "The calibration images")
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in _SUFFIXES)
        elif any(c in source for c in "*?[") and not path.is_file():
            # Path.glob takes no absolute patterns.
            files = sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())  # noqa: PTH207
        else:
            files = [path] if path.is_file() else []
        if not files:
            raise InputError(
                f"{source} names no image: give files, folders or patterns of {', '.join(_SUFFIXES)}."
            )
        found += files
    return found


def read_images(
    files: Sequence[Path], processor: Any, settings: CalibrateSettings, listener: Listener
) -> CalibrationImages:
    """Read and scale images until both splits are full.

    Raises :class:`InputError` for a file that is not an image, for images that have different sizes after the
    processor, and if a split is empty.
    """
    splits: dict[bool, list[F32]] = {False: [], True: []}
    want = {False: settings.samples, True: settings.heldout_samples}
    with listener.task("Reading images", min(len(files), sum(want.values())), "images") as task:
        for number, file in enumerate(files):
            held = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            if len(splits[held]) < want[held]:
                splits[held].append(_pixels(file, processor))
                task.advance(1)
            if all(len(splits[k]) >= want[k] for k in want):
                break
    if not all(splits.values()):
        raise InputError(
            f"{len(files)} images are too few: at least {HELD_OUT_EVERY} are needed, of which one is held out."
        )
    if any(len(splits[k]) < want[k] for k in want):
        listener.note(
            f"There are {len(splits[False])} calibration and {len(splits[True])} held-out images of the "
            f"{want[False]} and {want[True]} asked for; all are used."
        )
    shapes = {image.shape for split in splits.values() for image in split}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise InputError(
            f"The model's image processor gives images of different sizes ({one} and {other}), and a graph takes one "
            "size: give images of one shape."
        )
    return CalibrationImages(np.stack(splits[False]), np.stack(splits[True]))


def open_image(file: Path) -> Any:
    """The image of ``file`` in red, green and blue, as pillow has it; raises :class:`InputError` if it is none.

    One of more pixels than pillow takes for a bomb is refused, too.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise missing("pillow", "Reading images") from None
    try:
        with open_data(file) as data, Image.open(data) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        raise InputError(f"{file} is not a readable image: remove it, or download it again.") from None


def _pixels(file: Path, processor: Any) -> F32:
    image = open_image(file)
    try:
        pixels = processor(images=[image], return_tensors="np")[PIXELS][0]
    except Exception as error:  # a processor's own code may raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"The model's image processor does not accept {file} ({first[:200]}): remove it."
        ) from None
    return np.asarray(pixels, dtype=np.float32)


def save_images(path: Path, images: CalibrationImages) -> None:
    """Write the scaled images, atomically."""
    save_tensors(path, FORMAT, {"calibration": images.calibration, "heldout": images.heldout})


def load_images(path: Path) -> CalibrationImages:
    """Read what :func:`save_images` wrote; raises :class:`InputError` for anything else."""
    images = load_as(CalibrationImages, path, FORMAT, CALIBRATE_AGAIN)
    both = (images.calibration, images.heldout)
    if any(a.ndim != 4 or a.dtype != np.float32 or not a.size or not np.isfinite(a).all() for a in both):
        raise InputError(f"{path} is damaged (its arrays are not images): {CALIBRATE_AGAIN}.")
    return images
