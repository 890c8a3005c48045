"""The config.json of Llama, Qwen2, Qwen3 and InternLM2 decoders -> the shape of ours.

The same keys describe a language model alone (top level) and one inside a multimodal model.
"""

from __future__ import annotations

from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.rope import DynamicScaling, Llama3Scaling


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder of a ``model_type`` llama, qwen2, qwen3 or internlm2.

    Raises:
        UserError: it asks for something that is not supported.
        KeyError: a key is missing.
    """
    kind = hf.get("model_type")
    _refuse(hf)
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    head_dim = hf.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    long = 32768 if kind in ("qwen2", "qwen3") else 2048
    max_positions = hf.get("max_position_embeddings", long)
    # Qwen2's biases are fixed in its code, and in no config; InternLM2's MLP never has any.
    qwen2 = kind == "qwen2"
    attention_bias = bool(hf.get("bias" if kind == "internlm2" else "attention_bias")) and not qwen2
    return DecoderConfig(
        hidden_size=hidden,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        rope_sections=(head_dim // 2,),
        max_positions=max_positions,
        qkv_bias=qwen2 or attention_bias,
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        o_bias=attention_bias,
        mlp_bias=bool(hf.get("mlp_bias")) and kind == "llama",
        rope_scaling=_scaling(rope, max_positions),
        qk_norm=kind == "qwen3",
    )


def _scaling(rope: dict[str, Any], positions: int) -> Llama3Scaling | DynamicScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "dynamic":
        return DynamicScaling(float(rope["factor"]), positions)
    if kind != "llama3":
        raise UserError(
            f"config.json: rope type {kind!r} is not supported; known: default, dynamic, llama3. "
            "Within the original context most models work without it: remove rope_scaling"
        )
    scaling = Llama3Scaling(
        factor=float(rope["factor"]),
        low=float(rope["low_freq_factor"]),
        high=float(rope["high_freq_factor"]),
        original=int(rope["original_max_position_embeddings"]),
    )
    if scaling.factor < 1 or not 0 < scaling.low < scaling.high:
        raise UserError(
            f"config.json: rope scaling {scaling} is impossible; expected factor >= 1 and "
            "0 < low_freq_factor < high_freq_factor"
        )
    return scaling


def _refuse(hf: dict[str, Any]) -> None:
    """Stop at anything that would change the numbers and is not implemented."""
    act, partial = hf.get("hidden_act", "silu"), hf.get("partial_rotary_factor", 1.0)
    if act != "silu":
        raise UserError(f"config.json: hidden_act {act!r} is not supported; known: silu")
    if partial not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor {partial} is not supported")
    sliding = set(hf.get("layer_types") or ()) - {"full_attention"}
    if hf.get("use_sliding_window") or sliding:
        raise UserError(
            "config.json: use_sliding_window or layer_types ask for sliding-window attention, "
            "which is not supported; the same weights run with full attention when it is off"
        )
