"""A model folder chooses no weight file to open, nothing to fetch and no implementation; others read it as the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from nbl_export.errors import InputError
from nbl_export.models.folder import save_tokenizer, without_choices
from nbl_export.models.load import load_model, load_tokenizer
from nbl_export.models.source import find_model
from tests.models.spoiled import edit_config, one_sentence

INDEX = "model.safetensors.index.json"


def refusal(folder: Path) -> str:
    """The sentence with which ``folder`` is refused before anything is loaded of it."""
    with pytest.raises(InputError) as caught:
        find_model(str(folder))
    return one_sentence(caught)


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


def test_what_names_nothing_is_ordinary(folder: Path) -> None:
    ordinary = {"transformers_weights": None, "backbone": None}
    edit_config(folder, **ordinary, quantization_config={"quant_method": "gguf"})
    assert find_model(str(folder)).fingerprint


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    """Where peft is installed, transformers loads it on top, also from a pickle."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "merge it into the model" in refusal(folder)


# weight files ------------------------------------------------------------------------------------


def test_weights_in_a_folder_are_part_of_the_fingerprint(folder: Path, tiny_folder: Path) -> None:
    shard = split(folder, "sub/model-2.safetensors")
    before = find_model(str(folder))
    model: Any = load_model(before)
    assert torch.equal(model.lm_head.weight, load_model(find_model(str(tiny_folder))).lm_head.weight)  # type: ignore[union-attr]
    save_file({n: w + 1 for n, w in load_file(shard).items()}, shard, {"format": "pt"})
    after = find_model(str(folder))
    assert after.fingerprint != before.fingerprint and after.model != before.model


def test_a_file_that_loading_does_not_open_is_no_part_of_the_model(folder: Path) -> None:
    before = find_model(str(folder))
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert find_model(str(folder)) == before


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


@pytest.mark.parametrize(
    "choice", ["flash_attention_2", "kernels-community/flash-attn2", {"": "someone/kernel"}]
)
def test_a_folder_does_not_choose_how_attention_is_computed(
    folder: Path, tiny_folder: Path, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    ours = PreTrainedModel._check_and_adjust_attn_implementation

    def check(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(attn_implementation)
        return ours(self, attn_implementation, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", check)
    edit_config(folder, attn_implementation=choice, _experts_implementation="sonicmoe")
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


def test_a_choice_beside_weights_in_a_folder_and_an_infinite_number(folder: Path) -> None:
    split(folder, "sub/model-2.safetensors")
    edit_config(folder, _attn_implementation="flash_attention_2", time_step_limit=[0.0, float("inf")])
    model: Any = load_model(find_model(str(folder)))
    assert model.config.time_step_limit == [0.0, float("inf")]


# tokenizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["vocab_file", "vocab"])
def test_a_tokenizer_names_no_files_elsewhere(folder: Path, name: str, key: str) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(rules["model"]["vocab"])
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").unlink()
    for file, changes in (
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}),
        (name, {key: str(folder.parent / "vocab.json")}),
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
