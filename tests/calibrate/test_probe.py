"""The probe holds what an unpadded run of the same rows computes, and survives the disk to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.batch.rows import left_padded
from nbl_export.calibrate.probe import Probe, load_probe, probe_model, save_probe
from nbl_export.errors import InputError
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from tests.beyond import BEYOND


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(find_model(str(tiny_folder)))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(5, 64)).astype(np.int32)


@pytest.fixture(scope="module")
def probe(model: Any, tokens: np.ndarray) -> Probe:
    return probe_model(model, tokens)


def captured(model: Any, row: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """h, x and y of every layer for one row alone, without padding, by hooks of our own."""
    kept: dict[tuple[str, int], np.ndarray] = {}
    handles = []
    for i, block in enumerate(model.model.layers):

        def norm(_m: Any, args: Any, result: torch.Tensor, i: int = i) -> None:
            kept["h", i], kept["x", i] = args[0][0].numpy(), result[0].numpy()

        def out(_m: Any, _a: Any, result: torch.Tensor, i: int = i) -> None:
            kept["y", i] = result[0].numpy()

        handles.append(block.input_layernorm.register_forward_hook(norm))
        handles.append(block.self_attn.o_proj.register_forward_hook(out))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(row.astype(np.int64))[None])
    for handle in handles:
        handle.remove()
    return kept


def test_padding_is_on_the_left_and_positions_start_at_the_first_token() -> None:
    rows = [np.array(r, dtype=np.int32) for r in ([5, 6, 7, 8], [9], [3, 4, 2])]
    ids, mask, positions = left_padded(rows, pad=1)
    np.testing.assert_array_equal(ids, [[5, 6, 7, 8], [1, 1, 1, 9], [1, 3, 4, 2]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(positions, [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 2]])
    assert all(a.dtype == np.int64 for a in (ids, mask, positions))


def test_the_batch_is_ragged_real_text(probe: Probe, tokens: np.ndarray) -> None:
    lengths = probe.attention_mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    for i, length in enumerate(lengths):
        np.testing.assert_array_equal(probe.input_ids[i][-length:], tokens[i][:length])
        np.testing.assert_array_equal(
            probe.attention_mask[i], np.arange(lengths.max()) >= lengths.max() - length
        )
        np.testing.assert_array_equal(probe.position_ids[i][-length:], np.arange(length))


def test_activations_are_those_of_every_row_alone(model: Any, probe: Probe) -> None:
    rows = [ids[mask == 1] for ids, mask in zip(probe.input_ids, probe.attention_mask, strict=True)]
    alone = [captured(model, row) for row in rows]
    for name in ("h", "x", "y"):
        values = getattr(probe, name)
        assert set(values) == {0, 1, 2, 3}
        for index, got in values.items():
            want = np.concatenate([kept[name, index] for kept in alone])
            assert got.dtype == np.float32
            assert got.shape == (sum(map(len, rows)), 32)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
            # Neighbouring tokens differ far more than that, so an order or an offset would show.
            assert np.abs(want - np.roll(want, 1, axis=0)).max() > 0.1 * np.abs(want).max()


def test_a_probe_comes_back_to_the_bit(probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    save_probe(path, probe)
    loaded = load_probe(path)
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert getattr(loaded, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(loaded, name), getattr(probe, name))
    for name in ("h", "x", "y"):
        assert set(getattr(loaded, name)) == set(getattr(probe, name))
        for index, value in getattr(probe, name).items():
            np.testing.assert_array_equal(getattr(loaded, name)[index], value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


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
    assert tuple(made.attention_mask.sum(axis=1)) == found


def test_a_model_that_takes_other_inputs_is_refused(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*_args: Any, **_inputs: Any) -> None:
        raise IndexError("too many indices\nof a tensor")

    monkeypatch.setattr(type(tiny_model.model), "forward", odd)
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be run: too many indices\.$"):
        probe_model(tiny_model, np.zeros((2, 8), np.int32))
