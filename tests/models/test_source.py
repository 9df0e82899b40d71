"""Which models are found, what identifies them, and one sentence for everything that is none."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from nbl_export.errors import InputError
from nbl_export.models.load import load_model, load_tokenizer
from nbl_export.models.source import find_model, same_model
from tests.models.spoiled import edit_config, flip_last_byte, one_sentence

INDEX = "model.safetensors.index.json"
EMPTY_GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)  # no tensors and no keys


def refusal(source: Path | str) -> str:
    """The sentence with which ``source`` is refused before any weights are loaded."""
    with pytest.raises(InputError) as caught:
        find_model(str(source))
    return one_sentence(caught)


# found -------------------------------------------------------------------------------------------


def test_a_folder_is_found_and_loads(tiny_folder: Path) -> None:
    found = find_model(str(tiny_folder))
    assert (found.source, found.kind, found.path) == (str(tiny_folder), "folder", str(tiny_folder.resolve()))
    assert found.gguf_file is None
    assert not found.trust_remote_code
    assert len(found.fingerprint) == 64
    model: Any = load_model(found)
    weights = load_file(tiny_folder / "model.safetensors")
    state = model.state_dict()
    assert set(weights) <= set(state)
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert not model.training
    assert load_tokenizer(found)("ab")["input_ids"]


def test_a_gguf_file_is_found_by_its_magic(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(EMPTY_GGUF)
    found = find_model(str(path))
    assert (found.kind, found.path, found.gguf_file) == ("gguf", str(tmp_path.resolve()), "some.gguf")
    in_folder = find_model(str(tmp_path))  # the only .gguf of a folder is meant by the folder
    assert (in_folder.kind, in_folder.fingerprint) == ("gguf", found.fingerprint)
    assert same_model(found.as_json()).fingerprint == found.fingerprint


# the fingerprint ---------------------------------------------------------------------------------


def test_one_byte_of_the_weights_changes_the_fingerprint(folder: Path) -> None:
    before = find_model(str(folder)).fingerprint
    flip_last_byte(folder / "model.safetensors")
    changed = find_model(str(folder)).fingerprint
    edit_config(folder, rope_theta=5.0)
    assert len({before, changed, find_model(str(folder)).fingerprint}) == 3


def test_the_same_model_is_found_again_and_a_changed_one_refused(folder: Path) -> None:
    info = json.loads(json.dumps(find_model(str(folder)).as_json()))
    assert same_model(info) == find_model(str(folder))
    flip_last_byte(folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        same_model(info)
    message = one_sentence(caught)
    assert str(folder) in message
    assert "has changed since" in message
    assert "--output" in message


# refused before loading --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["./missing", "/missing", "a/b/missing", "missing.gguf", "~/missing", "has space"]
)
def test_a_path_that_is_not_there(source: str) -> None:
    message = refusal(source)
    assert "does not exist" in message
    assert "MODEL is a folder, a .gguf file, or a Hub id" in message


def test_a_file_that_is_no_gguf(tiny_folder: Path) -> None:
    message = refusal(tiny_folder / "model.safetensors")
    assert "is not a .gguf file" in message
    assert "a folder with config.json" in message


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "it has neither config.json nor a .gguf file" in refusal(tmp_path)
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(EMPTY_GGUF)
    assert "it has 2 .gguf files, name one of them" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null"])
def test_a_broken_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    message = refusal(folder)
    assert str(folder) in message
    assert "config.json cannot be read" in message


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "has no .safetensors weights" in message
    assert "pickled weights (.bin) are not loaded" in message
    assert "save_pretrained" in message


def test_an_encoder_decoder_model(tmp_path: Path) -> None:
    from transformers import T5Config, UMT5Config

    T5Config(d_model=8, num_layers=1, num_heads=1).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "is an encoder-decoder model (t5)" in message
    assert "only decoder-only language models and encoders are supported" in message
    UMT5Config(d_model=8, num_layers=1, num_heads=1, architectures=["UMT5EncoderModel"]).save_pretrained(
        tmp_path
    )
    assert "is the encoder of an encoder-decoder model (umt5)" in refusal(tmp_path)


@pytest.mark.parametrize(
    "architecture", ["BertForNextSentencePrediction", "BertForMultipleChoice", "WhisperEncoder"]
)
def test_a_head_that_is_not_served(folder: Path, architecture: str) -> None:
    edit_config(folder, architectures=[architecture])
    message = refusal(folder)
    assert (
        f"is for a task that is not supported (architecture {architecture}): supported are …ForCausalLM"
        in message
    )


@pytest.mark.parametrize("source", ["someone/no-such-model", "no-such-model"])
def test_a_hub_id_without_a_network(source: str) -> None:
    message = refusal(source)
    assert message.startswith(f"{source} is not a local path")
    assert "Hub cannot be reached" in message
    assert "spelling and the network" in message


def test_a_gguf_file_without_the_magic(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"ggml and more")
    message = refusal(tmp_path / "fake.gguf")
    assert "it starts with b'ggml'" in message and "download it again" in message


@pytest.mark.parametrize("sharded", [False, True])
def test_of_the_hub_the_files_that_loading_opens_are_fetched(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    there = [path.name for path in tiny_folder.iterdir()]
    there += ["consolidated.safetensors", "pytorch_model.bin", "modeling.py", "onnx/model.safetensors"]
    shards = ["model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"]
    if sharded:
        there = [name for name in there if name != "model.safetensors"] + [*shards, INDEX]
    fetched: set[str] = set()

    def snapshot(repo: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert repo == "someone/model" and not local_files_only
        for name in filter_repo_objects(there, allow_patterns=allow_patterns):
            fetched.add(name)
            (tmp_path / name).parent.mkdir(exist_ok=True)
            own = tiny_folder / name
            (tmp_path / name).write_bytes(own.read_bytes() if own.exists() else b"")
        if sharded:
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert find_model("someone/model").kind == "hub"
    weights = {name for name in fetched if not name.endswith((".json", ".jinja", ".txt", ".model"))}
    assert weights == ({*shards} if sharded else {"model.safetensors"})
