"""Whether a model fits a device: weights as held, cache, and what a prefill needs beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.errors import UserError
from mquant_jax.loading import model_bytes
from mquant_jax.models.base import VLM, Family, abstract_model
from mquant_jax.nn.params import parameter_bytes
from mquant_jax.ops.dense import target_platform
from mquant_jax.recipe import Recipe
from mquant_jax.validate import shown

_GIB = 1 << 30
USABLE = 0.92  # of a device's memory: programs, fragments and the runtime take the rest


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that models run on.

    Attributes:
        platform: as JAX names it.
        kind: the same.
        memory: bytes.
    """

    platform: str
    kind: str
    memory: int


# As the makers' data sheets have it; a GPU's drivers keep some of it to themselves.
DEVICES = {
    "v4": Device("tpu", "TPU v4", 32 * _GIB),
    "v5e": Device("tpu", "TPU v5 lite", 16 * _GIB),
    "v5p": Device("tpu", "TPU v5", 95 * _GIB),
    "v6e": Device("tpu", "TPU v6 lite", 32 * _GIB),
    "a100-40": Device("gpu", "NVIDIA A100-SXM4-40GB", 40 * _GIB),
    "a100-80": Device("gpu", "NVIDIA A100-SXM4-80GB", 80 * _GIB),
    "h100-80": Device("gpu", "NVIDIA H100 80GB HBM3", 80 * _GIB),
    "h200-141": Device("gpu", "NVIDIA H200", 141 * 10**9),
    "l4-24": Device("gpu", "NVIDIA L4", 24 * _GIB),
    "rtx4090-24": Device("gpu", "NVIDIA GeForce RTX 4090", 24 * _GIB),
}


def device(name: str) -> Device:
    """
    Raises:
        UserError: no device of this name is known.
    """
    if name not in DEVICES:
        raise UserError(f"--device {shown(name)}: not known; known: {', '.join(DEVICES)}")
    return DEVICES[name]


@dataclasses.dataclass(frozen=True)
class Memory:
    """What inference takes on a device, in bytes.

    Attributes:
        weights: as the device's products want them.
        cache: keys and values.
        activations: of a prefill that fills the context, estimated.
        usable: what the device has for them.
        context: tokens of a sequence.
        longest: the longest context that fits at this batch.
    """

    weights: int
    cache: int
    activations: int
    usable: int
    context: int
    longest: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.usable

    def to_json(self) -> dict[str, Any]:
        fields = {f"{k}_bytes": getattr(self, k) for k in (
            "weights", "cache", "activations", "total", "usable"
        )}  # fmt: skip
        return fields | {"fits": self.fits, "context": self.context, "longest": self.longest}

    def text(self, name: str) -> str:
        sizes = ", ".join(
            f"{key} {getattr(self, key) / _GIB:.2f} GiB"
            for key in ("weights", "cache", "activations")
        )
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"{name}: {verdict}: {sizes}; {self.total / _GIB:.2f} of {self.usable / _GIB:.2f} GiB; "
            f"longest context {self.longest}"
        )


def memory(
    family: Family,
    config: Any,
    recipe: Recipe,
    where: Device,
    context: int,
    batch: int = 1,
    int8_cache: bool = False,
) -> Memory:
    """What a model takes where it runs in bfloat16.

    Args:
        config: the family's, its head tied or not as the checkpoint's is.
        context: tokens of a sequence, prompt and answer.
        batch: sequences at once.
        int8_cache: keys and values are kept in int8.
    """
    model = abstract_model(family, config, recipe, jnp.bfloat16)
    with target_platform(where.platform, where.kind):
        weights = model_bytes(model)

    def needed(tokens: int) -> tuple[int, int]:
        return _cache(model, batch, tokens, int8_cache), _activations(config, batch, tokens)

    usable, most = int(USABLE * where.memory), config.language.max_positions
    low, high = 0, most  # the longest context lies in low .. high
    while low < high:
        middle = (low + high + 1) // 2
        fits = weights + sum(needed(middle)) <= usable
        low, high = (middle, high) if fits else (low, middle - 1)
    return Memory(weights, *needed(context), usable, context, low)


def _cache(model: VLM, batch: int, slots: int, int8: bool) -> int:
    made = jax.eval_shape(lambda m: m.language.init_cache(batch, slots, int8), model)
    return parameter_bytes({"": made})


def _activations(config: Any, batch: int, tokens: int) -> int:
    """Of one block in a prefill, bfloat16: the stream and its normed form, queries, keys, values
    and what attention gives, both halves of the MLP and their product; then logits in float32.
    Attention is computed in parts that are small beside them."""
    c = config.language
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    attention, mlp = heads, 3 * c.intermediate_size
    return 2 * batch * tokens * (3 * c.hidden_size + max(attention, mlp)) + 4 * batch * c.vocab_size
