"""The table of tasks: what a model is for, and what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from nbl_export.models.tasks import is_causal, reads, task_named, task_of


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
