"""Lazy reader of a Hugging Face model folder: config.json and safetensors, one tensor at a time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from mquant_jax.checkpoint.foreign import (
    refuse_adapter,
    refuse_foreign_names,
    refuse_quantised,
)
from mquant_jax.checkpoint.tensor_file import DTYPE_NAMES, TensorFile
from mquant_jax.errors import UserError
from mquant_jax.files import check_inside, is_file, is_folder, read_json
from mquant_jax.validate import shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST_NAME = 255  # bytes, the limit of all common file systems
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# Files that a processor needs, copied unchanged.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, and its entry in the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Reader:
    """The tensors of a folder by name; only headers are read until a tensor is requested.

    Attributes:
        folder: the model's folder.
        config: content of config.json.
        tensors: name -> :class:`TensorInfo`, sorted by name.
    """

    def __init__(self, folder: str | Path):
        """
        Raises:
            UserError: a missing, damaged or contradictory file; the message names it.
        """
        self.folder = Path(folder)
        if not is_folder(self.folder):
            raise UserError(f"{folder}: no such folder; SRC is a Hugging Face model folder")
        refuse_adapter(self.folder)
        self.config = read_json(self.folder / "config.json")
        refuse_quantised(self.config, self.folder / "config.json")
        self._open: dict[Path, TensorFile] = {}
        self.tensors = dict(sorted(self._scan().items()))
        refuse_foreign_names(self.tensors, self.folder)

    def _scan(self) -> dict[str, TensorInfo]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if os.path.lexists(single):
            return self._header(single)
        if not is_file(index):
            raise UserError(self._nothing_found())
        found: dict[str, TensorInfo] = {}
        wanted = _weight_map(index)
        for file in sorted(set(wanted.values())):
            path = self.folder / file
            if not os.path.lexists(path):
                raise UserError(f"{path}: shard is missing, {INDEX} names it; download it again")
            for name, info in self._header(path).items():
                if name in found:
                    raise UserError(
                        f"{name}: stored twice, in {found[name].file.name} and {file}; "
                        "remove the shard that does not belong to this model"
                    )
                found[name] = info
        _check_index(index, wanted, found)
        return found

    def _nothing_found(self) -> str:
        pickled = next(iter(sorted(self.folder.glob("*.bin"))), None)
        if pickled is not None:
            return (
                f"{pickled}: pickle files are never opened; export the model to safetensors "
                "(transformers: save_pretrained(DIR, safe_serialization=True))"
            )
        return f"{self.folder}: holds neither {SINGLE} nor {INDEX}"

    def _header(self, path: Path) -> dict[str, TensorInfo]:
        try:
            check_inside(path)
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror}; download it again") from e
        file = self._open[path] = TensorFile(path)
        return {
            name: TensorInfo(path, entry.shape, DTYPE_NAMES[entry.dtype])
            for name, entry in file.entries.items()
        }

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Read rows ``start`` to ``stop`` of one tensor, or all of it, in its stored dtype.

        Raises:
            UserError: it cannot be read.
        """
        return self._open[self.tensors[name].file].read(name, start, stop)

    def side_files(self) -> list[Path]:
        """Return the tokenizer, preprocessor and generation files that exist here."""
        paths = (self.folder / name for name in SIDE_FILES)
        return [p for p in paths if is_file(p)]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, checked to stay inside the folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index}: expected a non-empty object 'weight_map'")
    for name, file in table.items():
        if not _is_plain_name(file):
            raise UserError(f"{index}: {name} lies in {shown(file)}; expected a plain file name")
    return table


def _is_plain_name(name: Any) -> bool:
    """Return whether a name can be a file of the same folder."""
    if not isinstance(name, str) or "\0" in name or Path(name).name != name:
        return False
    try:
        return len(name.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _check_index(index: Path, wanted: dict[str, str], found: dict[str, TensorInfo]) -> None:
    for name, file in wanted.items():
        actual = found[name].file.name if name in found else None
        if actual != file:
            where = f"it is in {actual}" if actual else "no shard holds it"
            raise UserError(f"{index}: names tensor {name} in {file}, but {where}")
