"""Images of documents and of vision encoders: which files are found, every eighth held out, refusals in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.documents import documents
from nbl_export.calibrate.images import (
    document_of,
    image_files,
    images_in,
    load_images,
    read_images,
    save_images,
)
from nbl_export.calibrate.text import Document
from nbl_export.errors import InputError
from nbl_export.progress import Silent
from nbl_export.settings import CalibrateSettings
from tests.listening import Notes
from tests.pictures import save_documents

Image = pytest.importorskip("PIL.Image", reason="needs pillow: pip install 'nbl-export[vision]'")


def shade(i: int) -> tuple[int, int, int]:
    return (i, 255 - i, 7)


def write(folder: Path, count: int, size: tuple[int, int] = (4, 4), suffix: str = "png") -> list[Path]:
    """``count`` images of one colour each, by which a test knows them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", size, shade(i)).save(path)
    return paths


def processor(images: Any, return_tensors: str) -> dict[str, Any]:
    """Pixels as they are, channels first: what a test can check by hand."""
    assert return_tensors == "np"
    return {"pixel_values": np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])}


def numbers(images: Any) -> list[int]:
    """Which images these are, by the colour of every pixel."""
    for image in images:
        red = int(image[0, 0, 0])
        assert np.array_equal(image, np.broadcast_to(np.array(shade(red))[:, None, None], image.shape))
    return [int(image[0, 0, 0]) for image in images]


# documents ---------------------------------------------------------------------------------------


def test_rows_with_and_without_images(tmp_path: Path) -> None:
    files = write(tmp_path, 2)
    rows = [
        {"text": "one", "images": ["000.png", "001.png"]},
        {"text": "two", "images": []},
        {"text": "three", "images": None},
        {"text": "four", "images": ["001.png"]},
    ]
    path = save_documents(tmp_path, rows)
    first, *others = documents([str(path)], "text", document_of)
    assert first == Document("one", tuple(files), f"{path}, line 1")
    assert others == ["two", "three", Document("four", (files[1],), f"{path}, line 4")]
    assert images_in([str(path)], "text") == files


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (["missing.png"], r"line 1: the image .*missing\.png does not exist"),
        (["../secret.png"], "which is not the name of a file in"),
        (["out.png"], "which is not the name of a file in"),  # a link that leaves the folder
        ([{"url": "a.png"}], "which is not the name of a file in"),
        ("a.png", "is no list of file names"),
    ],
)
def test_what_names_no_image_of_the_folder_is_refused(images: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "corpus" / "out.png").symlink_to(tmp_path / "secret.png")
    path = save_documents(tmp_path / "corpus", [{"text": "one", "images": images}])
    with pytest.raises(InputError, match=said):
        list(documents([str(path)], "text", document_of))


# found -------------------------------------------------------------------------------------------


def test_files_folders_and_patterns_in_the_order_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = write(tmp_path / "a" / "deep", 2)
    upper = write(tmp_path / "a", 1, suffix="PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    others = write(tmp_path / "b", 3, suffix="bmp")
    assert image_files([str(tmp_path / "a")]) == sorted([*upper, *deep])
    pattern = str(tmp_path / "b" / "00[02].bmp")
    assert image_files([pattern, str(deep[1])]) == [others[0], others[2], deep[1]]
    # A file is taken whatever its suffix, also one whose name looks like a pattern.
    odd = tmp_path / "photo[1].dat"
    odd.write_bytes(deep[0].read_bytes())
    assert image_files([str(odd)]) == [odd]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image_files(["~/a/000.PNG"]) == upper


@pytest.mark.parametrize("source", ["empty", "*.nothing"])
def test_a_source_that_names_no_image(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"names no image: give files, folders or patterns of \.png, "
    ) as told:
        image_files([str(tmp_path / source)])
    assert str(tmp_path / source) in str(told.value) and "\n" not in str(told.value)


# read --------------------------------------------------------------------------------------------


def test_every_eighth_is_held_out(tmp_path: Path) -> None:
    files, listener = write(tmp_path, 40), Notes()
    found = read_images(files, processor, CalibrateSettings(samples=20, heldout_samples=3), listener)
    held = [7, 15, 23]
    assert numbers(found.heldout) == held
    assert numbers(found.calibration) == [i for i in range(40) if i % 8 != 7][:20]
    assert found.calibration.dtype == found.heldout.dtype == np.float32
    assert listener.tasks == [("Reading images", 23, "images", 0)] and sum(listener.advanced) == 23
    assert listener.notes == []


def test_what_there_is_is_used_with_a_note(tmp_path: Path) -> None:
    listener = Notes()
    settings = CalibrateSettings(samples=20, heldout_samples=4)
    found = read_images(write(tmp_path, 16), processor, settings, listener)
    assert (len(found.calibration), len(found.heldout)) == (14, 2)
    (note,) = listener.notes
    assert "14 calibration and 2 held-out images of the 20 and 4 asked for" in note


@pytest.mark.parametrize("count", [1, 7])
def test_too_few_for_one_to_be_held_out(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match=f"{count} images are too few: at least 8 are needed"):
        read_images(write(tmp_path, count), processor, CalibrateSettings(), Silent())


def test_grey_and_transparent_images_have_three_channels(tmp_path: Path) -> None:
    files = write(tmp_path, 8)
    Image.new("L", (4, 4), 9).save(files[0])
    Image.new("RGBA", (4, 4), (1, 254, 7, 40)).save(files[1])
    found = read_images(files, processor, CalibrateSettings(samples=2, heldout_samples=1), Silent())
    assert found.calibration.shape == (2, 3, 4, 4)
    assert np.unique(found.calibration[0]).tolist() == [9] and numbers(found.calibration[1:]) == [1]


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path, 8)
    Image.new("RGB", (4, 6), shade(3)).save(files[3])
    with pytest.raises(InputError, match=r"different sizes \(\(3, 4, 4\) and \(3, 6, 4\)\)"):
        read_images(files, processor, CalibrateSettings(), Silent())


@pytest.mark.parametrize("damage", [b"no image", None], ids=["text", "cut"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, damage: bytes | None) -> None:
    files = write(tmp_path, 8, size=(64, 64))
    files[2].write_bytes(files[2].read_bytes()[:60] if damage is None else damage)
    with pytest.raises(InputError, match=r"002\.png is not a readable image"):
        read_images(files, processor, CalibrateSettings(), Silent())


def test_a_processor_that_does_not_take_an_image_is_told_in_its_first_line(tmp_path: Path) -> None:
    def refuses(images: Any, return_tensors: str) -> Any:
        raise RuntimeError("too small\nand a long story")

    with pytest.raises(InputError, match=r"processor does not accept .*000\.png \(too small\): remove it\.$"):
        read_images(write(tmp_path, 8), refuses, CalibrateSettings(), Silent())


def test_images_come_back_to_the_bit(tmp_path: Path) -> None:
    found = read_images(
        write(tmp_path, 16), processor, CalibrateSettings(samples=9, heldout_samples=2), Silent()
    )
    save_images(tmp_path / "images.safetensors", found)
    again = load_images(tmp_path / "images.safetensors")
    for name in ("calibration", "heldout"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    (tmp_path / "images.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="nbl-export calibrate"):
        load_images(tmp_path / "images.safetensors")
