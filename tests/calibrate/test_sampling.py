"""Text sampled from the model itself, against the same draws made without a cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.calibrate import sampling
from nbl_export.calibrate.sampling import sample_from_model
from nbl_export.calibrate.text import CalibrationText
from nbl_export.errors import InputError
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.weights import Stored, streamed
from nbl_export.progress import Silent
from nbl_export.settings import CalibrateSettings
from tests.listening import Notes
from tests.models.test_weights import reads

SMALL = CalibrateSettings(samples=3, seq_len=12, heldout_samples=2, selection_samples=2, seed=5)


PARTS = ("calibration", "selection", "heldout")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(find_model(str(tiny_folder)))


def drawn(model: Any, count: int, length: int, seed: int) -> np.ndarray:
    """The same draws without a cache: all of a document so far goes through the model at every step."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((count, 1), 256)
    with torch.inference_mode():
        for _ in range(length):
            probabilities = torch.softmax(model(input_ids=rows).logits[:, -1], -1).double().numpy()
            draws = torch.rand(count, 1, generator=generator).double().numpy()
            token = (probabilities.cumsum(-1) < draws * probabilities.sum(-1, keepdims=True)).sum(-1)
            rows = torch.cat([rows, torch.from_numpy(token)[:, None]], 1)
    return rows[:, 1:].numpy()


def test_sampled_text_has_the_asked_shape(model: Any, tokenizer: Any) -> None:
    listener = Notes()
    text = sample_from_model(model, tokenizer, SMALL, listener)
    assert text.calibration.shape == (3, 12)
    assert text.selection.shape == text.selection_document.shape == (2, 12)
    assert text.heldout.shape == text.heldout_document.shape == (2, 12)
    assert all(
        getattr(text, name).dtype == np.int32 for name in CalibrationText.__annotations__ if name != "media"
    )
    assert text.start.tolist() == [256]
    assert listener.start[0] == sum(listener.advanced) >= 7 * 12
    rows = {tuple(r) for part in PARTS for r in getattr(text, part).tolist()}
    assert len(rows) == 7
    assert all(0 <= token < 260 for row in rows for token in row)


@pytest.mark.parametrize("token", [-1, 300, 2**40])
def test_a_start_that_the_model_does_not_know_is_refused(model: Any, token: int) -> None:
    tokenizer = SimpleNamespace(bos_token_id=token, eos_token_id=0, pad_token_id=0)
    embedded = model.get_input_embeddings().weight.shape[0]
    said = f"begins a text with the token {token:,}, the model has embeddings of {embedded} tokens: use the tokenizer"
    with pytest.raises(InputError, match=said):
        sample_from_model(model, tokenizer, SMALL, Silent())


def test_sampling_follows_the_seed(model: Any, tokenizer: Any) -> None:
    one, same = (sample_from_model(model, tokenizer, SMALL, Silent()) for _ in range(2))
    torch.manual_seed(99)  # the global generator plays no part
    again = sample_from_model(model, tokenizer, SMALL, Silent())
    other = sample_from_model(model, tokenizer, replace(SMALL, seed=6), Silent())
    for name in PARTS:
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
        assert np.mean(getattr(one, name) == getattr(other, name)) < 0.5


def test_sampling_draws_from_the_model_itself(model: Any, tokenizer: Any) -> None:
    text = sample_from_model(model, tokenizer, SMALL, Silent())
    expected = drawn(model, 7, 12, 5)
    expected[:, -1] = tokenizer.eos_token_id  # each document is ended, as in packed text
    np.testing.assert_array_equal(np.concatenate([getattr(text, part) for part in PARTS]), expected)


@pytest.mark.parametrize("vocab", [1, 256, 1000])
def test_a_token_is_found_where_the_running_sum_reaches_its_number(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(64, vocab, generator=generator) * 4
    logits[:, vocab // 2 + 1 :] = -float("inf")  # nobody draws these
    distribution = torch.softmax(logits, -1)
    numbers = torch.rand(64, 1, generator=generator)
    numbers[:2, 0] = torch.tensor([0.0, 1 - 2**-24])
    tokens = sampling._drawn(distribution, numbers)
    assert tokens.shape == (64, 1) and tokens.dtype == torch.int64
    assert int(tokens.max()) <= vocab // 2
    running = distribution.double().cumsum(-1)
    wanted = numbers.double() * running[:, -1:]
    # Up to the rounding of float32 sums, the number lies within the token's share.
    assert torch.all(running.gather(1, tokens) >= wanted - 1e-5)
    before = running.gather(1, tokens) - distribution.double().gather(1, tokens)
    assert torch.all(before <= wanted + 1e-5)


def test_long_rows_hold_several_sampled_documents(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.calibrate.sampling._SAMPLE_LENGTH", 8)
    text = sample_from_model(model, tokenizer, SMALL, Silent())
    # 36 calibration tokens are five documents, the last one cut; the 24 of each other part are three others.
    documents = drawn(model, 11, 8, 5)
    documents[:, -1] = tokenizer.eos_token_id
    np.testing.assert_array_equal(text.calibration.reshape(-1), documents[:5].reshape(-1)[:36])
    np.testing.assert_array_equal(text.selection.reshape(-1), documents[5:8].reshape(-1))
    np.testing.assert_array_equal(text.heldout.reshape(-1), documents[8:].reshape(-1))
    for owners in (text.selection_document.reshape(3, 8), text.heldout_document.reshape(3, 8)):
        assert [set(row.tolist()) for row in owners] == [{owner} for owner in owners[:, 0].tolist()]
        assert len(set(owners[:, 0].tolist())) == 3
    assert not set(text.selection_document.reshape(-1)) & set(text.heldout_document.reshape(-1))


# larger than memory ------------------------------------------------------------------------------


@pytest.fixture
def read_by_block(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sampling, "room", lambda _model: 0)
    low = streamed(Stored(model), torch.float32)
    dummy_run(low)
    return low


def test_one_read_serves_a_token_of_all_documents(
    model: Any, read_by_block: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_SAMPLE_BATCH", 3)
    expected = sample_from_model(model, tokenizer, SMALL, Silent())
    each = 12 * 4 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, their size, bytes
    for memory, passes in ((7 * each, 12), (7 * each - 1, 2 * 12), (each / 2, 7 * 12)):
        monkeypatch.setattr(sampling, "half_free", lambda _model, memory=memory: memory)
        with reads() as found:
            text = sample_from_model(read_by_block, tokenizer, SMALL, Silent())
        assert set(Counter(found).values()) == {passes}
        for name in PARTS:
            np.testing.assert_array_equal(getattr(text, name), getattr(expected, name))


@pytest.mark.parametrize(("limit", "said"), [(0, 1), (86400, 0)])
def test_what_takes_days_is_said_once(
    read_by_block: Any, tokenizer: Any, limit: float, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_LONG_SECONDS", limit)
    listener = Notes()
    sample_from_model(read_by_block, tokenizer, SMALL, listener)
    assert len(listener.notes) == said
    if said:
        assert "Sampling reads all weights 12 times" in listener.notes[0]
        assert listener.notes[0].endswith("here: name a text with --calibration.")
