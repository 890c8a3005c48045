"""Find the attention sinks: the few tokens whose activations are massive.

In trained language models the first token, and sometimes a few others, carry activations tens to
hundreds of times larger than the rest (Sun et al. 2024, "Massive Activations"). A static scale that
covers them leaves little resolution for all other tokens, so they get a class of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mquant_jax.models.base import Batch

STANDS_OUT = 4.0  # times the 90th percentile of the ordinary tokens
MOSTLY = 0.5  # share of sequences (or of an id's occurrences) in which it must exceed that
OFTEN = 3  # least number of occurrences of an id


def excess(tokens: Mapping[str, np.ndarray], ordinary: np.ndarray) -> np.ndarray:
    """Return each token's largest ratio to the ordinary tokens over all points, float ``[tokens]``.

    The reference at a point is the 90th percentile of the ordinary tokens (bool ``[tokens]``).
    """
    worst = np.zeros(ordinary.shape)
    for magnitudes in tokens.values():
        served = magnitudes[ordinary & ~np.isnan(magnitudes)]
        if served.size:
            worst = np.fmax(worst, magnitudes / (np.quantile(served, 0.9) + 1e-30))
    return worst


def find_sinks(
    tokens: Mapping[str, np.ndarray],
    input_ids: np.ndarray,
    order: np.ndarray,
    token_class: np.ndarray,
    most_positions: int,
    most_ids: int,
) -> tuple[list[int], list[int]]:
    """Choose the positions and token ids to treat as sinks.

    Position 0 always is a sink: a separate class costs nothing there, because no generated token
    can be at it. A later position, or a text token by its id, is a sink if it stands out in most
    of the sequences (occurrences).

    Args:
        tokens: point -> float ``[tokens]``, largest magnitude of each token in the language model;
            NaN where the point does not serve the token.
        input_ids, order, token_class: int32 ``[tokens]`` of the calibration prompts.
    """
    real = np.asarray(token_class) >= 0
    positions = [0]
    for _ in range(most_positions - 1):
        ordinary = real & ~np.isin(order, positions)
        stands_out = excess(tokens, ordinary) > STANDS_OUT
        shares = {
            int(p): stands_out[ordinary & (order == p)].mean()
            for p in range(1, 16)
            if (ordinary & (order == p)).any()
        }
        best = max(shares, key=shares.__getitem__, default=None)
        if best is None or shares[best] < MOSTLY:
            break
        positions.append(best)
    rest = real & ~np.isin(order, positions) & (np.asarray(token_class) == 0)
    if not rest.any():
        return positions, []
    stands_out = excess(tokens, real & ~np.isin(order, positions)) > STANDS_OUT
    seen = Counter(np.asarray(input_ids)[rest].tolist())
    loud = Counter(np.asarray(input_ids)[rest & stands_out].tolist())
    ids = [i for i, n in loud.most_common() if seen[i] >= OFTEN and n >= MOSTLY * seen[i]]
    return sorted(positions), ids[:most_ids]


def flat(batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, order and classes of all tokens, row by row and chunk by chunk: int32
    ``[tokens]``."""
    fields = ("input_ids", "order", "token_class")
    ids, order, classes = (
        np.concatenate([np.asarray(getattr(b, f)).ravel() for b in batches]) for f in fields
    )
    return ids, order, classes
