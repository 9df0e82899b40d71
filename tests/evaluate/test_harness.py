"""Our model of lm-evaluation-harness against the harness's own for transformers, on the same tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import InputError
from nbl_export.evaluate.scoring import Limits
from nbl_export.evaluate.tasks import EvalTask, find_tasks, run_task
from nbl_export.models.libraries import quiet
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from nbl_export.runtime.ort import ort_stream
from nbl_export.settings import EvalSettings

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'nbl-export[eval]'")

POSITIONS = 512


def ours(graph: Path, tokenizer: Any, positions: int, batch: int = 8) -> Any:
    from nbl_export.evaluate.harness import DecoderLM

    stream = ort_stream(graph, positions)
    return DecoderLM(stream, tokenizer, Limits(positions, len(tokenizer), batch), Silent())


def theirs(model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")


def answers(lm: Any, task: EvalTask) -> tuple[Mapping[str, Any], list[Any]]:
    """The harness's results and samples."""
    from lm_eval.evaluator import evaluate

    task.built.set_fewshot_seed(0)
    with quiet():
        found = evaluate(
            lm, {"tasks": {task.name: task.built}, "groups": {}}, bootstrap_iters=0, log_samples=True
        )
    return found["results"][task.name], found["samples"][task.name]


def assert_same_answers(lm: Any, reference: Any, task: EvalTask, atol: float = 1e-3) -> None:
    """The same metrics, and for every request the same log-likelihood and greedy flag, or the same text."""
    (results, samples), (wanted, references) = (answers(model, task) for model in (lm, reference))
    numbers = {k: v for k, v in wanted.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    assert len(numbers) >= 2
    for key, value in numbers.items():
        assert results[key] == pytest.approx(value, rel=1e-4), (task.name, key)
    assert len(samples) == len(references) > 0
    for sample, expected in zip(samples, references, strict=True):
        assert sample["arguments"] == expected["arguments"]
        for (found,), (answer,) in zip(sample["resps"], expected["resps"], strict=True):
            if isinstance(answer, tuple):
                np.testing.assert_allclose(found[0], answer[0], rtol=0, atol=atol)
                assert found[1] == answer[1]
            elif isinstance(answer, float):
                np.testing.assert_allclose(found, answer, rtol=1e-5)
            else:
                assert found == answer


@pytest.fixture(scope="module")
def stories(stories_out: Path, stories_folder: Path, stories_model: Any) -> tuple[Any, Any]:
    """Our model on the exported stories260K, and the harness's own on the same weights."""
    tokenizer = load_tokenizer(find_model(str(stories_folder)))
    return ours(stories_out / "baseline" / "model.onnx", tokenizer, POSITIONS), theirs(
        stories_model, tokenizer
    )


NAMES = (
    "boolq_valid",
    "lambada_openai_test",
)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_come_out_as_with_transformers(stories: tuple[Any, Any], shared_data: Path, name: str) -> None:
    """Some of the passages are longer than the model's 512 positions, and lose their beginning."""
    (task,) = find_tasks([str(shared_data / "eval" / f"{name}.jsonl.gz")], EvalSettings(limit=20))
    assert_same_answers(*stories, task)


def test_few_shot_tasks_come_out_as_with_transformers(stories: tuple[Any, Any], shared_data: Path) -> None:
    file = shared_data / "eval" / "piqa_valid.jsonl.gz"
    (task,) = find_tasks([str(file)], EvalSettings(limit=10, few_shot=2))
    _, (sample, *_) = answers(stories[0], task)
    assert sample["arguments"][0][0].count("Question:") == 3
    assert_same_answers(*stories, task)


def test_perplexity_of_long_texts_comes_out_as_with_transformers(
    stories: tuple[Any, Any], tmp_path: Path
) -> None:
    words = "Once upon a time there was a little girl named Lily. She liked to play in the park. "
    texts = [words * 12, words, "A", words * 30]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (task,) = find_tasks([str(tmp_path)], EvalSettings())
    lm, reference = stories
    assert len(lm.tok_encode(texts[-1])) > POSITIONS
    assert_same_answers(lm, reference, task)


def test_generated_answers_come_out_as_with_transformers(stories: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [
        {"question": q, "answer": "."}
        for q in ("Lily saw a cat.", "Once upon a time", "The dog was sad because it had no", "Tom")
    ]
    (tmp_path / "free.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (task,) = find_tasks([str(tmp_path)], EvalSettings())
    _, samples = answers(stories[0], task)
    assert len({s["resps"][0][0] for s in samples}) > 1  # there is something to compare
    assert_same_answers(*stories, task)


def _winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    first, second = row["choices"]
    return {
        "sentence": row["sentence"],
        "option1": first,
        "option2": second,
        "answer": str(row["gold"] + 1),
    }


# The harness's task → its data on the Hub, the split it asks, our file of such rows, and a row as it is on the Hub.
ON_THE_HUB: Mapping[str, tuple[str, str, str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "winogrande": ("allenai/winogrande", "validation", "winogrande_xl_valid", _winogrande),
}


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_task_of_the_hub_is_asked_as_its_rows_in_a_file_are(
    stories: tuple[Any, Any], shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The harness's own task by its name, its data handed over where the Hub's client would fetch them."""
    import datasets

    path, split, file, on_the_hub = ON_THE_HUB[name]
    settings = EvalSettings(limit=12)
    (local,) = find_tasks([str(shared_data / "eval" / f"{file}.jsonl.gz")], settings)
    rows = [on_the_hub(row) for row in local.built.eval_docs]
    served: list[str] = []

    def load_dataset(path: str, **_: Any) -> Any:
        served.append(path)
        return datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s in ("train", split)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (named,) = find_tasks([name], settings)
    assert served == [path] and named.total == 12
    found, expected = (run_task(stories[0], task, settings) for task in (named, local))
    assert found == expected


def test_sampled_answers_are_refused(stories: tuple[Any, Any]) -> None:
    class Request:
        args = ("Once", {"do_sample": True, "temperature": 0.8, "until": ["\n"]})

    with pytest.raises(InputError, match="decodes greedily"):
        stories[0].generate_until([Request()])


def test_a_conversation_is_written_by_the_tokenizers_template(stories: tuple[Any, Any]) -> None:
    lm = stories[0]
    before = lm.tokenizer.chat_template
    lm.tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}"
    lm.tokenizer.chat_template += "{% if add_generation_prompt %}<me>{% endif %}"
    try:
        assert lm.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<user>Hi<me>"
    finally:
        lm.tokenizer.chat_template = before
