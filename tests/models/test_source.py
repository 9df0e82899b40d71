"""Which models are found, what identifies them, what a folder may not choose, and one sentence for what is none."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from nbl_export.errors import InputError
from nbl_export.models.folder import save_tokenizer, without_choices
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


def refused(source: Path | str, *words: str) -> None:
    message = refusal(source)
    assert [word for word in words if word not in message] == [], message


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


def test_the_same_model_is_found_again_and_a_changed_one_refused(folder: Path) -> None:
    info = json.loads(json.dumps(find_model(str(folder)).as_json()))
    assert same_model(info) == find_model(str(folder))
    edit_config(folder, rope_theta=5.0)
    changed = find_model(str(folder)).fingerprint
    flip_last_byte(folder / "model.safetensors")
    assert len({info["fingerprint"], changed, find_model(str(folder)).fingerprint}) == 3
    with pytest.raises(InputError) as caught:
        same_model(info)
    message = one_sentence(caught)
    assert str(folder) in message
    assert "has changed since" in message
    assert "--output" in message


# refused before loading --------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./missing", "missing.gguf", "~/missing", "has space"])
def test_a_path_that_is_not_there(source: str) -> None:
    refused(source, "does not exist", "MODEL is a folder, a .gguf file, or a Hub id")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "it has neither config.json nor a .gguf file" in refusal(tmp_path)
    (tmp_path / "fake.gguf").write_bytes(b"ggml and more")
    refused(tmp_path / "fake.gguf", "it starts with b'ggml'", "download it again")
    (tmp_path / "fake.gguf").rename(tmp_path / "fake.bin")
    assert "is not a .gguf file" in refusal(tmp_path / "fake.bin")
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(EMPTY_GGUF)
    assert "it has 2 .gguf files, name one of them" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]"])
def test_a_broken_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, str(folder), "config.json cannot be read")


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "has no .safetensors weights", "pickled weights (.bin) are not loaded", "save_pretrained")


def test_an_encoder_decoder_model(tmp_path: Path) -> None:
    from transformers import T5Config, UMT5Config

    T5Config(d_model=8, num_layers=1, num_heads=1).save_pretrained(tmp_path)
    refused(
        tmp_path,
        "is an encoder-decoder model (t5)",
        "only decoder-only language models and encoders are supported",
    )
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


def test_a_hub_id_without_a_network() -> None:
    source = "someone/no-such-model"
    message = refusal(source)
    assert message.startswith(f"{source} is not a local path")
    assert "cannot be reached" in message
    assert "spelling and the network" in message


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


# what a folder does not choose --------------------------------------------------------------------


def split(folder: Path, second: str) -> Path:
    """The weights of ``folder`` in two files, the second one at ``second``."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(weights)
    parts = {"model-1.safetensors": names[:3], second: names[3:]}
    for name, held in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({n: weights[n] for n in held}, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: name for name, held in parts.items() for n in held}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder / second


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"transformers_weights": "sub/x.safetensors"}, "config.json has transformers_weights 'sub/x"),
        ({"text_config": {"backbone": "someone/model"}}, "config.json has backbone 'someone/model'"),
        ({"towers": [{"attribute_map": {"mine": "x"}}]}, "config.json has attribute_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is a quantized checkpoint (gptq)"),
        (
            {"text_config": {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}},
            "checkpoint (awq)",
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
        ({"quantization_config": {"load_in_4bit": True}}, "checkpoint (bitsandbytes): dequantize it first"),
    ],
)
def test_weights_that_lie_elsewhere_or_are_quantized(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    edit_config(folder, **changes)
    assert named in refusal(folder)


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    """Where peft is installed, transformers loads it on top, also from a pickle."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "merge it into the model" in refusal(folder)


# weight files ------------------------------------------------------------------------------------


def test_a_folder_of_weights_that_is_a_link_elsewhere(folder: Path) -> None:
    split(folder, "sub/model-2.safetensors")
    (folder / "sub").rename(folder.parent / "elsewhere")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    assert "'sub/model-2.safetensors', which is not the name of a file in" in refusal(folder)


@pytest.mark.parametrize("second", ["model-2.bin", "model-2.safetensors"])
def test_a_listed_file_that_is_a_pickle_or_is_missing(folder: Path, second: str) -> None:
    path = split(folder, second)
    if second.endswith("safetensors"):
        path.unlink()
    assert f"{path} is not there as a .safetensors file" in refusal(folder)


# implementations ---------------------------------------------------------------------------------


def test_a_folder_does_not_choose_how_attention_is_computed(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    ours = PreTrainedModel._check_and_adjust_attn_implementation

    def check(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(attn_implementation)
        return ours(self, attn_implementation, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", check)
    edit_config(folder, attn_implementation="someone/kernel", _experts_implementation="sonicmoe")
    model: Any = load_model(find_model(str(folder)))
    first, asked[:] = asked[:], []
    reference: Any = load_model(find_model(str(tiny_folder)))
    assert first == asked and asked
    assert model.config._attn_implementation == reference.config._attn_implementation
    assert model.config.name_or_path == str(folder.resolve())
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_nor_inside_its_configurations() -> None:
    config = {
        "text_config": {"_attn_implementation": "someone/kernel", "hidden_size": 8},
        "towers": [{"attn_implementation": "x", "depth": 1}],
        "fusion_config": {"x": True},
        "_attn_implementation_internal": "x",
        "experts_implementation": "x",
    }
    assert without_choices(config) == {"text_config": {"hidden_size": 8}, "towers": [{"depth": 1}]}


# tokenizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_names_no_files_elsewhere(folder: Path, name: str) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(rules["model"]["vocab"])
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").unlink()
    for file, changes in (
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}),
        (name, {"vocab_file": str(folder.parent / "vocab.json")}),
    ):
        before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({**before, **changes}))
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder.parent / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = load_tokenizer(find_model(str(folder)))
    assert tokenizer("ab")["input_ids"] == [vocabulary["b"], vocabulary["a"]]
    assert tokenizer.name_or_path == str(folder.resolve())


def test_a_saved_tokenizer_is_one_that_both_major_versions_know(tiny_folder: Path, tmp_path: Path) -> None:
    """tests/test_docs.py has 4.57 read one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    files = save_tokenizer(tokenizer, tmp_path)
    assert set(files) == set(tmp_path.iterdir())
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["model_input_names"] == ["input_ids", "attention_mask"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Once upon a time, 123 <unknown>"
    assert again(text) == tokenizer(text) and again.eos_token_id == tokenizer.eos_token_id
