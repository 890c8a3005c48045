"""Several hosts, each with its share of the questions; what they found is merged at the end.

A host needs nothing of another until then, not even a common disk.
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
    """Join the other hosts, before anything is computed; see ``jax.distributed.initialize``.

    Args:
        coordinator_address: ``host:port`` of the first host; ``None``: JAX asks the cluster.
        num_processes, process_id: how many hosts there are, and which this is, from 0.

    Raises:
        UserError: the others cannot be found, or not all three are given.
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
        raise UserError(f"the other hosts cannot be joined: {e}; give --coordinator-address, "
                        "--num-processes and --process-id") from e  # fmt: skip


def is_first() -> bool:
    """Whether this host writes the results."""
    return jax.process_index() == 0


def has(number: int) -> bool:
    """Whether part ``number`` of the work is this host's."""
    return number % jax.process_count() == jax.process_index()


def merged(found: Mapping[str, Any]) -> dict[str, Any]:
    """What all hosts found; each calls this, and waits for the others.

    Args:
        found: values that JSON has.
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
