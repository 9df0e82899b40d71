"""The table of method loss: what linearizing costs a decoder's predictions, or an encoder's outputs."""

from __future__ import annotations

from nbl_export.report.drawing import Table, number
from nbl_export.verify.loss.figures import Likeness, MethodLoss


def loss_table(loss: MethodLoss | Likeness) -> Table:
    """What linearizing cost on held-out text or images."""
    return _likeness(loss) if isinstance(loss, Likeness) else _predictions(loss)


def _error(se: float, spec: str, documents: int) -> str:
    """A standard error over ``documents``; of one document there is none, and 0 would look certain."""
    return f"± {number(se, spec)}" if documents > 1 else "unknown"


def _predictions(loss: MethodLoss) -> Table:
    return Table(
        "Method loss: original against linearized, held-out text",
        ("", "value", "standard error"),
        (
            ("perplexity, original", f"{number(loss.perplexity_original, '.3f')}", ""),
            ("perplexity, linearized", f"{number(loss.perplexity_linearized, '.3f')}", ""),
            (
                "perplexity ratio",
                f"{number(loss.perplexity_ratio, '.4f')}",
                _error(loss.perplexity_ratio_se, ".4f", loss.documents),
            ),
            (
                "KL to the original, nats per token",
                f"{number(loss.kl, '.4f')}",
                _error(loss.kl_se, ".4f", loss.documents),
            ),
        ),
        f"{loss.tokens:,} tokens of {loss.documents:,} documents that calibration did not see; "
        "standard errors over documents.",
    )


def _likeness(loss: Likeness) -> Table:
    rows = tuple(
        (m.what, number(m.value, ".6f"), _error(m.se, ".6f", loss.documents), f"{m.count:,}")
        for m in loss.measures
    )
    return Table(
        f"Method loss: original against linearized, held-out {loss.unit}",
        ("", "mean", "standard error", "n"),
        rows,
        f"{loss.documents:,} {loss.unit} that calibration did not see; standard errors over {loss.unit}.",
    )
