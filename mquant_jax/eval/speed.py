"""Prefill and decode speed of variants of one model, interleaved in one run.

Times on a shared machine are noisy: compare the ratios. Each repeat runs every variant once, so a
slow phase of the machine affects all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.models.base import VLM, Batch, Config, Family, abstract_model
from mquant_jax.nn.params import Params, abstract_params, get_params, set_params
from mquant_jax.numerics import QWeight
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.sampling import Sampling, per_row
from mquant_jax.runtime.steps import Answers, begin, run

NEVER_STOP = (-1,)


def float_twin(family: Family, config: Config, module: VLM, dtype) -> VLM:
    """A float model with the same layer shapes, as a baseline for the speed of ``module``.

    It has the original structure without online rotations, so a rotated checkpoint is compared
    with the model that it replaces. Weights are dequantised from the module (norm biases folded
    away by a rotation are zero); only its speed is meaningful.
    """
    held = get_params(module)
    model = abstract_model(family, config, Recipe(), dtype)
    params: Params = {}
    for name, like in abstract_params(model).items():
        value = held.get(name, np.zeros(like.shape, np.float32))
        value = value.dequantize() if isinstance(value, QWeight) else value
        params[name] = np.asarray(value).astype(like.dtype)
    set_params(model, params)
    return model


@dataclasses.dataclass
class Timings:
    """Seconds of every repeat: the vision module alone (empty: no pictures), one prefill including
    it, one decode of ``new_tokens`` steps. ``prefill_bytes`` is a prefill's memory (0: unknown)."""

    vision: list[float] = dataclasses.field(default_factory=list)
    prefill: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)
    prefill_bytes: int = 0


class Greedy:
    """A model's prefill and greedy decode loop, each as one compiled program.

    The programs are compiled for the exact sizes, without padding.

    Args:
        most_tokens: maximum number of decode steps after the first token.
    """

    def __init__(self, module: VLM, most_tokens: int):
        self.graphdef, self.params = nnx.split(module)
        self.limit = most_tokens + 1
        self.answers: Answers | None = None
        self.start = jax.jit(self._start, static_argnames="slots")
        self.go_on = jax.jit(self._run, donate_argnums=1)

    def _start(self, params: Any, batch: Batch, slots: int) -> Answers:
        answers = begin(nnx.merge(self.graphdef, params), batch, slots)
        return self._run(params, answers, jnp.int32(1))

    def _run(self, params: Any, answers: Answers, until: jax.Array) -> Answers:
        rows = answers.count.shape[0]
        until = jnp.full(rows, until, jnp.int32)
        how = per_row(Sampling(), None, rows)
        return run(nnx.merge(self.graphdef, params), answers, until, how, NEVER_STOP)

    def slots(self, batch: Batch) -> int:
        """Cache slots for the prompts and all tokens, a multiple of 32."""
        return -(-(batch.input_ids.shape[1] + self.limit) // 32) * 32

    def prefill(self, batch: Batch) -> None:
        """Prefill the prompts and choose the first token."""
        answers = self.start(self.params, batch, slots=self.slots(batch))
        self.answers = jax.block_until_ready(answers)

    def prefill_bytes(self, batch: Batch) -> int:
        """Memory of :meth:`prefill` by XLA's analysis of the compiled program: weights, prompts,
        cache and activations."""
        lowered = self.start.lower(self.params, batch, slots=self.slots(batch))
        m: Any = lowered.compile().memory_analysis()
        return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes

    def decode(self, until: jax.Array) -> jax.Array:
        """Decode up to token ``until``, int32 ``[]``; returns all tokens, int32 ``[B, slots]``."""
        self.answers = self.go_on(self.params, self.answers, until)
        return jax.block_until_ready(self.answers).tokens


class _Variant:
    """A compiled model with one fixed prompt batch."""

    def __init__(self, module: VLM, batch: Batch, new_tokens: int):
        self.greedy = Greedy(module, new_tokens)
        self.module, self.visual = module, jax.jit(lambda m, b: m.visual(b))
        self.batch = jax.tree.map(jnp.asarray, batch)
        self.until = jnp.int32(new_tokens + 1)
        self.timings = Timings()

    def run(self, record: bool) -> None:
        start = time.perf_counter()
        jax.block_until_ready(self.visual(self.module, self.batch))
        t0 = time.perf_counter()
        self.greedy.prefill(self.batch)
        t1 = time.perf_counter()
        self.greedy.decode(self.until)
        t2 = time.perf_counter()
        if record:
            if self.batch.vision is not None:
                self.timings.vision.append(t0 - start)
            self.timings.prefill.append(t1 - t0)
            self.timings.decode.append(t2 - t1)


class Runnable(Protocol):
    """Can be timed: ``run`` appends to ``timings`` if ``record`` is true."""

    timings: Timings

    def run(self, record: bool) -> None: ...


def measure(
    variants: dict[str, tuple[VLM, Batch]],
    new_tokens: int,
    repeats: int,
    progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> dict[str, Timings]:
    """Time every variant and measure the memory of its prefill.

    Args:
        variants: name -> model and prompts (the same ones, in the variant's layout).
        new_tokens: decode steps after the first token.
        repeats: rounds after a warm-up round, which compiles.
    """
    prepared = {name: _Variant(m, batch, new_tokens) for name, (m, batch) in variants.items()}
    timings = take_turns(prepared, repeats, progress)
    for name, variant in prepared.items():
        timings[name].prefill_bytes = variant.greedy.prefill_bytes(variant.batch)
    return timings


def take_turns(
    variants: Mapping[str, Runnable],
    repeats: int,
    progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> dict[str, Timings]:
    """Run every variant once to compile and warm up, then all of them in turn ``repeats`` times."""
    for variant in progress(list(variants.values()), "compile"):
        variant.run(record=False)
    for _ in progress(range(repeats), "measure"):
        for variant in variants.values():
            variant.run(record=True)
    return {name: v.timings for name, v in variants.items()}


def summary(timings: dict[str, Timings], rows: int, tokens: int, new_tokens: int, ours: str):
    """Medians, spread (interquartile range over median) and ratios to ``ours``.

    Returns:
        ``(rows, ratios)``: one dictionary per variant, and ``vision_vs_X``, ``prefill_vs_X``,
        ``decode_vs_X`` = time of X / time of ours (above 1: ours is faster).
    """
    listed, ratios = [], {}
    for name, t in timings.items():
        prefill, decode = statistics.median(t.prefill), statistics.median(t.decode)
        listed.append({
            "variant": name,
            "vision_seconds": statistics.median(t.vision) if t.vision else None,
            "prefill_seconds": prefill,
            "prefill_tokens_per_second": rows * tokens / prefill,
            "prefill_spread": _spread(t.prefill),
            "decode_seconds_per_token": decode / new_tokens,
            "decode_tokens_per_second": rows * new_tokens / decode,
            "decode_spread": _spread(t.decode),
            "prefill_bytes": t.prefill_bytes,
        })  # fmt: skip
        if name != ours:
            for part in ("vision", "prefill", "decode"):
                theirs, own = getattr(t, part), getattr(timings[ours], part)
                if not own:
                    continue
                ratios[f"{part}_vs_{name}"] = statistics.median(
                    a / b for a, b in zip(theirs, own, strict=True)
                )
    return listed, ratios


def table(rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float]) -> str:
    """The result of :func:`summary` as text."""
    titles = ("vision ms", "prefill ms", "tok/s", "spread", "decode tok/s", "spread", "memory MB")
    lines = [f"{'variant':<14}" + "".join(f"{t:>13}" for t in titles)]
    for r in rows:
        vision = f"{1e3 * r['vision_seconds']:.0f}" if r["vision_seconds"] else "-"
        lines.append(
            f"{r['variant']:<14}{vision:>13}{1e3 * r['prefill_seconds']:>13.0f}"
            f"{r['prefill_tokens_per_second']:>13.0f}{r['prefill_spread']:>13.0%}"
            f"{r['decode_tokens_per_second']:>13.1f}{r['decode_spread']:>13.0%}"
            f"{r['prefill_bytes'] / 1e6:>13.0f}"
        )
    return "\n".join(lines + [f"{name:<28}{value:>7.2f} x" for name, value in ratios.items()])


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle
