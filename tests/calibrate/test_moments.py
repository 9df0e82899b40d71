"""The moments equal sums computed at once in NumPy, survive the disk, and a folder goes on from its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nbl_export.blocks import Mlp, Span
from nbl_export.calibrate.moments import (
    ARRAYS,
    Accumulator,
    LayerMoments,
    Moments,
    MomentsFolder,
    digest_of_tokens,
    file_bytes,
    layer_file,
    load_layer,
    load_moments,
    save_layer,
    shapes,
)
from nbl_export.errors import InputError

# Below, at and above the width where the Gram matrix is cut into blocks, divisible by their count or not.
WIDTHS = (1, 64, 97, 402)
CHUNKS = (1, 7, 2, 33, 1, 12)


def activations(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h, x, y as float32 rows with means and scales that differ by channel, as in a residual stream."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-3, 3, size=(3, 1, d))
    h, x, y = (scale * (rng.normal(size=(3, n, d)) + 0.5)).astype(np.float32)
    return h, x, y


def sums(h: np.ndarray, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Every moment in one float64 product over all rows."""
    h, x, y = (a.astype(np.float64) for a in (h, x, y))
    return {
        "x": x.sum(0),
        "h": h.sum(0),
        "y": y.sum(0),
        "xx": np.einsum("ni,nj->ij", x, x),
        "yx": np.einsum("ni,nj->ij", y, x),
        "yy": np.einsum("ni,nj->ij", y, y),
        "hh": np.einsum("ni,nj->ij", h, h),
        "yh": np.einsum("ni,nj->ij", y, h),
    }


def accumulated(h: np.ndarray, x: np.ndarray, y: np.ndarray, chunks: tuple[int, ...]) -> Accumulator:
    accumulator = Accumulator([3], h.shape[1])
    start = 0
    for size in chunks:
        part = slice(start, start + size)
        accumulator.add(3, *(torch.from_numpy(a[part]) for a in (h, x, y)))
        start += size
    assert start == len(h)
    return accumulator


def summed(*of: Any) -> LayerMoments:
    ((block, moments),) = accumulated(*of).results()
    assert block == 3
    return moments


def assert_same(one: LayerMoments, other: LayerMoments) -> None:
    assert one.n == other.n
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("d", WIDTHS)
def test_ragged_chunks_give_the_sums_of_all_rows_at_once(d: int) -> None:
    h, x, y = activations(sum(CHUNKS), d)
    moments = summed(h, x, y, CHUNKS)
    # The sums of the absolute values bound the rounding of any order of summation.
    size = sums(*(np.abs(a) for a in (h, x, y)))
    assert moments.n == sum(CHUNKS)
    for name, want in sums(h, x, y).items():
        got = getattr(moments, name)
        assert got.dtype == np.float64
        assert np.all(np.abs(got - want) <= 1e-12 * size[name]), name


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_one_bad_activation_is_noticed(which: int, bad: float) -> None:
    parts = activations(6, 4)
    assert accumulated(*parts, (6,)).broken() is None
    parts[which][3, 2] = bad
    broken = accumulated(*parts, (6,))
    assert broken.broken() == 3
    # It stays noticed, whatever comes after.
    broken.add(3, *(torch.from_numpy(a) for a in activations(6, 4, seed=1)))
    assert broken.broken() == 3


# on disk -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Moments]:
    path = tmp_path / "moments"
    moments = Moments(
        {
            block: summed(*activations(9, 5, seed=seed), (9,))
            for seed, block in enumerate((0, 2, 11, Span(2, 3), Mlp(2)))
        }
    )
    path.mkdir()
    for index, layer in moments.layers.items():
        save_layer(layer_file(path, index), index, layer, {"model": "abc", "rows": 3})
    return path, moments


def test_moments_come_back_to_the_bit(saved: tuple[Path, Moments]) -> None:
    path, moments = saved
    loaded, metadata = load_moments(path)
    assert metadata == {"model": "abc", "rows": 3}
    assert list(loaded.layers) == [0, 2, Mlp(2), Span(2, 3), 11]
    for index, layer in moments.layers.items():
        assert_same(loaded.layers[index], layer)
    assert sorted(p.name for p in path.iterdir()) == [
        "000.safetensors",
        "002-003.span.safetensors",
        "002.mlp.safetensors",
        "002.safetensors",
        "011.safetensors",
    ]
    one, metadata = load_moments(path / "002.safetensors")
    assert metadata == {"model": "abc", "rows": 3} and list(one.layers) == [2]


@pytest.mark.parametrize("d", WIDTHS)
def test_half_of_a_symmetric_matrix_is_stored(d: int, tmp_path: Path) -> None:
    layer = summed(*activations(7, d), (7,))
    save_layer(tmp_path / "1.safetensors", 1, layer, {"model": "abc"})
    stored = load_file(tmp_path / "1.safetensors")
    assert {name for name, array in stored.items() if array.size == d * (d + 1) // 2} >= {"xx", "yy", "hh"}
    assert sum(array.nbytes for name, array in stored.items() if name != "n") == file_bytes(d)
    _, loaded, _ = load_layer(tmp_path / "1.safetensors")
    assert_same(loaded, layer)
    assert all(np.array_equal(m, m.T) for m in (loaded.xx, loaded.yy, loaded.hh))


def test_files_of_other_moments_beside_them_are_refused(saved: tuple[Path, Moments]) -> None:
    folder, moments = saved
    save_layer(folder / "002.safetensors", 2, moments.layers[2], {"model": "abc", "rows": 4})
    with pytest.raises(InputError, match=r"002\.safetensors is of other moments than those beside it"):
        dict(load_moments(folder)[0].layers)
    save_layer(folder / "002.safetensors", 11, moments.layers[2], {"model": "abc", "rows": 3})
    with pytest.raises(InputError, match=r"002\.safetensors is of other moments than those beside it"):
        dict(load_moments(folder)[0].layers)


def test_an_empty_folder_and_a_path_to_nothing_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match=r"run `nbl-export calibrate` again\.$"):
            load_moments(path)


def test_the_digest_of_tokens_sees_every_token_and_the_shape() -> None:
    tokens = np.arange(24, dtype=np.int32).reshape(4, 6)
    assert digest_of_tokens(np.asfortranarray(tokens)) == digest_of_tokens(tokens)
    changed = np.where(tokens == 23, 24, tokens).astype(np.int32)
    assert len({digest_of_tokens(t) for t in (tokens, changed, tokens.reshape(6, 4), tokens.T)}) == 4


# a folder of them ---------------------------------------------------------------------------------


ABOUT = {"model": "of a test"}
IDENTITY = {"dtype": "float32", "tokens": "0" * 64}


def made(seed: int, d: int = 3) -> LayerMoments:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape) for name, shape in shapes(d).items()}
    arrays |= {name: arrays[name] + arrays[name].T for name in ("xx", "yy", "hh")}
    return LayerMoments(n=5 + seed, **arrays)


def folder_at(
    place: Path, identity: dict[str, str] | None = None, about: dict[str, str] = ABOUT
) -> MomentsFolder:
    return MomentsFolder(place / "moments", place / "partial", {**about, "identity": identity or IDENTITY})


def test_layers_of_an_earlier_calibration_go(tmp_path: Path) -> None:
    first = folder_at(tmp_path)
    for index in (2, 0, 11):
        first.put(index, made(index))
    assert not (tmp_path / "moments").exists(), "an earlier calibration stays until all are there"
    assert [path.name for path in first.publish()] == [
        "000.safetensors",
        "002.safetensors",
        "011.safetensors",
    ]
    assert load_moments(tmp_path / "moments")[1] == {**ABOUT, "identity": IDENTITY}
    second = folder_at(tmp_path, {**IDENTITY, "tokens": "1" * 64})
    assert not second.has(0)
    second.put(1, made(7))
    assert [path.name for path in second.publish()] == ["001.safetensors"]
    assert_same(load_layer(tmp_path / "moments" / "001.safetensors")[1], made(7))
    assert len(list((tmp_path / "moments").iterdir())) == 1


def test_a_run_goes_on_from_what_is_finished_in_either_folder(tmp_path: Path) -> None:
    first = folder_at(tmp_path)
    first.put(0, made(0))
    first.put(1, made(1))
    (tmp_path / "moments").mkdir()
    (tmp_path / "partial" / "000.safetensors").replace(tmp_path / "moments" / "000.safetensors")
    second = folder_at(tmp_path)
    assert second.has(0) and second.has(1) and not second.has(2)
    second.put(2, made(2))
    assert len(second.publish()) == 3
    for index, found in load_moments(tmp_path / "moments")[0].layers.items():
        assert_same(found, made(index))


def test_what_is_of_another_run_or_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    folder_at(tmp_path).put(3, made(3))
    path = tmp_path / "partial" / "003.safetensors"
    assert folder_at(tmp_path).has(3) and not folder_at(tmp_path).has(2)
    assert not folder_at(tmp_path, {**IDENTITY, "dtype": "bfloat16"}).has(3)
    assert not folder_at(tmp_path, about={"model": "another"}).has(3)
    (tmp_path / "partial" / "004.safetensors").write_bytes(path.read_bytes())
    assert not folder_at(tmp_path).has(4)
    path.write_bytes(path.read_bytes()[:-8])
    assert not folder_at(tmp_path).has(3)
