"""A configuration or a header that claims more than the files hold is refused before anything is built of it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.models.limits import check_folder, check_gguf, weights_of
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from tests.models.spoiled import edit_config, one_sentence


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(find_model(str(folder)))
    return one_sentence(caught)


def test_what_the_weight_files_hold(folder: Path) -> None:
    from safetensors.numpy import load_file

    arrays = load_file(folder / "model.safetensors").values()
    held = weights_of(folder)
    assert (held.tensors, held.bytes) == (len(arrays), sum(a.nbytes for a in arrays))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000, its weight files have"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size 1,000,000,000,000, more than"),
        ({"hidden_size": -1}, "hidden_size -1, which is negative"),
        ({"hidden_size": "64"}, "hidden_size '64', which is no whole number"),
        ({"intermediate_size": 100_000}, "by its config.json it has"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"num_attention_heads": 10**9}, "num_attention_heads"),
    ],
)
def test_a_configuration_beyond_its_weights(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(folder, **changes)
    assert named in refusal(folder)


def test_masks_that_take_all_memory(folder: Path) -> None:
    """GPT-2 keeps a mask of positions by positions."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        num_layers=1, hidden_size=8, num_heads=2, vocab_size=16, attention_types=[[["global"], 1]]
    )
    shutil.rmtree(folder)
    config.max_position_embeddings = 16
    GPTNeoForCausalLM(config).save_pretrained(folder)
    edit_config(folder, max_position_embeddings=200_000)
    assert "masks and tables take" in refusal(folder) or "by its config.json it has" in refusal(folder)


NUMBER = "9" * 5000


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("text", [f'{{"a": {NUMBER}}}', '{"a": "\\ud800"}', "[" * 100_000, "5"])
def test_json_that_is_none(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert name in refusal(folder)


def test_what_training_left_behind_may_have_any_size(folder: Path) -> None:
    """A record of every step, and a log."""
    for name in ("trainer_state.json", "train_log.txt"):
        with (folder / name).open("wb") as file:
            file.truncate(1 << 27)
    check_folder("it", folder, json.loads((folder / "config.json").read_text()))
    with (folder / "vocab.txt").open("wb") as file:
        file.truncate(1 << 27)
    assert "vocab.txt is larger than 64 MiB" in refusal(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "vocab.txt", "model-2.safetensors", "a.py"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling"])
def test_what_is_no_file(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    makers: dict[str, Callable[[], Any]] = {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "dangling": lambda: path.symlink_to("nowhere"),
    }
    makers[kind]()
    assert f"{name} is not a regular file" in refusal(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "", "a\0b", 5, None, ["x"]])
def test_an_index_that_leaves_the_folder(folder: Path, name: Any) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder.parent / "other").mkdir()
    shutil.copy(folder / "model.safetensors", folder.parent / "other")
    assert "which is not the name of a file in" in refusal(folder) or "is missing" in refusal(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:7],
        lambda raw: struct.pack("<Q", 2**63) + raw[8:],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:8] + b"[" * struct.unpack("<Q", raw[:8])[0] + raw[8:],
        lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1).replace(
            b'"F32"', b'{"a":', 1
        ),
    ],
)
def test_a_damaged_header(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    assert "model.safetensors" in refusal(folder)


# GGUF --------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)


def gguf(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts) + bytes(200)


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * depth


BROKEN = {
    "no header": (b"GGUF\3", "damaged"),
    "another version": (gguf(version=99), "version 99"),
    "tensors": (gguf(tensors=2**60), "the number of tensors is 1,152,921,504,606,846,976"),
    "keys": (gguf(keys=2**60), "the number of keys"),
    "a name": (gguf(struct.pack("<Q", 2**62), keys=1), "the length of a name"),
    "a text": (gguf(key("a", 8, struct.pack("<Q", 2**62)), keys=1), "the length of a text"),
    "a list": (gguf(key("a", 9, struct.pack("<IQ", 4, 2**61)), keys=1), "the length of a list"),
    "lists in lists": (gguf(key("a", 9, nested(50)), keys=1), "unknown type"),
    "a type": (gguf(key("a", 77, b""), keys=1), "unknown type 77"),
    "layers": (
        gguf(key("x.block_count", 4, struct.pack("<I", 10**9)), keys=1),
        "block_count is 1,000,000,000",
    ),
    "a width": (gguf(key("x.embedding_length", 4, struct.pack("<I", 10**9)), keys=1), "embedding_length"),
    "dimensions": (gguf(text("t") + struct.pack("<I", 10**6), tensors=1), "1,000,000 dimensions"),
    "a shape": (gguf(tensor("t", [2**40]), tensors=1), "beyond the end"),
    "an offset": (gguf(tensor("t", [4], 2**40), tensors=1), "beyond the end"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_gguf_file_beyond_its_size(tmp_path: Path, name: str) -> None:
    content, named = BROKEN[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        find_model(str(path))
    assert named in one_sentence(caught)


def test_a_gguf_file_of_every_kind_of_value(tmp_path: Path) -> None:
    strings = struct.pack("<IQ", 8, 2) + text("a") + text("bc")
    numbers = struct.pack("<IQ", 5, 3) + struct.pack("<3i", 1, 2, 3)
    parts = [
        key("s", 8, text("x")),
        key("strings", 9, strings),
        key("numbers", 9, numbers),
        key("f", 12, struct.pack("<d", 1.0)),
        key("x.block_count", 4, struct.pack("<I", 1)),
        tensor("t", [4, 4]),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(*parts, tensors=1, keys=5))
    assert check_gguf(path) == {"x.block_count": 1}
    assert find_model(str(path)).kind == "gguf"
