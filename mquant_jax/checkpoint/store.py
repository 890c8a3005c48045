"""Checkpoint folders: written whole or not at all, and checked when read.

DST/config.json     the Hugging Face config, as it was
DST/mquant.json     manifest: format version, family, recipe, one entry per tensor with its hash
DST/params/         Orbax checkpoint; layers separate, int4 two values per byte
DST/*.json          tokenizer, preprocessor and generation files, as they were
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16")
import numpy as np

from mquant_jax import __version__
from mquant_jax.checkpoint.atomic import new_folder
from mquant_jax.errors import UserError
from mquant_jax.nn.params import Params, parameter_bytes
from mquant_jax.numerics import QWeight, Storage
from mquant_jax.recipe import Recipe

# Also of what a model does with its tensors, such as the rotations that `plan_rotation` gives.
FORMAT_VERSION = 2
MANIFEST, CONFIG, PARAMS, REPORT = "mquant.json", "config.json", "params", "report.json"
_CONVERT_AGAIN = "convert the model again"


def save(
    dst: str | Path,
    params: Params,
    *,
    family: str,
    hf_config: dict[str, Any],
    recipe: Recipe,
    tied_head: bool,
    files: Sequence[Path] = (),
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint folder and return its manifest; after a failure DST is as before.

    Args:
        params: name -> array or :class:`QWeight` (stored packed when 4-bit), layers separate.
        files: copied into DST under their names.
        report: the quantisation report, stored as report.json.

    Raises:
        UserError: DST exists (without ``overwrite``), is not a checkpoint, or cannot be written;
            not enough space.
    """
    dst = Path(dst).absolute()
    params = {name: _storable(value) for name, value in params.items()}
    head = {"format_version": FORMAT_VERSION, "mquant_jax": __version__, "family": family}
    manifest = {**head, "tied_head": tied_head, "recipe": recipe.to_json(), **_tables(params)}
    with new_folder(dst, MANIFEST, parameter_bytes(params), overwrite) as partial:
        _write_json(partial / CONFIG, hf_config)
        for file in files:
            shutil.copyfile(file, partial / file.name)
        if report is not None:
            _write_json(partial / REPORT, report)
        _fill(partial, params, manifest)
    return manifest


def _fill(folder: Path, params: Params, manifest: dict[str, Any]) -> None:
    """Write the tensors, then the manifest with the table of their files."""
    _orbax().save(folder / PARAMS, _to_tree(params))
    manifest["files"] = _file_table(folder / PARAMS)
    _write_json(folder / MANIFEST, manifest)


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        UserError: no folder, no manifest, damaged, or of another format version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a converted checkpoint")
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder}: holds no {MANIFEST}; expected a checkpoint that "
            "`python -m convert.hf_to_flax` wrote"
        )
    manifest = load_json(path)
    found = manifest.get("format_version")
    if found != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {found!r}, this program reads {FORMAT_VERSION}; "
            + _CONVERT_AGAIN
        )
    expected = {"family": str, "tied_head": bool, "recipe": dict, "tensors": dict, "files": dict}
    for key, kind in expected.items():
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"{path}: {key!r} is missing or damaged; {_CONVERT_AGAIN}")
    return manifest


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint folder.

    Raises:
        UserError: missing or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; {_CONVERT_AGAIN}") from e
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}; {_CONVERT_AGAIN}") from e
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object; {_CONVERT_AGAIN}")
    return data


def load_params(folder: str | Path, verify_hashes: bool = False) -> tuple[Params, dict[str, Any]]:
    """All tensors by name (NumPy; ``QWeight`` as stored), and the manifest.

    Args:
        verify_hashes: compare every file and tensor with the hash taken when it was saved; file
            sizes are always compared.

    Raises:
        UserError: see :func:`load_manifest`; a tensor is missing, damaged or not as recorded.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    _check_files(folder / PARAMS, manifest["files"], verify_hashes)
    try:
        tree = _orbax().restore((folder / PARAMS).absolute())
    except Exception as e:  # Orbax and TensorStore raise many types for damaged files
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise UserError(f"{folder / PARAMS}: damaged ({reason}); {_CONVERT_AGAIN}") from e
    params = {
        name: _from_tree(tree, name, entry, folder) for name, entry in manifest["tensors"].items()
    }
    if verify_hashes:
        for name, found in _hashes(params).items():
            if found != manifest["tensors"][name].get("sha256"):
                raise UserError(
                    f"{folder}: tensor {name} differs from its hash in {MANIFEST}; "
                    + _CONVERT_AGAIN
                )
    return params, manifest


# --- tensors -----------------------------------------------------------------------------------


def _storable(value: Any) -> Any:
    value = value.packed() if isinstance(value, QWeight) else value
    return jax.tree.map(np.asarray, value)


def _entry(value: Any) -> dict[str, Any]:
    """A tensor's line in the manifest; ``shape`` is that of the weight, not of its packing."""
    if not isinstance(value, QWeight):
        return {
            "shape": list(value.shape), "dtype": value.dtype.name, "bytes": value.nbytes
        }  # fmt: skip
    return {
        "shape": [*value.values.shape[:-1], value.in_features],
        "dtype": f"int{value.bits}",
        "bytes": value.values.nbytes + value.scale.nbytes,
        "in_features": value.in_features,
        "bits": value.bits,
        "groups": value.groups,
    }


def _tables(params: Params) -> dict[str, Any]:
    hashes = _hashes(params)
    tensors = {n: {**_entry(v), "sha256": hashes[n]} for n, v in sorted(params.items())}
    counts: Counter[str] = Counter()
    for entry in tensors.values():
        counts[entry["dtype"]] += int(np.prod(entry["shape"]))
    return {
        "total_bytes": sum(e["bytes"] for e in tensors.values()),
        "dtype_counts": dict(counts),
        "tensors": tensors,
    }


def _hashes(params: Params) -> dict[str, str]:
    """Name -> sha256 over the tensor's bytes (values, then scales)."""

    def one(value: Any) -> str:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(value):
            digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        return dict(zip(params, pool.map(one, params.values()), strict=True))


def _to_tree(params: Params) -> dict[str, Any]:
    """Nested dictionaries by the parts of the names."""
    root: dict[str, Any] = {}
    for name, value in params.items():
        *folders, leaf = name.split("/")
        node = root
        for part in folders:
            node = node.setdefault(part, {})
        if isinstance(value, QWeight):
            value = {"values": value.values, "scale": value.scale}
        node[leaf] = value
    return root


def _from_tree(tree: Any, name: str, entry: dict[str, Any], folder: Path) -> Any:
    """One tensor, compared with its manifest entry."""
    try:
        for part in name.split("/"):
            tree = tree[part]
        if "bits" in entry:
            storage: Storage = "packed" if entry["bits"] == 4 else "int8"
            tree = QWeight(
                tree["values"], tree["scale"], entry["in_features"], entry["bits"], storage
            )
        found = _entry(tree)
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}: tensor {name} is missing; {_CONVERT_AGAIN}") from e
    for key, value in found.items():
        if entry.get(key) != value:
            raise UserError(
                f"{folder}: tensor {name}: {MANIFEST} says {key} {entry.get(key)!r}, "
                f"found {value!r}; {_CONVERT_AGAIN}"
            )
    return tree


def _orbax():
    """Orbax, told to be quiet; imported late because it takes a second."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp.PyTreeCheckpointer()


# --- files -------------------------------------------------------------------------------------


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _file_hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size and sha256 of every file below ``folder``."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_file_hash, paths))
    return {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": h}
        for p, h in zip(paths, hashes, strict=True)
    }


def _check_files(folder: Path, files: dict[str, Any], hashes: bool) -> None:
    """Find damage before Orbax does: it tells less, and leaves threads complaining on stderr."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; {_CONVERT_AGAIN}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(
                f"{path}: damaged: expected {entry['bytes']} bytes, found {size}; {_CONVERT_AGAIN}"
            )
        if hashes and _file_hash(path) != entry["sha256"]:
            raise UserError(
                f"{path}: damaged: differs from its hash in {MANIFEST}; {_CONVERT_AGAIN}"
            )
