"""Tasks of the harness: by name, by file and of rows; what they score, and which are refused before any work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.evaluate import tasks
from nbl_export.evaluate.tasks import check_tasks, find_tasks, require_lm_eval, run_task
from nbl_export.packages import pip_line
from nbl_export.settings import EvalSettings
from tests.evaluate.test_local_tasks import QUESTION, written

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'nbl-export[eval]'")


# finding them -------------------------------------------------------------------------------------


def test_names_of_the_harness(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hellaswagg is neither .*near: .*hellaswag"):
        find_tasks(["hellaswagg"], EvalSettings())
    written(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(InputError, match="Two tasks are called rows"):
        find_tasks([str(tmp_path), str(tmp_path / "rows.jsonl")], EvalSettings())


def test_sources_are_refused_before_a_row_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("no row\n")
    check_tasks([str(tmp_path), "arc_easy", "own.yaml"])
    check_tasks([])
    with pytest.raises(InputError, match=r"hellaswagg is neither .*near: .*hellaswag"):
        check_tasks([str(tmp_path), "hellaswagg"])
    with pytest.raises(InputError, match=r"\./none does not exist"):
        check_tasks(["hellaswagg", "./none"])


def test_a_task_that_the_hub_does_not_give_is_named() -> None:
    with pytest.raises(InputError, match=r"The task arc_easy cannot be loaded \(.*check the network"):
        find_tasks(["arc_easy"], EvalSettings(limit=2))


def test_a_task_file_of_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own form of a task, on local data: its documents are sampled too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    written(tmp_path / "rows.json", [{**QUESTION, "question": f"Q{i}?"} for i in range(40)])
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{tmp_path}/rows.json'}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: gold\n"
        "doc_to_choice: choices\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (task,) = find_tasks([str(tmp_path / "mine.yaml")], EvalSettings(limit=8))
    assert task.name == "mine" and task.total == 40
    assert task.indices is not None and len(task.indices) == 8 and list(task.indices) == sorted(task.indices)
    assert list(task.indices) != list(range(8))
    (again,) = find_tasks([str(tmp_path / "mine.yaml")], EvalSettings(limit=8))
    (other,) = find_tasks([str(tmp_path / "mine.yaml")], EvalSettings(limit=8, seed=1))
    assert again.digest == task.digest != other.digest


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
        ("{do_sample: false, temperature: 0.0, until: ['.']}", False),
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
    require_lm_eval()
    find_spec = tasks.importlib.util.find_spec
    for gone in ("lm_eval", "datasets"):
        monkeypatch.setattr(
            tasks.importlib.util,
            "find_spec",
            lambda name, *a, gone=gone: None if name == gone else find_spec(name, *a),
        )
        with pytest.raises(
            MissingDependencyError, match=re.escape(f"Tasks need {gone}: {pip_line('eval')}.")
        ):
            require_lm_eval()


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


def test_a_written_answer_has_no_chance(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": "3"}]
    (task,) = find_tasks([str(written(tmp_path / "rows.jsonl", rows))], EvalSettings())
    found = run_task(knows(["2"]), task, EvalSettings())
    assert found.scored == "exact_match" and found.scores["exact_match"] == [1.0, 0.0]
    assert found.chance == [0.0, 0.0]


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
