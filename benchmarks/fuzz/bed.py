"""Small valid input of every kind; a case damages it, and it is restored afterwards."""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, features

import mquant_jax as mq
from benchmarks.byte_tokenizer import (
    write_bpe,
    write_sentencepiece,
    write_tiktoken,
    write_tokenizer,
)
from benchmarks.fuzz.damage import remove, special_file
from benchmarks.random_checkpoint import write_folder
from mquant_jax.models.registry import family_for
from mquant_jax.recipe import Recipe, Section
from mquant_jax.samples import DEMO_ASSETS

GOLDENS = Path(__file__).parents[2] / "tests" / "goldens"
CHECKPOINTS = ("float", "w4a8", "v2")
CONFIGS = (
    "cogvlm2/public", "glm4v/public", "internvl/public", "internvl2/public_qwen2", "llama/public",
    "minicpmv2_6/quirk_zero_token", "qwen2/public", "qwen2_5_vl/public",
    "qwen2_vl/public_video", "qwen3_vl/public", "qwen_vl/public",
)  # fmt: skip
_DYNAMIC = Section(4, None, "dynamic")
W4A8 = Recipe("w4a8-dynamic", vision=_DYNAMIC, connector=_DYNAMIC, language=_DYNAMIC,
              rotate=True)  # fmt: skip
# Golden case, id of the first special token, special tokens.
_TOKENIZERS = {
    "cogvlm2": ("cogvlm2/public", 368, "<|begin_of_text|> <|end_of_text|> <|reserved|>"),
    "internvl": (
        "internvl/public", 386, "<|im_start|> <|im_end|> <img> </img> <video> <IMG_CONTEXT>",
    ),
    "internvl2": ("internvl2/public", 374, "<|im_start|> <img> </img> <IMG_CONTEXT> <|im_end|>"),
    "llama": ("llama/public", 300, "<|endoftext|> <|im_start|> <|im_end|>"),
    "minicpmv": (
        "minicpmv2_6/public", 268,
        "<image> </image> <slice> </slice> <unk> <image_id> </image_id> <newline> <0> <1> <2> <3> "
        "<4> <5> <6> <7> <8> <9> <|im_start|> <|im_end|>",
    ),
    "qwen2_vl": (
        "qwen2_vl/public", 384,
        "<|endoftext|> <|im_end|> <|im_start|> <|unused|> <|vision_start|> <|vision_end|> "
        "<|vision_pad|> <|image_pad|> <|video_pad|>",
    ),
}  # fmt: skip
_TOKENIZERS["qwen3_vl"] = ("qwen3_vl/public", *_TOKENIZERS["qwen2_vl"][1:])
PROCESSORS = (*_TOKENIZERS, "glm4v", "qwen_vl", "bpe", "sentencepiece")


class Bed:
    """A copy of the input whose files may be damaged until :meth:`restore`.

    Args:
        root: the folder that :func:`build` wrote, or a copy of it.
    """

    def __init__(self, root: Path):
        self.root = root
        self._before: dict[Path, bytes | None] = {}

    def put(self, path: Path, data: bytes) -> None:
        """Write a file; :meth:`restore` undoes it."""
        self._keep(path)
        path.write_bytes(data)

    def put_special(self, rng: Random, path: Path) -> str:
        """Like :func:`special_file`; :meth:`restore` undoes it."""
        self._keep(path)
        return special_file(rng, path)

    def scratch(self, name: str) -> Path:
        """Return a path where nothing exists; :meth:`restore` removes what the case puts there."""
        path = self.root / "scratch" / name
        self._keep(path)
        return path

    def _keep(self, path: Path) -> None:
        if path not in self._before:
            self._before[path] = path.read_bytes() if path.is_file() else None

    def restore(self) -> None:
        """Restore all files."""
        for path, data in self._before.items():
            remove(path)
            if data is not None:
                path.write_bytes(data)
        self._before.clear()

    @functools.cached_property
    def family(self) -> tuple[Any, Any]:
        """Family and config of the small model."""
        return family_of(self.root / "tiny")

    @functools.cached_property
    def processor(self) -> Any:
        """The processor of the small model."""
        family, config = self.family
        return family.processor(self.root / "tiny", config)


def family_of(folder: Path) -> tuple[Any, Any]:
    """Return the family named in a folder's config.json, and its config."""
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = family_for(hf, folder / "config.json")
    return family, family.config_from_hf(hf)


def build(root: Path) -> None:
    """Write all input."""
    (root / "scratch").mkdir(parents=True)
    write_folder(root / "tiny", _small_config())
    write_folder(root / "sharded", _small_config(), shards=2)
    mq.convert(root / "tiny", root / "float")
    mq.convert(root / "tiny", root / "w4a8", W4A8)
    shutil.copytree(GOLDENS / "checkpoint_v2", root / "v2")
    for case in CONFIGS:
        folder = root / "configs" / case.replace("/", "-")
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(GOLDENS / case / name, folder)
    for name in PROCESSORS:
        processor_folder(root / "processors" / name, name)
    (root / "pictures").mkdir()
    for name, data in _pictures().items():
        (root / "pictures" / name).write_bytes(data)
    _samples(root / "samples")


def _small_config() -> dict[str, Any]:
    demo = json.loads((DEMO_ASSETS / "model" / "config.json").read_text(encoding="utf-8"))
    tower = demo["vision_config"] | {
        "depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32,
    }  # fmt: skip
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    return demo | {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 1, "rope_scaling": rope,
        "vision_config": tower,
    }  # fmt: skip


def processor_folder(folder: Path, name: str) -> None:
    """Write a new folder with all that one of :data:`PROCESSORS` needs, without weights."""
    folder.mkdir(parents=True)
    if name in _TOKENIZERS:
        case, first, tokens = _TOKENIZERS[name]
        special = tokens.split()
        end = "<|im_end|>" if "<|im_end|>" in special else special[0]
        write_tokenizer(folder, special, first, eos_token=end)
    elif name == "glm4v":
        case = "glm4v/public"
        write_tiktoken(folder / "tokenizer.model", 370)
    elif name == "qwen_vl":
        case = "qwen_vl/public"
        write_tiktoken(folder / "qwen.tiktoken", 260)
    elif name == "bpe":
        case = "qwen2/public"
        write_bpe(folder)
    else:
        case = "internvl2/public"
        first = write_sentencepiece(folder / "tokenizer.model")
        added = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
        added_ids = {token: first + i for i, token in enumerate(added)}
        (folder / "added_tokens.json").write_text(json.dumps(added_ids), encoding="utf-8")
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    for file in ("config.json", "preprocessor_config.json", "generation_config.json"):
        if (GOLDENS / case / file).is_file():
            shutil.copy(GOLDENS / case / file, folder)
    if name == "qwen_vl":
        path = folder / "config.json"
        hf = json.loads(path.read_text(encoding="utf-8"))
        hf |= {"vocab_size": 480, "visual": hf["visual"] | {"image_start_id": 474}}
        path.write_text(json.dumps(hf), encoding="utf-8")
        (folder / "generation_config.json").write_text(
            '{"chat_format": "chatml"}', encoding="utf-8"
        )


def _pictures() -> dict[str, bytes]:
    """Return one small picture in each format and mode, by file name."""
    rgb = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
    image, grey = Image.fromarray(rgb), Image.fromarray(rgb[..., 0])
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 100, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = image.quantize(16)
    palette.info["transparency"] = 3
    frames = {"save_all": True, "append_images": [image]}
    wide = Image.fromarray(rgb[..., 0].astype(np.uint16) << 8)
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("rgb.png", image, {"pnginfo": text, "exif": exif}), ("wide.png", wide, {}),
        ("palette.png", palette, {}), ("grey.png", grey, {"transparency": 7}),
        ("bits.png", grey.convert("1"), {}), ("a.jpg", image, {"exif": exif}),
        ("cmyk.jpg", image.convert("CMYK"), {}), ("progressive.jpg", image, {"progressive": True}),
        ("a.webp", image, frames), ("a.gif", palette, frames), ("a.bmp", image, {}),
        ("lzw.tiff", image, {"compression": "tiff_lzw"}), ("wide.tiff", wide, {}),
        ("jpeg.tiff", image, {"compression": "jpeg"}), ("a.ppm", image, {}),
        ("two.tiff", image, frames), ("a.mpo", image, frames),
    ]  # fmt: skip
    if features.check("jpg_2000"):
        made.append(("a.jp2", image, {}))
    if features.check("avif"):
        made.append(("a.avif", image, {}))
    return {name: _encoded(image, name, options) for name, image, options in made}


def _encoded(image: Image.Image, name: str, options: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    image.save(out, format=Image.registered_extensions()[f".{name.split('.')[1]}"], **options)
    return out.getvalue()


def _samples(folder: Path) -> None:
    folder.mkdir()
    rgb = np.random.default_rng(1).integers(0, 256, (2, 28, 56, 3), np.uint8)
    np.savez_compressed(folder / "samples.npz", images=rgb)
    Image.fromarray(rgb[0]).save(folder / "cat.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "cat"}]
    parts = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}]
    rows = [
        {"image": 0, "question": "What?", "answer": "cat", "task": "animals"},
        {"image": "cat.png", "question": "How many?", "answer": 3},
        {"image": "cat.png", "conversations": said, "id": 7},
        {"messages": [{"role": "user", "content": parts},
                      {"role": "assistant", "content": "cat"}]},
        {"images": ["cat.png", 1], "question": "Which?", "answer": ""},
        {"image": None, "question": "Text alone?", "answer": "yes"},
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
