"""Text sampled from the model itself, and the probe, against passes without a cache and without padding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.calibrate import collect as module
from nbl_export.calibrate import sampling
from nbl_export.calibrate.collect import States
from nbl_export.calibrate.probe import Probe, load_probe, probe_model, save_probe
from nbl_export.calibrate.sampling import sample_from_model
from nbl_export.errors import InputError
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.weights import Stored, streamed
from nbl_export.progress import Silent
from nbl_export.ranks import ALONE, Ranks
from nbl_export.settings import CalibrateSettings
from tests.models.test_weights import reads
from tests.processes import Notes, forked
from tests.tiny_types import BEYOND, activations

SMALL = CalibrateSettings(samples=3, seq_len=12, heldout_samples=2, selection_samples=2, seed=5)


PARTS = ("calibration", "selection", "heldout")


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


@pytest.mark.parametrize("token", [-1, 300])
def test_a_start_that_the_model_does_not_know_is_refused(model: Any, token: int) -> None:
    tokenizer = SimpleNamespace(bos_token_id=token, eos_token_id=0, pad_token_id=0)
    embedded = model.get_input_embeddings().weight.shape[0]
    said = f"begins a text with the token {token:,}, the model has embeddings of {embedded} tokens: use the tokenizer"
    with pytest.raises(InputError, match=said):
        sample_from_model(model, tokenizer, SMALL, Silent())


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
    text = sample_from_model(model, tokenizer, SMALL, listener := Notes())
    assert text.start.tolist() == [256] and listener.start[0] == sum(listener.advanced)
    assert [getattr(text, part).dtype for part in PARTS] == [np.int32] * 3
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
            text = sample_from_model(read_by_block, tokenizer, SMALL, listener := Notes())
        assert set(Counter(found).values()) == {passes}
        assert f"Sampling reads all weights {passes} times" in listener.notes[0]
        for name in PARTS:
            np.testing.assert_array_equal(getattr(text, name), getattr(expected, name))


# the probe ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(5, 64)).astype(np.int32)


@pytest.fixture(scope="module")
def probe(model: Any, tokens: np.ndarray) -> Probe:
    return probe_model(model, tokens)


def test_the_batch_is_ragged_real_text(probe: Probe, tokens: np.ndarray) -> None:
    lengths = probe.inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    for i, length in enumerate(lengths):
        np.testing.assert_array_equal(probe.inputs["input_ids"][i][-length:], tokens[i][:length])
        np.testing.assert_array_equal(
            probe.inputs["attention_mask"][i], np.arange(lengths.max()) >= lengths.max() - length
        )
        np.testing.assert_array_equal(probe.inputs["position_ids"][i][-length:], np.arange(length))


def test_activations_are_those_of_every_row_alone(model: Any, probe: Probe) -> None:
    rows = [
        ids[mask == 1]
        for ids, mask in zip(probe.inputs["input_ids"], probe.inputs["attention_mask"], strict=True)
    ]
    alone = []
    for row in rows:
        with torch.inference_mode(), activations(model) as kept:
            model(input_ids=torch.from_numpy(row)[None])
        alone.append(kept)
    for name in ("h", "x", "y"):
        values = getattr(probe, name)
        assert set(values) == {0, 1, 2, 3}
        for index, got in values.items():
            want = np.concatenate([kept[index][name][0][0].numpy() for kept in alone])
            assert got.dtype == np.float32
            assert got.shape == (sum(map(len, rows)), 32)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
            # Neighbouring tokens differ far more than that, so an order or an offset would show.
            assert np.abs(want - np.roll(want, 1, axis=0)).max() > 0.1 * np.abs(want).max()


def test_a_probe_comes_back_to_the_bit(probe: Probe, tmp_path: Path) -> None:
    save_probe(tmp_path / "probe.safetensors", probe)
    loaded = load_probe(tmp_path / "probe.safetensors")
    assert {array.dtype for array in loaded.inputs.values()} == {np.dtype(np.int64)}
    np.testing.assert_equal(dict(loaded.inputs), dict(probe.inputs))
    for name in ("h", "x", "y"):
        np.testing.assert_equal(dict(getattr(loaded, name)), dict(getattr(probe, name)))


@pytest.mark.parametrize(
    ("name", "changes", "width", "found"),
    [
        ("mistral", {}, 160, (108, 16)),
        ("mistral", {"sliding_window": 8}, 160, (24, 16)),
        ("mistral", {"sliding_window": None}, 160, (24, 16)),
        # No longer than the rows of the text, and than what the proof has memory for.
        ("mistral", {}, 60, (60, 16)),
        ("mistral", {"sliding_window": 400000, "max_position_embeddings": 500000}, 160, (24, 16)),
        # The longest row of a batch decides for all: both lie beyond.
        ("phi3", {}, 160, (108, 108)),
        ("phi3", {"original_max_position_embeddings": 20}, 22, (22, 22)),
    ],
)
def test_a_row_goes_beyond_a_length_where_there_is_room(
    name: str, changes: Any, width: int, found: tuple[int, int]
) -> None:
    tokens = np.random.default_rng(0).integers(3, 250, (2, width)).astype(np.int32)
    made = probe_model(BEYOND[name].model(**changes), tokens)
    assert tuple(made.inputs["attention_mask"].sum(axis=1)) == found


# states --------------------------------------------------------------------------------------

VALUES, BATCHES = 25, 5  # 100 bytes in float32
SCARCE, LARGE = 100, 1 << 20
OURS = {"model": "ours"}


class Model(torch.nn.Module):
    """Computes in ``dtype``."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))


def of(number: int, part: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The states of a batch before a part."""
    return torch.randn(5, 5, generator=torch.Generator().manual_seed(100 * part + number)).to(dtype)


def made(
    folder: Path | None, ranks: Ranks = ALONE, memory: int = LARGE, identity: Any = OURS, **how: Any
) -> States:
    numbers = ranks.mine(range(BATCHES))
    return States(how.pop("model", Model()), numbers, VALUES, memory, folder, identity, ranks, **how)


def walked(states: States, parts: int) -> None:
    for part in range(1, parts + 1):
        for number in states.numbers:
            states.put(number, of(number, part))
        states.turn()
        states.save()


def assert_before(states: States, part: int) -> None:
    assert states.part == part
    for number in states.numbers:
        found = states.get(number)
        assert found is not None and torch.equal(found, of(number, part))


@pytest.mark.parametrize("memory", [SCARCE, LARGE])
def test_states_after_a_part_are_those_before_the_next(tmp_path: Path, memory: int) -> None:
    for folder in (None, tmp_path):
        states = made(folder, memory=memory)
        assert states.on_disk == (memory == SCARCE) and states.get(0) is None
        for part in range(1, 4):
            for number in states.numbers:
                states.put(number, of(number, part))
                if folder and part > 1:
                    assert torch.equal(states.get(number), of(number, part - 1))  # type: ignore[arg-type]
            states.turn()
            assert_before(states, part)
    assert len(list(tmp_path.iterdir())) == (BATCHES if memory == SCARCE else 0), (
        "those of other parts are gone"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_is_lost(tmp_path: Path, dtype: torch.dtype) -> None:
    states = made(tmp_path, memory=SCARCE, model=Model(dtype))
    special = of(0, 0, dtype)
    special[0, :4] = torch.tensor([float("inf"), -0.0, 1e-40, 3.0]).to(dtype)
    states.put(0, special)
    states.turn()
    found = states.get(0)
    assert found is not None and found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), special.view(torch.uint8))


def test_they_are_in_memory_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Five batches of 100 bytes, before and after a part.
    for limit, on_disk in ((1000, False), (999, True), (100, True)):
        assert made(tmp_path, memory=limit).on_disk == on_disk
        monkeypatch.setattr(module, "half_free", lambda _model, limit=limit: limit)
        assert States(Model(), range(BATCHES), VALUES).on_disk == on_disk
    with pytest.raises(InputError) as caught:
        States(Model(), range(BATCHES), 25_001, 100_000)
    assert str(caught.value) == (
        "--memory 100,000 bytes is less than the states of one batch of rows take: give 101kB or more, or lower "
        "--seq-len."
    )


def test_files_that_nothing_goes_on_from_go_with_them() -> None:
    states = made(None, memory=SCARCE)
    walked(states, 1)
    folder = states._place
    assert folder is not None and len(list(folder.iterdir())) == BATCHES
    del states
    assert not folder.exists()


# going on ----------------------------------------------------------------------------------------


def test_they_are_saved_when_it_is_time_or_asked_for(tmp_path: Path) -> None:
    states = made(tmp_path, every_seconds=3600.0)
    states.save(now=True)
    walked(states, 1)
    assert list(tmp_path.iterdir()) == []
    states.save(now=True)
    assert [path.name for path in tmp_path.iterdir()] == ["states.001.0-of-1.safetensors"]


def saved(folder: Path, count: int, parts: int, **how: Any) -> None:
    def work(ranks: Ranks) -> None:
        walked(made(folder / "partial", ranks, every_seconds=0.0, **how), parts)

    assert forked(count, folder / "results", work) == [None] * count


@pytest.mark.parametrize("count", [2, 7])  # of seven, two have none
def test_any_number_of_processes_goes_on_from_the_latest(tmp_path: Path, count: int) -> None:
    saved(tmp_path, 3, 1)
    saved(tmp_path, count, 2)
    names = sorted(path.name for path in (tmp_path / "partial").iterdir())
    assert names == [f"states.002.{rank}-of-{count}.safetensors" for rank in range(count)]

    def work(ranks: Ranks) -> Any:
        states = made(tmp_path / "partial", ranks)
        assert states.resume(BATCHES, most=3)
        assert_before(states, 2)

    for then in (1, 4):
        assert forked(then, tmp_path / "found", work) == [None] * then


def test_half_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    saved(tmp_path, 2, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "partial").iterdir()}
    saved(tmp_path, 2, 2)
    (tmp_path / "partial" / "states.002.1-of-2.safetensors").unlink()
    for path, content in before.items():
        path.write_bytes(content)
    states = made(tmp_path / "partial")
    assert states.resume(BATCHES, most=2)
    assert_before(states, 1)
