"""Model folders with a tokenizer, one per family, for the chat tests."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from mquant_jax.models.base import Family
from tests.family_cases import family_of
from tests.helpers import GOLDENS
from tests.hf_folders import write_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IM = ("<|im_start|>", "<|im_end|>")
_QWEN2_VL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|unused|>", "<|vision_start|>",
             "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")  # fmt: skip
# Case -> special tokens, id of the first one, contents of tokenizer_config.json.
TOKENS: dict[str, tuple[tuple[str, ...], int, dict[str, str]]] = {
    "qwen2_vl/public": (_QWEN2_VL, 384, {"eos_token": "<|im_end|>"}),
    "qwen2_5_vl/public": (_QWEN2_VL, 384, {"eos_token": "<|im_end|>"}),
    "qwen3_vl/public": (_QWEN2_VL, 384, {"eos_token": "<|im_end|>"}),
    "internvl2/public": (
        ("<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>"),
        374, {"eos_token": "<|im_end|>"},
    ),
    "internvl/public": (
        ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<video>", "<IMG_CONTEXT>"),
        386, {"eos_token": "<|im_end|>"},
    ),
    "llava/public": (
        ("<s>", "</s>", "<image>"), 389, {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "minicpmv2_6/public": (
        ("<image>", "</image>", "<slice>", "</slice>", "<unk>", "<image_id>", "</image_id>",
         "<newline>", *(f"<digit {i}>" for i in range(10)), *_IM),
        268, {"eos_token": "<|im_end|>"},
    ),
    "qwen_vl/public": (
        ("<|endoftext|>", *_IM, "<spare>", "<other spare>", "<ref>", "</ref>", "<box>", "</box>",
         "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
        290, {"eos_token": "<|endoftext|>"},
    ),
    "cogvlm2/public": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
        368, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "llama/public": (("<|endoftext|>", *_IM), 300, {"chat_template": CHATML}),
    "qwen2/public": (("<|endoftext|>", *_IM), 300, {"chat_template": CHATML}),
}  # fmt: skip
CASES = (*TOKENS, "glm4v/public")
_MERGES = ((b"<", b"|"), (b"|", b">"), (b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"i", b"m"))


def folder_of(case: str, to: Path) -> Path:
    """A folder with the golden's config and weights, and a byte tokenizer with a few merges."""
    to.mkdir(parents=True, exist_ok=True)
    for path in (GOLDENS / case).iterdir():
        if path.suffix == ".json" or path.name == "model.safetensors":
            shutil.copyfile(path, to / path.name)
    if case not in TOKENS:  # GLM-4V
        tokens = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell"]
        tokens += [bytes([200, i]) for i in range(370 - len(tokens))]
        lines = [base64.b64encode(t).decode() + f" {i}\n" for i, t in enumerate(tokens)]
        (to / "tokenizer.model").write_text("".join(lines), encoding="ascii")
        return to
    special, first, config = TOKENS[case]
    write_tokenizer(to, special, first, **config)
    path = to / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    for i, (left, right) in enumerate(_MERGES):
        left, right = left.decode(), right.decode()
        vocab[left + right] = vocab.pop(f"<filler {i}>")
        merges.append([left, right])
    path.write_text(json.dumps(data), encoding="utf-8")
    return to


def processor_of(case: str, to: Path) -> tuple[Family, Any]:
    """The family of a case, and its processor made from :func:`folder_of`."""
    folder = folder_of(case, to)
    family, config = family_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return family, family.processor(folder, config)
