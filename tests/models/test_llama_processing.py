"""Text-only configs, prompts and batches; conversion and generation on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mquant_jax as mq
from convert import hf_to_flax
from mquant_jax import cli
from mquant_jax.errors import UserError
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.llama.processor import LlamaProcessor
from tests.family_checks import verified
from tests.helpers import GOLDENS, golden
from tests.hf_folders import write_tokenizer

HF = golden("llama", "public")[0]
CONFIG = LlamaConfig.from_hf(HF)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / "llama" / "public" / name, folder / name)
    write_tokenizer(folder, SPECIAL, first=300, eos_token="<|im_end|>", chat_template=TEMPLATE)
    return folder


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_configs_of_both_generations() -> None:
    flat = {k: v for k, v in HF.items() if k not in ("rope_theta", "rope_scaling")}
    nested = flat | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
    assert LlamaConfig.from_hf(nested) == CONFIG
    qwen = LlamaConfig.from_hf(golden("qwen2", "public")[0]).language
    assert qwen.qkv_bias and not qwen.o_bias and not qwen.mlp_bias
    biased = LlamaConfig.from_hf(HF | {"attention_bias": True, "mlp_bias": True}).language
    assert biased.qkv_bias and biased.o_bias and biased.mlp_bias
    assert LlamaConfig.from_hf(HF | {"head_dim": 20}).language.rope_streams == (0,) * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_says_so(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf(HF | changes)


def test_the_chat_template(folder) -> None:
    processor = LlamaProcessor(folder, CONFIG)
    prompt = processor.prompt("What?")
    assert processor.tokenizer.decode(prompt.input_ids) == (
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.input_ids[0] == 301 and prompt.grids == []
    assert processor.stop_ids == (2,)  # config.json


def test_a_model_without_template_takes_plain_text(copied) -> None:
    write_tokenizer(copied, SPECIAL, first=300)
    processor = LlamaProcessor(copied, CONFIG)
    assert processor.tokenizer.decode(processor.prompt("Once").input_ids) == "Once"
    with pytest.raises(UserError, match="no chat template"):
        processor.messages([{"role": "user", "content": "Once"}])
    with pytest.raises(UserError, match="empty"):
        processor.prompt("")


def test_pictures_and_strange_messages_are_refused(folder) -> None:
    processor = LlamaProcessor(folder, CONFIG)
    with pytest.raises(UserError, match="text-only model.*images: 1"):
        processor.prompt("hi", [np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(UserError, match="message 0"):
        processor.messages([{"role": "user", "content": [{"type": "image"}]}])


def test_a_tokenizer_of_another_model(copied) -> None:
    write_tokenizer(copied, SPECIAL, first=600, chat_template=TEMPLATE)
    with pytest.raises(UserError, match="vocabulary of 512"):
        LlamaProcessor(copied, CONFIG).prompt("hi")


def test_collate_pads_on_the_left(folder) -> None:
    processor = LlamaProcessor(folder, CONFIG)
    batch = processor.collate([processor.prompt("longer text"), processor.prompt("x")], pad_to=64)
    n = int(batch.lengths[1])
    assert batch.input_ids.shape == (2, 64) and batch.positions.shape == (1, 2, 64)
    assert (batch.token_class[1] == [-1] * (64 - n) + [0] * n).all()
    assert (batch.positions[0, 1, -n:] == np.arange(n)).all()
    assert (batch.order[1, :-n] == -1).all() and (batch.next_position == batch.lengths).all()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_convert_and_verify(family, tmp_path, capsys) -> None:
    source = tmp_path / "src"
    shutil.copytree(GOLDENS / family / "public", source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(12, np.float32)
    save_file(weights, source / "model.safetensors")
    arrays = verified(source, tmp_path / "dst", capsys, rtol=1e-4)
    assert {"embeds", "hidden_1", "hidden_2", "logits"} <= arrays


@pytest.mark.slow
def test_a_text_only_checkpoint_through_the_commands(folder, tmp_path, capsys) -> None:
    text, dst = tmp_path / "text.jsonl", str(tmp_path / "dst")
    rows = [{"question": f"Count to {i}.", "answer": " ".join("123456"[:i])} for i in range(1, 7)]
    text.write_text("\n".join(map(json.dumps, rows)))
    assert hf_to_flax.main([str(folder), dst, "--recipe", "w4a8"]) == 2
    assert "--calibration" in capsys.readouterr().err
    args = [str(folder), dst, "--recipe", "w4a8", "--calibration", str(text)]
    assert hf_to_flax.main(args) == 0
    assert isinstance(mq.load(dst).generate(prompt="Hello", max_new_tokens=3), str)
    capsys.readouterr()
    assert cli.main(["inspect", dst, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {r["layer"]: r["weights"] for r in layers}["language/layers/*/q_proj"] == "int4"
    small = ["--text-tokens", "8", "--new-tokens", "2", "--repeats", "1"]
    assert cli.main(["bench", dst, *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 8
