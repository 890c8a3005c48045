"""Write a LLaVA that sees, assembled from pretrained parts, as a Hugging Face folder.

    python -m benchmarks.llava_folder OUT [--connector FILE | --untrained]

The vision tower is DINOv2-small up to layer 9 (benchmarks/dinov2_onnx.py says where it comes from
and what to install), its positions resampled for pictures of 112 pixels: 64 visual tokens. The
language model is SmolLM2-135M-Instruct (benchmarks/smollm2.py); ``<image>`` takes the place of one
of its unused special tokens. The connector between them, and low-rank updates of the language
model, come from ``benchmarks/assets/llava/connector.safetensors``, which examples/train_llava.py
made; ``--untrained`` writes the folder that it starts from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from benchmarks import dinov2_onnx, smollm2
from mquant_jax.checkpoint.tensor_file import TensorFileWriter
from mquant_jax.cli_support import OK, Parser, run_cli
from mquant_jax.errors import UserError

ASSETS = Path(__file__).parent / "assets" / "llava"
CONNECTOR = ASSETS / "connector.safetensors"
LAYERS = 9  # of 12: a saliency head was trained on the last ones
GRID = 8  # patches a side
IMAGE, REPLACED, END = "<image>", "<reponame>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PROJECTOR, _LANGUAGE = "multi_modal_projector.", "language_model."
_BF16 = np.dtype(ml_dtypes.bfloat16)


def config(image_token: int, text: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model around a language model's own."""
    vision = {
        "model_type": "dinov2",
        "hidden_size": dinov2_onnx.WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": dinov2_onnx.HEADS,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": GRID * dinov2_onnx.PATCH,
        "patch_size": dinov2_onnx.PATCH,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "image_token_index": image_token,
        "image_seq_length": GRID * GRID,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def language() -> tuple[dict[str, np.ndarray], Any]:
    """Return SmolLM2's tensors under LLaVA's names, float32, and its tokenizer."""
    family, ours, params, tokenizer = smollm2.load()
    rules = family.weight_rules(ours)
    return {_LANGUAGE + rule.src: params[rule.dst] for rule in rules}, tokenizer


def vision(side: int = GRID) -> dict[str, np.ndarray]:
    """Return the tower's tensors under LLaVA's names, float32, positions resampled for pictures of
    ``side`` x ``side`` patches."""
    tensors = dinov2_onnx.load()
    table = "embeddings.position_embeddings"
    tensors[table] = dinov2_onnx.resampled(tensors[table], side)
    kept = tuple(f"encoder.layer.{i}." for i in range(LAYERS))
    return {
        f"vision_tower.{name}": value
        for name, value in tensors.items()
        if name.startswith(("embeddings.", "layernorm.", *kept))
    }


def fresh_projector(features: int, hidden: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return an untrained projector."""
    rng, out = np.random.default_rng(seed), {}
    for name, width in (("linear_1", features), ("linear_2", hidden)):
        kernel = rng.standard_normal((hidden, width)) / np.sqrt(width)
        out[f"{_PROJECTOR}{name}.weight"] = kernel.astype(np.float32)
        out[f"{_PROJECTOR}{name}.bias"] = np.zeros(hidden, np.float32)
    return out


def merged(tensors: dict[str, np.ndarray], updates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add what training made to the pretrained tensors.

    Args:
        updates: the projector's tensors, and for matrices of the language model two factors,
            ``NAME.down`` ``[rank, in]`` and ``NAME.up`` ``[out, rank]``, whose product is added.

    Raises:
        UserError: a factor without a matrix.
    """
    out = dict(tensors)
    for name, value in updates.items():
        matrix, _, factor = name.rpartition(".")
        if factor not in ("up", "down"):
            out[name] = value.astype(np.float32)
        elif matrix not in tensors:
            raise UserError(f"{name}: the language model has no tensor {matrix}")
        elif factor == "up":
            product = value.astype(np.float32) @ updates[f"{matrix}.down"].astype(np.float32)
            out[matrix] = tensors[matrix] + product
    return out


def write(out: Path, connector: Path | None) -> None:
    """Write the folder.

    Args:
        connector: what training made; ``None``: an untrained projector.

    Raises:
        UserError: ``out`` exists, or a package or the connector is missing.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    if connector and not connector.is_file():
        raise UserError(f"{connector}: no such file; expected what examples.train_llava wrote")
    tensors, tokenizer = language()
    tensors |= vision()
    text = smollm2.hf_config()
    fresh = fresh_projector(dinov2_onnx.WIDTH, text["hidden_size"])
    tensors = merged(tensors, load_file(connector) if connector else fresh)
    out.mkdir(parents=True)
    token = _write_tokenizer(out, tokenizer)
    _write_json(out / "config.json", config(token, text))
    _write_json(out / "preprocessor_config.json", _preprocessor())
    end = tokenizer.token_to_id(END)
    _write_json(out / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})
    _write_json(out / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": IMAGE,
        "patch_size": dinov2_onnx.PATCH, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    })  # fmt: skip
    specs = {name: (value.shape, _BF16) for name, value in tensors.items()}
    with TensorFileWriter(out / "model.safetensors", specs) as file:
        for name, value in tensors.items():
            file.write(name, value.astype(_BF16))


def _write_tokenizer(out: Path, tokenizer: Any) -> int:
    """Write the tokenizer with ``<image>`` in place of an unused special token.

    Returns:
        Its id.
    """
    text = json.loads(tokenizer.to_str())
    token = tokenizer.token_to_id(REPLACED)
    text["model"]["vocab"][IMAGE] = text["model"]["vocab"].pop(REPLACED)
    for added in text["added_tokens"]:
        if added["id"] == token:
            added["content"] = IMAGE
    (out / "tokenizer.json").write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
    _write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
        "chat_template": TEMPLATE,
    })  # fmt: skip
    return token


def _preprocessor() -> dict[str, Any]:
    side = GRID * dinov2_onnx.PATCH
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "image_mean": list(dinov2_onnx.MEAN),
        "image_std": list(dinov2_onnx.STD),
    }


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.llava_folder", __doc__ or "")
    add = parser.add_argument
    add("out", type=Path, help="folder to write")
    add("--connector", type=Path, default=CONNECTOR, metavar="FILE",
        help="what examples/train_llava.py made (default: the bundled one)")  # fmt: skip
    add("--untrained", action="store_true", help="a random projector, to start training from")
    args = parser.parse_args(argv)
    write(args.out, None if args.untrained else args.connector)
    print(f"wrote {args.out}")
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
