"""Documents with images and sounds: what is read of them and what is refused, and rows in which none is cut."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.batch.media_ids import FIRST, are_media, words
from nbl_export.calibrate.illustrated import (
    Document,
    HasMedia,
    illustrated,
    media_files,
    pack_illustrated,
    seen_by,
    words_alone,
)
from nbl_export.calibrate.text import CalibrationText, load_text, save_text
from nbl_export.errors import InputError
from nbl_export.models.media_tokens import MediaTokens
from nbl_export.models.towers import Seen
from nbl_export.settings import CalibrateSettings
from tests.listening import Notes
from tests.pictures import picture, save_documents

SETTINGS = CalibrateSettings(samples=12, seq_len=32, heldout_samples=3, selection_samples=3)


def folder_with(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "in").mkdir()
    picture(1).save(tmp_path / "in" / "b.png")
    return save_documents(tmp_path, list(rows))


def test_rows_with_and_without_images_and_sounds(tmp_path: Path) -> None:
    path = folder_with(
        tmp_path,
        {"text": "one", "images": ["a.png", "in/b.png"]},
        {"text": "two", "images": []},
        {"text": "three", "images": None},
        {"text": "four"},
        {"text": "five", "images": ["a.png"], "audio": ["c.wav"]},
        {"text": "six", "audio": ["c.wav"]},
    )
    (tmp_path / "c.wav").write_bytes(b"")
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, packed):
        first, *others = illustrated([str(source)], "text")
        files, sound = (tmp_path / "a.png", tmp_path / "in" / "b.png"), tmp_path / "c.wav"
        assert first == Document("one", files, (), f"{source}, line 1")
        assert others[:3] == ["two", "three", "four"]
        assert others[3:] == [
            Document("five", files[:1], (sound,), f"{source}, line 5"),
            Document("six", (), (sound,), f"{source}, line 6"),
        ]
        assert media_files([str(source)]) == [*files, sound]
        with pytest.raises(HasMedia):
            list(words_alone(illustrated([str(source)], "text")))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (["missing.png"], r"line 1: the image .*missing\.png does not exist"),
        (["../secret.png"], "which is not the name of a file in"),
        (["/etc/passwd"], "which is not the name of a file in"),
        (["out.png"], "which is not the name of a file in"),  # a link that leaves the folder
        (["https://example.org/a.png"], "does not exist"),
        ([{"url": "a.png"}], "which is not the name of a file in"),
        ("a.png", "is no list of up to 64 file names"),
        (["a.png"] * 65, "is no list of up to 64 file names"),
        (["in"], "does not exist"),
    ],
)
def test_what_names_no_image_of_the_folder_is_refused(images: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    picture(2).save(tmp_path / "secret.png")
    path = folder_with(tmp_path / "corpus", {"text": "one", "images": images})
    (tmp_path / "corpus" / "out.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=said):
        list(illustrated([str(path)], "text"))
    assert all(file.is_relative_to(tmp_path / "corpus") for file in media_files([str(path)]))


def test_a_file_that_is_no_image_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = folder_with(tmp_path, {"text": "one", "images": ["a.png"]})
    (tmp_path / "a.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(InputError, match=r"a\.png is not a readable image"):
        pack_illustrated(illustrated([str(path)], "text"), seen_by(Heard()), tokenizer, SETTINGS, Notes())


class Heard:
    """Takes what towers do, and gives it back."""

    def sampling_rate(self, _where: str) -> int:
        return 16_000

    def read(self, *given: Any) -> Any:
        return given


def test_towers_are_given_what_the_files_hold(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="needs soundfile: pip install 'nbl-export[audio]'")
    picture(0, (3, 5)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "b.wav", np.zeros((800, 2), np.float32), 8_000)
    files = (tmp_path / "a.png",), (tmp_path / "b.wav",)
    text, images, sounds, where = seen_by(Heard())(Document("one", *files, "here"))  # type: ignore[arg-type, misc]
    assert (text, where) == ("one", "here")
    assert [image.size for image in images] == [(5, 3)] and [sound.shape for sound in sounds] == [(1600,)]


class See:
    """Makes ``size`` tokens of each image, after a letter of its text each; what is known of them is their number."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0

    def __call__(self, document: Document) -> Seen:
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
        return Seen(np.array(ids, dtype=np.int32), known)


def packed(
    tmp_path: Path, tokenizer: Any, size: int = 5, count: int = 80
) -> tuple[CalibrationText, list[str]]:
    rows = [
        {"text": f"{chr(97 + i % 26) * (6 + i % 17)}", "images": ["a.png"] * (i % 4)} for i in range(count)
    ]
    listener = Notes()
    found = illustrated([str(folder_with(tmp_path, *rows))], "text")
    return pack_illustrated(found, See(size), tokenizer, SETTINGS, listener), listener.notes


def test_no_image_is_cut_and_its_tokens_are_of_no_document(tmp_path: Path, tokenizer: Any) -> None:
    text, notes = packed(tmp_path, tokenizer)
    assert text.media is not None
    splits = {"calibration": text.calibration, "selection": text.selection, "held-out": text.heldout}
    assert [len(rows) for rows in splits.values()] == [12, 3, 3]
    for rows in splits.values():
        there = are_media(rows)
        assert there.any() and (~there).any()
        for row in rows:
            block, counts = np.unique(text.media.block[row[are_media(row)] - FIRST], return_counts=True)
            assert (counts == 5).all(), block
        for kind in ("selection", "heldout"):
            assert ((getattr(text, f"{kind}_document") == -1) == are_media(getattr(text, kind))).all()
    owners = [set(np.unique(o[o >= 0]) % 8) for o in (text.selection_document, text.heldout_document)]
    assert owners == [{3}, {7}]
    (said,) = [note for note in notes if note.startswith("Images and sounds: ")]
    for name, rows in splits.items():
        tokens = int(are_media(rows).sum())
        assert f"{name} {tokens // 5} ({tokens} of {rows.size} tokens)" in said
    assert words(text.calibration).max() < 260


def test_they_are_kept_and_read_again(tmp_path: Path, tokenizer: Any) -> None:
    text, _ = packed(tmp_path, tokenizer)
    save_text(tmp_path / "text.safetensors", text)
    again = load_text(tmp_path / "text.safetensors")
    assert text.media is not None and again.media is not None
    for name in MediaTokens.__annotations__:
        np.testing.assert_array_equal(getattr(again.media, name), getattr(text.media, name))
    few = MediaTokens(**{k: v if k == "both_ways" else v[:2] for k, v in vars(text.media).items()})
    save_text(tmp_path / "text.safetensors", CalibrationText(**{**vars(text), "media": few}))
    with pytest.raises(InputError, match="a token of no image or sound"):
        load_text(tmp_path / "text.safetensors")
    (tmp_path / "media.safetensors").unlink()
    with pytest.raises(InputError, match=r"media\.safetensors cannot be read"):
        load_text(tmp_path / "text.safetensors")


def test_an_image_longer_than_a_row_and_too_few_documents_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(
        InputError, match=r"line 2: its first image or sound ends beyond 32 tokens: raise --seq-len"
    ):
        packed(tmp_path, tokenizer, size=40)
    (tmp_path / "less").mkdir()
    with pytest.raises(InputError, match=r"gives less than one .* row of 32 tokens: give more documents"):
        packed(tmp_path / "less", tokenizer, count=6)


def test_text_without_images_is_packed_as_before(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in ("a b", "", "c")))
    assert list(words_alone(illustrated([str(path)], "text"))) == ["a b", "", "c"]
