"""The embedding beside a decoder computes what PyTorch does, from rows of its table, in every precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from nbl_export.errors import InputError
from nbl_export.export.forms import embedding_form
from nbl_export.export.torch import save_in_precision, trace
from nbl_export.graph.embedding import NAME, Embedding, add_features, embedding_of, reads_embeddings
from nbl_export.graph.io import load_graph, set_folder
from nbl_export.graph.precision import precision_of
from tests.families import Calibrated

OFF = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2}


@pytest.mark.parametrize("precision", OFF)
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_it_is_the_models(
    name: str, precision: str, wrapper: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    model = wrapper(name).model
    ids = np.random.default_rng(0).integers(0, 260, (2, 7))
    graph = trace(model, embedding_form(model))
    save_in_precision(
        graph, tmp_path / NAME, precision_of(precision), [ids[0]], embedding_form(model).outputs
    )
    with torch.inference_mode():
        expected = model.get_input_embeddings()(torch.from_numpy(ids)).numpy()  # type: ignore[operator]
    (found,) = Embedding(tmp_path / NAME)(ids).values()
    assert found.dtype == np.float32
    with pytest.raises(InputError, match="has 260 tokens, and none with the id 260"):
        Embedding(tmp_path / NAME)(np.array([[3, 260]]))
    np.testing.assert_allclose(
        found, expected, rtol=OFF[precision], atol=OFF[precision] * np.abs(expected).max()
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # onnxruntime multiplies no bfloat16 on a CPU
@pytest.mark.parametrize(
    "tokens", [{"image": 250}, {"image": 260, "audio": 251}], ids=["in the table", "beyond it"]
)
def test_what_towers_make_is_put_in_its_places(
    tokens: dict[str, int], precision: str, wrapper: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    """The embeddings of the other tokens are scaled, these are not; too few or too many are an error."""
    model = wrapper("gemma3").model
    graph = trace(model, embedding_form(model))
    save_in_precision(
        graph, tmp_path / NAME, precision_of(precision), [np.arange(9)], embedding_form(model).outputs
    )
    files = add_features(tmp_path / NAME, tokens)
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()}
    ids = np.random.default_rng(0).integers(0, 240, (2, 7))
    for column, token in enumerate(tokens.values()):
        ids[0, column + 1 : column + 5 : 2] = token
        ids[1, 5 - column] = token
    width = model.config.hidden_size  # type: ignore[union-attr]
    features = {f"{kind}_features": np.random.rand(3, width).astype(np.float32) for kind in tokens}
    session = ort.InferenceSession(str(tmp_path / NAME))
    found = session.run(None, {"input_ids": ids, **features})[0]

    expected = Embedding(tmp_path / NAME)(np.where(ids < 240, ids, 0))["inputs_embeds"]  # as the text is
    for token, given in zip(tokens.values(), features.values(), strict=True):
        expected[ids == token] = given
    np.testing.assert_array_equal(found, expected)
    # Text alone, as it is while tokens are generated.
    nothing = {name: array[:0] for name, array in features.items()}
    alone = session.run(None, {"input_ids": ids[:, :1], **nothing})[0]
    np.testing.assert_array_equal(alone, expected[:, :1])
    for wrong in (2, 4):
        name = next(iter(features))
        with pytest.raises(Exception, match="ScatterND"):
            session.run(None, {"input_ids": ids, **features, name: np.ones((wrong, width), np.float32)})


def decoder(folder: Path) -> ir.Model:
    """A graph that reads embeddings, in ``folder``."""
    embeds = ir.Value(name="inputs_embeds", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2, 3]))
    node = ir.node("Identity", [embeds])
    graph = ir.Graph([embeds], node.outputs, nodes=[node], opset_imports={"": 23}, name="decoder")
    model = ir.Model(graph, ir_version=10)
    set_folder(model, folder)
    return model


def test_one_that_is_missing_or_another_graph_is_said(tmp_path: Path) -> None:
    model = decoder(tmp_path / "baseline")
    assert reads_embeddings(model)
    with pytest.raises(InputError, match=r"embedding\.onnx, which makes them of token ids, is not beside it"):
        embedding_of(model)
    node_free = decoder(tmp_path)
    ir.save(node_free, tmp_path / NAME)
    assert load_graph(tmp_path / NAME)
    with pytest.raises(InputError, match="is no embedding of nbl-export"):
        embedding_of(model)
