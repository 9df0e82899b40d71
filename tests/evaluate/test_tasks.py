"""Tasks of the harness: local rows, by name, by file; how they are asked, what they score, and which are refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.evaluate import tasks
from nbl_export.evaluate.scoring import Limits
from nbl_export.evaluate.tasks import (
    EvalTask,
    check_tasks,
    find_tasks,
    run_task,
    sample,
    shapes,
)
from nbl_export.models.load import load_tokenizer
from nbl_export.models.running import quiet
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from nbl_export.runtime.ort import ort_stream
from nbl_export.settings import EvalSettings

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'nbl-export[eval]'")

QUESTION = {"question": "What is wet?", "choices": ["water", "sand"], "gold": 0, "id": "1"}


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def requests_of(path: Path, few_shot: int = 0) -> list[tuple[Any, ...]]:
    """What the harness asks a model for the rows of a file."""
    (task,) = find_tasks([str(path)], EvalSettings(few_shot=few_shot))
    task.built.set_fewshot_seed(0)
    task.built.build_all_requests()
    return [i.args for i in task.built.instances]


# local rows ---------------------------------------------------------------------------------------


ASKED: Mapping[str, tuple[Mapping[str, Any], list[tuple[Any, ...]]]] = {
    "question": (
        QUESTION,
        [("Question: What is wet?\nAnswer:", " water"), ("Question: What is wet?\nAnswer:", " sand")],
    ),
    "ctx": (
        {"ctx": "A boy runs. He", "choices": ["falls.", "swims."], "gold": 1},
        [("A boy runs. He", " falls."), ("A boy runs. He", " swims.")],
    ),
    "passage": (
        {"passage": "Tea is hot.", "question": "is tea hot?", "choices": ["no", "yes"], "gold": 1},
        [
            ("Tea is hot.\nQuestion: is tea hot?\nAnswer:", " no"),
            ("Tea is hot.\nQuestion: is tea hot?\nAnswer:", " yes"),
        ],
    ),
    "subject": (
        {"subject": "high_school_physics", "question": " Up? ", "choices": ["a", "'b'", "3"], "gold": 2},
        [
            (
                "The following are multiple choice questions (with answers) about high school physics.\n\n"
                "Up?\nA. a\nB. 'b'\nC. 3\nAnswer:",
                f" {letter}",
            )
            for letter in "ABC"
        ],
    ),
    # What stands before the blank and the choice is the context; what follows the blank is scored.
    "sentence": (
        {"sentence": 'The _ fits in the "box" as it\'s big.', "choices": ["cup's", "cat"], "gold": 1},
        [("The cup's", ' fits in the "box" as it\'s big.'), ("The cat", ' fits in the "box" as it\'s big.')],
    ),
    "target": ({"context": "It was a {{dark}}", "target": "42"}, [("It was a {{dark}}", " 42")]),
    "text": ({"text": "Once."}, [("Once.",)]),
}


@pytest.mark.parametrize("name", ASKED)
def test_how_a_row_is_asked(tmp_path: Path, name: str) -> None:
    row, wanted = ASKED[name]
    assert requests_of(written(tmp_path / "rows.jsonl", [row])) == wanted


def test_a_free_answer_is_generated(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "2"}])
    ((prompt, kwargs),) = requests_of(path)
    assert prompt == "Question: 1+1?\nAnswer:"
    assert kwargs == {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}
    assert set(shapes()) == {*ASKED, "answer"}


def test_few_shot_examples_are_no_rows_that_are_asked(tmp_path: Path) -> None:
    rows = [{**QUESTION, "question": f"Q{i}?"} for i in range(30)]
    prompts = {args[0] for args in requests_of(written(tmp_path / "rows.jsonl", rows), few_shot=3)}
    assert all(p.count("Answer: water") == 3 and p.count("Question: ") == 4 for p in prompts)
    for total, limit, few_shot, sizes in ((10, None, 3, (7, 3)), (10, 10, 3, (7, 3)), (100, 20, 2, (20, 64))):
        found = sample(total, limit, few_shot, "0", "")
        assert tuple(map(len, found)) == sizes and not set(found[0]) & set(found[1])
    with pytest.raises(InputError, match="2 rows: too few for --few-shot 2"):
        requests_of(written(tmp_path / "rows.jsonl", rows[:2]), few_shot=2)


def test_packed_files_are_the_same_tasks(tmp_path: Path) -> None:
    plain = written(tmp_path / "a.jsonl", [QUESTION, QUESTION])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    zstd = pytest.importorskip(
        "backports.zstd", reason="needs backports.zstd: pip install 'nbl-export[text]'"
    )
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(plain.read_bytes()))
    found = find_tasks([str(tmp_path)], EvalSettings())
    assert [task.name for task in found] == ["a", "b", "c"] and len({task.digest for task in found}) == 1


BAD = {
    "broken": (["{broken"], "line 2: not JSON"),
    "list": (["[1]"], "line 2: not a JSON object"),
    "high gold": (
        [{**QUESTION, "gold": 2}],
        "line 2: 'gold' is 2; it must be the number of one of the choices",
    ),
    "true gold": ([{**QUESTION, "gold": True}], "line 2: 'gold' is True"),
    "one choice": (
        [{**QUESTION, "choices": ["a"]}],
        "line 2: 'choices' is ['a']; it must be a list of two or more",
    ),
    "number": ([{**QUESTION, "question": 3}], "line 2: 'question' is 3; it must be text"),
    "other": ([{"ctx": "a", "choices": ["a", "b"], "gold": 0}], "line 2: no field 'question'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(tmp_path: Path, name: str) -> None:
    rows, words = BAD[name]
    path = written(tmp_path / "rows.jsonl", [QUESTION, *rows])
    with pytest.raises(InputError) as refusal:
        find_tasks([str(tmp_path)], EvalSettings())
    assert str(path) in str(refusal.value) and words in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"\n", "has no rows"),
        ("rows.jsonl", b'{"text": "\xff"}\n', "not UTF-8 text"),
        ("rows.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:20], "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        find_tasks([str(tmp_path)], EvalSettings())


# finding them -------------------------------------------------------------------------------------


def test_sources_are_refused_before_a_row_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("no row\n")
    check_tasks([str(tmp_path), "arc_easy", "own.yaml"])
    check_tasks([])
    with pytest.raises(InputError, match=r"hellaswagg is neither .*near: .*hellaswag"):
        check_tasks([str(tmp_path), "hellaswagg"])
    with pytest.raises(InputError, match=r"\./none does not exist"):
        check_tasks(["hellaswagg", "./none"])


MINE = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{rows}'}}}}
test_split: test
output_type: {kind}
doc_to_text: question
doc_to_target: {target}
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def mine(folder: Path, rows: Sequence[Any], **how: str) -> str:
    """A task file of the harness, as a user may have it."""
    written(folder / "rows.json", rows)
    said = {
        "kind": "multiple_choice",
        "target": "gold",
        "metric": "acc",
        "more": "doc_to_choice: choices",
        **how,
    }
    (folder / "mine.yaml").write_text(MINE.format(rows=folder / "rows.json", **said))
    return str(folder / "mine.yaml")


@pytest.mark.parametrize(
    ("kwargs", "refused"),
    [
        ("{do_sample: true, until: ['.']}", True),
        ("{temperature: 0.7, until: ['.']}", True),
        ("{until: ['.']}", False),
    ],
)
def test_a_task_that_samples_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kwargs: str, refused: bool
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    more = f"generation_kwargs: {kwargs}"
    path = mine(
        tmp_path, [{"question": "a", "gold": "b"}], kind="generate_until", metric="exact_match", more=more
    )
    if refused:
        with pytest.raises(InputError, match=r"The task mine samples its answers, .* greedily: leave it out"):
            find_tasks([path], EvalSettings())
    else:
        assert [task.name for task in find_tasks([path], EvalSettings())] == ["mine"]


def test_how_it_is_asked_is_part_of_what_identifies_it(tmp_path: Path) -> None:
    rows = [{**QUESTION, "question": f"Q{i}?"} for i in range(6)]
    path = str(written(tmp_path / "rows.jsonl", rows))

    def digest(**asked: Any) -> str:
        (task,) = find_tasks([path], EvalSettings(**asked))
        return task.digest

    plain = digest()
    assert digest(batch_size=2, min_recovery=90.0, retrieval=False) == plain
    others = [digest(few_shot=1), digest(seed=1), digest(chat_template=True), digest(limit=3)]
    assert len({plain, *others}) == 5
    written(tmp_path / "rows.jsonl", [*rows[:-1], {**rows[-1], "gold": 1}])
    assert digest() not in {plain, *others}


def test_what_is_missing_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match="A task needs lm-eval: pip install"):
        check_tasks(["arc_easy"])
    check_tasks([])


# running them -------------------------------------------------------------------------------------


def knows(right: Sequence[str]) -> Any:
    """A model of the harness that is sure of every answer that is in ``right``."""
    from lm_eval.api.model import LM

    class Knows(LM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[str] = []

        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            self.asked += [request.args[0] for request in requests]
            return [((-1.0, True) if r.args[1].strip() in right else (-9.0, False)) for r in requests]

        def generate_until(self, requests: Any, **_: Any) -> Any:
            return [next(iter(right)) for _ in requests]

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            return [-1.0] * len(requests)

    return Knows()


def test_scores_are_of_the_documents_in_their_order(tmp_path: Path) -> None:
    rows = [
        {"question": "Q0?", "choices": ["water", "sand"], "gold": 0},
        {"question": "Q1?", "choices": ["water", "sand", "stone", "wood"], "gold": 2},
        {"question": "Q2?", "choices": ["iron", "water"], "gold": 1},
    ]
    (task,) = find_tasks([str(written(tmp_path / "rows.jsonl", rows))], EvalSettings())
    found = run_task(knows(["water"]), task, EvalSettings())
    assert found.scores["acc"] == [1.0, 0.0, 1.0] and found.metrics["acc"] == pytest.approx(2 / 3)
    assert found.chance == [1 / 2, 1 / 4, 1 / 2]
    assert (found.documents, found.scored) == (3, "acc_norm")


def test_only_the_sampled_documents_of_a_task_file_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{**QUESTION, "question": f"Q{i}?", "gold": i % 2} for i in range(40)]
    (task,) = find_tasks([mine(tmp_path, rows)], EvalSettings(limit=5))
    model = knows(["water"])
    found = run_task(model, task, EvalSettings(limit=5))
    assert task.indices is not None
    assert [q for i, q in enumerate(model.asked) if not i % 2] == [f"Q{i}?" for i in task.indices]
    assert found.scores["acc"] == [float(i % 2 == 0) for i in task.indices] and found.chance == [0.5] * 5


def test_a_model_that_breaks_is_one_sentence_and_our_own_refusals_stay(tmp_path: Path) -> None:
    (task,) = find_tasks([str(written(tmp_path / "rows.jsonl", [QUESTION]))], EvalSettings())
    model = knows([])

    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such\noperator")

    model.loglikelihood = breaks
    with pytest.raises(
        InputError, match=r"does not run the task rows \(RuntimeError: no such\): leave it out"
    ):
        run_task(model, task, EvalSettings())

    def refuses(*_: Any, **__: Any) -> Any:
        raise MissingDependencyError("A reason.")

    model.loglikelihood = refuses
    with pytest.raises(MissingDependencyError, match=r"^A reason\.$"):
        run_task(model, task, EvalSettings())


# harness -------------------------------------------------------------------------------------------

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
    for found_sample, expected in zip(samples, references, strict=True):
        assert found_sample["arguments"] == expected["arguments"]
        for (found,), (answer,) in zip(found_sample["resps"], expected["resps"], strict=True):
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
