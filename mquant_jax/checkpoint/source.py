"""Lazy reader of a Hugging Face model folder: config.json and safetensors, one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open

from mquant_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# Files beside the weights that a processor needs, copied along as they are.
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
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no such file, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:  # bad JSON or bad UTF-8
        raise UserError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


class Reader:
    """The tensors of a folder by name; only headers are read until a tensor is asked for.

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
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder; SRC is a Hugging Face model folder")
        self.config = read_json(self.folder / "config.json")
        self._open: dict[Path, Any] = {}
        self.tensors = dict(sorted(self._scan().items()))

    def _scan(self) -> dict[str, TensorInfo]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file():
            return self._header(single)
        if not index.is_file():
            raise UserError(self._nothing_found())
        found: dict[str, TensorInfo] = {}
        wanted = _weight_map(index)
        for file in sorted(set(wanted.values())):
            path = self.folder / file
            if not path.is_file():
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
        # safe_open checks that the header's offsets fill the file exactly.
        try:
            handle = self._open[path] = safe_open(path, framework="np")
            out = {}
            for name in handle.keys():  # noqa: SIM118  (a handle, not a mapping)
                part = handle.get_slice(name)
                out[name] = TensorInfo(path, tuple(part.get_shape()), part.get_dtype())
            return out
        except (SafetensorError, OSError, ValueError) as e:
            size = path.stat().st_size
            raise UserError(
                f"{path}: truncated or damaged safetensors file ({size} bytes): {e}; "
                "download it again"
            ) from e

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype.

        Raises:
            UserError: it cannot be read.
        """
        path = self.tensors[name].file
        try:
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as e:
            raise UserError(f"{path}: tensor {name} cannot be read: {e}") from e

    def side_files(self) -> list[Path]:
        """Tokenizer, preprocessor and generation files that exist here."""
        paths = (self.folder / name for name in SIDE_FILES)
        return [p for p in paths if p.is_file()]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, checked to stay inside the folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index}: expected a non-empty object 'weight_map'")
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {name} lies in {file!r}; expected a plain file name")
    return table


def _check_index(index: Path, wanted: dict[str, str], found: dict[str, TensorInfo]) -> None:
    for name, file in wanted.items():
        actual = found[name].file.name if name in found else None
        if actual != file:
            where = f"it is in {actual}" if actual else "no shard holds it"
            raise UserError(f"{index}: names tensor {name} in {file}, but {where}")
