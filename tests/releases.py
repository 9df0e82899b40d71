"""What a test needs of the release of transformers it runs with."""

from __future__ import annotations

import pytest

from nbl_export.models.compat import is_transformers_4

# 4.57 makes rotary angles by a product of matrices, and an older kind of configuration and tokenizer.
written_for_5 = pytest.mark.skipif(
    is_transformers_4(), reason="needs transformers 5: what it looks at is written another way by 4"
)
