"""mquant.json: what a checkpoint folder holds, and the checks of what is written there.

DST/mquant.json      this manifest, written last
DST/params/PART.safetensors
                     the tensors, a file per part: ``language.layers.3``, ``vision.merger``, ...;
                     a quantised one as NAME/values (4 bits: two per byte) and NAME/scale
DST/config.json      the Hugging Face config, as it was
DST/report.json      the quantisation report, if there is one
DST/*                tokenizer, preprocessor and generation files, as they were

Format 2, which 0.1.0 wrote, keeps the tensors as an Orbax checkpoint in DST/params.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from mquant_jax.errors import CheckpointError, UserError
from mquant_jax.files import is_file, is_folder, read_json
from mquant_jax.validate import shortened

# Also the version of how tensors are used, such as the rotations that `plan_rotation` returns.
FORMAT_VERSION, READABLE = 3, (2, 3)
MANIFEST, CONFIG, PARAMS, REPORT = "mquant.json", "config.json", "params", "report.json"
CONVERT_AGAIN = "convert the model again"
EDITED = 'where an edit is yours, pass verify="tensors" (on a command line --no-verify)'
_SHOWN, _LONGEST = 10, 400  # misfits listed in a message, characters of each
# True: all hashes must match; "tensors": JSON files may be edited; False: only sizes are checked.
Verify = Literal[True, False, "tensors"]

_QUANTISED = {"in_features": int, "bits": int, "groups": int, "scale_sha256": str}
_TENSOR = {"shape": list, "dtype": str, "bytes": int, "sha256": str, "part": str}
_FILE = {"bytes": int, "sha256": str}
_TOP = {"family": str, "tied_head": bool, "recipe": dict, "tensors": dict, "files": dict}
_TOP_3 = {**_TOP, "parts": dict, "total_bytes": int, "dtype_counts": dict, "sha256": str}


def load_manifest(folder: str | Path, verify: Verify = True) -> dict[str, Any]:
    """Load the manifest of a checkpoint folder.

    Args:
        verify: whether its hash must match; its structure is always checked.

    Raises:
        CheckpointError: there is no folder or no manifest, or it is damaged, edited, or of another
            format version.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise CheckpointError(f"{folder}: no such folder; expected a converted checkpoint")
    path = folder / MANIFEST
    if not is_file(path):
        raise CheckpointError(
            f"{folder}: holds no {MANIFEST}; expected a checkpoint that "
            "`python -m mquant_jax convert` wrote"
        )
    manifest = load_json(path)
    version = manifest.get("format_version")
    if type(version) is not int or version not in READABLE:
        raise CheckpointError(
            f"{path}: format version {version!r}, this program reads "
            f"{' and '.join(map(str, READABLE))}; {CONVERT_AGAIN}"
        )
    found = list(_wrong(manifest, _TOP if version == 2 else _TOP_3))
    if not found:
        found = list((_misfits_2 if version == 2 else _misfits)(manifest))
    if found:
        refuse(path, found)
    if verify and version == 3 and manifest["sha256"] != content_hash(manifest):
        raise CheckpointError(
            f"{path}: was edited or damaged: differs from its own hash; {CONVERT_AGAIN}, "
            "or pass verify=False (--no-verify)"
        )
    return manifest


def load_json(path: Path) -> dict[str, Any]:
    """Load a JSON object of a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return read_json(path)
    except UserError as e:
        raise CheckpointError(f"{e}; {CONVERT_AGAIN}") from e


def json_bytes(data: dict[str, Any]) -> bytes:
    """Return a JSON file's content."""
    return (json.dumps(data, indent=1) + "\n").encode()


def content_hash(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content without its own hash, whatever the formatting."""
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def refuse(where: Path, misfits: Sequence[str], cure: str = CONVERT_AGAIN) -> NoReturn:
    """
    Raises:
        CheckpointError: names the misfits, ten at most.
    """
    shown = [shortened(text, _LONGEST) for text in misfits[:_SHOWN]]
    more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
    raise CheckpointError(f"{where}: {'; '.join(shown)}{more}; {cure}")


def _misfits(manifest: dict[str, Any]) -> Iterator[str]:
    """Return what is missing or impossible in the tables of format 3."""
    if not isinstance(manifest.get("source", {}), dict):
        yield "source is damaged"
    for part, entry in manifest["parts"].items():
        yield from _wrong(entry, {**_FILE, "file": str}, f"parts.{part}")
        if isinstance(entry, dict) and entry.get("file") != f"{PARAMS}/{part}.safetensors":
            yield f"parts.{part}.file is {entry.get('file')!r}"
        yield from _no_name(part, "parts")
    for name, entry in manifest["files"].items():
        yield from _wrong(entry, _FILE, f"files.{name}")
        yield from _no_name(name, "files")
    for name, entry in manifest["tensors"].items():
        where = f"tensors.{name}"
        quantised = isinstance(entry, dict) and "bits" in entry
        wrong = list(_wrong(entry, _TENSOR | _QUANTISED if quantised else _TENSOR, where))
        yield from wrong
        if not wrong:
            yield from _impossible(entry, where, manifest["parts"])


def _misfits_2(manifest: dict[str, Any]) -> Iterator[str]:
    """Like :func:`_misfits`, for format 2."""
    for name, entry in manifest["files"].items():
        yield from _wrong(entry, _FILE, f"files.{name}")
    for name, entry in manifest["tensors"].items():
        quantised = isinstance(entry, dict) and "bits" in entry
        expected = {**_TENSOR, **_QUANTISED} if quantised else _TENSOR
        known = {k: v for k, v in expected.items() if k not in ("part", "scale_sha256")}
        yield from _wrong(entry, known, f"tensors.{name}")


def _wrong(entry: Any, expected: dict[str, type], where: str = "") -> Iterator[str]:
    """Return the keys of an entry that are missing or have another type."""
    if not isinstance(entry, dict):
        yield f"{where} is no object"
        return
    for key, kind in expected.items():
        if type(entry.get(key)) is not kind:
            yield f"{where + '.' if where else ''}{key} is missing or damaged"


def _no_name(name: str, where: str) -> Iterator[str]:
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        yield f"{where} has {name!r}, which is no file name"


def _impossible(entry: dict[str, Any], where: str, parts: dict[str, Any]) -> Iterator[str]:
    if not all(type(n) is int and n >= 0 for n in entry["shape"]):
        yield f"{where}.shape is {entry['shape']}"
    if entry["part"] not in parts:
        yield f"{where}.part is {entry['part']!r}, which is not among the parts"
    if "bits" not in entry:
        return
    shape, columns, groups = entry["shape"], entry["in_features"], entry["groups"]
    if entry["bits"] not in (4, 8) or entry["dtype"] != f"int{entry['bits']}":
        yield f"{where}.bits is {entry['bits']} with the dtype {entry['dtype']!r}"
    if len(shape) < 2 or shape[-1] != columns or groups < 1 or columns % groups:
        yield f"{where} has the shape {shape}, {columns} columns and {groups} groups"
