"""Which implementations a model's prefill and decode step run, found by tracing them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np

from mquant_jax.models.base import VLM, Batch
from mquant_jax.ops.registry import Choice, recording
from mquant_jax.runtime import steps

_ELSEWHERE = "not "  # how the reasons of forms begin that are for other devices or operands


def choices(model: VLM, batch: Batch) -> dict[str, list[Choice]]:
    """Trace both for the current target; nothing is run.

    Args:
        model: its arrays may be abstract.
        batch: prompts.

    Returns:
        Per phase (``prefill``, ``decode``) one entry for each call that is traced. Layers of a
        stack are traced once.
    """
    rows, width = batch.order.shape

    # Functions of this call: JAX remembers what it traced before.
    def prefill(model: VLM, batch: Batch) -> Any:
        return steps.prefill(model, batch, width + 1)

    def decode(model: VLM, state: Any) -> Any:
        return steps.decode(model, jax.numpy.zeros((rows,), np.int32), state)

    with recording() as first:
        _, state = jax.eval_shape(prefill, model, batch)
    with recording() as then:
        jax.eval_shape(decode, model, state)
    return {"prefill": first, "decode": then}


def rows_of(found: dict[str, list[Choice]]) -> list[dict[str, Any]]:
    """One JSON row per phase and kind of call: ``{"phase", "op", "form", "calls", "spec",
    "refused": {form: reason}}``."""
    return [
        {
            "phase": phase, "op": choice.op, "form": choice.name, "calls": calls,
            "spec": {k: _plain(v) for k, v in _fields(choice.spec).items()},
            "refused": dict(choice.refused),
        }
        for phase, some in found.items()
        for choice, calls in Counter(some).items()
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as text: a line per phase, op and form, with the reasons of the other forms
    for this device."""
    merged: dict[tuple[str, str, str], tuple[int, dict[str, str]]] = {}
    for r in rows:
        key = r["phase"], r["op"], r["form"]
        calls, reasons = merged.get(key, (0, {}))
        own = {k: v for k, v in r["refused"].items() if not v.startswith(_ELSEWHERE)}
        merged[key] = calls + r["calls"], reasons | own
    lines = [f"{'phase':<8} {'operation':<23} {'calls':>5}  form, and why not another one"]
    for (phase, op, form), (calls, reasons) in merged.items():
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        lines.append(f"{phase:<8} {op:<23} {calls:>5}  {form}" + (f"  ({why})" if why else ""))
    return "\n".join(lines)


def _fields(spec: Any) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, str, bool)) else str(value)
