"""Documents from every kind of source, refusals in words, and limits of what is read."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate import documents as module
from nbl_export.calibrate.documents import check_readable, check_there, documents
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.packages import pip_line

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


def test_what_reads_like_a_path_is_not_taken_for_a_data_set(tmp_path: Path) -> None:
    for name in ("missing.txt", "a/b/missing", "~/missing"):
        with pytest.raises(InputError, match=r"does not exist: check the path\.$"):
            check_there(name)
    (tmp_path / "there.txt").write_text("x")
    for name in ("owner/data", "data", "*.txt", str(tmp_path / "there.txt")):
        check_there(name)


def test_the_first_document_shows_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["first"]) + b"broken")
    (tmp_path / "b.txt").write_text("x")
    check_readable([str(tmp_path), "owner/data"], "text")
    for field, words in (("words", "no text field 'words'"), ("text", "")):
        (tmp_path / "a.jsonl").write_bytes(jsonl(["first"]) if words else b"broken")
        with pytest.raises(InputError, match=words or "line 1: not JSON"):
            check_readable([str(tmp_path / "a.jsonl")], field)
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path).name != "b.txt")
    with pytest.raises(InputError, match=r"b\.txt cannot be read: give a file that you may read\.$"):
        check_readable([str(tmp_path / "*.txt")], "text")


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


@pytest.mark.parametrize("cell", [["a"], {"a": "b"}, [["a"]], {"a": ["b"]}], ids=str)
def test_a_parquet_column_of_lists_or_structs_is_no_text(tmp_path: Path, cell: Any) -> None:
    path = parquet(tmp_path / "data.parquet", text=[cell] * 3, story=["a"] * 3)
    assert f"{path}: no text field 'text' (text fields: story)" in refusal(path)
    assert read(path, field="story") == ["a"] * 3


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
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    if "." in source:
        (tmp_path / source).write_bytes(b"x")
    with pytest.raises(MissingDependencyError) as caught:
        read(source)
    assert f"needs {package}: {pip_line(extra)}." in str(caught.value)
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


# limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, name: str, packing: str) -> None:
    path = tmp_path / (name + packing)
    block = PACKERS[packing](bytes(1 << 24) if name == "a.jsonl" else b"\n" * (1 << 24))
    path.write_bytes(block * 4)  # 64 MiB of nothing; a file of several parts is one
    with pytest.raises(
        InputError, match=r"unpacks to more than 200 times its size|lines without text|not JSON"
    ):
        read(path)


def test_text_that_packs_well_is_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["the same words again " * 20] * 1000)))
    assert len(read(tmp_path)) == 1000


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a", "b" * 2000]))
    with pytest.raises(InputError, match="line 2: longer than"):
        read(tmp_path / "a.jsonl")


def test_millions_of_lines_without_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EMPTY_LINES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b"\n" * 2000)
    with pytest.raises(InputError, match="lines without text in a row"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (r'{"text": "\ud800"}', "half of a surrogate pair"),
        ('{"text": ' + "9" * 5000 + "}", "a number of too many digits"),
        ('{"text": ' + "[" * 100_000 + "}", "nested too deep"),
    ],
)
def test_json_that_python_cannot_hold(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n")
    with pytest.raises(InputError, match=reason) as caught:
        read(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("how", ["named", "in a folder", "as a word"])
def test_a_fifo_is_refused(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / ("a.jsonl" if how != "as a word" else "pipe"))
    source = {"named": tmp_path / "a.jsonl", "in a folder": tmp_path, "as a word": "pipe"}[how]
    with pytest.raises(InputError, match="is not a regular file"):
        read(source)


def test_a_file_may_be_called_as_a_user_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~m.jsonl").write_bytes(jsonl(TEXTS))
    assert read("~m.jsonl") == TEXTS


def test_a_parquet_file_of_repeated_long_texts(tmp_path: Path) -> None:
    """A few KB on disk; as rows of text it is 12 GB."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 120, pa.int32()), pa.array(["x" * 100_000_000]))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(InputError, match="a text of more than 64 MiB"):
        read(tmp_path / "a.parquet")


def test_a_parquet_file_with_many_texts_in_a_row_group(tmp_path: Path) -> None:
    """Its dictionary grows beyond the limit of one text, which no text comes near."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"{number} " + "words " * 1500 for number in range(9000)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=len(texts))
    assert read(tmp_path / "a.parquet") == texts
