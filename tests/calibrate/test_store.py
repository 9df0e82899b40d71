"""A folder of moments goes on from what is its own, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbl_export.calibrate.moments import ARRAYS, LayerMoments, load_layer, load_moments, shapes
from nbl_export.calibrate.store import InMemory, MomentsFolder, Store, Unnamed

ABOUT = {"model": "of a test"}
IDENTITY = {"dtype": "float32", "tokens": "0" * 64}


def layer(seed: int, d: int = 3) -> LayerMoments:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape) for name, shape in shapes(d).items()}
    arrays |= {name: arrays[name] + arrays[name].T for name in ("xx", "yy", "hh")}
    return LayerMoments(n=5 + seed, **arrays)


def folder_at(
    place: Path, identity: dict[str, str] | None = None, about: dict[str, str] = ABOUT
) -> MomentsFolder:
    store = MomentsFolder(place / "moments", place / "partial", about)
    store.begin(identity or IDENTITY)
    return store


def assert_same(found: LayerMoments, wanted: LayerMoments) -> None:
    assert found.n == wanted.n
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


@pytest.mark.parametrize(
    "make", [folder_at, lambda _: InMemory(), Unnamed], ids=["folder", "memory", "unnamed"]
)
def test_what_was_put_is_there(make: Callable[[Path], Store], tmp_path: Path) -> None:
    store = make(tmp_path)
    store.begin(IDENTITY)
    assert not store.has(0)
    store.put(0, layer(0))
    assert store.has(0) and not store.has(1)


def test_a_file_without_a_name_gives_back_what_was_put(tmp_path: Path) -> None:
    store = Unnamed(tmp_path)
    for index in (3, 0, 7):
        store.put(index, layer(index))
        for known in store:
            assert_same(store[known], layer(known))
    assert list(store) == [3, 0, 7] and len(store) == 3 and store.checkpoint is None
    with pytest.raises(KeyError):
        store[1]
    assert list(tmp_path.iterdir()) == []


def test_published_files_are_in_the_order_of_the_layers(tmp_path: Path) -> None:
    store = folder_at(tmp_path)
    for index in (2, 0, 11):
        store.put(index, layer(index))
    assert not (tmp_path / "moments").exists(), "an earlier calibration stays until all are there"
    files = store.publish()
    assert [path.name for path in files] == ["000.safetensors", "002.safetensors", "011.safetensors"]
    assert not (tmp_path / "partial").exists()
    moments, metadata = load_moments(tmp_path / "moments")
    assert metadata == {**ABOUT, "identity": IDENTITY}
    for index in (0, 2, 11):
        assert_same(moments.layers[index], layer(index))


def test_layers_of_an_earlier_calibration_go(tmp_path: Path) -> None:
    first = folder_at(tmp_path)
    for index in (0, 1, 2):
        first.put(index, layer(index))
    first.publish()
    second = folder_at(tmp_path, {**IDENTITY, "tokens": "1" * 64})
    assert not second.has(0)
    second.put(1, layer(7))
    assert [path.name for path in second.publish()] == ["001.safetensors"]
    assert_same(load_layer(tmp_path / "moments" / "001.safetensors")[1], layer(7))
    assert len(list((tmp_path / "moments").iterdir())) == 1


def test_a_run_goes_on_from_what_is_finished_in_either_folder(tmp_path: Path) -> None:
    first = folder_at(tmp_path)
    first.put(0, layer(0))
    first.put(1, layer(1))
    (tmp_path / "moments").mkdir()
    (tmp_path / "partial" / "000.safetensors").replace(tmp_path / "moments" / "000.safetensors")
    second = folder_at(tmp_path)
    assert second.has(0) and second.has(1) and not second.has(2)
    second.put(2, layer(2))
    assert len(second.publish()) == 3
    for index, found in load_moments(tmp_path / "moments")[0].layers.items():
        assert_same(found, layer(index))


@pytest.mark.parametrize("other", ["identity", "about", "index", "cut", "empty", "none"])
def test_what_is_of_another_run_or_damaged_is_not_gone_on_from(tmp_path: Path, other: str) -> None:
    folder_at(tmp_path).put(3, layer(3))
    path = tmp_path / "partial" / "003.safetensors"
    assert folder_at(tmp_path).has(3)
    store = folder_at(tmp_path)
    if other == "identity":
        store = folder_at(tmp_path, {**IDENTITY, "dtype": "bfloat16"})
    elif other == "about":
        store = folder_at(tmp_path, about={"model": "another"})
    elif other == "index":
        path.write_bytes((path.rename(tmp_path / "partial" / "004.safetensors")).read_bytes())
    elif other == "none":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-8] if other == "cut" else b"")
    assert not store.has(4 if other == "index" else 3)
