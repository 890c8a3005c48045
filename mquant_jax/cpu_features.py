"""The name and instruction-set extensions of this machine's processor."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def _fields() -> dict[str, str]:
    """Linux's fields of the first core; empty elsewhere."""
    fields: dict[str, str] = {}
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields


def model() -> str:
    """The processor's name, or its architecture if unknown."""
    return _fields().get("model name") or platform.processor() or platform.machine()


def features() -> frozenset[str]:
    """Names of instruction-set extensions (``avx512_vnni``); empty if unknown."""
    fields = _fields()
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())
