"""What a graph generates is what PyTorch does, token by token; folders that generate nothing are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.stages.rewrite import drop_baseline
from nbl_export.workspace import Workspace
from tests.finished import END, OTHER_END

PROMPT = "Once upon a time"
COUNT = 64


@pytest.fixture(scope="module")
def tokenizer(stories_folder: Path) -> Any:
    return load_tokenizer(find_model(str(stories_folder)))


def settings(**asked: Any) -> api.GenerateSettings:
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
    found = api.generate(stories_out, PROMPT, settings(graph="both"), told=lambda *one: heard.append(one))
    assert [list(each.tokens) for each in found] == expected and expected[0] != expected[1]
    assert [each.graph for each in found] == ["base", "linearized"]
    assert found[0].text == tokenizer.decode([*ids, *expected[0]], skip_special_tokens=True)[len(PROMPT) :]
    for each in found:
        pieces = [piece for graph, piece in heard if graph == each.graph]
        assert "".join(pieces) == each.text and len(pieces) > COUNT // 2 and all(pieces)


def test_with_a_chat_template_and_a_system_message(
    talking_out: Path, stories_model: Any, tokenizer: Any
) -> None:
    (found,) = api.generate(talking_out, "Lily was", settings(graph="base", system="One day"))
    ids = [1, *tokenizer("One day\nLily was", add_special_tokens=False)["input_ids"]]
    assert list(found.tokens) == by_hand(stories_model, ids, {END, OTHER_END})
    (raw,) = api.generate(talking_out, "Lily was", settings(graph="base", raw=True))
    assert list(raw.tokens) == by_hand(stories_model, tokenizer("Lily was")["input_ids"], {END, OTHER_END})


def test_turns_are_a_conversation(talking_out: Path, stories_model: Any, tokenizer: Any) -> None:
    """The second turn follows the first, its answer, and the end that the template writes after it."""
    heard: list[str] = []
    asked = settings(graph="base", max_tokens=8)
    first, second = api.generate(
        talking_out, ["Lily was", "One"], asked, answered=lambda answer: heard.append(answer.text)
    )
    assert heard == [first.text, second.text]
    ids = tokenizer(f"<s>Lily was{first.text}</s>One", add_special_tokens=False)["input_ids"]
    assert second.figures.prompt_tokens == len(ids)
    assert list(second.tokens) == by_hand(stories_model, ids, {END, OTHER_END})[:8]


def test_another_form_of_the_cache_generates_the_same(stories_copy: Path) -> None:
    asked = settings(graph="base", max_tokens=24)
    (expected,) = api.generate(stories_copy, PROMPT, asked)
    api.export(stories_copy, api.ExportSettings(kv_cache="static"))
    (found,) = api.generate(stories_copy, PROMPT, asked)
    assert found.tokens == expected.tokens


# what is refused ----------------------------------------------------------------------------------


def record(out: Path, how: Callable[[Any], object]) -> None:
    """Change the record of the folder."""
    path = out / "nbl" / "workspace.json"
    found = json.loads(path.read_text())
    how(found)
    path.write_text(json.dumps(found))


def refused(out: Path, **asked: Any) -> str:
    with pytest.raises(InputError) as caught:
        api.generate(out, PROMPT, settings(**asked))
    return str(caught.value)


def test_a_folder_without_a_graph(talking_copy: Path) -> None:
    (talking_copy / "baseline" / "model.onnx").write_bytes(b"")
    assert "is missing or was changed after `export` wrote it" in refused(talking_copy, graph="base")
    drop_baseline(Workspace.open(talking_copy))
    assert "has no unmodified graph any more (--keep-baseline no)" in refused(talking_copy, graph="both")
    record(talking_copy, lambda s: s["stages"].pop("rewrite"))
    assert "has no finished `rewrite` yet: run `nbl-export rewrite" in refused(talking_copy)


def test_a_folder_of_an_encoder_or_without_a_tokenizer(
    talking_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "damaged_file", lambda *_: None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (talking_copy / name).unlink()
    assert "has no tokenizer: put the tokenizer.json" in refused(talking_copy)
    record(talking_copy, lambda s: s["model"].update(task="text-classification"))
    assert "is of a model that generates no text (text-classification)" in refused(talking_copy)
