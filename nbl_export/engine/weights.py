"""The weights of a TensorRT network, and the check that those of two networks differ by the plan alone.

The sizes of two engines cannot be compared: the library decides anew for each network what code it needs, and a
smaller network may get a larger engine. The weights of the parsed networks can:

    base        q₀ k₀ v₀ o₀   q₁ k₁ v₁ o₁   …   everything else
    linearized  q₀ k₀ v₀ o₀   W₁ b₁         …   everything else

1. Both networks have the plan's layers, and the linearized one no matrix of an attention or MLP that is replaced.
2. It has every matrix of the other layers' attention, and of everything else.
3. It has the plan's W in the place of each that is linear, bit for bit, and one bias.
4. It has no other weight that the base has not.

A repair changes retained weights, each of which may differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx_ir as ir

from nbl_export.blocks import Block, Mlp, attentions, described
from nbl_export.engine.library import Library
from nbl_export.errors import BuildError
from nbl_export.graph.operators import LINEAR, key, linear_op
from nbl_export.graph.regions import AttentionRegion, find_regions
from nbl_export.linearize.adapters import digest_of, weight_digests
from nbl_export.linearize.plan import LinearLayer, Plan, linear_name

_FLOATS = ("FLOAT", "HALF", "BF16")


@dataclass(frozen=True)
class NetworkWeights:
    """A network's floating-point weights of more than one element.

    ``named`` has the name and the digest of all of them; ``attention`` the digests of those that the linear operators
    of each attention layer read, in order; ``others`` those of all other linear operators.
    """

    named: tuple[tuple[str, str], ...]
    attention: tuple[tuple[str, ...], ...]
    others: tuple[str, ...]


def network_weights(library: Library, network: Any, model: ir.Model) -> NetworkWeights:
    """The weights of a ``network`` that was parsed from the graph ``model``."""
    weights = list(_digests(library, network, model))
    digests = dict(weights)
    layers: dict[ir.Node, int] = {}
    regions = find_regions(model)
    for index, region in enumerate(regions):
        if isinstance(region, AttentionRegion):
            layers |= dict.fromkeys(region.linear_nodes, index)
    attention: list[list[str]] = [[] for _ in regions]
    others: list[str] = []
    for node in model.graph:
        # The parser keeps the names.
        if linear_op(node) and (digest := digests.get(weight_name(node))):
            (attention[layers[node]] if node in layers else others).append(digest)
    return NetworkWeights(tuple(weights), tuple(map(tuple, attention)), tuple(others))


def _digests(library: Library, network: Any, model: ir.Model) -> Iterator[tuple[str, str]]:
    """Name and digest of each weight; a format that NumPy does not have is read from the graph."""
    trt = library.module
    stored = model.graph.initializers
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type != trt.LayerType.CONSTANT:
            continue
        output = layer.get_output(0)
        shape = tuple(output.shape)
        if output.dtype.name not in _FLOATS or prod(shape) < 2:
            continue
        layer.__class__ = trt.IConstantLayer  # the binding returns the base class
        values: Any = layer.weights
        if not hasattr(values, "tobytes"):
            known = stored[layer.name].const_value if layer.name in stored else None
            if known is None or tuple(known.shape) != shape:
                raise BuildError(
                    f"{library} has a weight {layer.name} {list(shape)} that the graph has not: export the graph again."
                )
            values = known.numpy()
        yield layer.name, digest_of(values)


def weight_name(node: ir.Node) -> str:
    """The name of the initializer that the linear operator ``node`` multiplies by, through transpositions."""
    value = node.inputs[LINEAR[key(node)].weight]
    while value is not None and (producer := value.producer()) is not None and producer.inputs:
        value = producer.inputs[0]
    return str(value.name) if value is not None else ""


def check_pair(
    base: NetworkWeights, linear: NetworkWeights, plan: Plan, mlps: Mapping[Mlp, Sequence[str]] | None = None
) -> None:
    """Raise :class:`BuildError` unless the two networks differ by the ``plan`` alone.

    ``mlps`` are the names of the weights of each MLP of the base that the plan replaces.
    """
    found = len(base.attention), len(linear.attention)
    expected = len(attentions(plan.candidates)), len(plan.attention_layers)
    if found != expected:  # (1)
        raise _strangers(
            f"they have {found[0]} and {found[1]} attention layers, not {expected[0]} and {expected[1]}"
        )
    named, has, had = dict(base.named), _digests_of(linear), _digests_of(base)
    weights: dict[Block, tuple[str, ...]] = {
        mlp: tuple(named[name] for name in names if name in named) for mlp, names in (mlps or {}).items()
    }
    # A family may share weights between layers: what another block reads stays.
    others = Counter(base.others) - Counter(digest for own in weights.values() for digest in own)
    weights |= zip(attentions(plan.candidates), base.attention, strict=True)
    changed = len(plan.adapters)
    staying = {d for layer in plan.attention_layers for d in weights[layer]} | set(others)
    for block in plan.chosen:
        what = described(block) if isinstance(block, Mlp) else f"the attention of {described(block)}"
        own = weights.get(block, ())
        if not own:
            raise _strangers(f"the base has no weight of {what}")
        going = [d for d in own if d not in staying]
        if left := sum(d in has for d in going):
            raise _strangers(f"{left} of {len(going)} weights of {what} are in both")
    if len(lost := staying - has.keys()) > changed:  # (2)
        where = next((f" of layer {i}" for i in plan.attention_layers if lost & set(weights[i])), "")
        raise _strangers(f"the linearized one lacks {len(lost)} weights{where} that the plan keeps")
    came = has - had
    for block in plan.linear:  # (3)
        ours = Counter(digest for name, digest in linear.named if name.startswith(f"{linear_name(block)}."))
        matrices = _matrices(plan.layers[block])
        if not all(ours.keys() & set(weight_digests(matrix)) for matrix in matrices):
            raise _strangers(
                f"the linearized one does not have the plan's W in the place of {described(block)}"
            )
        if ours.total() != len(matrices) + 1:
            raise _strangers(
                f"the linearized one has {ours.total()} weights in the place of {described(block)}"
            )
        came -= ours
    if (more := came.total()) > changed:  # (4)
        raise _strangers(
            f"the linearized one has {more} weights that are neither in the base nor in the plan"
        )


def _digests_of(weights: NetworkWeights) -> Counter[str]:
    return Counter(digest for _, digest in weights.named)


def _matrices(layer: LinearLayer) -> tuple[Any, ...]:
    return (layer.w,) if layer.up is None or layer.down is None else (layer.up, layer.down)


def _strangers(why: str) -> BuildError:
    return BuildError(
        f"The base's and the linearized network do not belong together ({why}): run `nbl-export rewrite` again on this "
        "folder, then build."
    )
