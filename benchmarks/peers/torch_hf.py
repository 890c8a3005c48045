"""PyTorch: transformers' LlamaForCausalLM with the same weights, run eagerly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.base import Peer, Source, TokenByToken, hf_names

DTYPES = {"torch-float32": torch.float32, "torch-bfloat16": torch.bfloat16}


class Torch(TokenByToken):
    """The model with a dynamic cache, one call per token."""

    def __init__(self, model: torch.nn.Module, settings: str):
        super().__init__()
        self.model, self.settings = model.eval(), settings
        self.weight_bytes = _bytes(model)

    def clear(self) -> None:
        self.cache = None

    def next_token(self, tokens: Sequence[int]) -> int:
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([list(tokens)]), past_key_values=self.cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


def _bytes(model: torch.nn.Module) -> int:
    """Return the weights' bytes; tied weights count once, and quantised layers are added
    separately."""
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    packed = [m.weight() for m in model.modules() if callable(getattr(m, "weight", None))]
    return float_bytes + sum(w.numel() * w.element_size() for w in packed)


def llama(source: Source) -> LlamaForCausalLM:
    """Build the float32 model."""
    cfg = source.config.language
    config = LlamaConfig(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        vocab_size=cfg.vocab_size,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        max_position_embeddings=cfg.max_positions,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    names = hf_names(cfg.num_layers)
    tensors = {theirs: torch.from_numpy(source.params[ours]) for theirs, ours in names.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def build(source: Source, names: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    torch.set_num_threads(source.threads)
    for name in names:
        model = llama(source)
        settings = f"{source.threads} threads, eager, attention {model.config._attn_implementation}"
        if name in DTYPES:
            yield name, Torch(model.to(DTYPES[name]), settings)
            continue
        with warnings.catch_warnings():  # warns that it will move to another package
            warnings.simplefilter("ignore")
            model = torch.ao.quantization.quantize_dynamic(
                model, {torch.nn.Linear}, dtype=torch.qint8
            )
        yield name, Torch(model, f"{settings}, quantize_dynamic, head included")
