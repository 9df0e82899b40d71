"""Read images: those of a vision encoder, and those in documents of a multimodal model.

A vision encoder gets files, folders and patterns, of which every eighth image is held out from the fit. A row of a
.jsonl file for a multimodal model has the text, with the placeholder of the model's processor where an image is, and
the files, which are in the folder of the .jsonl file or below it; nothing is fetched:

    {"text": "What is this? <image>\\nA cat on a mat.", "images": ["photos/cat.jpg"]}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.batch.arrays import F32
from nbl_export.batch.names import PIXELS
from nbl_export.calibrate.documents import documents, field_of, local_files, named_files
from nbl_export.calibrate.moments import CALIBRATE_AGAIN
from nbl_export.calibrate.text import HELD_OUT_EVERY, Document
from nbl_export.errors import InputError, first_line
from nbl_export.files import member
from nbl_export.packages import missing
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings
from nbl_export.settings.choices import SELF
from nbl_export.tensorfile import load_as, save_tensors

FORMAT = "nbl-export/images/1"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def document_of(row: Any, field: str, where: str, folder: Path | None) -> str | Document:
    """The document of a row: its text alone, or with the files of its images.

    Raises :class:`InputError` for a file that is not there, or not below the ``folder`` of the one that names it.
    """
    text = field_of(row, field, where, folder)
    names = row.get("images") or []
    if folder is None or not names:
        return text
    if not isinstance(names, list):
        raise InputError(f"{where}: 'images' is no list of file names: correct the row.")
    images = tuple(member(folder, name, f"{where}: the image") for name in names)
    if gone := next((file for file in images if not file.is_file()), None):
        raise InputError(f"{where}: the image {gone} does not exist: correct the row, or put the file there.")
    return Document(text, images, where)


def images_in(sources: Iterable[str], field: str) -> list[Path]:
    """The files of images that the rows of local .jsonl files among ``sources`` name."""
    files = [file for source in sources if source != SELF for file in local_files(source) or ()]
    rows = documents([str(file) for file in files if ".jsonl" in file.suffixes], field, document_of)
    return [*dict.fromkeys(image for one in rows if isinstance(one, Document) for image in one.images)]


def open_image(file: Path) -> Any:
    """The image of ``file`` in red, green and blue, as pillow has it; raises :class:`InputError` if it is none.

    One of more pixels than pillow takes for a bomb is refused, too.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing("pillow", "Reading images") from None
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        raise InputError(f"{file} is not a readable image: remove it, or download it again.") from None


# vision encoders ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationImages:
    """``calibration`` and ``heldout``, each [images, channels, height, width] float32, as the model reads them."""

    calibration: F32
    heldout: F32


def image_files(sources: Iterable[str]) -> list[Path]:
    """The image files that ``sources`` name, in order; raises :class:`InputError` for a source without images."""
    found: list[Path] = []
    for source in sources:
        files = named_files(source, "The calibration images", lambda p: p.suffix.lower() in _SUFFIXES)
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


def _pixels(file: Path, processor: Any) -> F32:
    image = open_image(file)
    try:
        pixels = processor(images=[image], return_tensors="np")[PIXELS][0]
    except Exception as error:  # a processor's own code may raise anything
        raise InputError(
            f"The model's image processor does not accept {file} ({first_line(error)[:200]}): remove it."
        ) from None
    return np.asarray(pixels, dtype=np.float32)


def save_images(path: Path, images: CalibrationImages) -> None:
    """Write the scaled images, atomically."""
    save_tensors(path, FORMAT, {"calibration": images.calibration, "heldout": images.heldout})


def load_images(path: Path) -> CalibrationImages:
    """Read what :func:`save_images` wrote; raises :class:`InputError` for anything else."""
    return load_as(CalibrationImages, path, FORMAT, CALIBRATE_AGAIN)
