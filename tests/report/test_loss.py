"""Method loss as a table: a decoder's figures with their errors, an encoder's measures one by one."""

from __future__ import annotations

from math import inf, nan

from nbl_export.report.loss import loss_table
from nbl_export.verify.loss.figures import Likeness, Measure, MethodLoss


def test_a_decoder_s() -> None:
    table = loss_table(MethodLoss(12, 4096, 8.0, 9.0, 1.125, 0.0312, 0.15625, 0.002))
    assert table.rows == (
        ("perplexity, original", "8.000", ""),
        ("perplexity, linearized", "9.000", ""),
        ("perplexity ratio", "1.1250", "± 0.0312"),
        ("KL to the original, nats per token", "0.1562", "± 0.0020"),
    )
    assert "4,096 tokens of 12 documents" in table.note and table.title.endswith("held-out text")


def test_an_encoder_s() -> None:
    measures = (
        Measure("cosine of sentence_embedding", 0.9871, 0.0009, 8),
        Measure("1-R²", 0.0125, 0.00003, 1024),
    )
    table = loss_table(Likeness(8, "images", measures))
    assert table.columns == ("", "mean", "standard error", "n")
    assert table.rows == (
        ("cosine of sentence_embedding", "0.987100", "± 0.000900", "8"),
        ("1-R²", "0.012500", "± 0.000030", "1,024"),
    )
    assert table.title.endswith("held-out images")
    assert table.note.startswith("8 images that calibration did not see") and table.note.endswith(
        "over images."
    )


def test_what_is_no_number_is_shown() -> None:
    broken = loss_table(MethodLoss(2, 2, 8.0, inf, inf, nan, nan, nan))
    assert [row[1:] for row in broken.rows] == [
        ("8.000", ""),
        ("inf", ""),
        ("inf", "± nan"),
        ("nan", "± nan"),
    ]
    assert loss_table(Likeness(2, "documents", (Measure("x", nan, nan, 1),))).rows == (
        ("x", "nan", "± nan", "1"),
    )


def test_of_one_document_no_error_is_known() -> None:
    rows = loss_table(MethodLoss(1, 127, 8.0, 9.0, 1.125, 0.0, 0.15625, 0.0)).rows
    assert [row[2] for row in rows] == ["", "", "unknown", "unknown"]
    like = loss_table(Likeness(1, "images", (Measure("cosine of x", 0.9, 0.0, 1),)))
    assert like.rows[0][2] == "unknown"
