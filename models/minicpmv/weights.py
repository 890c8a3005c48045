"""MiniCPM-V's published tensor names -> ours."""

from __future__ import annotations

from collections.abc import Iterator

from mquant_jax.models.language import decoder_rules, dense_rules, direct, norm_rules
from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.models.resampler import resampler_rules
from mquant_jax.models.rules import WeightRule


def weight_rules(config: MiniCPMVConfig) -> list[WeightRule]:
    """One rule per tensor of our model (the resampler's fused projection appears in three)."""
    return [
        *_tower(config),
        *resampler_rules(config.resampler, "resampler", "resampler"),
        *decoder_rules(config.language, "llm."),
    ]


def ignored(name: str) -> bool:
    """Whether a tensor is unused: tables in some copies that are computed here."""
    known = ("rotary_emb.inv_freq", "resampler.pos_embed", "vpm.embeddings.position_ids")
    return name.endswith(known)


def _tower(config: MiniCPMVConfig) -> Iterator[WeightRule]:
    v, p = config.vision, config.patch_size
    d, inner = v.hidden_size, v.intermediate_size
    kernel = (d, v.patch_dim // p**2, p, p)
    patch, src = "vision/patch_embed/proj", "vpm.embeddings"
    yield WeightRule(f"{patch}/kernel", f"{src}.patch_embedding.weight", (d, v.patch_dim), kernel)
    yield direct(f"{patch}/bias", f"{src}.patch_embedding.bias", d)
    yield direct("vision/positions", f"{src}.position_embedding.weight", v.position_grid**2, d)
    for i in range(v.num_layers):
        dst, src = f"vision/layers/{i}", f"vpm.encoder.layers.{i}"
        yield from norm_rules(f"{dst}/attn_norm", f"{src}.layer_norm1", d)
        yield from norm_rules(f"{dst}/mlp_norm", f"{src}.layer_norm2", d)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from dense_rules(f"{dst}/{name}", f"{src}.self_attn.{name}", d, d)
        yield from dense_rules(f"{dst}/o_proj", f"{src}.self_attn.out_proj", d, d)
        yield from dense_rules(f"{dst}/fc1", f"{src}.mlp.fc1", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{src}.mlp.fc2", d, inner)
    yield from norm_rules("vision/final/norm", "vpm.post_layernorm", d)
