"""Reads checkpoint folders: sizes and hashes first, each file once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mquant_jax.checkpoint import orbax_format
from mquant_jax.checkpoint.manifest import (
    CONVERT_AGAIN,
    EDITED,
    MANIFEST,
    PARAMS,
    Verify,
    load_manifest,
    refuse,
)
from mquant_jax.checkpoint.source import SIDE_FILES
from mquant_jax.checkpoint.tensor_file import DTYPE_NAMES, Entry, TensorFile, byte_view, file_hash
from mquant_jax.checkpoint.writer import SCALE, VALUES
from mquant_jax.errors import CheckpointError, UserError
from mquant_jax.files import is_file, is_folder
from mquant_jax.nn.params import Params
from mquant_jax.numerics import QWeight, Storage, empty_aligned

THREADS = min(4, os.cpu_count() or 1)  # reading, hashing and NumPy release the GIL
_BLOCK = 4 << 20  # bytes read, hashed and used at a time
# Called with a stored tensor's name, the first row and the rows; the array is reused.
Sink = Callable[[str, int, np.ndarray], None]


class Checkpoint:
    """A checkpoint folder open for reading, one tensor at a time.

    Attributes:
        folder: the folder.
        manifest: its content as mquant.json describes it.
    """

    def __init__(self, folder: str | Path, verify: Verify = True):
        """
        Args:
            verify: ``True``: files must be what was written; ``"tensors"``: JSON files beside the
                manifest may be edited; ``False``: only sizes are compared.

        Raises:
            CheckpointError: see :func:`load_manifest`; files that are missing, damaged or edited,
                all of them named.
        """
        self.folder = Path(folder)
        self.verify = verify
        self.manifest = load_manifest(folder, verify)
        check_files(self.folder, self.manifest, verify)
        self._files: dict[str, TensorFile] = {}
        self._old: Params | None = None

    @property
    def names(self) -> list[str]:
        """All tensors' names, sorted."""
        return sorted(self.manifest["tensors"])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str) -> Any:
        """One tensor: a NumPy array, or a :class:`QWeight` as stored.

        Raises:
            CheckpointError: it is not what was written.
            KeyError: there is none of this name.
        """
        entry = self.manifest["tensors"][name]
        if self.manifest["format_version"] == 2:
            if self._old is None:
                self._old = orbax_format.read(self.folder, self.manifest, bool(self.verify))
            return self._old[name]
        file = self._part(entry["part"])
        arrays = {stored: file.read(stored) for stored in stored_names(name, entry)}
        if self.verify:
            wrong = _wrong_tensors({name: entry}, lambda stored: byte_view(arrays[stored]))
            if wrong:
                refuse(file.path, wrong)
        return _assembled(name, entry, arrays)

    def read_scale(self, name: str) -> np.ndarray:
        """The scales of a quantised tensor, float32 ``[..., groups]``, without its values.

        Raises:
            CheckpointError: they are not what was written.
        """
        entry = self.manifest["tensors"][name]
        if self.manifest["format_version"] == 2:
            return np.asarray(self.read(name).scale)
        file, stored = self._part(entry["part"]), stored_names(name, entry)[1]
        scale = file.read(stored)
        found = hashlib.sha256(byte_view(scale)).hexdigest()
        if self.verify and found != entry["scale_sha256"]:
            refuse(file.path, [f"tensor {stored} differs from its hash in {MANIFEST}"])
        return scale

    def _part(self, part: str) -> TensorFile:
        if part not in self._files:
            self._files[part] = open_part(self.folder, part, self.manifest)
        return self._files[part]


def load_params(folder: str | Path, verify: Verify = True) -> tuple[Params, dict[str, Any]]:
    """All tensors by name (NumPy; :class:`QWeight` as stored), and the manifest.

    Args:
        verify: see :class:`Checkpoint`.

    Raises:
        CheckpointError: files or tensors that are missing, damaged or not as recorded.
    """
    folder = Path(folder)
    manifest = load_manifest(folder, verify)
    check_files(folder, manifest, verify)
    if manifest["format_version"] == 2:
        return orbax_format.read(folder, manifest, bool(verify)), manifest
    arrays: dict[str, np.ndarray] = {}

    def keep(entries: Mapping[str, Entry]) -> Sink:
        mine = {n: empty_aligned(e.shape, e.dtype) for n, e in entries.items()}
        arrays.update(mine)
        return lambda name, row, block: put_rows(mine[name], row, block)

    stream(folder, manifest, keep, verify)
    params = {n: _assembled(n, e, arrays) for n, e in manifest["tensors"].items()}
    return params, manifest


def put_rows(out: Any, row: int, block: np.ndarray) -> None:
    """Put a block of rows (or a scalar) in its place, converted to the type of ``out``."""
    if block.ndim:
        out[row : row + len(block)] = block
    else:
        out[...] = block


def stream(
    folder: Path,
    manifest: dict[str, Any],
    sink_for: Callable[[Mapping[str, Entry]], Sink],
    verify: Verify = True,
) -> None:
    """Read every part's file once, in parallel, and hand out its tensors by blocks of rows.

    Args:
        sink_for: given the stored tensors of a part, what takes their blocks; called from several
            threads, like the sinks. Scalars come as arrays without axes.
        verify: whether the bytes handed out are compared with the files' hashes.

    Raises:
        CheckpointError: files that are damaged; all of them are named.
    """
    misfits = stream_misfits(folder, manifest, sink_for, verify)
    if misfits:
        refuse(folder, misfits)


def stream_misfits(
    folder: Path,
    manifest: dict[str, Any],
    sink_for: Callable[[Mapping[str, Entry]], Sink],
    verify: Verify = True,
) -> list[str]:
    """:func:`stream`, and a line for each file that is damaged."""

    def one(part: str) -> list[str]:
        try:
            with open_part(folder, part, manifest) as file:
                digest = _stream_file(file, sink_for(file.entries))
                if not verify or digest == manifest["parts"][part]["sha256"]:
                    return []
                return [_blame(file, part, manifest)]
        except UserError as e:
            return [str(e)]

    # Largest first, so that the threads finish at about the same time.
    parts = sorted(manifest["parts"], key=lambda p: -manifest["parts"][p]["bytes"])
    with ThreadPoolExecutor(THREADS) as pool:
        return [text for found in pool.map(one, parts) for text in found]


def _stream_file(file: TensorFile, sink: Sink) -> str:
    """Hand out all tensors; the sha256 of what was read."""
    digest = file.header_hash.copy()
    buffer = np.empty(_BLOCK, np.uint8)
    for name, entry in file.entries.items():
        rows = entry.shape[0] if entry.shape else 1
        per_block = max(1, _BLOCK // max(1, entry.row_bytes))
        for start in range(0, rows if entry.stop > entry.start else 0, per_block):
            count = min(per_block, rows - start)
            size = count * entry.row_bytes
            buffer = buffer if size <= buffer.size else np.empty(size, np.uint8)
            shape = (count, *entry.shape[1:]) if entry.shape else ()
            block = buffer[:size].view(entry.dtype).reshape(shape)
            file.read_into(name, block, start)
            digest.update(buffer[:size].data)
            sink(name, start, block)
    return digest.hexdigest()


def _blame(file: TensorFile, part: str, manifest: dict[str, Any]) -> str:
    """Which tensors differ from what was written."""
    entries = {n: e for n, e in manifest["tensors"].items() if e["part"] == part}
    wrong = _wrong_tensors(entries, lambda stored: byte_view(file.read(stored)))
    return f"{file.path}: damaged: {', '.join(wrong) or 'its header differs'}"


def _wrong_tensors(entries: Mapping[str, Any], data: Callable[[str], memoryview]) -> list[str]:
    wrong = []
    for name, entry in entries.items():
        hashes = (entry["sha256"], entry.get("scale_sha256"))
        for stored, expected in zip(stored_names(name, entry), hashes, strict=False):
            if hashlib.sha256(data(stored)).hexdigest() != expected:
                wrong.append(f"tensor {stored} differs from its hash in {MANIFEST}")
    return wrong


def stored_names(name: str, entry: Mapping[str, Any]) -> list[str]:
    """The names under which a tensor's arrays lie in the file: values, then scales."""
    return [f"{name}/{VALUES}", f"{name}/{SCALE}"] if "bits" in entry else [name]


def _assembled(name: str, entry: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    values, *scale = (arrays[stored] for stored in stored_names(name, entry))
    if not scale:
        return values
    storage: Storage = "packed" if entry["bits"] == 4 else "int8"
    return QWeight(values, scale[0], entry["in_features"], entry["bits"], storage)


# --- checks --------------------------------------------------------------------------------------


def open_part(folder: Path, part: str, manifest: dict[str, Any]) -> TensorFile:
    """The file of a part, whose header holds what the manifest says.

    Raises:
        UserError: it does not.
    """
    file = TensorFile(folder / manifest["parts"][part]["file"])
    expected: dict[str, tuple[str, list[int]]] = {}
    for name, entry in manifest["tensors"].items():
        if entry["part"] == part:
            expected |= dict(zip(stored_names(name, entry), _layouts(entry), strict=True))
    found = {n: (DTYPE_NAMES[e.dtype], list(e.shape)) for n, e in file.entries.items()}
    if found == expected:
        return file
    file.close()
    wrong = [
        f"tensor {n}: {MANIFEST} says {_layout(expected.get(n))}, found {_layout(found.get(n))}"
        for n in sorted(expected.keys() | found.keys())
        if expected.get(n) != found.get(n)
    ]
    refuse(file.path, wrong)


def _layouts(entry: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """dtype and shape of the stored arrays of a tensor."""
    shape = list(entry["shape"])
    if "bits" not in entry:
        yield _SAFETENSORS.get(entry["dtype"], entry["dtype"]), shape
        return
    packed = entry["bits"] == 4
    columns = (entry["in_features"] + 1) // 2 if packed else entry["in_features"]
    yield "U8" if packed else "I8", [*shape[:-1], columns]
    yield "F32", [*shape[:-1], entry["groups"]]


_SAFETENSORS = {dtype.name: name for dtype, name in DTYPE_NAMES.items()}


def _layout(value: tuple[str, list[int]] | None) -> str:
    return "nothing" if value is None else f"{value[0]} {value[1]}"


def check_files(folder: Path, manifest: dict[str, Any], verify: Verify) -> None:
    """Sizes of all files, and hashes of those that hold no tensors.

    Raises:
        CheckpointError: names every file that is missing, damaged, edited or too many.
    """
    misfits = list(file_misfits(folder, manifest, verify))
    if misfits:
        tensors = any(PARAMS in Path(text.split(":")[0]).parts for text in misfits)
        refuse(folder, misfits, CONVERT_AGAIN if tensors else f"{CONVERT_AGAIN}; {EDITED}")


def file_misfits(folder: Path, manifest: dict[str, Any], verify: Verify) -> Iterator[str]:
    """What of the files is not as the manifest says, file by file."""
    if manifest["format_version"] == 2:
        yield from orbax_format.file_misfits(folder, manifest["files"], bool(verify))
        return
    wanted = set()
    for entry in manifest["parts"].values():
        wanted.add(entry["file"])
        yield from size_misfit(folder, entry["file"], entry["bytes"])
    if verify and is_folder(folder / PARAMS):
        found = {f"{PARAMS}/{p.name}" for p in (folder / PARAMS).iterdir()}
        yield from (f"{file}: not one of the checkpoint's files" for file in sorted(found - wanted))
    for name, entry in manifest["files"].items():
        if verify is True:
            yield from hash_misfit(folder, name, entry)
        elif not is_file(folder / name):
            yield f"{name}: no such file"
    if verify is True:
        for name in SIDE_FILES:
            if name not in manifest["files"] and (folder / name).exists():
                yield f"{name}: was not there when the checkpoint was written"


def size_misfit(folder: Path, name: str, expected: int) -> Iterator[str]:
    """One line if a file is missing or of another size."""
    path = folder / name
    if not is_file(path):
        yield f"{name}: no such file"
    elif path.stat().st_size != expected:
        yield f"{name}: damaged: expected {expected} bytes, found {path.stat().st_size}"


def hash_misfit(folder: Path, name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """One line if a file is missing or not what was written."""
    path = folder / name
    try:
        if not is_file(path):
            yield f"{name}: no such file"
        elif path.stat().st_size != entry["bytes"] or file_hash(path)["sha256"] != entry["sha256"]:
            yield f"{name}: was edited or damaged: differs from its hash in {MANIFEST}"
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
