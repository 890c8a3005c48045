"""Shared by the config tables of all families: common keys, fields with their ranges, checks.

Each family's config.py defines one :class:`Schema` per object of its config.json. Defaults are
those of the published config class, because configs may be saved as differences from them. A key in
no table is reported at conversion. A known key that changes the results but is not implemented is
refused, unless its value has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.schema import Field, Refused, Schema, inside, real, whole

FILE = "config.json"
# Object of a config.json -> its table and its content. The top level is "".
Tables = Mapping[str, tuple[Schema, Any]]

_BOOKKEEPING = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _name_or_path _vocab_size add_cross_attention architectures
    attn_implementation auto_map chunk_size_feed_forward cross_attention_hidden_size dtype
    finetuning_task id2label initializer_factor initializer_range is_decoder is_encoder_decoder
    is_llama_config
    label2id max_sequence_length max_window_layers model_max_length model_type num_labels
    output_attentions output_hidden_states output_router_logits output_scores pretraining_tp
    problem_type
    pruned_heads quantization_config return_dict return_dict_in_generate task_specific_params
    sliding_window tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16
    use_cache use_flash_attn
"""
_SAMPLING = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences prefix remove_invalid_values repetition_penalty
    suppress_tokens temperature top_k top_p typical_p
"""
_TOKENS = """
    bos_token_id decoder_start_token_id eos_token_id mask_token_id pad_token_id sep_token_id
    unk_token_id
"""
_TRAINING = """
    attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop classifier_dropout
    drop_path_rate dropout dropout_prob embd_pdrop gradient_checkpointing hidden_dropout
    hidden_dropout_prob layerdrop neftune_noise_alpha resid_pdrop
"""
HARMLESS = frozenset(" ".join((_BOOKKEEPING, _SAMPLING, _TOKENS, _TRAINING)).split())

_OTHER = "the weights would be those of another model, which is not supported"
REFUSED = {
    "alibi": Refused((False,)),
    "attention_multiplier": Refused(),
    "attn_logit_softcapping": Refused(),
    "clip_qkv": Refused(),
    "embedding_multiplier": Refused((1, 1.0)),
    "final_logit_softcapping": Refused(),
    "logit_scale": Refused((1, 1.0)),
    "logits_scaling": Refused((1, 1.0)),
    "no_rope_layers": Refused(([],)),
    "attention_chunk_size": Refused(),
    "moe_config": Refused(({},), _OTHER),
    "n_routed_experts": Refused((0,), _OTHER),
    "num_experts": Refused((0,), _OTHER),
    "num_local_experts": Refused((0,), _OTHER),
    "parallel_attn": Refused((False,)),
    "position_embedding_type": Refused(("rope", "absolute")),
    "qk_layernorm": Refused((False,)),
    "query_pre_attn_scalar": Refused(),
    "residual_multiplier": Refused((1, 1.0)),
    "rope_interleaved": Refused((False,)),
    "scale_depth": Refused((1, 1.0)),
    "scale_emb": Refused((1, 1.0)),
    "sliding_window_pattern": Refused(),
    "use_moe": Refused((False,), _OTHER),
    "use_mrope": Refused((False,)),
    "use_parallel_residual": Refused((False,)),
    "use_qk_norm": Refused((False,)),
}


def common(fields: Mapping[str, Field], harmless: str = "", **refused: Refused) -> Schema:
    """Return a schema with the keys that every config may have; ``harmless``: more names,
    separated by spaces."""
    return Schema(fields, HARMLESS | frozenset(harmless.split()), {**REFUSED, **refused})


def layers(default: Any) -> Field:
    return whole(default, 1, 1024)


def width(default: Any) -> Field:
    """Return a field for the width of a stream or an MLP."""
    return whole(default, 1, 2**20)


def heads(default: Any, null: bool = False) -> Field:
    return whole(default, 1, 1024, null)


def head_width(default: Any = None) -> Field:
    return whole(default, 1, 4096, null=True)


def vocabulary(default: Any) -> Field:
    return whole(default, 1, 2**24)


def positions(default: Any) -> Field:
    """Return a field for a context length in tokens."""
    return whole(default, 2, 2**30)


def norm_eps(default: Any) -> Field:
    return real(default, 0.0, 1.0)


def theta(default: Any = None) -> Field:
    """Return a field for the base of rotary positions."""
    return real(default, 1.0, 1e15, above=True, null=default is None)


def token(default: Any = None) -> Field:
    return whole(default, 0, 2**24, null=default is None)


def read_tables(tables: Tables) -> dict[str, dict[str, Any]]:
    """Return all objects of a config.json, typed.

    Raises:
        UserError: see :meth:`Schema.read`.
    """
    return {
        path: schema.read(data, inside(FILE, path) if path else FILE)
        for path, (schema, data) in tables.items()
    }


def unknown_keys(tables: Tables) -> list[str]:
    """Return the keys in no table, with the paths of their objects."""
    return [
        f"{path}.{key}" if path else key
        for path, (schema, data) in tables.items()
        for key in schema.unknown(data)
    ]


def check_heads(where: str, size: int, count: int, kv: int | None = None) -> None:
    """Check that the heads divide the width, and the key heads the heads.

    Raises:
        UserError: they do not.
    """
    if size % count:
        raise UserError(f"{where}: width {size} is not a multiple of {count} heads")
    check_groups(where, count, count if kv is None else kv)


def check_groups(where: str, count: int, kv: int) -> None:
    """
    Raises:
        UserError: ``kv`` key heads do not share ``count`` heads evenly.
    """
    if count % kv:
        raise UserError(f"{where}: {count} heads do not divide into {kv} groups of equal size, "
                        f"one for each of {kv} key heads")  # fmt: skip


def check_grid(where: str, image: int, patch: int, most: int = 1024) -> int:
    """Return the number of patches along a picture's side.

    Raises:
        UserError: none, or more than ``most``.
    """
    if image < patch:
        raise UserError(f"{where}: a picture of {image} pixels has no patch of {patch}")
    if image // patch > most:
        raise UserError(f"{where}: pictures of {image} pixels make {image // patch} patches of "
                        f"{patch} along a side; expected at most {most}")  # fmt: skip
    return image // patch
