"""Rotation magnitude suppression (RMS, paper section 3.3): split off a layer's outlier channel.

A plain Hadamard matrix gathers the mean of each weight row in one column, which then determines the
row's scale. That column is multiplied separately, with its own scale, and the rest is quantised
without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.numerics import AnyArray, QWeight, quantize_weight
from mquant_jax.ptq.gptq import output_error
from mquant_jax.recipe import Split


@dataclasses.dataclass(frozen=True)
class SplitWeight:
    """A rounded weight and, where it pays, its channel split off.

    Attributes:
        q: the weight; its split channel is zero.
        index: int32 number of the channel.
        column: :class:`QWeight` ``[1, out]``, or float32.
        report: findings and decision.
    """

    q: QWeight
    index: np.int32
    column: Any
    report: dict[str, Any]

    def dequantize(self) -> np.ndarray:
        """Return float32 ``[out, in]`` of both together."""
        out = np.array(self.q.dequantize())
        out[:, int(self.index)] += np.asarray(_float(self.column))[0]
        return out


def _float(column: Any) -> Any:
    return column.dequantize() if isinstance(column, QWeight) else column


def split_weight(
    weight: jax.Array,
    hessian: AnyArray | None,
    round_: Callable[[jax.Array, int | None], QWeight],
    split: Split,
) -> SplitWeight:
    """Round a weight whole or split, as the criterion decides.

    The paper's criterion: the channel's weight (``sqrt(n) |mean|`` after a plain Hadamard)
    exceeds every other weight of its row. A layer is split if this holds for half of its rows.

    Args:
        weight: float32 ``[out, K]``.
        hessian: float32 ``[K, K]`` of its inputs, or ``None`` (then weights count alike).
        round_: ``(weight, channel left out or None) -> QWeight`` (int8 storage).
    """
    leads = jnp.bincount(jnp.argmax(jnp.abs(weight), axis=1), length=weight.shape[1])
    index = int(jnp.argmax(leads))
    led = float(leads[index]) / weight.shape[0]
    metric = jnp.eye(weight.shape[1], dtype=jnp.float32) if hessian is None else hessian

    def error(q: Any) -> float:
        return float(jnp.sum(output_error(weight, q, metric)))

    def column_of(values: jax.Array) -> Any:
        if split.bits == 16:
            return np.asarray(values[None], np.float32)
        return jax.tree.map(np.asarray, quantize_weight(values[None], split.bits).packed())

    whole = round_(weight, None)
    report = {"channel": index, "rows_led": led, "error": error(whole)}
    zero = column_of(jnp.zeros(weight.shape[0], jnp.float32))
    kept = SplitWeight(whole, np.int32(0), zero, report | {"split": False})
    if split.criterion == "paper" and led < 0.5:
        return kept
    q = round_(weight.at[:, index].set(0.0), index)
    column = column_of(weight[:, index])
    apart = SplitWeight(q, np.int32(index), column, report)
    report["error_split"] = error(apart)
    if split.criterion == "measured" and report["error_split"] >= report["error"]:
        return kept
    report["split"] = True
    return apart
