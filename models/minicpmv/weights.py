"""MiniCPM-V's published tensor names -> ours."""

from __future__ import annotations

from collections.abc import Iterator

from models.base import Rows, WeightRule
from models.language import decoder_rules, dense_rules, direct
from models.minicpmv.config import MiniCPMVConfig


def weight_rules(config: MiniCPMVConfig) -> list[WeightRule]:
    """One rule per tensor of our model (the resampler's fused projection appears in three)."""
    return [*_tower(config), *_resampler(config), *decoder_rules(config.language, "llm.")]


def ignored(name: str) -> bool:
    """Tables that some copies store and that are computed here."""
    known = ("rotary_emb.inv_freq", "resampler.pos_embed", "vpm.embeddings.position_ids")
    return name.endswith(known)


def _norm(dst: str, src: str, width: int) -> Iterator[WeightRule]:
    for leaf in ("weight", "bias"):
        yield direct(f"{dst}/{leaf}", f"{src}.{leaf}", width)


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
        yield from _norm(f"{dst}/attn_norm", f"{src}.layer_norm1", d)
        yield from _norm(f"{dst}/mlp_norm", f"{src}.layer_norm2", d)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from dense_rules(f"{dst}/{name}", f"{src}.self_attn.{name}", d, d)
        yield from dense_rules(f"{dst}/o_proj", f"{src}.self_attn.out_proj", d, d)
        yield from dense_rules(f"{dst}/fc1", f"{src}.mlp.fc1", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{src}.mlp.fc2", d, inner)
    yield from _norm("vision/final/norm", "vpm.post_layernorm", d)


def _resampler(config: MiniCPMVConfig) -> Iterator[WeightRule]:
    d, src = config.language.hidden_size, "resampler"
    yield direct("vision/query", f"{src}.query", config.queries, d)
    if config.has_kv_proj:
        into = config.vision.hidden_size
        yield from dense_rules("vision/keys/kv_proj", f"{src}.kv_proj", d, into, bias=False)
    projections = ("vision/queries/q_proj", "vision/keys/k_proj", "vision/keys/v_proj")
    for leaf, hf, tail in (("kernel", "weight", (d,)), ("bias", "bias", ())):
        for i, dst in enumerate(projections):
            yield WeightRule(f"{dst}/{leaf}", f"{src}.attn.in_proj_{hf}", (d, *tail),
                             (3 * d, *tail), Rows(i, i + 1, 3))  # fmt: skip
    yield from dense_rules("vision/merger/out_proj", f"{src}.attn.out_proj", d, d)
    for dst, name in (("queries", "ln_q"), ("keys", "ln_kv"), ("merger", "ln_post")):
        yield from _norm(f"vision/{dst}/norm", f"{src}.{name}", d)
    # A bare parameter, multiplied from the right.
    yield WeightRule("vision/merger/proj/kernel", f"{src}.proj", (d, d), (d, d), transposed=True)
