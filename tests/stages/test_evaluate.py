"""Evaluation and generation with the graphs of a finished folder: results, gates, tokens, and what is refused."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.report.evaluation import load_evaluation
from nbl_export.stages import evaluate as stage
from nbl_export.stages.rewrite import drop_baseline
from nbl_export.workspace import Workspace
from tests.finished import END, OTHER_END
from tests.processes import assert_refused, edit, nbl

harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install 'nbl-export[eval]'"
)

NAMES = ["fruit", "words"]
FRUIT = [
    {"question": f"Is {n} a number?", "choices": ["yes it is", "no", "it was"], "gold": n % 3}
    for n in range(12)
]
WORDS = [
    {"context": f"Once upon a {w}, there was a little", "target": "girl"} for w in ("time", "day", "hill")
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks of a few rows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in zip(NAMES, (FRUIT, WORDS), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is really asked of a graph, in order."""
    names: list[str] = []
    run_task, answer = stage.run_task, stage.answer

    def noting(lm: Any, task: Any, settings: Any) -> Any:
        names.append(lm.title)
        return run_task(lm, task, settings)

    def noting_retrieval(score: Any, questions: Any) -> Any:
        names.append(f"{questions[0].context} tokens")
        return answer(score, questions)

    monkeypatch.setattr(stage, "run_task", noting)
    monkeypatch.setattr(stage, "answer", noting_retrieval)
    return names


def settings(folder: Path, **more: Any) -> api.EvalSettings:
    return api.EvalSettings((str(folder),), **{"retrieval": False, **more})


@harness
def test_both_graphs_are_asked_and_compared(stories_copy: Path, folder: Path) -> None:
    value = api.evaluate(
        stories_copy, settings(folder, retrieval=True, retrieval_contexts=(400,), retrieval_samples=4)
    )
    assert value == load_evaluation(stories_copy / "report" / "eval.json")
    raw = json.loads((stories_copy / "report" / "eval.json").read_text())
    assert raw["schema"] == "nbl-export/eval/1" and raw["verdict"] == "no gate"
    fruit, words = value.tasks
    assert (fruit.name, fruit.documents, fruit.scored) == ("fruit", 12, "acc_norm")
    figures = fruit.metrics["acc_norm"]
    assert figures.chance == pytest.approx(1 / 3)
    assert figures.linearized.value - figures.base.value == pytest.approx(figures.difference.value)
    assert set(words.figures) == {"acc", "perplexity"} and set(words.metrics) == {"acc"}
    # The graphs differ, and so do their perplexities.
    assert words.figures["perplexity"].base != words.figures["perplexity"].linearized
    (entry,) = value.retrieval
    assert entry.context == 400 and entry.questions == 4 and len(entry.depths) == 4
    text = (stories_copy / "report" / "eval.md").read_text()
    assert "fruit, acc_norm" in text and "400 tokens, choice" in text and "words, perplexity" in text
    assert not (stories_copy / "report" / "eval-junit.xml").exists()


@harness
def test_figures_are_those_of_the_right_graph(stories_copy: Path, folder: Path) -> None:
    """The perplexity of each graph, from a bare session's logits."""
    from tests.alone import graph_logits

    value = api.evaluate(stories_copy, settings(folder / "words.jsonl"))
    model = Workspace.open(stories_copy).model_info
    assert model
    tokenizer = load_tokenizer(find_model(model["path"]))
    for role, graph in (("base", "baseline/model.onnx"), ("linearized", "model.onnx")):
        total = 0.0
        for row in WORDS:
            context = tokenizer(row["context"])["input_ids"]
            whole = tokenizer(f"{row['context']} {row['target']}")["input_ids"]
            logits = graph_logits(stories_copy / graph, "concat", [np.array(whole[:-1])], 0)[0].astype(
                np.float64
            )
            values = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            total += sum(values[i - 1, whole[i]] for i in range(len(context), len(whole)))
        found = getattr(value.tasks[0].figures["perplexity"], role)
        assert found == pytest.approx(np.exp(-total / len(WORDS)), rel=1e-4)


@harness
def test_what_is_done_is_kept(stories_copy: Path, folder: Path, asked: list[str]) -> None:
    first = api.evaluate(stories_copy, settings(folder))
    assert asked == ["base: fruit", "base: words", "linearized: fruit", "linearized: words"]
    assert api.evaluate(stories_copy, settings(folder)) == first and len(asked) == 4
    # A gate or a batch size asks nothing anew; another row does, of its task alone.
    api.evaluate(stories_copy, settings(folder, min_recovery=1, batch_size=2))
    assert len(asked) == 4
    with (folder / "fruit.jsonl").open("a") as file:
        file.write(json.dumps(FRUIT[0]) + "\n")
    api.evaluate(stories_copy, settings(folder))
    assert asked[4:] == ["base: fruit", "linearized: fruit"]
    api.evaluate(stories_copy, settings(folder, few_shot=1))
    assert asked[6:] == ["base: fruit", "base: words", "linearized: fruit", "linearized: words"]


@harness
def test_an_interrupted_run_goes_on(
    stories_copy: Path, folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_task = stage.run_task

    def interrupted(lm: Any, task: Any, how: Any) -> Any:
        if lm.title == "linearized: fruit":
            raise KeyboardInterrupt
        return run_task(lm, task, how)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "run_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.evaluate(stories_copy, settings(folder))
    assert not (stories_copy / "report" / "eval.json").exists()
    assert asked == ["base: fruit", "base: words"]
    api.evaluate(stories_copy, settings(folder))
    assert asked[2:] == ["linearized: fruit", "linearized: words"]


@harness
def test_a_changed_graph_is_asked_anew_and_the_base_is_not(
    stories_copy: Path, folder: Path, asked: list[str]
) -> None:
    contexts: Any = {"retrieval": True, "retrieval_contexts": (400,), "retrieval_samples": 2}
    before = api.evaluate(stories_copy, settings(folder, **contexts))
    api.select(stories_copy, api.SelectSettings(k=3))
    with pytest.raises(InputError, match="rewrite"):
        api.evaluate(stories_copy, settings(folder, **contexts))
    api.rewrite(stories_copy)
    del asked[:]
    after = api.evaluate(stories_copy, settings(folder, **contexts))
    assert asked == ["linearized: fruit", "linearized: words", "400 tokens"]
    assert (
        before.hashes["base"] == after.hashes["base"]
        and before.hashes["linearized"] != after.hashes["linearized"]
    )
    figures = [v.tasks[1].figures["perplexity"] for v in (before, after)]
    assert figures[0].base == figures[1].base and figures[0].linearized != figures[1].linearized


# The command line --------------------------------------------------------------------------------


@harness
def test_the_gate_is_the_exit_code(stories_copy: Path, tmp_path: Path) -> None:
    """One row over and over has no standard error, so the gate is as sharp as the recovery."""
    rows = [{"context": "Once upon a time, there was a little", "target": "girl"}] * 8
    (tmp_path / "girl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = ["eval", stories_copy, "--tasks", tmp_path / "girl.jsonl", "--no-retrieval"]
    value = api.evaluate(stories_copy, settings(tmp_path / "girl.jsonl"))
    figures = value.tasks[0].metrics["acc"]
    assert figures.base.value == 1.0 and figures.recovery is not None and figures.recovery.se == 0.0
    percent = 100 * figures.recovery.value
    above = nbl(*asked, "--min-recovery", percent + 1)
    assert above.code == 1 and "FAIL" in above.out and "failed" in above.out
    below = nbl(*asked, "--min-recovery", max(0, percent - 1))
    assert below.code == 0 and "PASS" in below.out
    suite = ElementTree.parse(stories_copy / "report" / "eval-junit.xml").getroot().find("testsuite")
    assert suite is not None and suite.get("failures") == "0" and suite.get("tests") == "2"


BAD = {
    "chat": (["--chat-template"], "has no chat template"),
    "positions": (["--retrieval-contexts", "400,513"], "513 tokens, the model 512 positions"),
}


@pytest.mark.parametrize("name", BAD)
@harness
def test_bad_usage_is_one_sentence(stories_out: Path, name: str) -> None:
    arguments, words = BAD[name]
    assert_refused(nbl("eval", stories_out, *arguments), 2, words)
    assert not (stories_out / "report" / "eval.json").exists()


@harness
def test_what_cuda_answers_is_kept_apart(
    stories_copy: Path,
    folder: Path,
    asked: list[str],
    cuda_sessions: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both graphs are asked on one device; what the CPU answered earlier is no half of a comparison."""
    monkeypatch.setattr("nbl_export.stages.run.find_device", torch.device)
    monkeypatch.setattr("nbl_export.stages.run.described", str)
    api.evaluate(stories_copy, settings(folder / "words.jsonl", device="cpu"))
    before = Workspace.open(stories_copy).record("eval")
    assert before and before.device == "cpu" and not {"device", "graphs"} & set(before.settings)
    assert {providers[0] for providers in cuda_sessions} == {"CPUExecutionProvider"}
    api.evaluate(stories_copy, settings(folder / "words.jsonl", device="cuda:0"))
    record = Workspace.open(stories_copy).record("eval")
    assert record and (record.device, record.settings["graphs"]) == ("cuda:0", "cuda")
    assert asked == ["base: words", "linearized: words"] * 2
    assert cuda_sessions[-1][0] == ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0"})
    api.evaluate(stories_copy, settings(folder / "words.jsonl", device="cpu"))
    assert len(asked) == 4


# generate --------------------------------------------------------------------------------------

PROMPT = "Once upon a time"
COUNT = 64


@pytest.fixture(scope="module")
def tokenizer(stories_folder: Path) -> Any:
    return load_tokenizer(find_model(str(stories_folder)))


def to_say(**asked: Any) -> api.GenerateSettings:
    return api.GenerateSettings(**{"max_tokens": COUNT, **asked})


def by_hand(model: Any, ids: list[int], stops: set[int]) -> list[int]:
    """Greedy, without a cache."""
    tokens: list[int] = []
    with torch.inference_mode():
        while len(tokens) < COUNT and not stops & set(tokens):
            logits = model(input_ids=torch.tensor([[*ids, *tokens]]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


def test_both_graphs_generate_what_pytorch_does_and_are_heard_piece_by_piece(
    stories_out: Path, stories_model: Any, tokenizer: Any
) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    expected = [by_hand(stories_model, ids, {END})]
    with linearized(stories_model, load_plan(stories_out / "nbl" / "plan.json")) as model:
        expected.append(by_hand(model, ids, {END}))
    heard: list[tuple[str, str]] = []
    found = api.generate(stories_out, PROMPT, to_say(graph="both"), told=lambda *one: heard.append(one))
    assert [list(each.tokens) for each in found] == expected and expected[0] != expected[1]
    assert [each.graph for each in found] == ["base", "linearized"]
    assert found[0].text == tokenizer.decode([*ids, *expected[0]], skip_special_tokens=True)[len(PROMPT) :]
    for each in found:
        pieces = [piece for graph, piece in heard if graph == each.graph]
        assert "".join(pieces) == each.text and len(pieces) > COUNT // 2 and all(pieces)


def test_with_a_chat_template_and_a_system_message(
    talking_out: Path, stories_model: Any, tokenizer: Any
) -> None:
    (found,) = api.generate(talking_out, "Lily was", to_say(graph="base", system="One day"))
    ids = [1, *tokenizer("One day\nLily was", add_special_tokens=False)["input_ids"]]
    assert list(found.tokens) == by_hand(stories_model, ids, {END, OTHER_END})
    (raw,) = api.generate(talking_out, "Lily was", to_say(graph="base", raw=True))
    assert list(raw.tokens) == by_hand(stories_model, tokenizer("Lily was")["input_ids"], {END, OTHER_END})


def test_turns_are_a_conversation(talking_out: Path, stories_model: Any, tokenizer: Any) -> None:
    """The second turn follows the first, its answer, and the end that the template writes after it."""
    heard: list[str] = []
    asked = to_say(graph="base", max_tokens=8)
    first, second = api.generate(
        talking_out, ["Lily was", "One"], asked, answered=lambda answer: heard.append(answer.text)
    )
    assert heard == [first.text, second.text]
    ids = tokenizer(f"<s>Lily was{first.text}</s>One", add_special_tokens=False)["input_ids"]
    assert second.figures.prompt_tokens == len(ids)
    assert list(second.tokens) == by_hand(stories_model, ids, {END, OTHER_END})[:8]


def test_another_form_of_the_cache_generates_the_same(stories_copy: Path) -> None:
    asked = to_say(graph="base", max_tokens=24)
    (expected,) = api.generate(stories_copy, PROMPT, asked)
    api.export(stories_copy, api.ExportSettings(kv_cache="static"))
    (found,) = api.generate(stories_copy, PROMPT, asked)
    assert found.tokens == expected.tokens


# what is refused ----------------------------------------------------------------------------------


RECORD = "nbl/workspace.json"


def refused(out: Path, **asked: Any) -> str:
    with pytest.raises(InputError) as caught:
        api.generate(out, PROMPT, to_say(**asked))
    return str(caught.value)


def test_a_folder_without_a_graph(talking_copy: Path) -> None:
    (talking_copy / "baseline" / "model.onnx").write_bytes(b"")
    assert "is missing or was changed after `export` wrote it" in refused(talking_copy, graph="base")
    drop_baseline(Workspace.open(talking_copy))
    assert "has no unmodified graph any more (--keep-baseline no)" in refused(talking_copy, graph="both")
    edit(talking_copy / RECORD, lambda s: s["stages"].pop("rewrite"))
    assert "has no finished `rewrite` yet: run `nbl-export rewrite" in refused(talking_copy)


def test_a_folder_of_an_encoder_or_without_a_tokenizer(
    talking_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "damaged_file", lambda *_: None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (talking_copy / name).unlink()
    assert "has no tokenizer: put the tokenizer.json" in refused(talking_copy)
    edit(talking_copy / RECORD, lambda s: s["model"].update(task="text-classification"))
    assert "is of a model that generates no text (text-classification)" in refused(talking_copy)
