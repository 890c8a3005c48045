"""Arrays in JSON records: base64 of their bytes, exact."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def arrays_to(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Arrays as JSON."""
    return {
        name: {
            "dtype": a.dtype.name,
            "shape": list(a.shape),
            "data": base64.b64encode(np.ascontiguousarray(a).tobytes()).decode(),
        }
        for name, a in arrays.items()
    }


def arrays_from(record: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays again."""
    return {
        name: np.frombuffer(base64.b64decode(r["data"]), r["dtype"]).reshape(r["shape"])
        for name, r in record.items()
    }
