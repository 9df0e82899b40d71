"""The folder handed over: the same model for transformers 5 and 4, the user's own folder untouched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from nbl_export.export.hf_folder import as_hf_folder
from nbl_export.models.compat import readable_config, readable_tokenizer_config
from tests.export.exported import BASE, LLAMA3, handed_off, loaded, torch_logits
from tests.releases import written_for_5
from tests.tiny import build

LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 32,
}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
}
# One family for each way transformers 4 spells its rotary embedding.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("Llama", {"rope_parameters": BASE}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "partial": ("GPTNeoX", {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}}),
    "by layer": ("Gemma3", {"rope_parameters": BY_LAYER, "sliding_window": 16}),
    "long": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    # Apertus scales like llama3 where its configuration says nothing.
    "unscaled": ("Apertus", {"rope_parameters": BASE}),
}
IDS = list(range(3, 90))
# The activation of Apertus differs a little between the majors.
TOLERANCE = {"unscaled": 5e-3}


def family(name: str, folder: Path) -> Path:
    kind, changes = FAMILIES[name]
    fields = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**fields, **json.loads(json.dumps(changes))))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        assert handed_off(family(name, root / name / "own"), root / name / "handed") == root / name / "handed"
    return root


READ = """
import sys, torch, numpy
from pathlib import Path
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        numpy.save(folder / "logits.npy", model(torch.arange(3, 90)[None]).logits[0].numpy())
"""


def run_in(python: str, code: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [python, "-c", code, *arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.fixture(scope="module")
def read_by_4(families: Path, optimum_python: str) -> Path:
    run_in(optimum_python, READ, *(str(families / n / k) for n in FAMILIES for k in ("own", "handed")))
    return families


@written_for_5
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_5_reads_the_same_model(families: Path, name: str) -> None:
    own, handed = (torch_logits(families / name / kind, IDS) for kind in ("own", "handed"))
    assert np.array_equal(own, handed)


@written_for_5
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_4_reads_the_same_model(read_by_4: Path, name: str) -> None:
    expected = torch_logits(read_by_4 / name / "own", IDS)
    found = np.load(read_by_4 / name / "handed" / "logits.npy")
    np.testing.assert_allclose(found, expected, atol=TOLERANCE.get(name, 1e-5))
    # Without the hand-off it reads another model, without a word.
    assert np.abs(np.load(read_by_4 / name / "own" / "logits.npy") - expected).max() > 0.1


def test_config_in_both_spellings() -> None:
    config = {"dtype": "float32", "rope_parameters": LLAMA3}
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert readable_config(config) == {
        **config,
        "torch_dtype": "float32",
        "rope_theta": 5000.0,
        "rotary_emb_base": 5000.0,
        "rope_scaling": scaling,
    }


def test_what_a_config_says_itself_stays() -> None:
    config = {"dtype": "float32", "torch_dtype": "float16", "rope_theta": 7.0, "rope_parameters": BASE}
    assert readable_config(config)["torch_dtype"] == "float16"
    assert readable_config(config)["rope_theta"] == 7.0


def test_nested_configs_are_adapted_too() -> None:
    nested = readable_config(
        {"text_config": {"rope_parameters": BASE}, "id2label": {"rope_parameters": BASE}}
    )
    assert nested["text_config"]["rope_theta"] == 500.0
    assert nested["id2label"] == {"rope_parameters": BASE}


@pytest.mark.parametrize("config", [{"rope_theta": 7.0, "torch_dtype": "float16"}, {"n_positions": 9}, {}])
def test_config_of_4_is_left_as_it_is(config: dict[str, Any]) -> None:
    assert readable_config(config) == config


def test_tokenizer_config_in_the_old_spelling() -> None:
    assert readable_tokenizer_config(
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"], "eos_token": "</s>"}
    ) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<x>"],
        "eos_token": "</s>",
    }
    old = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<i>"}}
    assert readable_tokenizer_config(old) == old


TOKENS = """
import sys
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained(sys.argv[1])("Once upon a <x> time")["input_ids"])
"""


@pytest.fixture
def special_folder(stories_folder: Path, tmp_path: Path) -> Path:
    """stories260K with a special token of its own."""
    folder = Path(shutil.copytree(stories_folder, tmp_path / "special"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    tokenizer.save_pretrained(folder)
    return folder


@written_for_5
def test_tokenizer_is_the_same(special_folder: Path, tmp_path: Path) -> None:
    handed = handed_off(special_folder, tmp_path / "handed")
    text = "Once upon a <x> time"
    own, other = (AutoTokenizer.from_pretrained(f)(text)["input_ids"] for f in (special_folder, handed))
    assert own == other and 512 in own


@written_for_5
def test_tokenizer_is_the_same_for_transformers_4(
    special_folder: Path, tmp_path: Path, optimum_python: str
) -> None:
    handed = handed_off(special_folder, tmp_path / "handed")
    expected = AutoTokenizer.from_pretrained(special_folder)("Once upon a <x> time")["input_ids"]
    assert run_in(optimum_python, TOKENS, str(handed)).split("\n")[0] == str(expected)


def test_the_users_folder_is_linked_to_and_untouched(tmp_path: Path) -> None:
    own = build(tmp_path / "own", num_hidden_layers=1)
    (own / "pytorch_model.bin").write_bytes(b"pickled")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in own.iterdir()}
    handed = handed_off(own, tmp_path / "handed")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in own.iterdir()} == before
    assert (handed / "model.safetensors").readlink() == own / "model.safetensors"
    assert not (handed / "config.json").is_symlink()
    assert not (handed / "pytorch_model.bin").exists()


def test_a_folder_that_both_read_is_handed_over_as_it_is(tmp_path: Path) -> None:
    own = build(tmp_path / "own", num_hidden_layers=1)
    handed = handed_off(own, tmp_path / "handed")
    assert handed_off(handed, tmp_path / "again") == handed
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_gguf_is_saved_from_the_loaded_model(tmp_path: Path) -> None:
    path = os.environ.get("NBL_EXPORT_SMOLLM2")
    if not path:
        pytest.skip("needs NBL_EXPORT_SMOLLM2, the path of a SmolLM2 GGUF file")
    model = loaded(Path(path))
    config: Any = model.model.config
    before = config.to_dict()
    handed = as_hf_folder(model, tmp_path / "handed")
    assert config.to_dict() == before
    saved = json.loads((handed / "config.json").read_text())
    assert (saved["rope_theta"], saved["torch_dtype"]) == (100000.0, "float32")
    assert "quantization_config" not in saved
    with torch.no_grad():
        expected = model.model(input_ids=torch.tensor([IDS[:8]])).logits[0].numpy()
    assert np.array_equal(torch_logits(handed, IDS[:8]), expected)
    assert (
        AutoTokenizer.from_pretrained(handed)("Hello")["input_ids"] == model.tokenizer("Hello")["input_ids"]
    )
    shutil.rmtree(handed)  # half a gigabyte
