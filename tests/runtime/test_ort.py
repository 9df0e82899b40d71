"""The two decoders: PyTorch with linearized layers and a real cache, and ONNX Runtime."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from nbl_export.batch.names import ALL_LOGITS, NUM_LOGITS_TO_KEEP
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.graph.cache import KV_LAYERS_KEY
from nbl_export.linearize.swap import linearized
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.pieces import run_taps
from nbl_export.runtime.session import require_onnxruntime, session
from nbl_export.runtime.torch import TorchDecoder
from tests.fixtures_graph import maps_in_place, pad_left, plan_by_hand, ragged_rows


def teacher_forced(decoder: Any, rows: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """For each row the logits of its tokens: a ragged prefill of ``lengths``, then one token at a time."""
    steps = len(rows[0]) - lengths[0]
    ids, mask, positions = pad_left([r[:n] for r, n in zip(rows, lengths, strict=True)])
    past = decoder.empty_past(len(rows))
    out = decoder(ids, mask, positions, past)
    seen = [[*out.logits[i, -n:]] for i, n in enumerate(lengths)]
    for step in range(steps):
        ids = np.array([[r[n + step]] for r, n in zip(rows, lengths, strict=True)], dtype=np.int64)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        positions = np.array([[n + step] for n in lengths], dtype=np.int64)
        out = decoder(ids, mask, positions, out.present)
        assert all(t.shape[2] == mask.shape[1] for pair in out.present for t in pair)
        for i in range(len(rows)):
            seen[i].append(out.logits[i, 0])
    return seen


@pytest.mark.parametrize("layers", [(), (0,), (0, 1), (2, 4), (0, 1, 2, 3, 4)], ids=str)
def test_masks_and_positions_stay_right_across_decode(
    stories_out: Path, stories_model: Any, layers: tuple[int, ...]
) -> None:
    """Against one pass over the whole row without a cache; the first layer is the one usually asked."""
    plan = plan_by_hand(stories_out, layers)
    lengths = (13, 8, 1)
    rows = ragged_rows([n + 5 for n in lengths], 500, seed=4)
    with linearized(stories_model, plan):
        decoder = TorchDecoder(stories_model, plan.chosen)
        assert decoder.kv_layers == tuple(i for i in range(5) if i not in layers)
        assert len(decoder.empty_past(3)) == 5 - len(layers)
        found = teacher_forced(decoder, rows, lengths)
    for row, logits in zip(rows, found, strict=True):
        with maps_in_place(stories_model, plan), torch.inference_mode():
            ids = torch.from_numpy(row.astype(np.int64))[None]
            expected = stories_model(input_ids=ids, use_cache=False).logits[0].numpy()
        assert len(logits) == len(row)
        np.testing.assert_allclose(np.stack(logits), expected, rtol=0, atol=5e-4)


def test_torch_cache_holds_what_transformers_caches(tiny_model: Any) -> None:
    row = ragged_rows([9], 260)[0].astype(np.int64)[None]
    decoder = TorchDecoder(tiny_model)
    ones = np.ones_like(row)
    present = decoder(row, ones, np.arange(9, dtype=np.int64)[None], decoder.empty_past(1)).present
    with torch.inference_mode():
        cache = tiny_model(input_ids=torch.from_numpy(row), use_cache=True).past_key_values
    assert len(present) == len(cache.layers) == 4
    for pair, layer in zip(present, cache.layers, strict=True):
        assert pair[0].shape == (1, 2, 9, 8)
        for found, expected in zip(pair, (layer.keys, layer.values), strict=True):
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


# ONNX Runtime ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewritten(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K without the attention of layers 0 and 3."""
    path = tmp_path_factory.mktemp("rewritten") / "model.onnx"
    rewrite_file(stories_out / "baseline" / "model.onnx", plan_by_hand(stories_out, (0, 3)), path)
    return path


def test_ort_decoder_knows_its_layers(stories_out: Path, rewritten: Path) -> None:
    base, linear = OrtDecoder(stories_out / "baseline" / "model.onnx"), OrtDecoder(rewritten)
    assert base.kv_layers == (0, 1, 2, 3, 4)
    assert linear.kv_layers == (1, 2, 4)
    assert [k.shape for pair in linear.empty_past(3) for k in pair] == [(3, 4, 0, 8)] * 6
    assert all(k.dtype == np.float32 for pair in linear.empty_past(3) for k in pair)


def test_ort_feeds_by_name(rewritten: Path) -> None:
    decoder = OrtDecoder(rewritten)
    ids = np.array([[1, 2]], dtype=np.int64)
    mask, positions = np.ones((1, 5), dtype=np.int64), ids + 2
    past = [
        tuple(np.full((1, 4, 3, 8), 10 * n + side, dtype=np.float32) for side in (0, 1)) for n in range(3)
    ]
    feeds = decoder.feeds(ids, mask, positions, past)  # type: ignore[arg-type]
    assert set(feeds) == {i.name for i in decoder.session.get_inputs()} | {NUM_LOGITS_TO_KEEP}
    assert feeds[NUM_LOGITS_TO_KEEP] == ALL_LOGITS
    assert feeds["input_ids"] is ids and feeds["attention_mask"] is mask
    assert feeds["position_ids"] is positions
    for n in range(3):
        for side, name in enumerate(("key", "value")):
            assert np.unique(feeds[f"past_key_values.{n}.{name}"]).tolist() == [10 * n + side]
    with pytest.raises(ValueError, match="argument"):
        decoder.feeds(ids, mask, positions, past[:2])  # type: ignore[arg-type]


def test_ort_leaves_out_inputs_that_the_graph_does_not_have(stories_out: Path, tmp_path: Path) -> None:
    """Without attention left, nothing reads positions."""
    path = tmp_path / "model.onnx"
    rewrite_file(stories_out / "baseline" / "model.onnx", plan_by_hand(stories_out, range(5)), path)
    proto = onnx.load(str(path), load_external_data=False)
    read = {name for node in proto.graph.node for name in node.input}
    unread = [i for i in proto.graph.input if i.name not in read]
    assert {"attention_mask", "position_ids"} == {i.name for i in unread}
    for value in unread:
        proto.graph.input.remove(value)
    path.write_bytes(proto.SerializeToString())
    decoder = OrtDecoder(path)
    ids = np.array([[1, 5, 9]], dtype=np.int64)
    feeds = decoder.feeds(ids, np.ones_like(ids), np.arange(3)[None], decoder.empty_past(1))
    assert list(feeds) == ["input_ids", NUM_LOGITS_TO_KEEP]
    result = decoder(ids, np.ones_like(ids), np.arange(3)[None], [])
    assert result.logits.shape == (1, 3, 512) and result.present == ()


def test_ort_decodes_as_it_recomputes(rewritten: Path, stories_model: Any, stories_out: Path) -> None:
    rows = ragged_rows([12, 9], 500, seed=5)
    found = teacher_forced(OrtDecoder(rewritten), rows, (8, 5))
    plan = plan_by_hand(stories_out, (0, 3))
    for row, logits in zip(rows, found, strict=True):
        with maps_in_place(stories_model, plan), torch.inference_mode():
            ids = torch.from_numpy(row.astype(np.int64))[None]
            expected = stories_model(input_ids=ids, use_cache=False).logits[0].numpy()
        np.testing.assert_allclose(np.stack(logits), expected, rtol=0, atol=5e-4)


def copied(path: Path, folder: Path) -> Path:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(path.with_name(name), folder / name)
    return folder / "model.onnx"


def test_metadata_that_contradicts_the_inputs_is_refused(rewritten: Path, tmp_path: Path) -> None:
    path = copied(rewritten, tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    next(p for p in proto.metadata_props if p.key == KV_LAYERS_KEY).value = "[1, 2]"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="names 2 KV layers, its inputs 3"):
        OrtDecoder(path)


@pytest.mark.parametrize("damage", ["text", "truncated graph", "no data", "truncated data"])
def test_a_broken_file_is_an_input_error(rewritten: Path, tmp_path: Path, damage: str) -> None:
    path = copied(rewritten, tmp_path)
    data = tmp_path / "model.onnx.data"
    if damage == "text":
        path.write_text("no graph\n" * 100)
    elif damage == "truncated graph":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "no data":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.onnx") as caught:
        session(path)
    assert "\n" not in str(caught.value)


def test_missing_onnxruntime_is_named_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nbl-export\[cpu\]'") as caught:
        require_onnxruntime()
    assert caught.value.exit_code == 3
    with pytest.raises(MissingDependencyError):
        session(Path("any.onnx"))


@pytest.mark.parametrize("command", ["run", "verify", "rewrite"])
def test_commands_without_onnxruntime_exit_3(stories_copy: Path, stories_folder: Path, command: str) -> None:
    """Before the first minute of work, in one sentence."""
    arguments = [str(stories_folder), "--k", "2", "-o", str(stories_copy)]
    if command != "run":
        arguments = [command, str(stories_copy)]
        # What is done is not looked at again; let there be something to do.
        (stories_copy / ("report/report.json" if command == "verify" else "model.onnx")).unlink()
    code = (
        "import sys; sys.modules['onnxruntime'] = None; sys.argv = ['nbl-export', *sys.argv[1:]]; "
        "from nbl_export.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "pip install 'nbl-export[cpu]'" in errors[0]
    assert "Traceback" not in done.stderr


def test_taps_are_inner_tensors(stories_out: Path, stories_model: Any) -> None:
    ids, mask, positions = pad_left(ragged_rows((7, 4), 500))
    path = stories_out / "baseline" / "model.onnx"
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    gather = next(
        n for n in onnx.load(str(path), load_external_data=False).graph.node if n.op_type == "Gather"
    )
    name = gather.output[0]
    found = run_taps(path, [name, "logits", name], inputs)
    assert list(found) == [name, "logits"]
    table = stories_model.get_input_embeddings().weight.numpy()
    kept = mask.astype(bool)
    assert np.array_equal(found[name][kept], table[ids][kept])
    assert not found[name][~kept].any()
    with pytest.raises(InputError, match="has no tensor 'nothing'"):
        run_taps(path, ["nothing"], inputs)
