"""Local rows: how each shape is asked, which rows are sampled, and what is refused with file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.evaluate.local_tasks import local_tasks, sample, shapes, task_files
from nbl_export.evaluate.tasks import task_of_rows

QUESTION = {"question": "What is wet?", "choices": ["water", "sand"], "gold": 0, "id": "1"}


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def requests_of(path: Path, few_shot: int = 0) -> list[tuple[Any, ...]]:
    """What the harness asks a model for the rows of a file."""
    (task,) = local_tasks(str(path), None, few_shot) or ()
    built = task_of_rows(task, few_shot)
    built.set_fewshot_seed(0)
    built.build_all_requests()
    return [i.args for i in built.instances]


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


def test_every_shape_is_tested() -> None:
    assert {s.name for s in shapes()} == {*ASKED, "answer"}


def test_shared_files_are_recognized(shared_data: Path) -> None:
    tasks = local_tasks(str(shared_data / "eval"), 5) or []
    assert {t.name: t.shape.name for t in tasks} == {
        "arc_challenge_train": "question",
        "arc_easy_train": "question",
        "boolq_valid": "passage",
        "hellaswag_valid": "ctx",
        "lambada_openai_test": "target",
        "mmlu_dev": "subject",
        "mmlu_test": "subject",
        "openbookqa_train": "question",
        "piqa_valid": "question",
        "winogrande_xl_valid": "sentence",
    }
    assert all(len(t.rows) == 5 for t in tasks)


def test_rows_are_sampled_over_the_whole_file(shared_data: Path) -> None:
    file = str(shared_data / "eval" / "mmlu_test.jsonl.gz")
    (task,) = local_tasks(file, 100) or ()
    # The file is in the order of its 57 subjects; its first hundred rows are of one or two.
    assert len({r["subject"] for r in task.rows}) > 30 and task.total == 7014
    (again,), (other,) = (local_tasks(file, 100, seed=s) or () for s in (0, 1))
    assert again == task and again.digest == task.digest
    assert other.rows != task.rows and other.digest != task.digest


def test_few_shot_examples_are_no_rows_that_are_asked(tmp_path: Path) -> None:
    rows = [{**QUESTION, "question": f"Q{i}?"} for i in range(30)]
    path = written(tmp_path / "rows.jsonl", rows)
    (task,) = local_tasks(str(path), 10, few_shot=3) or ()
    asked, pool = ({r["question"] for r in part} for part in (task.rows, task.pool))
    assert len(asked) == 10 and len(pool) >= 3 and not asked & pool
    prompts = {args[0] for args in requests_of(path, few_shot=3)}
    assert all(p.count("Answer: water") == 3 and p.count("Question: ") == 4 for p in prompts)
    for total, limit, few_shot, sizes in ((10, None, 3, (7, 3)), (10, 10, 3, (7, 3)), (100, 20, 2, (20, 64))):
        found = sample(total, limit, few_shot, "0", "")
        assert tuple(map(len, found)) == sizes and not set(found[0]) & set(found[1])


def test_compressed_files_are_the_same_tasks(tmp_path: Path) -> None:
    plain = written(tmp_path / "a.jsonl", [QUESTION, QUESTION])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    one, two = local_tasks(str(tmp_path)) or ()
    assert (one.name, two.name) == ("a", "b") and one.rows == two.rows
    zstd = pytest.importorskip(
        "backports.zstd", reason="needs backports.zstd: pip install 'nbl-export[text]'"
    )
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(plain.read_bytes()))
    (three,) = local_tasks(str(tmp_path / "c.jsonl.zst")) or ()
    assert three.rows == one.rows


BAD = {
    "broken": (["{broken"], "line 2: not JSON"),
    "list": (["[1]"], "line 2: not a JSON object"),
    "high gold": (
        [{**QUESTION, "gold": 2}],
        "line 2: 'gold' is 2; it must be the number of one of the 2 choices",
    ),
    "negative gold": ([{**QUESTION, "gold": -1}], "line 2: 'gold' is -1"),
    "text gold": ([{**QUESTION, "gold": "0"}], "line 2: 'gold' is '0'"),
    "true gold": ([{**QUESTION, "gold": True}], "line 2: 'gold' is True"),
    "one choice": ([{**QUESTION, "choices": ["a"]}], "line 2: 'choices' must be a list of two or more"),
    "empty choice": ([{**QUESTION, "choices": ["a", ""]}], "line 2: 'choices' must be a list"),
    "number": ([{**QUESTION, "question": 3}], "line 2: 'question' is not text"),
    "other": ([{"ctx": "a", "choices": ["a", "b"], "gold": 0}], "line 2: no field 'question'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(tmp_path: Path, name: str) -> None:
    rows, words = BAD[name]
    path = written(tmp_path / "rows.jsonl", [QUESTION, *rows])
    with pytest.raises(InputError) as refusal:
        local_tasks(str(tmp_path))
    assert str(path) in str(refusal.value) and words in str(refusal.value)


FIRST = {
    "unknown fields": ({"prompt": "a", "label": 1}, "no task has rows with the fields prompt, label"),
    "no blank": ({"sentence": "None.", "choices": ["a", "b"], "gold": 0}, "has no blank"),
    "empty target": ({"context": "a", "target": " "}, "'target' is empty"),
    "too many letters": (
        {"subject": "s", "question": "q", "choices": [str(i) for i in range(27)], "gold": 0},
        "27 choices; there are letters for 26",
    ),
}


@pytest.mark.parametrize("name", FIRST)
def test_a_bad_first_row_is_named(tmp_path: Path, name: str) -> None:
    row, words = FIRST[name]
    with pytest.raises(InputError, match=f"line 1: .*{words}"):
        local_tasks(str(written(tmp_path / "rows.jsonl", [row])))


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no tasks"):
        local_tasks(str(tmp_path))
    for missing in (str(tmp_path / "none"), "./none", "none.jsonl.gz"):
        with pytest.raises(InputError, match="does not exist"):
            local_tasks(missing)
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="is not a task"):
        local_tasks(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no rows"):
        local_tasks(str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8 text"):
        local_tasks(str(tmp_path))
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:20])
    with pytest.raises(InputError, match="cannot be unpacked"):
        local_tasks(str(tmp_path))
    assert local_tasks("hellaswag") is None and task_files("hellaswag") is None
    assert task_files(str(tmp_path)) == [tmp_path / "rows.jsonl.gz"]  # which cannot be read


def test_too_few_rows_for_examples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 rows: too few for --few-shot 2"):
        local_tasks(str(written(tmp_path / "rows.jsonl", [QUESTION] * 2)), None, 2)
