"""What a model is for, what it reads, and its pooling, which is computed without padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nbl_export.errors import InputError
from nbl_export.models.forward import last_token, pool
from nbl_export.models.tasks import Pooling, find_pooling, is_causal, reads, task_named, task_of
from tests.encoders import as_sentence_transformer


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),  # it ends in Model too: the longest ending counts
        ("BertModel", "feature-extraction"),
        ("ViTModel", "feature-extraction"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("ViTForImageClassification", "image-classification"),
    ],
)
def test_a_head_says_what_a_model_is_for(architecture: str, task: str) -> None:
    found = task_of([architecture])
    assert found and found.name == task and found == task_named(task)
    assert hasattr(transformers, found.loads)
    assert found.causal == (task == "text-generation")


def test_no_class_is_a_decoder_and_a_foreign_head_is_no_task() -> None:
    assert task_of([]) == task_named("text-generation")
    assert task_of(["BertForNextSentencePrediction"]) is None and task_of(["ElectraForPreTraining"]) is None
    pretraining = task_of(["BertForPreTraining"])  # of which the other head is left out
    assert pretraining is not None and pretraining.name == "fill-mask"


@pytest.mark.parametrize(
    ("task", "config", "expected"),
    [
        ("feature-extraction", {"vocab_size": 9}, "input_ids"),
        ("feature-extraction", {"image_size": 32}, "pixel_values"),
        ("image-classification", {}, "pixel_values"),
        ("fill-mask", {}, "input_ids"),
    ],
)
def test_what_a_model_reads(task: str, config: dict[str, Any], expected: str) -> None:
    assert reads(task_named(task), config) == expected


def test_a_name_that_is_no_task_generates_no_text() -> None:
    assert is_causal("text-generation")
    assert not is_causal("fill-mask") and not is_causal("../text-generation")


# pooling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("left", [True, False])
def test_pooling_passes_over_padding(tmp_path: Path, mode: str, normalize: bool, left: bool) -> None:
    as_sentence_transformer(tmp_path, f"{mode}_token{'' if mode == 'cls' else 's'}", normalize)
    pooling = find_pooling(tmp_path)
    assert pooling == Pooling(mode, normalize, ("modules.json", "1_Pooling/config.json"))
    generator = np.random.default_rng(0)
    states = generator.standard_normal((3, 6, 5)) - 4  # zeros would be the largest
    rows = [slice(6 - n, 6) if left else slice(0, n) for n in (6, 3, 1)]
    mask = np.zeros((3, 6), dtype=np.int64)
    expected = []
    for i, row in enumerate(rows):
        mask[i, row] = 1
        kept = states[i, row]
        vector = {"mean": kept.mean(0), "cls": kept[0], "max": kept.max(0)}[mode]
        expected.append(vector / np.linalg.norm(vector) if normalize else vector)
    found = pool(pooling, torch.from_numpy(states).float(), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found, np.array(expected), atol=1e-5)


def test_newer_folders_name_their_pooling(tmp_path: Path) -> None:
    as_sentence_transformer(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    found = find_pooling(tmp_path)
    assert found and found.mode == "cls"
    assert find_pooling(tmp_path / "1_Pooling") is None


@pytest.mark.parametrize(
    ("modules", "config", "said"),
    [
        (
            ["Transformer", "Dense", "Pooling"],
            "{}",
            "has the modules Transformer, Dense, Pooling: supported are a Transformer",
        ),
        (["Pooling", "Transformer"], "{}", "has the modules Pooling, Transformer: supported are"),
        (["Transformer"], "{}", "has the modules Transformer: supported are"),
        (
            ["Transformer", "Pooling"],
            "{}",
            "asks for the pooling none: supported is one of mean, cls, max and lasttoken",
        ),
        (
            ["Transformer", "Pooling"],
            '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}',
            "asks for the pooling mean, cls",
        ),
        (["Transformer", "Pooling"], "[]", "asks for the pooling none"),
        (["Transformer", "Pooling"], "{", "The pooling's configuration is damaged"),
        (None, "{}", "is not a list of modules"),
    ],
)
def test_a_pooling_that_is_not_served(
    tmp_path: Path, modules: list[str] | None, config: str, said: str
) -> None:
    as_sentence_transformer(tmp_path)
    listed = [{"type": f"sentence_transformers.models.{m}", "path": "1_Pooling"} for m in modules or ()]
    (tmp_path / "modules.json").write_text(json.dumps(listed if modules else {"type": 1}))
    (tmp_path / "1_Pooling" / "config.json").write_text(config)
    with pytest.raises(InputError, match=said) as told:
        find_pooling(tmp_path)
    assert "\n" not in str(told.value)


def test_the_last_token_is_the_last_that_is_no_padding() -> None:
    states = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    torch.testing.assert_close(last_token(states, mask), torch.stack([states[0, 3], states[1, 1]]))
    torch.testing.assert_close(pool(Pooling("lasttoken", False, ()), states, mask), last_token(states, mask))
