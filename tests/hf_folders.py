"""Small Hugging Face folders made from a golden, valid or deliberately broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.byte_tokenizer import write_tokenizer as write_tokenizer

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_vl"
Arrays = dict[str, np.ndarray]


def hf_folder(to: Path, change: Callable[[Arrays], None] | None = None, **config) -> Path:
    """A copy of the public golden with some tensors and config keys changed."""
    to.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copyfile(GOLDENS / "public" / name, to / name)
    if config:
        data = json.loads((to / "config.json").read_text()) | config
        (to / "config.json").write_text(json.dumps(data))
    if change is not None:
        tensors = load_file(to / "model.safetensors")
        change(tensors)
        save_file(tensors, to / "model.safetensors")
    return to


def shard(folder: Path) -> tuple[Path, Path]:
    """Split model.safetensors into two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    table = {}
    for file, part in zip(files, halves, strict=True):
        save_file({n: tensors[n] for n in part}, folder / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / files[0], folder / files[1]


def edit_index(folder: Path, **entries: str) -> None:
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"] |= entries
    path.write_text(json.dumps(data))
