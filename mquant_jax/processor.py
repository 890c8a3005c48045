"""What the processor of this machine can do."""

from __future__ import annotations

import functools
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def features() -> frozenset[str]:
    """Names of instruction-set extensions (``avx512_vnni``); none where Linux does not tell."""
    if not _CPU_INFO.is_file():
        return frozenset()
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    told = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(told.partition(":")[2].split())
