"""What documents are read of files, folders, patterns and data sets, and what is refused in words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from nbl_export.calibrate.documents import check_readable, check_there, documents, local_files
from nbl_export.errors import InputError

ROWS = [
    {"text": "one", "n": 1},
    {"text": "zwei ä\u2028", "n": "x"},
    {"text": None},
    {"text": "", "more": ["a"]},
]
TEXTS = ["one", "zwei ä\u2028", "", ""]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"


def read(*sources: Path | str, field: str = "text") -> list[Any]:
    return list(documents(map(str, sources), field))


def test_jsonl_plain_and_packed(tmp_path: Path) -> None:
    zstd = pytest.importorskip("backports.zstd")
    content = b"\xef\xbb\xbf" + LINES.encode()
    for name, data in (
        ("a.jsonl", content),
        ("a.jsonl.gz", gzip.compress(content)),
        ("a.JSONL.zst", zstd.compress(content)),
    ):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == TEXTS, name


def test_parquet(tmp_path: Path) -> None:
    found = [{"text": f"document {i}", "other": i} for i in range(50)]
    datasets.Dataset.from_list(found).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [row["text"] for row in found]
    with pytest.raises(InputError, match=r"no text field 'body' \(text fields: text\); name it with"):
        read(tmp_path / "a.parquet", field="body")


def test_a_text_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a text\r\n" for i in range(2000)) + "x" * 20_000
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = read(tmp_path / "a.txt")
    assert "".join(found) == text and len(found) > 4
    assert all(8192 <= len(one) < 2 * 8192 for one in found[:-1])
    assert all(one.endswith("\n") for one in found[:3])


def test_folders_patterns_and_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "deep/c.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}' if name.endswith("jsonl") else name)
    assert read(tmp_path) == ["a", "b.txt", "deep/c.txt"]
    assert read(tmp_path / "*.txt", tmp_path / "a.jsonl") == ["b.txt", "a"]
    odd = tmp_path / "d[1].txt"
    odd.write_text("odd")
    assert read(odd) == ["odd"]
    assert local_files("wikitext:wikitext-2-raw-v1") is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\nno JSON', r"a\.jsonl, line 2: not JSON \(Expecting value\)"),
        ("a.jsonl", b'{"text": "\\ud800"}', "half of a surrogate pair"),
        ("a.jsonl", b'{"body": "a", "n": 1}', r"line 1: no text field 'text' \(text fields: body\)"),
        ("a.jsonl", b'{"text": 3}', "no text field 'text'"),
        ("a.jsonl", b"[1]", "no text field 'text'"),
        ("a.txt", b"a\0b", "is not text: it has NUL bytes"),
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-20], "cannot be read"),
        ("a.txt.zst", b"nothing packed", "cannot be read"),
        ("a.parquet", b"nothing", "cannot be read"),
        ("a.csv", b"a,b", r"is not a calibration text: give a \.txt, \.jsonl"),
        ("a.parquet.gz", b"", "is not a calibration text"),
    ],
)
def test_what_cannot_be_read_is_refused_before_any_work(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        check_readable([str(tmp_path / name)], "text")
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{}/gone.txt", "does not exist: check the path"),
        ("{}/*.nothing", "has no calibration text"),
        ("{}", "has no calibration text: no .txt"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(source.format(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        check_there("corpus.jsonl")


def test_a_data_set_of_the_hub_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def loaded(path: str, **how: Any) -> Any:
        asked.append((path, how["name"], how["split"], how["streaming"]))
        if path == "gone":
            raise FileNotFoundError("no such data set")
        if path == "several" and how["name"] is None:
            configs = "Please pick one among the available configs: ['one', 'two']"
            raise ValueError(f"Config name is missing.\n{configs}\nExample of usage:\n\t`…`")
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    config = "wikitext-2-raw-v1"
    assert read("org/name", f"wikitext:{config}", f"wikitext:{config}:test") == 3 * ["a", "b"]
    assert asked == [
        ("org/name", None, "train", True),
        ("wikitext", config, "train", True),
        ("wikitext", config, "test", True),
    ]
    with pytest.raises(InputError, match=r"gone is neither .* NAME:CONFIG:SPLIT\) .*\(no such data set\)"):
        read("gone")
    with pytest.raises(
        InputError, match=r"several has several conf.* \(one, two\): name one .* as several:one\."
    ):
        read("several")
    with pytest.raises(InputError, match="data set org/name: no text field 'body'"):
        read("org/name", field="body")
