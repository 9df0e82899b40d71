"""The form of an encoder's graph: no cache, the full text or image as input, the outputs of its task.

Inputs  input_ids, attention_mask and optionally token_type_ids [batch_size, sequence_length], or
        pixel_values [batch_size, channels, height, width] of one size
Outputs the outputs of the task that the model has (:mod:`nbl_export.models.tasks`), float32; for a
        sentence-transformers folder also sentence_embedding [batch_size, d]

The names are those of optimum. ONNX opset 23.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nbl_export.batch.names import BATCH, MASK, PIXELS, SEQUENCE
from nbl_export.batch.rows import Inputs
from nbl_export.export.forms import ENCODER, Form
from nbl_export.export.recurrence import rows_of
from nbl_export.models.encoder import INPUT_ORDER, encoder_of, encoder_outputs
from nbl_export.models.pooling import Pooling
from nbl_export.models.tasks import Task
from nbl_export.settings.choices import OPSETS


def encoder_form(model: torch.nn.Module, task: Task, pooling: Pooling | None, inputs: Inputs) -> Form:
    """The form of ``model``, whose batches have the names and shapes of ``inputs``."""
    names = {name: _dims(name) for name in INPUT_ORDER if name in inputs}
    examples = {MASK: torch.ones(2, 3, dtype=torch.long)}
    if PIXELS in inputs:
        examples[PIXELS] = torch.zeros(2, *inputs[PIXELS].shape[1:])
    outputs = {n: dict(enumerate(dims)) for n, dims in encoder_outputs(model, task, pooling).items()}
    return Form(
        ENCODER,
        OPSETS["none"],
        names,
        past={},
        present={},
        module=lambda m: encoder_of(m, task, pooling, inputs, rows_of),
        outputs=outputs,
        examples=examples,
    )


def _dims(name: str) -> Mapping[int, str]:
    return {0: BATCH} if name == PIXELS else {0: BATCH, 1: SEQUENCE}
