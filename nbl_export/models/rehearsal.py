"""Whether a model's own code runs in another precision, tried on a few tokens and one block of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbl_export.errors import NblError, first_line
from nbl_export.models.dummy_run import dummy_run, example_inputs
from nbl_export.models.layers import accepted_arguments, backbone
from nbl_export.models.load import quiet
from nbl_export.models.partial_forward import one_of_each_kind

if TYPE_CHECKING:
    import torch


def why_not_run(model: torch.nn.Module) -> str | None:
    """What the code of ``model`` raises in its precision, in one line; None if it runs.

    Tables that a model keeps in float32 may meet states in bfloat16, which not every operator takes.
    """
    import torch

    dummy_run(model)
    run: Any = backbone(model)
    with quiet(), torch.inference_mode(), one_of_each_kind(model):
        try:
            run(**example_inputs(model), **accepted_arguments(run, use_cache=False))
        except NblError:
            raise
        except Exception as error:  # a model's own code may raise anything
            return first_line(error)[:200]
    return None
