"""A model folder chooses no weight file to open, nothing to import or fetch, and no implementation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from nbl_export.errors import InputError
from nbl_export.models.config_keys import check_keys, without_choices, without_files
from nbl_export.models.load import load_model, load_tokenizer
from nbl_export.models.source import ModelSource, find_model
from tests.models.spoiled import edit_config, one_sentence
from tests.releases import written_for_5

INDEX = "model.safetensors.index.json"


def refusal(folder: Path) -> str:
    """The sentence with which ``folder`` is refused before anything is loaded of it."""
    with pytest.raises(InputError) as caught:
        find_model(str(folder))
    message = one_sentence(caught)
    assert str(folder) in message
    return message


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


# another weight file -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sub/x.safetensors", "adapter_model.bin", "x.safetensors.index.json", 5])
def test_a_config_that_names_its_weight_file(folder: Path, name: Any) -> None:
    edit_config(folder, transformers_weights=name)
    message = refusal(folder)
    assert f"config.json has transformers_weights {name!r}" in message
    assert "put those weights into model.safetensors and remove the key" in message


@pytest.mark.parametrize(
    "where",
    [
        {"text_config": {"transformers_weights": "x.safetensors"}},
        {"towers": [{"transformers_weights": "x.safetensors"}]},
        {"__dict__": {"transformers_weights": "x.safetensors"}},
    ],
)
def test_it_is_found_at_any_depth(folder: Path, where: dict[str, Any]) -> None:
    edit_config(folder, **where)
    assert "config.json has " in refusal(folder)


def test_a_key_that_names_nothing_is_ordinary(folder: Path) -> None:
    edit_config(folder, transformers_weights=None, sizes=[{"__float__": "Infinity"}])
    assert load_model(find_model(str(folder)))


@pytest.mark.parametrize("name", ["attribute_map", "__dict__", "__class__"])
def test_a_config_that_renames_its_keys(folder: Path, name: str) -> None:
    """transformers sets an attribute for every key, and looks up others through ``attribute_map``."""
    edit_config(folder, **{name: {"mine": "transformers_weights"}}, mine="sub/x.safetensors")
    message = refusal(folder)
    assert f"config.json has {name}, which renames other keys" in message
    assert "remove it" in message


def test_a_config_that_is_nested_too_deep(folder: Path) -> None:
    nested: Any = "x"
    for _ in range(300):
        nested = [nested]
    edit_config(folder, nested=nested)
    with pytest.raises(InputError, match="nested more than 100 deep"):
        find_model(str(folder))


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    """Where peft is installed, transformers loads it on top, also from a pickle."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = refusal(folder)
    assert "adapter_config.json" in message
    assert "merge it into the model" in message


def test_the_weights_of_a_distributed_run(folder: Path) -> None:
    """transformers 5 prefers files of this name to model.safetensors."""
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    message = refusal(folder)
    assert "shard-00001-model-00001-of-00001.safetensors" in message
    assert "save_pretrained" in message


# weights in folders ------------------------------------------------------------------------------


def test_weights_in_a_folder_are_part_of_the_fingerprint(folder: Path, tiny_folder: Path) -> None:
    shard = split(folder, "sub/model-2.safetensors")
    before = find_model(str(folder))
    model: Any = load_model(before)
    assert torch.equal(model.lm_head.weight, load_model(find_model(str(tiny_folder))).lm_head.weight)  # type: ignore[union-attr]
    changed = {name: value + 1 for name, value in load_file(shard).items()}
    save_file(changed, shard, {"format": "pt"})
    after = find_model(str(folder))
    assert after.fingerprint != before.fingerprint
    assert after.model != before.model


def test_weights_only_in_folders_are_found(folder: Path) -> None:
    split(folder, "sub/model-2.safetensors")
    index = json.loads((folder / INDEX).read_text())
    (folder / "model-1.safetensors").rename(folder / "sub" / "model-1.safetensors")
    index["weight_map"] = {n: f"sub/{Path(name).name}" for n, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    assert load_model(find_model(str(folder)))


def test_a_folder_of_weights_that_is_a_link_elsewhere(folder: Path) -> None:
    split(folder, "sub/model-2.safetensors")
    (folder / "sub").rename(folder.parent / "elsewhere")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    assert "'sub/model-2.safetensors', which is not the name of a file in" in refusal(folder)


def test_a_list_that_names_a_pickle(folder: Path) -> None:
    shard = split(folder, "model-2.safetensors")
    pickled = shard.rename(folder / "model-2.bin")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        n: name.replace("2.safetensors", "2.bin") for n, name in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{pickled} is not a .safetensors file" in refusal(folder)


# implementations ---------------------------------------------------------------------------------

KEYS = ("attn_implementation", "_attn_implementation")
CHOICES = [
    "flash_attention_2",
    "flex_attention",
    "eager",
    "kernels-community/flash-attn2",
    "paged|someone/kernel:fn",
    {"": "someone/kernel"},
    7,
]


def by_default(folder: Path) -> str:
    return str(load_model(find_model(str(folder))).config._attn_implementation)  # type: ignore[union-attr]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_folder_does_not_choose_how_attention_is_computed(
    folder: Path, tiny_folder: Path, key: str, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    ours = PreTrainedModel._check_and_adjust_attn_implementation

    def check(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(attn_implementation)
        return ours(self, attn_implementation, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", check)
    edit_config(folder, **{key: choice}, _experts_implementation="sonicmoe")
    found = find_model(str(folder))
    model: Any = load_model(found)
    first, asked[:] = asked[:], []
    reference: Any = load_model(find_model(str(tiny_folder)))
    assert first == asked  # on the meta device, and when it is loaded
    assert len(asked) >= 2
    assert model.config._attn_implementation == reference.config._attn_implementation
    assert getattr(model.config, "_experts_implementation", None) == getattr(
        reference.config, "_experts_implementation", None
    )
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert load_tokenizer(found)("ab")["input_ids"]


def test_nor_inside_its_configurations() -> None:
    config = {
        "text_config": {"_attn_implementation": "someone/kernel", "hidden_size": 8},
        "towers": [{"attn_implementation": "x", "depth": 1}],
        "fusion_config": {"x": True},
        "_attn_implementation_internal": "x",
        "experts_implementation": "x",
    }
    assert without_choices(config) == {"text_config": {"hidden_size": 8}, "towers": [{"depth": 1}]}
    assert "fusion_config" in config


@written_for_5
def test_a_model_in_parts_gets_the_default_in_each(tmp_path: Path) -> None:
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    whole = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(whole).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["Gemma3ForCausalLM"])
    expected = by_default(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["_attn_implementation"] = "someone/kernel"
    config["vision_config"]["attn_implementation"] = "flex_attention"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert by_default(tmp_path) == expected


@written_for_5
def test_only_a_folder_with_a_choice_is_loaded_from_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []
    own = AutoModelForCausalLM.from_pretrained

    def load(place: str, **options: Any) -> Any:
        places.append(place)
        return own(place, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    for _ in range(2):
        model: Any = load_model(find_model(str(folder)))
        assert model.config.name_or_path == str(folder.resolve())
        edit_config(folder, attn_implementation="flash_attention_2")
    assert places[0] == str(folder.resolve()) != places[1]


def test_a_choice_beside_weights_in_a_folder_and_an_infinite_number(folder: Path) -> None:
    split(folder, "sub/model-2.safetensors")
    edit_config(folder, _attn_implementation="flash_attention_2", time_step_limit=[0.0, float("inf")])
    model: Any = load_model(find_model(str(folder)))
    assert model.config.time_step_limit == [0.0, float("inf")]


# what would be fetched or imported ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backbone": "someone/model"}, "backbone 'someone/model'"),
        ({"vision_config": {"model_type": "timm_backbone"}}, "model_type 'timm_backbone'"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantized checkpoint (awq)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantized checkpoint (bitsandbytes)"),
    ],
)
def test_what_needs_another_library_or_model(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(folder, **changes)
    assert named in refusal(folder)


def test_a_model_of_timm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"hf_hub_id": "someone/m"}}))
    assert "is a model of timm" in refusal(folder)


def test_the_keys_of_an_ordinary_configuration(tiny_folder: Path) -> None:
    source: ModelSource = find_model(str(tiny_folder))
    config = json.loads((tiny_folder / "config.json").read_text())
    check_keys(source.source, {**config, "backbone": None, "quantization_config": {"quant_method": "gguf"}})
    assert without_choices(config) == config


# files of a tokenizer ----------------------------------------------------------------------------


@pytest.fixture
def elsewhere(folder: Path) -> Path:
    """Another tokenizer beside the model's folder, and a model whose tokenizer is made of two files."""
    rules = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(rules["model"]["vocab"])
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    place = folder.parent / "elsewhere"
    place.mkdir()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    rules["model"]["vocab"] = vocabulary
    (place / "tokenizer.json").write_text(json.dumps(rules))
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    shutil.copy(folder / "merges.txt", place)
    return place


def edit_json(path: Path, **changes: Any) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **changes}))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "named",
    [
        {"tokenizer_file": "tokenizer.json"},
        {"vocab_file": "vocab.json", "merges_file": "merges.txt"},
        {"vocab": "vocab.json", "merges": "merges.txt"},
    ],
    ids=lambda named: next(iter(named)),
)
def test_a_tokenizer_names_no_files_elsewhere(
    folder: Path, elsewhere: Path, name: str, named: dict[str, str]
) -> None:
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    (folder / "tokenizer.json").unlink()
    before = load_tokenizer(find_model(str(folder)))("ab")["input_ids"]
    edit_json(folder / name, **{key: str(elsewhere / file) for key, file in named.items()})
    tokenizer = load_tokenizer(find_model(str(folder)))
    assert tokenizer("ab")["input_ids"] == before
    assert tokenizer.name_or_path == str(folder.resolve())


def test_paths_of_a_tokenizer_are_left_out_and_nothing_else() -> None:
    config = {"model_max_length": 5, "tokenizer_file": None, "unk_token": "x", "vocab_size": 3}
    paths = {"spm_file": "a", "source_spm": "b", "entity_vocab": "c", "init_inputs": ["d"]}
    assert without_files({**config, **paths}) == config
