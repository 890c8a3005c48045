"""Whether a checkpoint fits on an accelerator: weights, cache and working memory, by shapes."""

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
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.params import parameter_bytes
from mquant_jax.nn.vit_block import ViTConfig
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.buckets import MOST_TOGETHER_ELSEWHERE
from mquant_jax.target import tracing_for

RESERVED = 1.0e9  # bytes for the runtime, compiled programs and what lies fragmented
_DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One chip.

    Attributes:
        platform, kind: as JAX names them.
        memory: bytes, by the maker's data sheet.
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
        weights: as they are held there.
        cache: keys and values of ``batch`` rows of ``context`` tokens.
        working: estimate of what the larger of two steps takes beside that: the vision tower on
            ``patches`` patches, or prefilling the whole context at once.
        capacity: of the chip, without :data:`RESERVED`.
        longest_context: tokens per row that fit; at most the model's own limit.
    """

    device: str
    context: int
    batch: int
    patches: int
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
    """:func:`memory_plan` of a checkpoint folder, of which only JSON files are read.

    Raises:
        UserError: not a checkpoint, or as there.
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
    patches: int = MOST_TOGETHER_ELSEWHERE,
    int8_cache: bool = False,
) -> MemoryPlan:
    """What a model takes on a device.

    Args:
        device: one of :data:`ACCELERATORS`.
        context: tokens per row, prompt and answer; default 4096, or the model's limit.
        patches: of the largest picture. Smaller pictures run together up to the default, so fewer
            count as the default.
        int8_cache: keys and values are kept as int8.

    Raises:
        UserError: a context that the model does not have.
    """
    limit = config.language.max_positions
    context = min(4096, limit) if context is None else context
    if not 0 < context <= limit:
        raise UserError(f"--context {context}: the model has contexts of 1 to {limit} tokens")
    chip = ACCELERATORS[device]
    with tracing_for(chip.platform, chip.kind):
        model = abstract_model(family, config, recipe, _DTYPE)
        weights = model_bytes(model)
    patches = max(patches, MOST_TOGETHER_ELSEWHERE)
    one, two = (_cache_bytes(model, batch, n, int8_cache) for n in (1, 2))
    token, fixed = two - one, weights + one - (two - one)
    capacity = int(chip.memory - RESERVED)
    per_token, logits = batch * _decoder_bytes(config.language), _logit_bytes(config, batch)
    tower = patches * _tower_bytes(config)
    longest = min(
        limit,
        (capacity - fixed - tower) // token,
        (capacity - fixed - logits) // (token + per_token),
    )
    return MemoryPlan(
        device, context, batch, patches, weights,
        cache=_cache_bytes(model, batch, context, int8_cache),
        working=max(tower, context * per_token + logits),
        capacity=capacity, longest_context=max(0, longest),
    )  # fmt: skip


def _cache_bytes(model: VLM, batch: int, slots: int, int8: bool) -> int:
    cache = jax.eval_shape(lambda m: m.language.init_cache(batch, slots, int8), model)
    return parameter_bytes({"": cache})


def _decoder_bytes(cfg: DecoderConfig) -> int:
    """Per token of the context: the residual stream twice, queries, keys and values, and the MLP's
    two sums and their product in 32 bits. XLA needs two thirds of it for W4A8 of Qwen2-VL-7B's
    shapes (benchmarks/results/aot-*.json)."""
    heads = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    return _block_bytes(cfg.hidden_size, heads, cfg.intermediate_size)


def _tower_bytes(config: Any) -> int:
    """The same per patch, 0 without a vision tower."""
    vision = getattr(config, "vision", None)
    if vision is None:
        return 0
    cfg: ViTConfig = getattr(vision, "tower", vision)
    return _block_bytes(cfg.hidden_size, 3 * cfg.hidden_size, cfg.intermediate_size)


def _block_bytes(hidden: int, heads: int, inner: int) -> int:
    return (2 * hidden + heads) * jnp.dtype(_DTYPE).itemsize + 3 * 4 * inner


def _logit_bytes(config: Any, batch: int) -> int:
    """Logits and probabilities of the last tokens, float32."""
    return 2 * 4 * batch * config.language.vocab_size
