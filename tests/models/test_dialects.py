"""Decoders whose config.json has names of its own for Llama's keys."""

from __future__ import annotations

import dataclasses

import pytest

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderBlock, DecoderConfig
from tests.family_cases import changed_config, family_of

# Sizes and options under Llama's names, and each dialect's names where they differ.
SIZES = {
    "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "num_hidden_layers": 2, "intermediate_size": 80, "vocab_size": 320, "rms_norm_eps": 3e-4,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
GLM = {
    "num_hidden_layers": "num_layers", "head_dim": "kv_channels",
    "num_key_value_heads": "multi_query_group_num", "intermediate_size": "ffn_hidden_size",
    "vocab_size": "padded_vocab_size", "rms_norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "seq_length",
}  # fmt: skip
COGVLM = {"num_key_value_heads": "num_multi_query_heads"}
QWEN = {"head_dim": "kv_channels", "rms_norm_eps": "layer_norm_epsilon"}


def language(case: str, names: dict[str, str], **changes) -> DecoderConfig:
    sizes = {names.get(key, key): value for key, value in SIZES.items()} | changes
    return family_of(changed_config(case, **sizes))[1].language


def shape(config: DecoderConfig) -> DecoderConfig:
    """Without rotary positions and the kind of block."""
    return dataclasses.replace(
        config, rope_theta=1.0, rope_streams=(), rope_scaling=None, block=DecoderBlock
    )


def test_each_dialect_says_the_same_sizes() -> None:
    expected = shape(language("llama/public", {}, attention_bias=False, mlp_bias=False))
    glm = language("glm4v/public", GLM, multi_query_attention=True, add_qkv_bias=False)
    cogvlm = language("cogvlm2/public", COGVLM)
    assert shape(glm) == shape(cogvlm) == expected
    # Qwen's queries share no keys, and its MLP's width counts both halves.
    more = {"intermediate_size": 160, "seq_length": 512, "visual": {"output_dim": 96}}
    with pytest.raises(UserError, match="output_dim 96"):  # resamplers have heads of 128 channels
        language("qwen_vl/public", QWEN, **more)
    wide = SIZES | {"hidden_size": 128, "head_dim": 32}
    more |= {QWEN.get(k, k): wide[k] for k in ("hidden_size", "head_dim")}
    more |= {"visual": {"output_dim": 128}, "use_logn_attn": False}
    qwen = language("qwen_vl/public", QWEN, **more)
    sizes = {"hidden_size": 128, "head_dim": 32, "num_kv_heads": 4, "qkv_bias": True}
    assert shape(qwen) == dataclasses.replace(expected, **sizes)


def test_a_dialect_without_groups_shares_no_keys() -> None:
    assert language("glm4v/public", GLM, multi_query_attention=False).num_kv_heads == 4


@pytest.mark.parametrize(
    ("case", "names", "changes"),
    [
        ("glm4v/public", GLM, {"multi_query_attention": True, "multi_query_group_num": 3}),
        ("cogvlm2/public", COGVLM, {"num_multi_query_heads": 3}),
        ("cogvlm2/public", COGVLM, {"hidden_size": 90}),
        ("cogvlm2/public", COGVLM, {"hidden_size": 12}),
    ],
)
def test_heads_that_do_not_fit_are_refused(case, names, changes) -> None:
    with pytest.raises(UserError, match=r"config\.json: .*(head|width)"):
        language(case, names, **changes)
