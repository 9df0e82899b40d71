"""Text packed with disjoint parts, images that are never cut, and images for encoders; refusals in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from nbl_export.batch import FIRST, are_media, words
from nbl_export.calibrate.documents import (
    document_of,
    documents,
    image_files,
    images_in,
    read_images,
)
from nbl_export.calibrate.text import (
    PADDING,
    CalibrationText,
    Document,
    check_tokens,
    frame_of,
    heldout_rows,
    load_text,
    longest_row,
    pack,
    read_passages,
    save_text,
    start_tokens,
    token_ids,
)
from nbl_export.errors import InputError
from nbl_export.models.load import load_tokenizer
from nbl_export.models.media_tokens import MediaTokens
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from nbl_export.settings import CalibrateSettings
from tests.pictures import save_documents
from tests.processes import Notes


def marked(count: int, words: int = 12) -> list[str]:
    """Documents each made of its own word only."""
    return [f"doc{i:03d} " * words for i in range(count)]


def test_packing_joins_documents_with_the_end_token(tokenizer: Any) -> None:
    texts = marked(64)
    settings = CalibrateSettings(samples=20, seq_len=32, heldout_samples=6, selection_samples=5)
    listener = Notes()
    text = pack([*texts[:3], " ", *texts[3:]], tokenizer, settings, listener)
    assert text.calibration.shape == (20, 32)
    assert text.selection.shape == text.selection_document.shape == (5, 32)
    assert text.heldout.shape == text.heldout_document.shape == (6, 32)
    assert text.calibration.dtype == text.heldout_document.dtype == np.int32 and text.media is None
    assert listener.notes == [] and listener.start[0] == sum(listener.advanced) == 31 * 32
    # A byte-level tokenizer gives one token a character; 257 is its end of text. Of every eight documents, six
    # are calibrated on, the fourth is for choosing and the eighth for judging.
    for tokens, kept in (
        (text.calibration, {0, 1, 2, 4, 5, 6}),
        (text.selection, {3}),
        (text.heldout, {7}),
    ):
        flat = [c for i, t in enumerate(texts) if i % 8 in kept for c in (*t, None)][: tokens.size]
        ids = tokens.reshape(-1).tolist()
        assert [None if i == 257 else tokenizer.decode([i]) for i in ids] == flat
    # Each token knows its document.
    for tokens, owners in ((text.selection, text.selection_document), (text.heldout, text.heldout_document)):
        for number in np.unique(owners):
            inside = tokenizer.decode([t for t in tokens[owners == number] if t != 257])
            assert set(re.findall(r"doc(\d{3})", inside)) <= {f"{number:03d}"}


def test_too_little_text(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=100, seq_len=32, heldout_samples=2, selection_samples=2)
    notes = Notes()
    text = pack(marked(16), tokenizer, settings, notes)
    assert 1 <= len(text.calibration) < 100
    have = 12 * (7 * 12 + 1)
    assert notes.notes == [
        f"The text gives {have:,} calibration tokens of the 3,200 asked for; all are used."
    ]
    with pytest.raises(InputError, match="gives 0 held-out tokens, less than one row of 32: give more text"):
        pack(marked(7), tokenizer, settings, Silent())


def test_only_as_much_of_a_long_document_is_tokenized_as_is_needed(tokenizer: Any) -> None:
    assert len(token_ids(tokenizer, "abc " * 1000, 10)) == 160

    def fails(*_args: Any, **_more: Any) -> Any:
        raise RuntimeError("odd bytes\nand more")

    with pytest.raises(
        InputError, match=r"The tokenizer fails on the text that begins with 'abc': odd bytes"
    ):
        token_ids(fails, "abc", 10)


def test_tokens_that_the_model_has_no_embedding_of(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=4, seq_len=32, heldout_samples=1, selection_samples=1)
    text = pack(marked(16), tokenizer, settings, Silent())
    assert check_tokens(text, 258, "tiny") is text
    with pytest.raises(
        InputError, match=r"tokenizer of tiny gives the token 257, the model has .* 257 tokens"
    ):
        check_tokens(text, 257, "tiny")


def test_start_tokens_are_the_tokenizers_own(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_folder)))
    bos = tokenizer.bos_token_id
    assert start_tokens(tokenizer).tolist() == ([] if bos is None else [bos])
    framed = processors.TemplateProcessing(single="X $A Y", special_tokens=[("X", 250), ("Y", 251)])
    tokenizer.backend_tokenizer.post_processor = framed
    assert start_tokens(tokenizer).tolist() == [250]
    frame = frame_of(tokenizer)
    assert (frame.start.tolist(), frame.end.tolist(), frame.size) == ([250], [251], 2)


# images ------------------------------------------------------------------------------------------

SETTINGS = CalibrateSettings(samples=12, seq_len=32, heldout_samples=3, selection_samples=3)


class See:
    """Makes ``size`` tokens of each image, after a letter of its text each; what is known of them is their number."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0

    def __call__(self, document: Document) -> tuple[Any, MediaTokens]:
        text, images, ids = document.text, document.images, list[int]()
        for letter, _ in zip(text, images, strict=False):
            ids += [ord(letter), *range(FIRST + self.count, FIRST + self.count + self.size)]
            self.count += self.size
        ids += [ord(letter) for letter in text[len(images) :]]
        made = np.arange(self.count - self.size * len(images), self.count, dtype=np.int32)
        one = np.ones_like(made)
        known = MediaTokens(
            features=np.repeat(made[:, None], 3, 1).astype(np.float32),
            later=np.zeros((len(made), 0, 3), np.float32),
            offsets=made[:, None] * 0,
            steps=one,
            block=made // self.size,
            stand_in=one * 0,
            both_ways=np.zeros(1, np.int32),
        )
        return np.array(ids, dtype=np.int32), known


def packed(tokenizer: Any, size: int = 5) -> tuple[CalibrationText, list[str]]:
    found = [
        Document(text, (Path("a.png"),) * (i % 4), f"line {i + 1}") if i % 4 else text
        for i in range(80)
        for text in [chr(97 + i % 26) * (6 + i % 17)]
    ]
    listener = Notes()
    return pack(found, tokenizer, SETTINGS, listener, See(size)), listener.notes


def test_no_image_is_cut_and_its_tokens_are_of_no_document(tmp_path: Path, tokenizer: Any) -> None:
    text, notes = packed(tokenizer)
    assert text.media is not None
    splits = {"calibration": text.calibration, "selection": text.selection, "held-out": text.heldout}
    assert [len(rows) for rows in splits.values()] == [12, 3, 3]
    for rows in splits.values():
        for row in rows:
            _, counts = np.unique(text.media.block[row[are_media(row)] - FIRST], return_counts=True)
            assert (counts == 5).all()
    for kind in ("selection", "heldout"):
        assert ((getattr(text, f"{kind}_document") == -1) == are_media(getattr(text, kind))).all()
    owners = [set(np.unique(o[o >= 0]) % 8) for o in (text.selection_document, text.heldout_document)]
    assert owners == [{3}, {7}]
    (said,) = [note for note in notes if note.startswith("Images are ")]
    for name, rows in splits.items():
        tokens = int(are_media(rows).sum())
        assert tokens and f"{tokens} of {rows.size} {name} tokens" in said
    assert words(text.calibration).max() < 260
    save_text(tmp_path / "text.safetensors", text)
    again = load_text(tmp_path / "text.safetensors")
    assert again.media is not None and np.array_equal(again.media.features, text.media.features)
    names = CalibrationText.__annotations__.keys() - {"media"}
    assert all(np.array_equal(getattr(again, n), getattr(text, n)) for n in names)


def test_an_image_longer_than_a_row_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"line 2: its first image ends beyond 32 tokens: raise --seq-len"):
        packed(tokenizer, size=40)


# encoders ----------------------------------------------------------------------------------------


def test_passages_are_framed(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_folder)))
    special = [("X", 250), ("Y", 251)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="X $A Y", special_tokens=special
    )
    settings = CalibrateSettings(samples=10, seq_len=32, heldout_samples=2)
    text = read_passages(["ab", *marked(40, 2), "x"], tokenizer, settings, 20, Silent())
    assert text.calibration.shape == (10, 20) and text.selection.shape == (0, 20)
    assert (text.calibration[:, 0] == 250).all() and (text.calibration[:, -1] == 251).all()
    rows = heldout_rows(text, ["token_type_ids"])
    assert len(rows) == 2 and all(row["input_ids"][0, [0, -1]].tolist() == [250, 251] for row in rows)
    assert all((row["token_type_ids"] == 0).all() for row in rows)
    assert ((text.heldout_document == PADDING) == (text.heldout == frame_of(tokenizer).pad)).all()
    # The eighth document, counted from the first.
    assert tokenizer.decode(rows[0]["input_ids"][0, 1:-1]) == "doc006 doc006 "
    with pytest.raises(InputError, match="less than one row of 20 and one document: give more text"):
        read_passages(marked(3), tokenizer, settings, 20, Silent())
    with pytest.raises(InputError, match=r"--seq-len 2 leaves no room for text next to 2 special tokens"):
        read_passages(marked(3), tokenizer, settings, 2, Silent())


def test_rows_are_no_longer_than_the_model_takes(tokenizer: Any) -> None:
    notes = Notes()
    assert longest_row(CalibrateSettings(seq_len=64), tokenizer, 16, notes) == 16
    assert notes.notes == ["Rows have 16 tokens instead of 64: the model takes no more."]
    assert longest_row(CalibrateSettings(seq_len=64), tokenizer, None, notes) == 64


# images alone -------------------------------------------------------------------------------------


def save_image(path: Path, mode: str, size: tuple[int, int], colour: Any) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow: pip install 'nbl-export[vision]'")
    image.new(mode, size, colour).save(path)


def shade(i: int) -> tuple[int, int, int]:
    return (i, 255 - i, 7)


def write(folder: Path, count: int, size: tuple[int, int] = (4, 4), suffix: str = "png") -> list[Path]:
    """``count`` images of one colour each, by which a test knows them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        save_image(path, "RGB", size, shade(i))
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


def test_too_few_for_one_to_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="7 images are too few: at least 8 are needed"):
        read_images(write(tmp_path, 7), processor, CalibrateSettings(), Silent())


def test_grey_and_transparent_images_have_three_channels(tmp_path: Path) -> None:
    files = write(tmp_path, 8)
    save_image(files[0], "L", (4, 4), 9)
    save_image(files[1], "RGBA", (4, 4), (1, 254, 7, 40))
    found = read_images(files, processor, CalibrateSettings(samples=2, heldout_samples=1), Silent())
    assert found.calibration.shape == (2, 3, 4, 4)
    assert np.unique(found.calibration[0]).tolist() == [9] and numbers(found.calibration[1:]) == [1]


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path, 8)
    save_image(files[3], "RGB", (4, 6), shade(3))
    with pytest.raises(InputError, match=r"different sizes \(\(3, 4, 4\) and \(3, 6, 4\)\)"):
        read_images(files, processor, CalibrateSettings(), Silent())


@pytest.mark.parametrize("damage", [b"no image", None], ids=["text", "cut"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, damage: bytes | None) -> None:
    files = write(tmp_path, 8, size=(64, 64))
    files[2].write_bytes(files[2].read_bytes()[:60] if damage is None else damage)
    with pytest.raises(InputError, match=r"002\.png is not a readable image"):
        read_images(files, processor, CalibrateSettings(), Silent())
