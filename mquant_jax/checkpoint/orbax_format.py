"""Format 2, written by 0.1.0: the tensors are in an Orbax checkpoint. It is only read."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mquant_jax.checkpoint.manifest import CONVERT_AGAIN, MANIFEST, PARAMS, refuse
from mquant_jax.checkpoint.tensor_file import byte_view, file_hash
from mquant_jax.errors import CheckpointError
from mquant_jax.files import is_file
from mquant_jax.nn.params import Params
from mquant_jax.numerics import QWeight, Storage

_GLOB = "[]*?\\"  # characters that Orbax treats as a pattern in a path


def read(folder: Path, manifest: dict[str, Any], verify: bool) -> Params:
    """Read all tensors by name; their files have been checked.

    Raises:
        CheckpointError: a tensor is missing, damaged or not as recorded.
    """
    try:
        with _safe_path(folder / PARAMS) as path:
            tree = _orbax().restore(path)
    except Exception as e:  # Orbax and TensorStore raise many types of errors for damaged files
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise CheckpointError(f"{folder / PARAMS}: damaged ({reason}); {CONVERT_AGAIN}") from e
    tensors = manifest["tensors"]
    params = {name: _from_tree(tree, name, entry, folder) for name, entry in tensors.items()}
    if verify:
        hashes = _hashes(params)
        wrong = [
            f"tensor {name} differs from its hash in {MANIFEST}"
            for name, found in hashes.items()
            if found != tensors[name].get("sha256")
        ]
        if wrong:
            refuse(folder, wrong)
    return params


def file_misfits(folder: Path, files: dict[str, Any], verify: bool) -> Iterator[str]:
    """Return which of the Orbax checkpoint's files are not as recorded. Orbax itself reports less,
    and leaves threads that write errors to stderr."""
    for name, entry in files.items():
        path = folder / PARAMS / name
        shown = f"{PARAMS}/{name}"
        if not is_file(path):
            yield f"{shown}: no such file"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{shown}: damaged: expected {entry['bytes']} bytes, found {path.stat().st_size}"
        elif verify and file_hash(path)["sha256"] != entry["sha256"]:
            yield f"{shown}: damaged: differs from its hash in {MANIFEST}"


@contextlib.contextmanager
def _safe_path(folder: Path) -> Iterator[Path]:
    """Return a path to the folder in which Orbax finds no pattern."""
    places = [None, "/tmp", "/var/tmp", "/dev/shm"]
    for place in places:
        if set(place or tempfile.gettempdir()) & set(_GLOB):
            continue
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=place) as temporary:
            link = Path(temporary) / "checkpoint"
            link.symlink_to(folder.absolute(), target_is_directory=True)
            yield link
            return
    raise OSError("no temporary folder can be written; set TMPDIR")


def _orbax():
    """Import Orbax, silenced; late, because it takes a second."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp.PyTreeCheckpointer()


def _from_tree(tree: Any, name: str, entry: dict[str, Any], folder: Path) -> Any:
    """Return one tensor, compared with its manifest entry."""
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
        raise CheckpointError(f"{folder}: tensor {name} is missing; {CONVERT_AGAIN}") from e
    for key, value in found.items():
        if entry.get(key) != value:
            raise CheckpointError(
                f"{folder}: tensor {name}: {MANIFEST} says {key} {entry.get(key)!r}, "
                f"found {value!r}; {CONVERT_AGAIN}"
            )
    return tree


def _entry(value: Any) -> dict[str, Any]:
    if not isinstance(value, QWeight):
        return {
            "shape": list(value.shape), "dtype": value.dtype.name, "bytes": value.nbytes
        }  # fmt: skip
    return {
        "shape": [*value.values.shape[:-1], value.in_features],
        "dtype": f"int{value.bits}",
        "bytes": value.values.nbytes + value.scale.nbytes,
        "groups": value.groups,
    }


def _hashes(params: Params) -> dict[str, str]:
    """Return name -> SHA-256 of the tensor's bytes (values, then scales)."""

    def one(value: Any) -> str:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(value):
            digest.update(byte_view(np.ascontiguousarray(leaf)))
        return digest.hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(params, pool.map(one, params.values()), strict=True))
