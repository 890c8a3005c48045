"""LLaVA's published tensor names -> ours."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mquant_jax.models.language import decoder_rules, dense_rules, direct, norm_rules
from mquant_jax.models.llava.config import CLIP, DINOV2, LlavaConfig
from mquant_jax.models.rules import WeightRule

_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
# Tensors of CLIP and SigLIP that the Hub has in ``vision_model``; a model that transformers 5 built
# from a config alone is saved without that prefix.
_BARE = re.compile(
    r"^vision_tower\.(?=embeddings\.(class_embedding|patch_embedding\b|position_)|encoder\.layers\.|"
    r"pre_layrnorm\.|post_layernorm\.|head\.)(?!embeddings\.position_embeddings)"
)
# Names of DINOv2's attention in memory (transformers 5), and on the Hub.
_MODEL_NAMES = {
    "q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
    "o_proj": "output.dense",
}  # fmt: skip
_MEMORY = re.compile(r"^(vision_tower\.encoder\.layer\.\d+\.attention\.)([qkvo]_proj)\.")
_LAYER = re.compile(r"^vision_tower\.(vision_model\.)?encoder\.layers?\.(\d+)\.")
_QKV = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


def weight_rules(config: LlavaConfig) -> list[WeightRule]:
    """One rule per tensor of our model."""
    vision = _dinov2 if config.tower == DINOV2 else _clip
    return [
        *vision(config),
        *_projector(config),
        *decoder_rules(config.language, "language_model."),
    ]


def canonical_name(name: str) -> str:
    """Return the Hub's name of a tensor saved under transformers 5's in-memory name."""
    for prefix, hub in _PREFIXES:
        if name.startswith(prefix):
            name = hub + name.removeprefix(prefix)
            break
    name = _MEMORY.sub(lambda m: f"{m[1]}{_MODEL_NAMES[m[2]]}.", name)
    return _BARE.sub("vision_tower.vision_model.", name)


def ignored(name: str) -> bool:
    """Return whether a tensor is unused: after the tower's last layer, for training only, or
    computed here."""
    ends = ("rotary_emb.inv_freq", "embeddings.position_ids")
    starts = ("vision_tower.vision_model.post_layernorm.", "vision_tower.vision_model.head.",
              "vision_tower.layernorm.", "vision_tower.embeddings.mask_token")  # fmt: skip
    return name.endswith(ends) or name.startswith(starts)


def unused(config: LlavaConfig, name: str) -> bool:
    """Return whether a tensor is in a tower layer after the one that the projector reads."""
    layer = _LAYER.match(name)
    return layer is not None and config.vision.num_layers <= int(layer[2]) < config.tower_layers


def _patch_embed(config: LlavaConfig, src: str) -> Iterator[WeightRule]:
    v, p = config.vision, config.patch_size
    kernel = (v.hidden_size, v.patch_dim // p**2, p, p)
    dst = "vision/patch_embed/proj"
    yield WeightRule(f"{dst}/kernel", f"{src}.weight", (v.hidden_size, v.patch_dim), kernel)
    if v.patch_bias:
        yield direct(f"{dst}/bias", f"{src}.bias", v.hidden_size)


def _clip(config: LlavaConfig) -> Iterator[WeightRule]:
    """Return the rules of CLIP's tower, and of SigLIP's, which has no class token and no input
    norm."""
    v, src = config.vision, "vision_tower.vision_model"
    d, inner = v.hidden_size, v.intermediate_size
    yield from _patch_embed(config, f"{src}.embeddings.patch_embedding")
    if config.tower == CLIP:
        yield WeightRule("vision/class_token", f"{src}.embeddings.class_embedding", (1, d), (d,))
        yield from norm_rules("vision/input/norm", f"{src}.pre_layrnorm", d)
    rows = v.position_grid**2 + v.class_token
    yield direct("vision/positions", f"{src}.embeddings.position_embedding.weight", rows, d)
    for i in range(v.num_layers):
        dst, layer = f"vision/layers/{i}", f"{src}.encoder.layers.{i}"
        yield from norm_rules(f"{dst}/attn_norm", f"{layer}.layer_norm1", d)
        yield from norm_rules(f"{dst}/mlp_norm", f"{layer}.layer_norm2", d)
        for name in _QKV:
            yield from dense_rules(f"{dst}/{name}", f"{layer}.self_attn.{name}", d, d)
        yield from dense_rules(f"{dst}/o_proj", f"{layer}.self_attn.out_proj", d, d)
        yield from dense_rules(f"{dst}/fc1", f"{layer}.mlp.fc1", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{layer}.mlp.fc2", d, inner)


def _dinov2(config: LlavaConfig) -> Iterator[WeightRule]:
    v, src = config.vision, "vision_tower.embeddings"
    d, inner, rows = v.hidden_size, v.intermediate_size, v.position_grid**2 + 1
    yield from _patch_embed(config, f"{src}.patch_embeddings.projection")
    yield WeightRule("vision/class_token", f"{src}.cls_token", (1, d), (1, 1, d))
    yield WeightRule("vision/positions", f"{src}.position_embeddings", (rows, d), (1, rows, d))
    for i in range(v.num_layers):
        dst, layer = f"vision/layers/{i}", f"vision_tower.encoder.layer.{i}"
        yield from norm_rules(f"{dst}/attn_norm", f"{layer}.norm1", d)
        yield from norm_rules(f"{dst}/mlp_norm", f"{layer}.norm2", d)
        for name, hub in _QKV.items():
            yield from dense_rules(
                f"{dst}/{name}", f"{layer}.attention.attention.{hub}", d, d, v.qkv_bias
            )
        yield from dense_rules(f"{dst}/o_proj", f"{layer}.attention.output.dense", d, d)
        yield from dense_rules(f"{dst}/fc1", f"{layer}.mlp.fc1", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{layer}.mlp.fc2", d, inner)
        yield direct(f"{dst}/attn_gain", f"{layer}.layer_scale1.lambda1", d)
        yield direct(f"{dst}/mlp_gain", f"{layer}.layer_scale2.lambda1", d)


def _projector(config: LlavaConfig) -> Iterator[WeightRule]:
    src, bias = "multi_modal_projector", config.projector_bias
    into, out = config.vision.hidden_size, config.language.hidden_size
    yield from dense_rules("vision/merger/fc1", f"{src}.linear_1", out, into, bias)
    yield from dense_rules("vision/merger/fc2", f"{src}.linear_2", out, out, bias)
