"""llama.cpp on the unchanged GGUF file (Q4_1: a scale and an offset per 32 weights).

Activations are quantised to int8 in blocks of 32 at run time. ``llama.cpp`` uses the file's own
layout. ``llama.cpp-repack`` allows buffer types that reorder weights at load, where the build has
them (``use_extra_bufts``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np

from benchmarks.peers.base import Peer, Source, TokenByToken
from mquant_jax.errors import UserError


@llama_cpp.llama_log_callback
def _silent(level, text, user_data):
    """Discard llama.cpp's log, which fills stderr."""


class LlamaCpp(TokenByToken):
    """The library's low-level interface: one context, whose memory is cleared before every
    prompt."""

    def __init__(self, source: Source, repack: bool):
        super().__init__()
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers, options.use_extra_bufts = 0, repack
        self.model = llama_cpp.llama_model_load_from_file(str(source.path).encode(), options)
        if not self.model:
            raise UserError(f"{source.path}: llama.cpp cannot load it")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = source.room
        options.n_threads = options.n_threads_batch = source.threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise UserError("llama.cpp cannot create a context")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.weight_bytes = llama_cpp.llama_model_size(self.model)
        self.settings = f"{source.threads} threads, use_extra_bufts={repack}, else defaults"

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def next_token(self, tokens: Sequence[int]) -> int:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(
            self.context, llama_cpp.llama_batch_get_one(ids, len(tokens))
        )
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


def build(source: Source, names: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    for name in names:
        yield name, LlamaCpp(source, repack=name.endswith("-repack"))
