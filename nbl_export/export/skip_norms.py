"""Residual addition and norm as one operator of onnxruntime: the sum is written and normalized in one pass.

    before                                  after
    h, y ─► Add ─► h' ─► RMSNormalization   h, y ─► SkipSimplifiedLayerNormalization ─► norm, h'

LayerNormalization becomes SkipLayerNormalization. The results are the same. onnxruntime's own optimizer fuses these
in older graphs but does not know RMSNormalization. The operators are in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

from nbl_export.graph.operators import MICROSOFT, int_attribute, is_constant

_FUSED = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
_SUM = 3  # the index of the output that is the sum


def fuse_norms(model: ir.Model) -> int:
    """Fuse every norm of a sum of two activations [batch, tokens, d], in place; returns the number of fused norms."""
    count = 0
    for node in list(model.graph):
        added = _added(node)
        if added is None:
            continue
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        fused = ir.node(
            _FUSED[node.op_type],
            [*added.inputs, *node.inputs[1:]],
            {"epsilon": epsilon},
            domain=MICROSOFT,
            num_outputs=_SUM + 1,
            name=node.name,
        )
        node.prepend(fused)
        for old, index in ((node.outputs[0], 0), (added.outputs[0], _SUM)):
            new = fused.outputs[index]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.name = f"{old.name}.apart"
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        for unused in fused.outputs[1:_SUM]:
            unused.name = ""
        count += 1
    if count:
        model.opset_imports[MICROSOFT] = 1
        model.graph.sort()
        passes.RemoveUnusedNodesPass()(model)
    return count


def _added(norm: ir.Node) -> ir.Node | None:
    """The Add of two activations whose last dimension ``norm`` normalizes; None for any other node."""
    value = norm.inputs[0] if norm.op_type in _FUSED and norm.domain in ("", "ai.onnx") else None
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Add" or int_attribute(norm, "axis", -1) not in (-1, 2):
        return None
    shapes = [None if v is None or v.shape is None else v.shape for v in node.inputs]
    if any(s is None or len(s) != 3 or s[2] != shapes[0][2] for s in shapes):  # type: ignore[index]
        return None
    # Shapes must be equal: learned positions are broadcast over rows, and a bias is one vector.
    if any(is_constant(v) for v in node.inputs) or shapes[0] != shapes[1]:
        return None
    return node
