"""Check a whole checkpoint: its files are unchanged, and the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.checkpoint.manifest import MANIFEST, load_manifest
from mquant_jax.checkpoint.provenance import source_misfits
from mquant_jax.checkpoint.reader import (
    Sink,
    file_misfits,
    load_params,
    stored_names,
    stream_misfits,
)
from mquant_jax.checkpoint.source import SIDE_FILES
from mquant_jax.checkpoint.tensor_file import Entry
from mquant_jax.cli_support import warn
from mquant_jax.errors import CheckpointError, UserError
from mquant_jax.files import is_file
from mquant_jax.loading import check_tensors, describe, held_bytes, load_model
from mquant_jax.models.base import VLM, Batch, Config, Family, Processor, abstract_model
from mquant_jax.nn.params import abstract_params
from mquant_jax.numerics import QWeight

_WEIGHTS = ("kernel", "embedding")  # tensors that must not be all zero
_TOKENIZERS = [name for name in SIDE_FILES if "token" in name or name == "vocab.json"]
_SPARE = 1 << 29  # bytes that a trial run takes beside the weights
_QUESTION = "Hello"


def examine(folder: Path, source: Path | None = None) -> list[str]:
    """Return everything that is wrong with a checkpoint folder, without running the model.

    Checks files and hashes, tensors against config and recipe, that weight scales are finite and
    positive, that float tensors are finite, and that weights are not all zero.

    Args:
        source: the model folder that it is said to be made from.

    Raises:
        UserError: there is no checkpoint folder, or no source folder.
    """
    if not is_file(folder / MANIFEST):
        load_manifest(folder)  # says what is missing
    try:
        manifest = load_manifest(folder)
    except CheckpointError as e:
        return [str(e)]
    found = list(file_misfits(folder, manifest, True))
    found += _model_misfits(folder, manifest)
    if not found:
        found += _tensor_misfits(folder, manifest)
    if source is not None:
        found += source_misfits(manifest.get("source", {}), source)
    return found


def _model_misfits(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return how the tensors' shapes fail to fit config and recipe."""
    try:
        family, config, recipe, _ = describe(folder, manifest)
        model = abstract_model(family, config, recipe)
        check_tensors(manifest, abstract_params(model), folder)
    except (UserError, ValueError) as e:
        return [str(e)]
    return []


def _tensor_misfits(folder: Path, manifest: dict[str, Any]) -> list[str]:
    values = _Values(manifest)
    if manifest["format_version"] == 2:
        try:
            params, _ = load_params(folder)
        except CheckpointError as e:
            return [str(e)]
        for name, value in params.items():
            leaves = [value.values, value.scale] if isinstance(value, QWeight) else [value]
            stored = stored_names(name, manifest["tensors"][name])
            for leaf, leaf_name in zip(leaves, stored, strict=True):
                values.see(leaf_name, 0, np.asarray(leaf))
        return values.misfits()
    found = stream_misfits(folder, manifest, values.sink_for)
    return found + values.misfits()


class _Values:
    """Checks tensors block by block."""

    def __init__(self, manifest: dict[str, Any]):
        self._scales: set[str] = set()
        self._zero: set[str] = set()  # weights of which only zeros were seen so far
        self._bad: dict[str, str] = {}
        for name, entry in manifest["tensors"].items():
            stored = stored_names(name, entry)
            self._scales.update(stored[1:])
            if name.rpartition("/")[2] in _WEIGHTS and entry["bytes"]:
                self._zero.add(stored[0])

    def sink_for(self, entries: Mapping[str, Entry]) -> Sink:
        return self.see

    def see(self, name: str, row: int, block: np.ndarray) -> None:
        if name in self._zero and np.any(block):
            self._zero.discard(name)
        if block.dtype.kind in "iub":
            return
        if not np.isfinite(block).all():
            self._bad[name] = "holds NaN or Inf"
        elif name in self._scales and not (block > 0).all():
            self._bad[name] = "holds scales that are not positive"

    def misfits(self) -> list[str]:
        zero = dict.fromkeys(self._zero, "is zero everywhere")
        return [f"tensor {name} {text}" for name, text in sorted((zero | self._bad).items())]


def check_result(
    folder: Path, family: Family, config: Config, processor: Processor | None = None
) -> None:
    """Read a checkpoint back and generate one token with it.

    If there is not enough memory for the whole model, a warning says that it was not run. Its files
    are read and compared with their hashes in any case.

    Args:
        folder: the folder as written, before it becomes DST.
        config: the family's config object.
        processor: that of ``folder``; by default it is built if the folder has a tokenizer.

    Raises:
        UserError: the files are not what was written, the processor cannot be built, or the model
            gives NaN.
    """
    manifest = load_manifest(folder)
    if processor is None and any(name in manifest["files"] for name in _TOKENIZERS):
        processor = family.processor(folder, config)
    needed, free = run_bytes(held_bytes(folder)), available_memory()
    if free is not None and needed > free:
        misfits = examine(folder)
        if misfits:
            raise CheckpointError(f"{folder}: {'; '.join(misfits)}")
        warn(f"the result was read back but not run: it needs {needed / 2**30:.1f} GiB of memory, "
             f"{free / 2**30:.1f} GiB are free", "memory")  # fmt: skip
        return
    model = load_model(folder).model
    prompt = (
        family.example_prompt(config, 4, 0) if processor is None else processor.prompt(_QUESTION)
    )
    batch = jax.tree.map(jnp.asarray, family.collate(config, [prompt]))
    logits = np.asarray(_last_logits(model, batch))
    if not np.isfinite(logits).all():
        raise UserError(
            f"{folder}: the converted model gives NaN or Inf; the source is damaged or the recipe "
            "does not suit it"
        )
    if processor is not None:
        processor.decode([int(np.argmax(logits))])


@jax.jit
def _last_logits(model: VLM, batch: Batch) -> jax.Array:
    """Return the logits that choose the first token of the answer, float32 ``[vocab]``."""
    return model(batch)[0, -1]


def run_bytes(held: int) -> int:
    """Return the free memory needed to run a model whose weights take ``held`` bytes."""
    return held + _SPARE


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate, if the system reports it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            lines = dict(line.split(":", 1) for line in f)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
