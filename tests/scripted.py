"""The programs in scripts/, as modules."""

from __future__ import annotations
