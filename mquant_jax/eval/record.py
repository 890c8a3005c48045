"""Provenance of a result: data, prompts, decoding, versions, checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import mquant_jax
from mquant_jax.api import Model
from mquant_jax.checkpoint.manifest import content_hash
from mquant_jax.checkpoint.provenance import hash_files
from mquant_jax.eval.perplexity import LENGTH
from mquant_jax.eval.question import Question, Task, picture_key
from mquant_jax.eval.readers.shards import files_of
from mquant_jax.eval.runner import WINDOW
from mquant_jax.files import is_folder, read_json_if_any
from mquant_jax.runtime.options import Options


def describe(
    task: Task,
    data: Path | None,
    questions: Sequence[Question],
    options: Options,
    split: str | None = None,
) -> dict[str, Any]:
    """Everything that answers depend on besides the checkpoint."""
    digest = hashlib.sha256()
    for q in questions:
        pictures = [picture_key(image) for image in q.sample.images]
        text = json.dumps([q.id, q.sample.question, q.sample.messages, pictures])
        digest.update(text.encode())
    return {
        "task": task.name,
        "data": hashes(data, split) if data else {},
        "split": split,
        "limit": options.limit,
        "questions": len(questions),
        "questions_sha256": digest.hexdigest(),
        "prompt": {
            "suffix": task.suffix,
            "example": questions[0].sample.question if task.judge else "",
        },
        "option_rules": task.rules,
        "decoding": {
            "kind": "greedy" if task.judge else f"none; loss of windows of {LENGTH} tokens",
            "max_new_tokens": options.max_new_tokens,
            "batch_size": options.batch_size,
            "window": WINDOW * options.batch_size,
            "kv_cache": options.kv_cache,
            "layout": options.layout,
        },
        "versions": {"mquant_jax": mquant_jax.__version__, "jax": jax.__version__},
    }


def hashes(data: Path, split: str | None) -> dict[str, Any]:
    """File -> size and SHA-256. Files of a folder are named by their relative path."""
    found = {}
    for file in files_of(data, split):
        name = str(file.relative_to(data)) if is_folder(data) else file.name
        found[name] = hash_files([file])[file.name]
    return found


def of_checkpoint(model: Model) -> dict[str, Any]:
    """The checkpoint's hash, recipe, and image preprocessing with its pixel limits."""
    manifest = model.manifest
    folder = getattr(model.processor, "folder", None)
    pictures = read_json_if_any(Path(folder) / "preprocessor_config.json") if folder else {}
    return {
        "checkpoint": manifest.get("sha256") or content_hash(manifest),
        "family": manifest["family"],
        "recipe": manifest["recipe"],
        "preprocessor": pictures,
        "dtype": str(model.module.language.dtype)
        if hasattr(model.module.language, "dtype")
        else "",
    }
