"""Count what this process has of the machine: the cores that it may use, the memory that is free."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """Cores of this process: `taskset` or a container may allow fewer than there are."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no control group, or one without a quota, which says "max"
        quota, period = map(int, _QUOTA.read_text().split())
        allowed = min(allowed, math.ceil(quota / period))
    return max(1, allowed)


def free_memory() -> int:
    """Bytes that can be had."""
    import psutil

    return psutil.virtual_memory().available
