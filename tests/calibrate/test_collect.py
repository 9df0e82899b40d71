"""Calibration sums what the model really computes, and an interruption changes nothing of it, to the bit."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.moments import ARRAYS, Accumulator, Moments, load_moments
from nbl_export.checkpoint import Checkpoint
from nbl_export.errors import CalibrationError
from nbl_export.models.load import in_precision, load_model
from nbl_export.models.source import find_model
from tests.interruptions import Recorder, crash, send

LENGTH = 128
ROWS = 30  # several batches of about a thousand tokens, the last one short
FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(find_model(str(tiny_folder)))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def whole(model: Any, tokens: np.ndarray) -> Moments:
    """The moments of an uninterrupted run."""
    return collect_moments(model, tokens, FINGERPRINT)


@pytest.fixture(scope="module")
def batches(model: Any, tokens: np.ndarray) -> int:
    """How many batches an uninterrupted run takes."""
    listener = Recorder()
    collect_moments(model, tokens, FINGERPRINT, listener=listener)
    assert len(listener.advanced) >= 4
    assert listener.advanced[-1] < listener.advanced[0]
    return len(listener.advanced)


def assert_same(one: Moments, other: Moments) -> None:
    assert set(one.layers) == set(other.layers)
    for index, layer in one.layers.items():
        assert layer.n == other.layers[index].n
        for name in ARRAYS:
            np.testing.assert_array_equal(
                getattr(layer, name), getattr(other.layers[index], name), err_msg=f"{index}.{name}"
            )


def test_moments_are_those_of_the_activations(model: Any, tokens: np.ndarray) -> None:
    # Captured in the same run by hooks of our own, at other modules than the product's.
    kept: dict[tuple[str, int], list[torch.Tensor]] = {}
    ids: list[torch.Tensor] = []
    handles = [model.model.embed_tokens.register_forward_pre_hook(lambda _m, args: ids.append(args[0]))]

    def keep(name: str, index: int, value: torch.Tensor) -> None:
        kept.setdefault((name, index), []).append(value.clone())

    for i, block in enumerate(model.model.layers):
        norm, out = block.input_layernorm, block.self_attn.o_proj
        handles += [
            norm.register_forward_pre_hook(lambda _m, args, i=i: keep("h", i, args[0])),
            norm.register_forward_hook(lambda _m, _a, result, i=i: keep("x", i, result)),
            out.register_forward_hook(lambda _m, _a, result, i=i: keep("y", i, result)),
        ]
    moments = collect_moments(model, tokens, FINGERPRINT)
    for handle in handles:
        handle.remove()
    np.testing.assert_array_equal(torch.cat(ids).numpy(), tokens)
    assert set(moments.layers) == {0, 1, 2, 3}
    for index, layer in moments.layers.items():
        h, x, y = (torch.cat(kept[name, index]).reshape(-1, 32).double().numpy() for name in "hxy")
        assert layer.n == len(h) == ROWS * LENGTH
        want = {"h": h.sum(0), "x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yx": y.T @ x}
        want |= {"yy": y.T @ y, "hh": h.T @ h, "yh": y.T @ h}
        size = {"h": abs(h).sum(0), "x": abs(x).sum(0), "y": abs(y).sum(0), "xx": abs(x).T @ abs(x)}
        size |= {"yx": abs(y).T @ abs(x), "yy": abs(y).T @ abs(y)}
        size |= {"hh": abs(h).T @ abs(h), "yh": abs(y).T @ abs(h)}
        for name, value in want.items():
            assert np.all(np.abs(getattr(layer, name) - value) <= 1e-12 * size[name]), (index, name)


def test_moments_are_those_of_all_rows_in_one_forward_pass(
    model: Any, tokens: np.ndarray, whole: Moments
) -> None:
    # An independent pass: attention sees each row whole and no other row.
    with torch.inference_mode():
        states = model.model(
            torch.from_numpy(tokens.astype(np.int64)), output_hidden_states=True
        ).hidden_states
    for index, layer in whole.layers.items():
        h = states[index].reshape(-1, 32).double().numpy()
        scale = np.sqrt(np.outer(np.diag(h.T @ h), np.diag(h.T @ h)))
        assert np.all(np.abs(layer.hh - h.T @ h) <= 1e-4 * scale), index


def test_progress_counts_every_token_once(model: Any, tokens: np.ndarray) -> None:
    listener = Recorder()
    collect_moments(model, tokens, FINGERPRINT, listener=listener)
    assert listener.start == (ROWS * LENGTH, 0)
    assert sum(listener.advanced) == ROWS * LENGTH
    assert len(listener.advanced) > 2
    assert listener.notes == []


def test_no_hook_stays_in_the_model(model: Any, tokens: np.ndarray) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    collect_moments(model, tokens[:2], FINGERPRINT)
    with pytest.raises(RuntimeError):
        collect_moments(model, tokens[:2], FINGERPRINT, listener=Recorder(1, crash))
    assert hooks() == before


def test_memory_does_not_grow_with_the_text(
    model: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Accumulator] = []

    class Kept(Accumulator):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("nbl_export.calibrate.collect.Accumulator", Kept)
    for rows in (2, ROWS):
        made.clear()
        collect_moments(model, tokens[:rows], FINGERPRINT)
        assert [a.n for a in made] == [rows * LENGTH] * 4
        numbers = [sum(t.numel() for t in vars(a)["sums"].values()) for a in made]
        assert numbers == [5 * 32 * 32 + 3 * 32] * 4
        assert all(set(vars(a)) == {"n", "sums"} for a in made)


# interruptions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_batch_and_the_next_run_goes_on(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, signum: int
) -> None:
    checkpoint = Checkpoint(tmp_path / "partial.safetensors")
    first = Recorder(2, send(signum))
    with pytest.raises(KeyboardInterrupt):
        collect_moments(model, tokens, FINGERPRINT, checkpoint, first)
    assert len(first.advanced) == 2
    partial, metadata = load_moments(checkpoint.path)
    assert metadata["rows"] * LENGTH == sum(first.advanced)
    assert {layer.n for layer in partial.layers.values()} == {sum(first.advanced)}

    second = Recorder()
    resumed = collect_moments(model, tokens, FINGERPRINT, checkpoint, second)
    assert_same(resumed, whole)
    assert second.notes == [f"Calibration goes on from a checkpoint at {metadata['rows']} rows."]
    assert second.start == (ROWS * LENGTH, sum(first.advanced))
    assert sum(first.advanced) + sum(second.advanced) == ROWS * LENGTH


def test_two_interruptions_in_a_row(
    model: Any, tokens: np.ndarray, whole: Moments, batches: int, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "partial.safetensors")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect_moments(model, tokens, FINGERPRINT, checkpoint, Recorder(1, send(signal.SIGINT)))
    last = Recorder()
    assert_same(collect_moments(model, tokens, FINGERPRINT, checkpoint, last), whole)
    assert len(last.advanced) == batches - 2


def test_an_interrupt_in_the_last_batch_loses_nothing(
    model: Any, tokens: np.ndarray, whole: Moments, batches: int, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "partial.safetensors")
    with pytest.raises(KeyboardInterrupt):
        collect_moments(model, tokens, FINGERPRINT, checkpoint, Recorder(batches, send(signal.SIGINT)))
    last = Recorder()
    assert_same(collect_moments(model, tokens, FINGERPRINT, checkpoint, last), whole)
    assert last.advanced == []


def test_a_second_interrupt_stops_at_once(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "partial.safetensors")

    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()
        pytest.fail("went on after the second interrupt")

    with pytest.raises(KeyboardInterrupt):
        collect_moments(model, tokens, FINGERPRINT, checkpoint, Recorder(2, twice))
    assert not checkpoint.path.exists()  # nothing was saved between the two


def test_a_crash_falls_back_on_the_last_regular_checkpoint(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=0.0)
    first = Recorder(3, crash)
    with pytest.raises(RuntimeError):
        collect_moments(model, tokens, FINGERPRINT, checkpoint, first)
    second = Recorder()
    assert_same(collect_moments(model, tokens, FINGERPRINT, checkpoint, second), whole)
    assert second.start[1] == sum(first.advanced[:2])
    assert len(second.notes) == 1


def test_checkpoints_are_not_written_more_often_than_asked(
    model: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=3600.0)
    with pytest.raises(RuntimeError):
        collect_moments(model, tokens, FINGERPRINT, checkpoint, Recorder(3, crash))
    assert not checkpoint.path.exists()


@pytest.fixture
def interrupted(model: Any, tokens: np.ndarray, tmp_path: Path) -> Checkpoint:
    checkpoint = Checkpoint(tmp_path / "partial.safetensors")
    with pytest.raises(KeyboardInterrupt):
        collect_moments(model, tokens, FINGERPRINT, checkpoint, Recorder(2, send(signal.SIGINT)))
    return checkpoint


def begun_anew(
    model: Any, tokens: np.ndarray, checkpoint: Checkpoint, fingerprint: str = FINGERPRINT
) -> Moments:
    """The moments of a run that finds a ``checkpoint`` of something else, and takes nothing from it."""
    listener = Recorder()
    moments = collect_moments(model, tokens, fingerprint, checkpoint, listener)
    assert listener.start == (ROWS * LENGTH, 0)
    return moments


def test_a_checkpoint_of_other_tokens_is_ignored(
    model: Any, tokens: np.ndarray, interrupted: Checkpoint
) -> None:
    other = tokens.copy()
    other[-1, -1] = (other[-1, -1] + 1) % 256
    assert_same(begun_anew(model, other, interrupted), collect_moments(model, other, FINGERPRINT))


def test_a_checkpoint_in_another_dtype_is_ignored(
    model: Any, tokens: np.ndarray, interrupted: Checkpoint
) -> None:
    half = in_precision(model, "bfloat16")
    assert_same(begun_anew(half, tokens, interrupted), collect_moments(half, tokens, FINGERPRINT))


def test_moments_of_a_model_in_bfloat16_are_near_those_in_float32(
    model: Any, tokens: np.ndarray, whole: Moments
) -> None:
    moments = collect_moments(in_precision(model, "bfloat16"), tokens, FINGERPRINT)
    for index, layer in moments.layers.items():
        for name in ("xx", "yx", "yy", "hh", "yh"):
            want, have = getattr(whole.layers[index], name), getattr(layer, name)
            assert have.dtype == np.float64
            scale = np.linalg.norm(want)
            # Rounding is there, and small: 8 bits of each activation, some of which evens out.
            assert 1e-6 * scale < np.linalg.norm(have - want) < 1e-2 * scale, (index, name)


def test_a_checkpoint_of_another_model_is_ignored(
    model: Any, tokens: np.ndarray, whole: Moments, interrupted: Checkpoint
) -> None:
    assert_same(begun_anew(model, tokens, interrupted, "0" * 64), whole)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "one bit"])
def test_a_damaged_checkpoint_is_ignored_with_a_note(
    model: Any, tokens: np.ndarray, whole: Moments, interrupted: Checkpoint, damage: str
) -> None:
    raw = interrupted.path.read_bytes()
    flipped = raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]
    content = {"cut": raw[:-9], "empty": b"", "foreign": b"no safetensors", "one bit": flipped}
    interrupted.path.write_bytes(content[damage])
    listener = Recorder()
    assert_same(collect_moments(model, tokens, FINGERPRINT, interrupted, listener), whole)
    assert listener.notes == ["The checkpoint partial.safetensors is damaged and was ignored."]


# signal handlers and threads ---------------------------------------------------------------------


def handlers() -> tuple[Any, ...]:
    return tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM))


@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        (lambda: None, nullcontext()),
        (crash, pytest.raises(RuntimeError)),
        (send(signal.SIGINT), pytest.raises(KeyboardInterrupt)),
    ],
)
def test_signal_handlers_come_back(
    model: Any, tokens: np.ndarray, action: Callable[[], None], outcome: Any
) -> None:
    def mine(_signum: int, _frame: Any) -> None:
        raise AssertionError("not to be called")

    previous = signal.signal(signal.SIGTERM, mine)
    try:
        before, during = handlers(), []

        def act() -> None:
            during.append(handlers())
            action()

        with outcome:
            collect_moments(model, tokens[:2], FINGERPRINT, listener=Recorder(1, act))
        assert handlers() == before
        assert not set(during[0]) & set(before)
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_collecting_works_outside_the_main_thread(model: Any, tokens: np.ndarray, whole: Moments) -> None:
    results: list[Moments] = []
    thread = threading.Thread(target=lambda: results.append(collect_moments(model, tokens, FINGERPRINT)))
    thread.start()
    thread.join()
    assert len(results) == 1
    assert_same(results[0], whole)


# broken models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_broken_layer_is_named(tiny_folder: Path, tokens: np.ndarray, layer: int, bad: float) -> None:
    model: Any = load_model(find_model(str(tiny_folder)))
    model.model.layers[layer].self_attn.o_proj.weight[3, 5] = bad
    with pytest.raises(CalibrationError) as caught:
        collect_moments(model, tokens, FINGERPRINT)
    message = str(caught.value)
    assert f"layer {layer} (model.layers.{layer}.self_attn) are NaN or infinite" in message
    assert "calibration row 0" in message


def test_the_batch_where_it_broke_is_named_and_nothing_is_saved_of_it(
    tiny_folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    model: Any = load_model(find_model(str(tiny_folder)))
    model.model.embed_tokens.weight[259] = float("nan")  # a token that only one row has
    broken = tokens.copy()
    broken[17, 40] = 259
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=0.0)
    with pytest.raises(CalibrationError) as caught:
        collect_moments(model, broken, FINGERPRINT, checkpoint)
    row = re.search(r"layer 0 .* calibration row (\d+),", str(caught.value))
    assert row
    partial, metadata = load_moments(checkpoint.path)
    assert 0 < metadata["rows"] == int(row[1]) <= 17
    assert all(np.isfinite(layer.hh).all() for layer in partial.layers.values())
