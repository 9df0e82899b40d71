"""Documents from every kind of source, packing with a disjoint held-out part, and refusals in words."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from nbl_export.calibrate.text import (
    CalibrationText,
    documents,
    load_text,
    pack,
    save_text,
    start_tokens,
)
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from nbl_export.settings import CalibrateSettings
from nbl_export.tensorfile import save_tensors
from tests.listening import Notes

TEXTS = ["Once upon a time.", "Zwölf Boxkämpfer jagen Viktor", "狐 jumps\nover two lines", "the end"]


def zstd(data: bytes) -> bytes:
    """``data`` as the zstd command line writes it, with a checksum."""
    for name in ("compression.zstd", "backports.zstd"):
        with suppress(ImportError):
            module = importlib.import_module(name)
            options = {module.CompressionParameter.checksum_flag: 1}
            return bytes(module.compress(data, options=options))
    pytest.skip("needs Python 3.14 or backports.zstd")


def unchanged(data: bytes) -> bytes:
    return data


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": unchanged, ".gz": gzip.compress, ".zst": zstd}


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()


def read(*sources: Path | str, field: str = "text") -> list[str]:
    return list(documents([str(s) for s in sources], field))


def refusal(*sources: Path | str, field: str = "text") -> str:
    """The message with which ``sources`` are refused: one line, one sentence."""
    with pytest.raises(InputError) as caught:
        read(*sources, field=field)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# sources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKERS)
def test_a_jsonl_file_is_one_document_a_line(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"data.jsonl{packing}"
    path.write_bytes(PACKERS[packing](jsonl(TEXTS) + b"\n  \n"))
    assert read(path) == TEXTS


@pytest.mark.parametrize("packing", PACKERS)
def test_a_text_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path, packing: str) -> None:
    lines = [f"line {i}: {'wörter ' * (i % 9)}\n" for i in range(2000)]
    path = tmp_path / f"data.txt{packing}"
    path.write_bytes(PACKERS[packing]("".join(lines).encode()))
    parts = read(path)
    assert "".join(parts) == "".join(lines)
    assert len(parts) > 4
    assert all(part.endswith("\n") for part in parts)
    longest = max(map(len, lines))
    assert all(8192 <= len(part) < 8192 + longest for part in parts[:-1])


def test_text_keeps_its_line_ends_and_a_last_line_without_one(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"one\r\ntwo\rthree\nfour")
    assert read(tmp_path / "data.txt") == ["one\r\ntwo\rthree\nfour"]


@pytest.mark.parametrize("suffix", [".TXT", ".txt.GZ"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(b"hello\n") if suffix.endswith("GZ") else b"hello\n")
    assert read(path) == ["hello\n"]


def parquet(path: Path, **columns: list[Any]) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_parquet_file_is_one_document_a_row(tmp_path: Path) -> None:
    texts = [f"{t} {i}" for i in range(100) for t in TEXTS]  # more rows than are read at once
    path = parquet(tmp_path / "data.parquet", id=list(range(400)), text=texts)
    assert read(path) == texts


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(jsonl(TEXTS, "story"))
    assert read(tmp_path / "data.jsonl", field="story") == TEXTS
    path = parquet(tmp_path / "data.parquet", text=["wrong"] * 4, story=TEXTS)
    assert read(path, field="story") == TEXTS


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(["second", "third"])))
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.txt").write_text("fourth")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["first", "second", "third", "fourth"]


def test_a_pattern_takes_what_it_matches(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "a*.txt") == ["a1.txt", "a2.txt"]
    assert read(tmp_path / "?1.txt") == ["a1.txt", "b1.txt"]
    assert "No file matches" in refusal(tmp_path / "c*.txt")


def test_sources_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "z.txt").write_text("first")
    (tmp_path / "a.txt").write_text("second")
    assert read(tmp_path / "z.txt", tmp_path / "a.txt") == ["first", "second"]


def test_documents_are_read_only_as_far_as_they_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["first", "second"]) + b"broken")
    stream = documents([str(tmp_path / "a.jsonl"), str(tmp_path / "missing.txt")], "text")
    assert [next(stream), next(stream)] == ["first", "second"]
    with pytest.raises(InputError, match="line 3"):
        next(stream)


# refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.txt", "a/b/missing", "./missing", "/missing", "~/missing"])
def test_a_path_that_is_not_there(name: str) -> None:
    assert refusal(name) == f"The calibration text {name} does not exist: check the path."


def test_a_file_of_another_kind_lists_the_kinds_there_are(tmp_path: Path) -> None:
    for name in ("picture.png", "text", "data.json", "data.txt.bz2"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n")
        message = refusal(tmp_path / name)
        assert name in message
        assert ".txt, .jsonl (.gz and .zst too) or .parquet" in message


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert ".txt, .jsonl (.gz and .zst too) or .parquet" in message


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_bytes_that_are_no_utf8(tmp_path: Path, name: str) -> None:
    for content in (b"\xff\xfe\x00 abc", b"abc\n" * 9000 + b"\x80", "größe".encode("latin-1")):
        (tmp_path / name).write_bytes(content if name.endswith("txt") else b'{"text":"' + content + b'"}')
        message = refusal(tmp_path / name)
        assert str(tmp_path / name) in message
        assert "UTF-8" in message or "not JSON" in message


def test_binary_bytes_that_happen_to_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"\x7fELF\x02\x01\x01\x00\x00\x00\n" * 10)
    assert (
        refusal(tmp_path / "data.txt")
        == f"{tmp_path / 'data.txt'} is not text: it has NUL bytes; give another file."
    )


def test_a_bad_json_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(jsonl(["a", "b"]) + b"\n" + b'{"text": "cut off\n')
    message = refusal(tmp_path / "data.jsonl")
    assert f"{tmp_path / 'data.jsonl'}, line 4: not JSON" in message
    assert "one object per line" in message


def test_a_missing_field_lists_the_fields_there_are(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text":"a"}\n{"content":"a","title":"b","id":3}\n')
    message = refusal(tmp_path / "data.jsonl")
    assert f"{tmp_path / 'data.jsonl'}, line 2: no text field 'text'" in message
    assert "(text fields: content, title)" in message
    assert "--text-field" in message


@pytest.mark.parametrize("row", ["[1, 2]", "3", '{"text": 3}', "null"])
def test_a_row_without_text(tmp_path: Path, row: str) -> None:
    (tmp_path / "data.jsonl").write_text(row + "\n")
    assert "line 1: no text field 'text' (text fields: none)" in refusal(tmp_path / "data.jsonl")


def test_an_empty_cell_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert [t for t in documents([str(tmp_path / "data.jsonl")], "text") if t] == ["one", "two"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert list(documents([str(tmp_path / "data.jsonl")], "text")) == ["one"]


def test_a_txt_without_line_ends_is_cut_too(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("x" * 30_000)
    pieces = list(documents([str(tmp_path / "data.txt")], "text"))
    assert len(pieces) >= 3
    assert "".join(pieces) == "x" * 30_000


def test_a_missing_parquet_field_lists_the_fields_there_are(tmp_path: Path) -> None:
    path = parquet(tmp_path / "data.parquet", content=["a"], id=[3])
    message = refusal(path)
    assert f"{path}: no text field 'text'" in message
    assert "content" in message
    assert "--text-field" in message
    assert "no text field 'id'" in refusal(path, field="id")


def damaged_middle(data: bytes) -> bytes:
    half = len(data) // 2
    return data[: half - 20] + b"\xff" * 40 + data[half + 20 :]


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def foreign(data: bytes) -> bytes:
    return b"this is plain text, not what the suffix says\n" * 20


@pytest.mark.parametrize("damage", [cut, foreign, damaged_middle])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_broken_archive(tmp_path: Path, kind: str, packing: str, damage: Callable[[bytes], bytes]) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(400)]
    data = jsonl(texts) if kind == ".jsonl" else "\n".join(texts).encode()
    path = tmp_path / f"data{kind}{packing}"
    path.write_bytes(damage(PACKERS[packing](data)))
    message = refusal(path)
    assert str(path) in message
    if damage is not damaged_middle:  # there, garbage may come out before the checksum is reached
        assert "unpacked" in message
        assert "download it again" in message


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_an_archive_of_several_parts_is_read_to_its_end(tmp_path: Path, packing: str) -> None:
    # What parallel compressors and `cat a.gz b.gz` write.
    path = tmp_path / f"data.jsonl{packing}"
    texts = [text * 10_000 for text in TEXTS]
    path.write_bytes(b"".join(PACKERS[packing](jsonl([text])) for text in texts))
    assert read(path) == texts


@pytest.mark.parametrize("damage", [cut, foreign, damaged_middle, lambda data: b""])
def test_a_broken_parquet_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    rng = np.random.default_rng(0)
    path = parquet(
        tmp_path / "data.parquet", text=["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(400)]
    )
    raw = path.read_bytes()
    # The pages begin after the magic; damage there is found only while reading.
    path.write_bytes(raw[:4] + b"\xff" * 200 + raw[204:] if damage is damaged_middle else damage(raw))
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("modules", "source", "package", "extra"),
    [
        (("compression.zstd", "backports.zstd"), "data.txt.zst", "backports.zstd", "text"),
        (("pyarrow",), "data.parquet", "pyarrow", "text"),
        (("datasets",), "someone/stories", "datasets", "hub"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modules: tuple[str, ...],
    source: str,
    package: str,
    extra: str,
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    if "." in source:
        (tmp_path / source).write_bytes(b"x")
    with pytest.raises(MissingDependencyError) as caught:
        read(source)
    assert f"needs {package}: pip install 'nbl-export[{extra}]'." in str(caught.value)
    assert caught.value.exit_code == 3


# the hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Let the Hub answer with rows or an exception; the value collects what it was asked for."""
    datasets = pytest.importorskip("datasets")

    def answer(result: Any) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []

        def load_dataset(name: str, **options: Any) -> Any:
            asked.append((name, options))
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


def test_a_hub_data_set_is_streamed(hub: Callable[[Any], list[Any]]) -> None:
    asked = hub([{"text": t, "id": i} for i, t in enumerate(TEXTS)])
    assert read("someone/stories") == TEXTS
    assert asked == [("someone/stories", {"split": "train", "streaming": True})]


def test_a_hub_data_set_without_the_field(hub: Callable[[Any], list[Any]]) -> None:
    hub([{"story": "a", "id": 1}])
    message = refusal("someone/stories")
    assert "data set someone/stories: no text field 'text' (text fields: story)" in message


@pytest.mark.parametrize(
    "error", [ConnectionError("no network"), ValueError("no\nsuch"), FileNotFoundError()]
)
def test_a_hub_data_set_that_is_not_given(hub: Callable[[Any], list[Any]], error: Exception) -> None:
    hub(error)
    for name in ("someone/stories", "stories"):
        message = refusal(name)
        assert f"The calibration text {name} is neither a local file or folder nor a data set" in message
        assert type(error).__name__ in message
        assert "spelling and the network" in message


def test_a_connection_that_breaks_while_streaming(hub: Callable[[Any], list[Any]]) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise ConnectionError

    hub(rows())
    assert "ConnectionError" in refusal("someone/stories")


# packing -----------------------------------------------------------------------------------------


def marked(count: int, words: int = 12) -> list[str]:
    """Documents each made of its own word only."""
    return [f"doc{i:03d} " * words for i in range(count)]


def words(tokenizer: Any, tokens: np.ndarray) -> set[str]:
    """The whole marker words in ``tokens``."""
    return set(re.findall(r"doc\d{3}", tokenizer.decode(tokens.reshape(-1).tolist())))


def test_packing_joins_documents_with_the_end_token(tokenizer: Any) -> None:
    texts = marked(64)
    settings = CalibrateSettings(samples=20, seq_len=32, heldout_samples=6, selection_samples=5)
    listener = Notes()
    text = pack(texts, tokenizer, settings, listener)
    assert text.calibration.shape == (20, 32)
    assert text.selection.shape == text.selection_document.shape == (5, 32)
    assert text.heldout.shape == text.heldout_document.shape == (6, 32)
    assert all(getattr(text, name).dtype == np.int32 for name in CalibrationText.__annotations__)
    assert listener.notes == []
    assert listener.start[0] == sum(listener.advanced) == 31 * 32
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


def test_a_document_is_in_one_part_only(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=30, seq_len=32, heldout_samples=8, selection_samples=8)
    text = pack(marked(64), tokenizer, settings, Silent())
    parts = [words(tokenizer, t) for t in (text.calibration, text.selection, text.heldout)]
    seen, chosen_by, held = parts
    assert len(seen) > 8 and len(chosen_by) > 2 and len(held) > 2
    assert sum(map(len, parts)) == len(seen | chosen_by | held)
    assert {int(w[3:]) % 8 for w in chosen_by} == {3}
    assert {int(w[3:]) % 8 for w in held} == {7}


@pytest.mark.parametrize("part", ["selection", "heldout"])
def test_every_token_that_is_judged_knows_its_document(tokenizer: Any, part: str) -> None:
    settings = CalibrateSettings(samples=4, seq_len=32, heldout_samples=12, selection_samples=12)
    text = pack(marked(64), tokenizer, settings, Silent())
    owners, tokens = (getattr(text, name).reshape(-1) for name in (f"{part}_document", part))
    assert np.all(np.diff(owners) >= 0)
    assert len(set(owners.tolist())) > 3
    for owner in set(owners.tolist()):
        piece = tokens[owners == owner].tolist()
        assert tokenizer.decode(piece).removesuffix("</s>") == (f"doc{owner:03d} " * 12)[: len(piece)]


def test_blank_documents_count_for_nothing(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=4, seq_len=32, heldout_samples=4)
    with_blanks = [t for text in marked(40) for t in ("", text, " \n\t")]
    one, other = (pack(t, tokenizer, settings, Silent()) for t in (marked(40), with_blanks))
    for name in CalibrationText.__annotations__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_packing_stops_reading_when_it_is_full(tokenizer: Any) -> None:
    def stream() -> Iterator[str]:
        yield from marked(40)
        pytest.fail("read on although all parts were full")

    pack(
        stream(),
        tokenizer,
        CalibrateSettings(samples=4, seq_len=32, heldout_samples=4, selection_samples=4),
        Silent(),
    )


def test_a_short_text_is_used_as_far_as_it_goes_with_a_note(tokenizer: Any) -> None:
    # 12 documents of 84 characters and an end token for calibration, 2 for choosing, 2 held out.
    listener = Notes()
    settings = CalibrateSettings(samples=100, seq_len=32, heldout_samples=100, selection_samples=100)
    text = pack(marked(16), tokenizer, settings, listener)
    assert text.calibration.shape == (12 * 85 // 32, 32)
    assert text.selection.shape == text.heldout.shape == (2 * 85 // 32, 32)
    assert listener.notes == [
        "The text gives 1,020 calibration tokens of the 3,200 asked for; all are used.",
        "The text gives 170 selection tokens of the 3,200 asked for; all are used.",
        "The text gives 170 held-out tokens of the 3,200 asked for; all are used.",
    ]


@pytest.mark.parametrize(
    ("count", "part"),
    [(0, "0 calibration"), (3, "0 selection"), (4, "85 selection"), (12, "85 held-out")],
)
def test_too_little_text_is_refused(tokenizer: Any, count: int, part: str) -> None:
    settings = CalibrateSettings(samples=1, seq_len=128, heldout_samples=1, selection_samples=1)
    with pytest.raises(InputError) as caught:
        pack(marked(count), tokenizer, settings, Silent())
    message = str(caught.value)
    assert f"gives {part} tokens, less than one row of 128" in message
    assert "give more text" in message
    assert "--seq-len" in message


def test_an_empty_file_is_too_little_text(tmp_path: Path, tokenizer: Any) -> None:
    for name, content in (("a.txt", b""), ("b.jsonl", b"\n"), ("c.txt.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="gives 0 calibration tokens"):
            pack(documents([str(tmp_path / name)], "text"), tokenizer, CalibrateSettings(), Silent())


def test_packing_is_deterministic(tokenizer: Any) -> None:
    settings = CalibrateSettings(samples=5, seq_len=16, heldout_samples=2)
    one, other = (pack(marked(30), tokenizer, settings, Silent()) for _ in range(2))
    for name in CalibrationText.__annotations__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"samples": 0}, "--samples is 0; it must be at least 1"),
        ({"seq_len": 7}, "--seq-len is 7; it must be at least 8"),
        ({"selection_samples": 0}, "--selection-samples is 0; it must be at least 1"),
        ({"heldout_samples": -1}, "--heldout-samples is -1; it must be at least 1"),
        ({"sources": ("self", "a.txt")}, "--calibration self stands alone"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], option: str) -> None:
    CalibrateSettings().check()
    with pytest.raises(InputError, match=option):
        CalibrateSettings(**changes).check()


# start tokens ------------------------------------------------------------------------------------


def with_template(folder: Path, single: str) -> Any:
    tokenizer = load_tokenizer(find_model(str(folder)))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return tokenizer


def test_start_tokens_fall_back_on_the_beginning_of_text(tokenizer: Any) -> None:
    start = start_tokens(tokenizer)
    assert start.dtype == np.int32
    assert start.tolist() == [256]


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("<s> $A", [256]),
        ("</s> <s> $A", [257, 256]),
        ("$A </s>", [256]),
        ("<s> $A </s>", [256]),
    ],
)
def test_start_tokens_follow_the_tokenizers_own_rules(
    tiny_folder: Path, template: str, start: list[int]
) -> None:
    assert start_tokens(with_template(tiny_folder, template)).tolist() == start


def test_a_tokenizer_without_special_tokens_starts_with_nothing(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_folder)))
    tokenizer.bos_token = None
    start = start_tokens(tokenizer)
    assert start.dtype == np.int32
    assert start.shape == (0,)


# on disk -----------------------------------------------------------------------------------------


def test_packed_text_comes_back(tmp_path: Path, tokenizer: Any) -> None:
    text = pack(marked(30), tokenizer, CalibrateSettings(samples=5, seq_len=16, heldout_samples=2), Silent())
    path = tmp_path / "text.safetensors"
    save_text(path, text)
    loaded = load_text(path)
    for name in CalibrationText.__annotations__:
        assert getattr(loaded, name).dtype == np.int32
        np.testing.assert_array_equal(getattr(loaded, name), getattr(text, name))
    raw = path.read_bytes()
    assert b"nbl-export/text/2" in raw
    flipped = raw[:-1] + bytes([raw[-1] ^ 1])
    for content in (raw[:-1], raw[:10], b"", b"no safetensors", flipped):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"text\.safetensors .*: run `nbl-export calibrate` again\.$"):
            load_text(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_text(path)


def test_text_without_a_part_for_choosing_is_of_an_earlier_format(tmp_path: Path, tokenizer: Any) -> None:
    text = pack(marked(30), tokenizer, CalibrateSettings(samples=5, seq_len=16, heldout_samples=2), Silent())
    path = tmp_path / "text.safetensors"
    earlier = {name: getattr(text, name) for name in ("calibration", "heldout", "heldout_document", "start")}
    for written, stored in (("nbl-export/text/1", earlier), ("nbl-export/text/2", earlier)):
        save_tensors(path, written, stored)
        with pytest.raises(InputError, match=r"text\.safetensors .*: run `nbl-export calibrate` again\.$"):
            load_text(path)
