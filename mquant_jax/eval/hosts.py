"""Evaluation on several hosts: each answers its share of the questions; answers are merged last.

Until then hosts do not communicate, and they need no shared disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mquant_jax.errors import UserError


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connect to the other hosts, before any computation; see ``jax.distributed.initialize``.

    Args:
        coordinator_address: ``host:port`` of the first host; ``None``: JAX detects the cluster.
        num_processes, process_id: number of hosts, and index of this host from 0.

    Raises:
        UserError: the connection fails, or only some of the three are given.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise UserError("--coordinator-address, --num-processes and --process-id go together")
    if process_id is not None and not 0 <= process_id < (num_processes or 0):
        raise UserError(f"--process-id is {process_id}; expected 0 to {num_processes} - 1, the "
                        "number of this host among --num-processes")  # fmt: skip
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"cannot connect to the other hosts: {e}; give --coordinator-address, "
                        "--num-processes and --process-id") from e  # fmt: skip


def is_first() -> bool:
    """Whether this host writes the results."""
    return jax.process_index() == 0


def has(number: int) -> bool:
    """Whether this host does part ``number`` of the work."""
    return number % jax.process_count() == jax.process_index()


def merged(found: Mapping[str, Any]) -> dict[str, Any]:
    """The results of all hosts. Every host must call this; it waits for the others.

    Args:
        found: this host's results, JSON values.
    """
    if jax.process_count() == 1:
        return dict(found)
    from jax.experimental.multihost_utils import process_allgather

    body = np.frombuffer(json.dumps(found).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.asarray(len(body), np.int32)))
    padded = np.pad(body, (0, int(sizes.max()) - len(body)))
    bodies = np.asarray(process_allgather(padded))
    out: dict[str, Any] = {}
    for row, size in zip(bodies, sizes.tolist(), strict=True):
        out |= json.loads(row[:size].tobytes())
    return out
