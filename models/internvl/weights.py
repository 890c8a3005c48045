"""InternVL's published tensor names, of both layouts -> ours."""

from __future__ import annotations

from collections.abc import Iterator

from mquant_jax.models.internvl.config import CHAT, InternVLConfig
from mquant_jax.models.language import (
    decoder_rules,
    dense_rules,
    direct,
    internlm2_rules,
    norm_rules,
)
from mquant_jax.models.rules import Rows, WeightRule

_QKV = ("q_proj", "k_proj", "v_proj")


def weight_rules(config: InternVLConfig) -> list[WeightRule]:
    """One rule per tensor of our model (a fused source appears in several rules)."""
    language = internlm2_rules if config.language_names == "internlm2" else decoder_rules
    vision = _chat_vision if config.layout == CHAT else _native_vision
    return [*vision(config), *language(config.language, "language_model.")]


def canonical_name(name: str) -> str:
    """Return the Hub's name of a tensor saved under transformers 5's in-memory name."""
    for prefix, hub in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(prefix):
            return hub + name.removeprefix(prefix)
    return name


def ignored(name: str) -> bool:
    """Whether a tensor is unused: tables in older checkpoints that are computed here."""
    return name.endswith("rotary_emb.inv_freq")


def _embeddings(
    config: InternVLConfig, src: str, token: str, positions: str, patch: str
) -> Iterator[WeightRule]:
    v, p = config.vision, config.patch_size
    d, rows = v.hidden_size, v.position_grid**2 + 1
    kernel = (d, v.patch_dim // p**2, p, p)
    yield WeightRule("vision/class_token", f"{src}.{token}", (1, d), (1, 1, d))
    yield WeightRule("vision/positions", f"{src}.{positions}", (rows, d), (1, rows, d))
    yield WeightRule(
        "vision/patch_embed/proj/kernel", f"{src}.{patch}.weight", (d, v.patch_dim), kernel
    )
    yield direct("vision/patch_embed/proj/bias", f"{src}.{patch}.bias", d)


def _qk_norms(config: InternVLConfig, dst: str, src: str) -> Iterator[WeightRule]:
    for name in ("q_norm", "k_norm") if config.vision.qk_norm_eps else ():
        yield direct(f"{dst}/{name}/weight", f"{src}.{name}.weight", config.vision.hidden_size)


def _projector(
    config: InternVLConfig, src: str, norm: str, fc1: str, fc2: str
) -> Iterator[WeightRule]:
    merged, out = config.vision.hidden_size * config.merge**2, config.language.hidden_size
    yield from norm_rules("vision/merger/norm", f"{src}.{norm}", merged)
    yield from dense_rules("vision/merger/fc1", f"{src}.{fc1}", out, merged)
    yield from dense_rules("vision/merger/fc2", f"{src}.{fc2}", out, out)


def _chat_vision(config: InternVLConfig) -> Iterator[WeightRule]:
    v = config.vision
    d, inner = v.hidden_size, v.intermediate_size
    yield from _embeddings(config, "vision_model.embeddings", "class_embedding",
                           "position_embedding", "patch_embedding")  # fmt: skip
    leaves = [("kernel", "weight", (d,)), ("bias", "bias", ())][: 1 + v.qkv_bias]
    for i in range(v.num_layers):
        dst, src = f"vision/layers/{i}", f"vision_model.encoder.layers.{i}"
        for part, name in enumerate(_QKV):
            for leaf, hf, tail in leaves:
                yield WeightRule(
                    f"{dst}/{name}/{leaf}",
                    f"{src}.attn.qkv.{hf}",
                    (d, *tail),
                    (3 * d, *tail),
                    Rows(part, part + 1, 3),
                )
        yield from _qk_norms(config, dst, f"{src}.attn")
        yield from dense_rules(f"{dst}/o_proj", f"{src}.attn.proj", d, d)
        yield from dense_rules(f"{dst}/fc1", f"{src}.mlp.fc1", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{src}.mlp.fc2", d, inner)
        yield direct(f"{dst}/attn_gain", f"{src}.ls1", d)
        yield direct(f"{dst}/mlp_gain", f"{src}.ls2", d)
        yield from norm_rules(f"{dst}/attn_norm", f"{src}.norm1", d, not v.rms_norm)
        yield from norm_rules(f"{dst}/mlp_norm", f"{src}.norm2", d, not v.rms_norm)
    yield from _projector(config, "mlp1", "0", "1", "3")


def _native_vision(config: InternVLConfig) -> Iterator[WeightRule]:
    v = config.vision
    d, inner = v.hidden_size, v.intermediate_size
    yield from _embeddings(config, "vision_tower.embeddings", "cls_token",
                           "position_embeddings", "patch_embeddings.projection")  # fmt: skip
    for i in range(v.num_layers):
        dst, src = f"vision/layers/{i}", f"vision_tower.encoder.layer.{i}"
        for name in _QKV:
            yield from dense_rules(f"{dst}/{name}", f"{src}.attention.{name}", d, d, v.qkv_bias)
        yield from _qk_norms(config, dst, f"{src}.attention")
        yield from dense_rules(f"{dst}/o_proj", f"{src}.attention.projection_layer", d, d)
        yield from dense_rules(f"{dst}/fc1", f"{src}.mlp.fc1", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{src}.mlp.fc2", d, inner)
        yield direct(f"{dst}/attn_gain", f"{src}.lambda_1", d)
        yield direct(f"{dst}/mlp_gain", f"{src}.lambda_2", d)
        yield from norm_rules(f"{dst}/attn_norm", f"{src}.layernorm_before", d, not v.rms_norm)
        yield from norm_rules(f"{dst}/mlp_norm", f"{src}.layernorm_after", d, not v.rms_norm)
    yield from _projector(config, "multi_modal_projector", "layer_norm", "linear_1", "linear_2")
