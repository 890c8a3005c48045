"""The config.json of Llama and Qwen2 language models -> the shape of our decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder import DecoderConfig
from mquant_jax.nn.rope import Llama3Scaling


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder and nothing else."""

    language: DecoderConfig

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> LlamaConfig:
        """Read a config.json, of the hub or as transformers 5 writes it.

        Raises:
            UserError: a key is missing, or asks for something that is not supported.
        """
        try:
            return cls(_language(hf))
        except KeyError as e:
            raise UserError(f"config.json: key {e} is missing ({hf.get('model_type')})") from e


def _language(hf: dict[str, Any]) -> DecoderConfig:
    _refuse(hf)
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    head_dim = hf.get("head_dim") or hidden // heads
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    qwen = hf.get("model_type") == "qwen2"  # biases are fixed in its code, and in no config
    attention_bias = bool(hf.get("attention_bias")) and not qwen
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
        max_positions=hf.get("max_position_embeddings", 32768 if qwen else 2048),
        qkv_bias=qwen or attention_bias,
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        o_bias=attention_bias,
        mlp_bias=bool(hf.get("mlp_bias")) and not qwen,
        rope_scaling=_scaling(rope),
    )


def _scaling(rope: dict[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(
            f"config.json: rope type {kind!r} is not supported; known: default, llama3. Within "
            "the original context most models work without it: remove rope_scaling"
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
