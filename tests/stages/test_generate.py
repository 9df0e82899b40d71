"""What a graph generates is what PyTorch does, token by token, in either runtime."""

from __future__ import annotations

import shutil
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
from tests.talking import END, OTHER_END

PROMPTS = ["Once upon a time", "Lily wanted to"]
COUNT = 64


@pytest.fixture(params=["genai", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> str:
    if request.param == "genai":
        pytest.importorskip(
            "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
        )
    return str(request.param)


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


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_base_generates_what_transformers_does(
    stories_out: Path, stories_model: Any, tokenizer: Any, runtime: str, prompt: str
) -> None:
    ids = tokenizer(prompt, return_tensors="pt")
    whole = stories_model.generate(**ids, do_sample=False, max_new_tokens=COUNT)[0].tolist()
    expected = whole[ids["input_ids"].shape[1] :]
    (found,) = api.generate(stories_out, prompt, settings(graph="base", runtime=runtime))
    assert list(found.tokens) == expected and len(expected) == COUNT
    assert found.text == tokenizer.decode(whole)[len(prompt) :]
    assert (found.graph, found.why) == ("base", "max-tokens")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_linearized_graph_generates_what_pytorch_with_the_plan_does(
    stories_out: Path, stories_model: Any, tokenizer: Any, runtime: str, prompt: str
) -> None:
    ids = tokenizer(prompt)["input_ids"]
    with linearized(stories_model, load_plan(stories_out / "nbl" / "plan.json")) as model:
        expected = by_hand(model, ids, {END})
    (found,) = api.generate(stories_out, prompt, settings(runtime=runtime))
    assert list(found.tokens) == expected != by_hand(stories_model, ids, {END})
    assert found.graph == "linearized"


def test_with_a_chat_template_and_a_system_message(
    talking_out: Path, stories_model: Any, tokenizer: Any, runtime: str
) -> None:
    asked = settings(graph="base", runtime=runtime, system="One day")
    (found,) = api.generate(talking_out, "Lily was", asked)
    ids = [1, *tokenizer("One day\nLily was", add_special_tokens=False)["input_ids"]]
    assert list(found.tokens) == by_hand(stories_model, ids, {END, OTHER_END})
    assert found.figures.prompt_tokens == len(ids)
    (raw,) = api.generate(talking_out, "Lily was", settings(graph="base", runtime=runtime, raw=True))
    assert list(raw.tokens) == by_hand(stories_model, tokenizer("Lily was")["input_ids"], {END, OTHER_END})


@pytest.mark.parametrize("graph", ["base", "linearized"])
def test_any_stop_token_ends_it_and_is_not_shown(talking_copy: Path, runtime: str, graph: str) -> None:
    asked = settings(graph=graph, runtime=runtime)
    (free,) = api.generate(talking_copy, PROMPTS[0], asked)
    at, stop = next((i, t) for i, t in enumerate(free.tokens) if i > 8 and t not in free.tokens[:i])
    from nbl_export.generate import prompts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "_ids", lambda value: [END, stop])
        (found,) = api.generate(talking_copy, PROMPTS[0], asked)
    assert found.tokens == free.tokens[: at + 1] and found.why == "ended"
    assert free.text.startswith(found.text) and found.text


def test_both_are_one_after_the_other_and_heard_piece_by_piece(talking_out: Path, runtime: str) -> None:
    heard: list[tuple[str, str]] = []
    asked = settings(graph="both", runtime=runtime)
    found = api.generate(talking_out, PROMPTS[0], asked, told=lambda *piece: heard.append(piece))
    assert [each.graph for each in found] == ["base", "linearized"]
    for each in found:
        pieces = [piece for graph, piece in heard if graph == each.graph]
        assert "".join(pieces) == each.text and len(pieces) > COUNT // 2 and all(pieces)
    assert [graph for graph, _ in heard] == sorted(graph for graph, _ in heard)
    assert found[0].text != found[1].text


def test_nobody_listens_any_more(talking_out: Path) -> None:
    heard: list[str] = []

    def told(_graph: str, piece: str) -> bool:
        heard.append(piece)
        return len(heard) < 3

    (found,) = api.generate(talking_out, PROMPTS[0], settings(graph="both"), told=told)
    assert len(heard) == 3 and found.text == "".join(heard) and found.why == "stopped"


def test_a_seed_is_a_text_and_its_limits_are_greedy(talking_out: Path, runtime: str) -> None:
    def text(**asked: Any) -> str:
        (found,) = api.generate(talking_out, PROMPTS[0], settings(runtime=runtime, max_tokens=24, **asked))
        return found.text

    one = text(temperature=0.9, seed=1)
    assert one == text(temperature=0.9, seed=1) != text(temperature=0.9, seed=2)
    greedy = text()
    assert one != greedy == text(temperature=1e-9) == text(temperature=1.0, top_p=1e-9, seed=5)


def test_a_prompt_longer_than_the_positions_is_refused_with_numbers(
    talking_out: Path, tokenizer: Any, runtime: str
) -> None:
    long = "a " * 600
    count = len(tokenizer(long, add_special_tokens=False)["input_ids"]) + 1
    with pytest.raises(InputError, match=rf"^The prompt has {count:,} tokens, and the model 512 positions"):
        api.generate(talking_out, long, settings(runtime=runtime))


def test_it_ends_at_the_last_position(talking_out: Path, tokenizer: Any, runtime: str) -> None:
    words = "one day " * 250
    ids = tokenizer(words, add_special_tokens=False)["input_ids"][:500]
    prompt = tokenizer.decode(ids)
    (found,) = api.generate(talking_out, prompt, settings(runtime=runtime, raw=True))
    assert found.why in ("positions", "ended")
    assert found.figures.prompt_tokens + len(found.tokens) <= 513
    if found.why == "positions":
        assert found.figures.prompt_tokens + len(found.tokens) == 513


@pytest.mark.parametrize("cache", ["shared", "static", "none"])
def test_every_form_of_the_cache_generates_the_same(stories_copy: Path, runtime: str, cache: str) -> None:
    if (runtime, cache) == ("genai", "static"):
        pytest.skip("it has no configuration")
    (expected,) = api.generate(stories_copy, PROMPTS[0], settings(graph="base", max_tokens=24))
    api.export(stories_copy, api.ExportSettings(kv_cache=cache))
    has_config = (stories_copy / "baseline" / "genai_config.json").is_file()
    asked = settings(graph="base", max_tokens=24, runtime=runtime if has_config else "auto")
    (found,) = api.generate(stories_copy, PROMPTS[0], asked)
    assert found.tokens == expected.tokens


def test_the_folder_is_enough_and_is_not_changed(talking_out: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(talking_out, tmp_path / "elsewhere"))
    before = {p: p.read_bytes() for p in moved.rglob("*") if p.is_file() and p.name != "digests.json"}
    (found,) = api.generate(moved, PROMPTS[0])
    assert found.text == api.generate(talking_out, PROMPTS[0])[0].text
    after = {p: p.read_bytes() for p in moved.rglob("*") if p.is_file() and p.name != "digests.json"}
    assert after == before
