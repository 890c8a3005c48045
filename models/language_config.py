"""The config.json of Llama, Qwen2, Qwen3 and InternLM2 decoders -> the shape of ours.

The same keys describe a text-only model (top level) and the decoder of a multimodal model. Dialects
with other names of keys are read through :func:`renamed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models import rope_config
from mquant_jax.models.config_keys import (
    check_groups,
    check_heads,
    common,
    head_width,
    heads,
    layers,
    norm_eps,
    positions,
    vocabulary,
    width,
)
from mquant_jax.models.rope_config import MRope, read_rope
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.schema import Field, Refused, choice, flag, inside, items, text
from mquant_jax.validate import shown

_THETA = 10000.0


def decoder_fields(
    vocab: int, hidden: int, inner: int, depth: int, head: int, kv: int | None, context: int
) -> dict[str, Field]:
    """Return the fields that all decoders of this kind have, with these defaults."""
    return {
        "vocab_size": vocabulary(vocab),
        "hidden_size": width(hidden),
        "intermediate_size": width(inner),
        "num_hidden_layers": layers(depth),
        "num_attention_heads": heads(head),
        "num_key_value_heads": heads(kv, null=True),
        "head_dim": head_width(),
        "hidden_act": choice("silu", ("silu",)),
        "max_position_embeddings": positions(context),
        "rms_norm_eps": norm_eps(1e-6),
        "tie_word_embeddings": flag(False),
        **rope_config.FIELDS,
    }


_PARTIAL: dict[str, Any] = {"partial_rotary_factor": Refused((1, 1.0))}
_WINDOWED = {
    "use_sliding_window": flag(False),
    "layer_types": items(text(), None, null=True),
}
_LLAMA = decoder_fields(32000, 4096, 11008, 32, 32, None, 2048)
_QWEN = decoder_fields(151936, 4096, 22016, 32, 32, 32, 32768) | _WINDOWED
# model_type -> the table of its config, with the defaults of its published class.
SCHEMAS = {
    "llama": common(
        _LLAMA | {"attention_bias": flag(False), "mlp_bias": flag(False)} | _WINDOWED,
        **_PARTIAL,
    ),
    "qwen2": common(_QWEN, "attention_bias mlp_bias", **_PARTIAL),
    "qwen3": common(
        _QWEN | {"head_dim": head_width(128), "attention_bias": flag(False)}, "mlp_bias", **_PARTIAL
    ),
    "internlm2": common(
        _LLAMA | {"vocab_size": vocabulary(103168), "bias": flag(True)}, **_PARTIAL
    ),
}


def renamed(hf: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return typed keys of another dialect for :func:`decoder_config`.

    Args:
        names: the dialect's names of keys that have others here.
    """
    absent = dict.fromkeys(("head_dim", "num_key_value_heads", *rope_config.FIELDS))
    return {**absent, **hf, **{key: hf[name] for key, name in names.items()}}


def decoder_config(
    hf: Mapping[str, Any],
    kind: str,
    where: str,
    default_theta: float = _THETA,
    mrope: MRope | None = None,
) -> DecoderConfig:
    """Return the decoder of a typed config, read with a table of :data:`SCHEMAS` or a similar one.

    Args:
        kind: model_type of the language model: llama, qwen2, qwen3 or internlm2.
        where: the object with the keys, for messages.
        default_theta: base of the rotary positions if the config has none.
        mrope: see :func:`~mquant_jax.models.rope_config.read_rope`.

    Raises:
        UserError: an unsupported option, or inconsistent sizes.
    """
    check_window(hf, where)
    count, hidden = hf["num_attention_heads"], hf["hidden_size"]
    kv = hf["num_key_value_heads"] or count
    if not hf["head_dim"]:
        check_heads(where, hidden, count)
    check_groups(where, count, kv)
    head_dim = hf["head_dim"] or hidden // count
    if head_dim % 2:
        raise UserError(f"{where}: head_dim {head_dim} is odd; rotary positions take pairs")
    rope = read_rope(hf, where, default_theta, head_dim, mrope)
    # Qwen2's biases are fixed in its code, not in the config; InternLM2's MLP never has any.
    bias = hf.get("bias" if kind == "internlm2" else "attention_bias", False)
    return DecoderConfig(
        hidden_size=hidden,
        num_layers=hf["num_hidden_layers"],
        num_heads=count,
        num_kv_heads=kv,
        head_dim=head_dim,
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=rope.theta,
        rope_streams=rope.streams,
        max_positions=rope.max_positions,
        qkv_bias=kind == "qwen2" or bias,
        tied_head=hf["tie_word_embeddings"],
        o_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        rope_scaling=rope.scaling,
        qk_norm=kind == "qwen3",
    )


def check_window(hf: Mapping[str, Any], where: str) -> None:
    """Check that no layer has a sliding window shorter than the context.

    Raises:
        UserError: one has.
    """
    kinds = hf.get("layer_types") or ()
    for i, name in enumerate(kinds):
        if name != "full_attention":
            raise UserError(f"{inside(where, 'layer_types')}[{i}] {shown(name)} is not supported; "
                            "known: full_attention")  # fmt: skip
    if len(kinds) not in (0, hf["num_hidden_layers"]):
        raise UserError(f"{inside(where, 'layer_types')} names {len(kinds)} layers of "
                        f"{hf['num_hidden_layers']}")  # fmt: skip
    if hf.get("use_sliding_window") and not kinds:
        raise UserError(f"{inside(where, 'use_sliding_window')} is true: sliding windows are "
                        "not supported; with full attention, set it to false")  # fmt: skip
