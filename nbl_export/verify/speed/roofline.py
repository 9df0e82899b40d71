"""What this machine can do at most: multiply-adds and bytes a second, measured.

The roofline model (Williams, Waterman, Patterson 2009): a piece of work takes at least the time of its arithmetic at
the machine's best rate, and at least that of its memory traffic at the machine's bandwidth. Both rates are measured
where the graphs are timed, in the same run and by the same number of threads: arithmetic by large matrix products, in
PyTorch and (on a CPU) in ONNX Runtime, whichever is faster; bandwidth by STREAM's triad and by a sum, which only
reads as a decoder reads its weights. The best of several repetitions counts, since a ceiling is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nbl_export.machine import cores
from nbl_export.runtime.session import CPU, require_onnxruntime, session_options
from nbl_export.verify.speed.ceiling import timed
from nbl_export.verify.speed.values import Machine, Roofline

# Larger than any cache: 128 MiB each.
_STREAM = 32 << 20
_PRODUCT = 1536
_REPEATS = 7


def cpu_machine() -> Machine:
    """ONNX Runtime on the processor that this runs on, with its roofline."""
    return Machine(CPU, cores(), roofline=measure_roofline())


def measure_roofline(device: str = "cpu", dtype: str = "float32") -> Roofline:
    """Measure the machine that the process runs on; a second or two."""
    import torch

    kind = getattr(torch, dtype)

    def finished(work: Callable[[], object]) -> Callable[[], object]:
        def waited() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return waited

    a, b = (torch.rand(_PRODUCT, _PRODUCT, device=device).to(kind) for _ in range(2))
    out = torch.empty_like(a)
    products = [finished(lambda: torch.mm(a, b, out=out))]
    if device == "cpu" and dtype == "float32":
        products.append(_ort_product())
    x, y, z = (torch.ones(_STREAM, device=device) for _ in range(3))
    triad = _rate(finished(lambda: torch.add(x, y, alpha=3.0, out=z)), 3 * x.nbytes)
    read = _rate(finished(x.sum), x.nbytes)
    macs = max(_rate(product, _PRODUCT**3) for product in products)
    threads = torch.get_num_threads() if device == "cpu" else None
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return Roofline(name, dtype, threads, macs, max(triad, read))


def _rate(work: Callable[[], object], amount: float) -> float:
    return amount / min(timed(work) for _ in range(_REPEATS))


def _ort_product() -> Callable[[], object]:
    import onnx_ir as ir

    shape = ir.Shape([_PRODUCT, _PRODUCT])
    left, right = (ir.Value(name=n, shape=shape, type=ir.TensorType(ir.DataType.FLOAT)) for n in "ab")
    square = np.random.default_rng(0).random((_PRODUCT, _PRODUCT), dtype=np.float32)
    right.const_value = ir.tensor(square, name="b")
    node = ir.node("MatMul", [left, right])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "c", left.type, shape
    graph = ir.Graph([left], node.outputs, nodes=[node], initializers=[right], opset_imports={"": 20})
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = require_onnxruntime().InferenceSession(model, session_options(), providers=[CPU])
    return lambda: session.run(None, {"a": square})
