"""The published tensor names of Qwen2-VL and Qwen2.5-VL -> ours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mquant_jax.models.language import decoder_rules, dense_rules, norm_rules
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.rules import Rows, WeightRule
from mquant_jax.nn.params import Params
from mquant_jax.nn.vit_block import ViTConfig


def weight_rules(config: Qwen2VLConfig) -> list[WeightRule]:
    """One rule per tensor of our model (a fused source appears in several rules)."""
    return [*_vision(config), *decoder_rules(config.language)]


def canonical_name(name: str) -> str:
    """The hub's name of a tensor saved under the in-memory name of transformers 5."""
    for prefix, hub in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return hub + name.removeprefix(prefix)
    return name


def ignored(name: str) -> bool:
    """Whether a tensor is unused: tables in older checkpoints that are computed here."""
    return name.endswith("rotary_emb.inv_freq") or name.endswith("rotary_pos_emb.inv_freq")


def _mlp(dst: str, src: str, v: ViTConfig) -> Iterator[WeightRule]:
    d, inner = v.hidden_size, v.intermediate_size
    for name in v.block.POINTS["mlp_in"]:
        yield from dense_rules(f"{dst}/{name}", f"{src}.{name}", inner, d)
    for name in v.block.POINTS["mlp_hidden"]:
        yield from dense_rules(f"{dst}/{name}", f"{src}.{name}", d, inner)


def patch_rule(config: Qwen2VLConfig, src: str) -> WeightRule:
    """The patch embedding's kernel, a convolution over time, rows and columns."""
    v, size = config.vision, config.patch_size
    kernel = (v.hidden_size, 3, config.temporal_patch_size, size, size)
    shape = (v.hidden_size, v.patch_dim)
    return WeightRule("vision/patch_embed/proj/kernel", f"{src}.weight", shape, kernel)


def block_rules(dst: str, src: str, v: ViTConfig) -> Iterator[WeightRule]:
    """Attention and norms of a vision block; queries, keys and values are fused."""
    d, biased = v.hidden_size, not v.rms_norm
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for leaf, hf, tail in (("kernel", "weight", (d,)), ("bias", "bias", ())):
            yield WeightRule(
                f"{dst}/{name}/{leaf}",
                f"{src}.attn.qkv.{hf}",
                (d, *tail),
                (3 * d, *tail),
                rows=Rows(part, part + 1, 3),
            )
    yield from dense_rules(f"{dst}/o_proj", f"{src}.attn.proj", d, d)
    yield from norm_rules(f"{dst}/attn_norm", f"{src}.norm1", d, biased)
    yield from norm_rules(f"{dst}/mlp_norm", f"{src}.norm2", d, biased)


def _vision(config: Qwen2VLConfig) -> Iterator[WeightRule]:
    v = config.vision
    d = v.hidden_size
    yield patch_rule(config, "visual.patch_embed.proj")
    for i in range(v.num_layers):
        dst, src = f"vision/layers/{i}", f"visual.blocks.{i}"
        yield from block_rules(dst, src, v)
        yield from _mlp(dst, f"{src}.mlp", v)
    merged = d * config.merge_size**2
    yield from norm_rules("vision/merger/norm", "visual.merger.ln_q", d, not v.rms_norm)
    yield from dense_rules("vision/merger/fc1", "visual.merger.mlp.0", merged, merged)
    yield from dense_rules(
        "vision/merger/fc2", "visual.merger.mlp.2", config.language.hidden_size, merged
    )


def export_hf(config: Qwen2VLConfig, params: Params) -> dict[str, np.ndarray]:
    """Our float tensors under their published names and shapes: the inverse of the rules."""
    out: dict[str, np.ndarray] = {}
    for rule in weight_rules(config):
        ours = np.asarray(params[rule.dst])
        if rule.src not in out:
            out[rule.src] = np.empty(rule.src_shape, ours.dtype)
        rule.scatter(ours, out[rule.src])
    return out
