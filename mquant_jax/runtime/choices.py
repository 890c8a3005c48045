"""Which implementations a model's prefill and decode step run, found by tracing them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np

from mquant_jax.loading import Loaded
from mquant_jax.models.base import VLM, Batch
from mquant_jax.ops.registry import Choice, recording
from mquant_jax.runtime import steps

EXAMPLE = 128, 224  # text tokens, and side of a picture in pixels
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


def example_rows(loaded: Loaded) -> tuple[int, list[dict[str, Any]]]:
    """The tokens of one prompt with a picture, and :func:`rows_of` for it.

    Args:
        loaded: its arrays may be abstract.
    """
    family, config = loaded.family, loaded.config
    prompt = family.example_prompt(config, *EXAMPLE)
    found = choices(loaded.model, family.collate(config, [prompt]))
    return len(prompt.input_ids), rows_of(found)


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


def merged(rows: list[dict[str, Any]]) -> list[tuple[str, str, int, str, str]]:
    """Phase, operation, calls, form, and the reasons of the other forms for this device; one entry
    per phase, operation and form."""
    found: dict[tuple[str, str, str], tuple[int, dict[str, str]]] = {}
    for r in rows:
        key = r["phase"], r["op"], r["form"]
        calls, reasons = found.get(key, (0, {}))
        own = {k: v for k, v in r["refused"].items() if not v.startswith(_ELSEWHERE)}
        found[key] = calls + r["calls"], reasons | own
    return [
        (phase, op, calls, form, "; ".join(f"{name}: {why}" for name, why in reasons.items()))
        for (phase, op, form), (calls, reasons) in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as text, a line for each entry of :func:`merged`."""
    lines = [f"{'phase':<8} {'operation':<23} {'calls':>5}  form, and why not another one"]
    for phase, op, calls, form, why in merged(rows):
        lines.append(f"{phase:<8} {op:<23} {calls:>5}  {form}" + (f"  ({why})" if why else ""))
    return "\n".join(lines)


def _fields(spec: Any) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, str, bool)) else str(value)
