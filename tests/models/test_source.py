"""Which models are found, what identifies them, what a folder may not choose, and one sentence for what is none."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from nbl_export.errors import InputError
from nbl_export.models.folder import save_tokenizer, without_choices
from nbl_export.models.load import load_model, load_tokenizer
from nbl_export.models.source import find_model, same_model
from tests.processes import edit


def edit_config(folder: Path, **changes: Any) -> None:
    edit(folder / "config.json", lambda config: config.update(changes))


def flip_last_byte(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def one_sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert re.fullmatch(r".*[^.]\.", message) and "()" not in message
    return message


def small_gguf(path: Path, seed: int) -> Path:
    """A Llama of one block, without a tokenizer."""
    numbers = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
    sizes |= {"head_count": 4, "head_count_kv": 2, "vocab_size": 40, "rope_dimension_count": 8}
    for field, value in {**sizes, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4}.items():
        getattr(writer, f"add_{field}")(value)
    block = {
        "attn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_norm": (32,),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }
    shapes = {"token_embd": (40, 32), "output_norm": (32,), **{f"blk.0.{n}": s for n, s in block.items()}}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# source --------------------------------------------------------------------------------------

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


def test_a_folder_is_found(tiny_folder: Path) -> None:
    found = find_model(str(tiny_folder))
    assert (found.source, found.kind, found.path) == (str(tiny_folder), "folder", str(tiny_folder.resolve()))
    assert found.gguf_file is None
    assert not found.trust_remote_code
    assert len(found.fingerprint) == 64


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
    assert re.search(rf"{folder} .* has changed since .* another --output", one_sentence(caught))


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


Spoil = Callable[[Path], object]


def configured(**changes: Any) -> Spoil:
    return lambda folder: edit_config(folder, **changes)


def written(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def of_t5(architecture: str) -> Spoil:
    return configured(model_type="t5", is_encoder_decoder=True, architectures=[architecture])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        *(
            (written("config.json", content), "config.json cannot be read")
            for content in (b"{", b"\xff\xfe", b"[]")
        ),
        (
            pickled,
            "has no .safetensors weights: pickled weights (.bin) are not loaded; convert them with `save_pret",
        ),
        (
            of_t5("T5Model"),
            "is an encoder-decoder model (t5): only decoder-only language models and encoders are",
        ),
        (of_t5("T5EncoderModel"), "is the encoder of an encoder-decoder model (t5)"),
        *(
            (
                configured(architectures=[head]),
                f"for a task that is not supported (architecture {head}): supported are …ForCausalLM",
            )
            for head in ("BertForNextSentencePrediction", "BertForMultipleChoice", "WhisperEncoder")
        ),
        # Weights that lie elsewhere, or are quantized. Where peft is installed, transformers loads an adapter on top,
        # also from a pickle.
        (configured(transformers_weights="sub/x.safetensors"), "config.json has transformers_weights 'sub/x"),
        (configured(text_config={"backbone": "someone/model"}), "config.json has backbone 'someone/model'"),
        (configured(towers=[{"attribute_map": {"mine": "x"}}]), "config.json has attribute_map"),
        (written("adapter_config.json", b'{"peft_type": "LORA"}'), "merge it into the model"),
        (configured(quantization_config={"quant_method": "gptq"}), "is a quantized checkpoint (gptq)"),
        (
            configured(text_config={"model_type": "llama", "quantization_config": {"quant_method": "awq"}}),
            "checkpoint (awq)",
        ),
        (configured(compression_config={"quant_method": "compressed-tensors"}), "(compressed-tensors)"),
        (
            configured(quantization_config={"load_in_4bit": True}),
            "checkpoint (bitsandbytes): dequantize it first",
        ),
    ],
)
def test_a_folder_that_is_not_served(folder: Path, spoil: Spoil, said: str) -> None:
    spoil(folder)
    assert said in refusal(folder)


def test_a_hub_id_without_a_network() -> None:
    source = "someone/no-such-model"
    refused(source, f"{source} is not a local path", "cannot be reached", "spelling and the network")


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
