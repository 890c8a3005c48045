"""Whether a checkpoint fits on an accelerator: weights, KV cache and activations, from shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.checkpoint.manifest import load_manifest
from mquant_jax.errors import UserError
from mquant_jax.loading import describe, model_bytes
from mquant_jax.models.base import VLM, Family, abstract_model
from mquant_jax.nn.params import parameter_bytes
from mquant_jax.ops.dense import target_platform
from mquant_jax.recipe import Recipe

RESERVED = 1.0e9  # bytes for the runtime, compiled programs and fragmentation
_DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One chip.

    Attributes:
        platform, kind: as JAX names them.
        memory: bytes, from the vendor's data sheet.
    """

    platform: str
    kind: str
    memory: float


ACCELERATORS = {
    "v4": Accelerator("tpu", "TPU v4", 32e9),
    "v5e": Accelerator("tpu", "TPU v5 lite", 16e9),
    "v5p": Accelerator("tpu", "TPU v5p", 95e9),
    "v6e": Accelerator("tpu", "TPU v6 lite", 32e9),
    "l4-24": Accelerator("gpu", "NVIDIA L4", 24e9),
    "a100-40": Accelerator("gpu", "NVIDIA A100-SXM4-40GB", 40e9),
    "a100-80": Accelerator("gpu", "NVIDIA A100-SXM4-80GB", 80e9),
    "h100-80": Accelerator("gpu", "NVIDIA H100 80GB HBM3", 80e9),
    "h200-141": Accelerator("gpu", "NVIDIA H200", 141e9),
}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one chip, and what is left for longer contexts.

    Attributes:
        weights: in their on-device layout.
        cache: keys and values of ``batch`` rows of ``context`` tokens.
        working: estimated activations of a prefill of the whole context at once, without the
            vision tower, which runs earlier.
        capacity: memory of the chip less :data:`RESERVED`.
        longest_context: tokens per row that fit, at most the model's own limit.
    """

    device: str
    context: int
    batch: int
    weights: int
    cache: int
    working: int
    capacity: int
    longest_context: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "total": self.total, "fits": self.fits}


def checkpoint_plan(folder: Path, device: str, **options: Any) -> MemoryPlan:
    """:func:`memory_plan` of a checkpoint folder. Reads JSON files only.

    Raises:
        UserError: not a checkpoint; see also :func:`memory_plan`.
    """
    family, config, recipe, _ = describe(folder, load_manifest(folder))
    return memory_plan(family, config, recipe, device, **options)


def memory_plan(
    family: Family,
    config: Any,
    recipe: Recipe,
    device: str,
    *,
    context: int | None = None,
    batch: int = 1,
    int8_cache: bool = False,
) -> MemoryPlan:
    """The memory that a model needs on a device.

    Args:
        device: one of :data:`ACCELERATORS`.
        context: tokens per row, prompt and answer; default 4096, or the model's limit.
        int8_cache: store keys and values as int8.

    Raises:
        UserError: the context is out of the model's range.
    """
    limit = config.language.max_positions
    context = min(4096, limit) if context is None else context
    if not 0 < context <= limit:
        raise UserError(f"--context {context}: expected 1 to {limit}, the model's context length")
    chip = ACCELERATORS[device]
    with target_platform(chip.platform, chip.kind):
        model = abstract_model(family, config, recipe, _DTYPE)
        weights = model_bytes(model)
    one, two = (_cache_bytes(model, batch, n, int8_cache) for n in (1, 2))
    per_token = two - one + _working_bytes(config, batch)
    fixed = weights + (one - (two - one)) + _logit_bytes(config, batch)
    capacity = int(chip.memory - RESERVED)
    longest = min(limit, max(0, (capacity - fixed) // per_token))
    return MemoryPlan(
        device, context, batch, weights,
        cache=_cache_bytes(model, batch, context, int8_cache),
        working=context * _working_bytes(config, batch) + _logit_bytes(config, batch),
        capacity=capacity, longest_context=longest,
    )  # fmt: skip


def _cache_bytes(model: VLM, batch: int, slots: int, int8: bool) -> int:
    cache = jax.eval_shape(lambda m: m.language.init_cache(batch, slots, int8), model)
    return parameter_bytes({"": cache})


def _working_bytes(config: Any, batch: int) -> int:
    """Per token of the context: the residual stream twice, queries, keys and values, and in 32 bits
    the MLP's two accumulators and their product. For W4A8 on Qwen2-VL-7B's shapes XLA uses two
    thirds of it (benchmarks/results/aot-*.json)."""
    cfg = config.language
    heads = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    narrow = 2 * cfg.hidden_size + heads
    return batch * (narrow * jnp.dtype(_DTYPE).itemsize + 3 * 4 * cfg.intermediate_size)


def _logit_bytes(config: Any, batch: int) -> int:
    """Logits and probabilities of each row's last token, float32."""
    return 2 * 4 * batch * config.language.vocab_size
