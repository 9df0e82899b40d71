"""Calibration sums what the model really computes, and an interruption changes nothing of it, to the bit."""

from __future__ import annotations

import json
import re
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nbl_export.blocks import spans_of
from nbl_export.calibrate.collect import collect_moments, store_moments
from nbl_export.calibrate.moments import ARRAYS, Accumulator, Moments, load_moments
from nbl_export.calibrate.store import MomentsFolder
from nbl_export.errors import CalibrationError
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from tests.calibrate.conftest import BLOCKS, LENGTH, ROWS
from tests.interruptions import Recorder, crash, send

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def batches(model: Any, tokens: np.ndarray) -> int:
    """How many batches an uninterrupted run takes, over all blocks."""
    listener = Recorder()
    collect_moments(model, tokens, listener)
    assert len(listener.advanced) >= 4 * BLOCKS
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
    dummy_run(model)
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
    moments = collect_moments(model, tokens)
    for handle in handles:
        handle.remove()
    np.testing.assert_array_equal(torch.cat(ids).numpy(), np.concatenate([tokens] * BLOCKS))
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


SPANNED = ("attention", "span")


@pytest.fixture(scope="module")
def spanned(model: Any, tokens: np.ndarray) -> Moments:
    return collect_moments(model, tokens, parts=SPANNED)


def test_moments_of_spans_are_those_of_the_streams_around_them(
    model: Any, tokens: np.ndarray, whole: Moments, spanned: Moments
) -> None:
    spans = spans_of(range(BLOCKS))
    assert list(spanned.layers) == sorted([*range(BLOCKS), *spans])
    ends: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, _a, after, i=i: ends.update({i: after}))
        for i, block in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        ids = torch.from_numpy(tokens.astype(np.int64))
        states = model.model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for span in spans:
        before, after = (t.reshape(-1, 32).double().numpy() for t in (states[span.layer], ends[span.last]))
        found, y = spanned.layers[span], after - before
        scale = np.abs(y).T @ np.abs(before)
        assert np.all(np.abs(found.yh - y.T @ before) <= 1e-4 * scale.max()), span
        np.testing.assert_allclose(found.y, y.sum(0), rtol=1e-3, atol=1e-3 * np.abs(y).sum(0).max())
        # What it reads is what the attention of its first layer reads, which is counted as it was.
        for name in ("n", "x", "h", "xx", "hh"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole.layers[span.layer], name))
    for index in range(BLOCKS):
        np.testing.assert_array_equal(spanned.layers[index].yx, whole.layers[index].yx)


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


def test_memory_does_not_grow_with_the_text(
    model: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Accumulator] = weakref.WeakSet()
    sizes: list[tuple[int, int]] = []

    class Counted(Accumulator):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.add(self)

        def result(self) -> Any:
            assert set(vars(self)) == {"n", "sums"}
            sizes.append((self.n, sum(t.numel() for t in self.sums.values())))
            assert len(alive) == 1, "the sums of one layer at a time"
            return super().result()

    monkeypatch.setattr("nbl_export.calibrate.collect.Accumulator", Counted)
    for rows in (2, ROWS):
        sizes.clear()
        collect_moments(model, tokens[:rows])
        assert sizes == [(rows * LENGTH, 5 * 32 * 32 + 3 * 32)] * BLOCKS


# interruptions -----------------------------------------------------------------------------------


class Place:
    """A folder that moments are collected in, as a calibration does it."""

    def __init__(self, folder: Path, every_seconds: float | None = None) -> None:
        self.moments, self.partial = folder / "moments", folder / "partial"
        self.states = self.partial / "states.safetensors"
        self.every_seconds = every_seconds

    def collect(
        self,
        model: Any,
        tokens: np.ndarray,
        listener: Any = None,
        fingerprint: str = FINGERPRINT,
        parts: Sequence[str] = ("attention",),
    ) -> Moments:
        store = MomentsFolder(self.moments, self.partial, {"model": "of a test"}, self.every_seconds)
        store_moments(model, tokens, fingerprint, store, listener, parts=parts)
        files = store.publish()
        assert sorted(self.moments.iterdir()) == sorted(files) and not self.partial.exists()
        return load_moments(self.moments)[0]

    def at(self) -> tuple[int, int]:
        """The block and the number of batches of the checkpoint."""
        with safe_open(self.states, "numpy") as file:
            about = json.loads(json.loads(file.metadata()["nbl_export"])["nbl"])
        return about["part"], about["batch"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_folder_has_the_same_moments(model: Any, tokens: np.ndarray, whole: Moments, place: Place) -> None:
    assert_same(place.collect(model, tokens), whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_batch_and_the_next_run_goes_on(
    model: Any, tokens: np.ndarray, whole: Moments, batches: int, place: Place, signum: int
) -> None:
    first = Recorder(2, send(signum))
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, first)
    assert len(first.advanced) == 2 and place.at() == (0, 2)
    second = Recorder()
    assert_same(place.collect(model, tokens, second), whole)
    rows = sum(first.advanced) // LENGTH
    assert second.notes == [f"Calibration goes on from a checkpoint in block 0, at row {rows}."]
    assert second.start == (BLOCKS * ROWS * LENGTH, sum(first.advanced))
    assert len(second.advanced) == batches - 2


def test_an_interrupt_at_any_batch_changes_no_bit(
    model: Any, tokens: np.ndarray, whole: Moments, batches: int, tmp_path: Path
) -> None:
    for at in range(1, batches + 1):
        place = Place(tmp_path / str(at))
        place.partial.parent.mkdir()
        with pytest.raises(KeyboardInterrupt):
            place.collect(model, tokens, Recorder(at, send(signal.SIGINT)))
        last = Recorder()
        assert_same(place.collect(model, tokens, last), whole)
        assert len(last.advanced) == batches - at


@pytest.mark.parametrize("lost", [True])
def test_a_crash_without_a_checkpoint_keeps_the_layers_that_are_finished(
    model: Any, tokens: np.ndarray, whole: Moments, batches: int, tmp_path: Path, lost: bool
) -> None:
    place = Place(tmp_path, every_seconds=3600.0)
    with pytest.raises(RuntimeError):
        place.collect(model, tokens, Recorder(batches - 1, crash))
    assert not place.states.exists()
    kept = sorted(place.partial.iterdir())
    assert [path.name for path in kept] == ["000.safetensors", "001.safetensors", "002.safetensors"]
    before = [path.stat().st_mtime_ns for path in kept]
    if lost:
        kept[1].write_bytes(kept[1].read_bytes()[:-9])
    moved: list[list[int]] = []
    publish = MomentsFolder.publish

    def watched(store: MomentsFolder) -> list[Path]:
        moved.append([path.stat().st_mtime_ns for path in kept])
        return publish(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MomentsFolder, "publish", watched)
        assert_same(place.collect(model, tokens), whole)
    assert [old == new for old, new in zip(before, moved[0], strict=True)] == [True, not lost, True]


def test_a_crash_while_the_files_are_moved(
    model: Any, tokens: np.ndarray, whole: Moments, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, moved = Path.replace, []

    def failing(self: Path, target: Path) -> Path:
        if target.parent == place.moments:
            moved.append(target)
            if len(moved) == 3:
                crash()
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(RuntimeError):
            place.collect(model, tokens)
    assert len(list(place.moments.iterdir())) == len(list(place.partial.iterdir())) == 2
    last = Recorder()
    assert_same(place.collect(model, tokens, last), whole)
    assert last.advanced == []


@pytest.fixture
def interrupted(model: Any, tokens: np.ndarray, batches: int, tmp_path: Path) -> Place:
    """Stopped in the third block."""
    place = Place(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, Recorder(batches // 2 + 2, send(signal.SIGINT)))
    assert place.at() == (2, 2)
    return place


def begun_anew(model: Any, tokens: np.ndarray, place: Place, fingerprint: str = FINGERPRINT) -> Moments:
    """The moments of a run that finds what is left of something else, and takes nothing from it."""
    listener = Recorder()
    moments = place.collect(model, tokens, listener, fingerprint)
    assert listener.start == (BLOCKS * ROWS * LENGTH, 0) and listener.notes == []
    return moments


def test_what_is_left_of_other_tokens_is_ignored(model: Any, tokens: np.ndarray, interrupted: Place) -> None:
    other = tokens.copy()
    other[-1, -1] = (other[-1, -1] + 1) % 256
    assert_same(begun_anew(model, other, interrupted), collect_moments(model, other))


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_a_damaged_checkpoint_is_ignored_with_a_note(
    model: Any, tokens: np.ndarray, whole: Moments, interrupted: Place, damage: str
) -> None:
    raw = interrupted.states.read_bytes()
    flipped = raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]
    content = {"cut": raw[:-9], "empty": b"", "foreign": b"no safetensors", "one bit": flipped}
    interrupted.states.write_bytes(content[damage])
    listener = Recorder()
    assert_same(interrupted.collect(model, tokens, listener), whole)
    assert listener.notes == ["The checkpoint states.safetensors is damaged and was ignored."]


def test_a_checkpoint_is_ignored_where_an_earlier_layer_is_gone(
    model: Any, tokens: np.ndarray, whole: Moments, interrupted: Place
) -> None:
    (interrupted.partial / "001.safetensors").unlink()
    assert_same(begun_anew(model, tokens, interrupted), whole)


# signal handlers and threads ---------------------------------------------------------------------


def handlers() -> tuple[Any, ...]:
    return tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM))


# broken models -----------------------------------------------------------------------------------


def test_the_batch_where_it_broke_is_named_and_nothing_is_saved_of_it(
    tiny_folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    model: Any = load_model(find_model(str(tiny_folder)))
    model.model.embed_tokens.weight[259] = float("nan")  # a token that only one row has
    broken = tokens.copy()
    broken[17, 40] = 259
    place = Place(tmp_path, every_seconds=0.0)
    with pytest.raises(CalibrationError) as caught:
        place.collect(model, broken)
    row = re.search(r"layer 0 .* calibration row (\d+),", str(caught.value))
    assert row
    block, batch = place.at()
    assert block == 0 and 0 < batch * 1024 // LENGTH == int(row[1]) <= 17
    with safe_open(place.states, "numpy") as file:
        assert all(np.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
