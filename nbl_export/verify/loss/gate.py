"""The gates on what linearizing costs: the bounds that were asked for, held against the loss on held-out text."""

from __future__ import annotations

import math

from nbl_export.checks import Check
from nbl_export.settings import LossBound
from nbl_export.verify.loss.figures import Likeness, MethodLoss


def number_checks(loss: MethodLoss | Likeness) -> tuple[Check, ...]:
    """A verdict that failed where the loss is no number, bounded or not; otherwise none."""
    if isinstance(loss, Likeness):
        figures = {m.what: m.value for m in loss.measures}
    else:
        figures = {"perplexity ratio": loss.perplexity_ratio, "KL": loss.kl}
    wrong = [f"{what} is {value:g}" for what, value in figures.items() if not math.isfinite(value)]
    return (Check("method loss", "failed", f"{'; '.join(wrong)} on held-out data"),) if wrong else ()


def bound_checks(loss: MethodLoss, bound: LossBound) -> tuple[Check, ...]:
    """One verdict for each bound that there is; what is no number is within none."""
    ratio, ratio_se = loss.perplexity_ratio, loss.perplexity_ratio_se
    bounds = (
        ("perplexity bound", "perplexity × ", ratio, ratio_se, bound.max_perplexity_ratio),
        ("KL bound", "KL ", loss.kl, loss.kl_se, bound.max_kl),
    )
    found = []
    for name, what, value, error, most in bounds:
        if most is None:
            continue
        within = value <= most
        # Of one document no error is known; 0 would look certain.
        known = f" ± {error:.4f}" if loss.documents > 1 else ""
        said = f"{what}{value:.4f}{known} on held-out text, {'within' if within else 'above'} the {most:g} asked for"
        found.append(Check(name, "passed" if within else "failed", said))
    return tuple(found)
