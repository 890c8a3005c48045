"""Safetensors files: headers checked in full, tensors read by rows, files written as a stream.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes.
Reading never maps a file: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.numerics import empty_aligned

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PARTIAL = ".partial"  # suffix of a file until it is complete
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_MAX_READ = 1 << 30  # bytes per system call; Linux refuses 2 GiB
_LENGTH = 8
_MOST_AXES = 64  # as NumPy
_SHOWN = 80  # characters of a damaged value shown in a message


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype, shape, and where its bytes lie (counted from the file's
    beginning, ``stop`` excluded)."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class TensorFile:
    """A safetensors file open for reading; its methods may be called from several threads.

    Attributes:
        path: the file.
        entries: name -> :class:`Entry`, in the order of the bytes.
        metadata: the header's own strings.
        header_hash: a hashlib sha256 over everything before the tensors' bytes.
    """

    def __init__(self, path: str | Path):
        """
        Raises:
            UserError: no regular file, or a header that is damaged or does not fit the file.
        """
        self.path = Path(path)
        self._fd = _open_regular(self.path)
        # Unlike __del__, it still runs properly when the interpreter shuts down.
        self._closed = weakref.finalize(self, os.close, self._fd)
        try:
            self.size = os.fstat(self._fd).st_size
            raw = self._header()
            self.header_hash = hashlib.sha256(raw)
            self.metadata, self.entries = self._parsed(raw[_LENGTH:], len(raw))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a no-op if it is closed."""
        self._closed()
        self._fd = -1

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Read a tensor, or its rows ``start:stop`` along the first axis, into new memory.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        entry = self.entries[name]
        shape = entry.shape
        if start is not None or stop is not None:
            first, last, _ = slice(start, stop).indices(shape[0])
            start, shape = first, (max(0, last - first), *shape[1:])
        out = empty_aligned(shape, entry.dtype)
        self.read_into(name, out, start or 0)
        return out

    def read_into(self, name: str, out: np.ndarray, start: int = 0) -> None:
        """Fill ``out``, a C-contiguous array of the tensor's dtype, from row ``start`` on.

        Raises:
            UserError: as :meth:`read`.
            ValueError: ``out`` is of another dtype, not contiguous, or longer than the tensor.
        """
        entry = self.entries[name]
        begin = entry.start + start * entry.row_bytes
        if out.dtype != entry.dtype or not out.flags.c_contiguous:
            raise ValueError(f"{name}: expected a contiguous array of {entry.dtype}")
        if begin + out.nbytes > entry.stop:
            raise ValueError(f"{name}: {out.nbytes} bytes from row {start} on, it has fewer")
        self._fill(byte_view(out), begin)

    def _fill(self, buffer: memoryview, at: int) -> None:
        while buffer.nbytes:
            try:
                got = os.preadv(self._fd, [buffer[:_MAX_READ]], at)
            except OSError as e:
                raise UserError(f"{self.path}: cannot be read: {e.strerror}") from e
            if not got:
                raise UserError(f"{self.path}: truncated: it ends at byte {at} of {self.size}")
            buffer, at = buffer[got:], at + got

    def _header(self) -> bytes:
        """Return the length and the JSON, unparsed."""
        if self.size < _LENGTH:
            self._damaged("no header")
        raw = bytearray(_LENGTH)
        self._fill(memoryview(raw), 0)
        length = int.from_bytes(raw, "little")
        if length > min(_MAX_HEADER, self.size - _LENGTH):
            self._damaged(f"the header claims {length} bytes")
        raw += bytes(length)
        self._fill(memoryview(raw)[_LENGTH:], _LENGTH)
        return bytes(raw)

    def _parsed(self, text: bytes, base: int) -> tuple[dict[str, str], dict[str, Entry]]:
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as e:
            self._damaged(f"the header is not valid JSON: {_short(e)}")
        if not isinstance(header, dict):
            self._damaged("the header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._damaged("__metadata__ is not an object of strings")
        entries = {name: self._entry(name, data, base) for name, data in header.items()}
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        end = base
        for name, entry in entries.items():
            if entry.start != end:
                kind = "overlaps" if entry.start < end else "leaves a gap to"
                self._damaged(f"tensor {_short(name)} {kind} the one before it")
            end = entry.stop
        if end != self.size:
            self._damaged(f"its tensors end at byte {end}")
        return metadata, entries

    def _entry(self, name: str, data: Any, base: int) -> Entry:
        where = f"tensor {_short(name)}"
        if not isinstance(data, dict) or data.keys() != {"dtype", "shape", "data_offsets"}:
            self._damaged(f"{where} needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self._damaged(f"{where} has the dtype {_short(dtype)}; known: {', '.join(DTYPES)}")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            self._damaged(f"{where} has the shape {_short(shape)} at {_short(offsets)}")
        if len(shape) > _MOST_AXES:
            self._damaged(f"{where} has {len(shape)} axes; expected {_MOST_AXES} at most")
        start, stop = offsets
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if stop - start != size:
            self._damaged(f"{where} of {dtype} {_short(shape)} takes {_short(size)} bytes, not "
                          f"{stop - start}")  # fmt: skip
        return Entry(DTYPES[dtype], tuple(shape), base + start, base + stop)

    def _damaged(self, reason: str) -> NoReturn:
        raise UserError(
            f"{self.path}: truncated or damaged safetensors file ({self.size} bytes): {reason}"
        )


def byte_view(array: np.ndarray) -> memoryview:
    """Return the bytes of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _open_regular(path: Path) -> int:
    """Open a regular file; reading a pipe or a device would never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: not a regular file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _counts(value: Any) -> bool:
    """Return whether a value is a list of integers from 0 to 2^63."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


class TensorFileWriter:
    """Writes a safetensors file front to back; it gets its final name only when it is complete.

    Used as a context manager: on success the file is flushed to the disk and renamed, on failure
    it is removed.

    Attributes:
        record: after success ``{"bytes", "sha256", "tensors": {name: sha256}}``.
    """

    def __init__(self, path: str | Path, specs: Mapping[str, tuple[tuple[int, ...], Any]]):
        """
        Args:
            specs: name -> (shape, dtype), in the order in which the tensors will be written.
        """
        self.path = Path(path)
        self.record: dict[str, Any] = {}
        self._specs = {n: (tuple(shape), np.dtype(dtype)) for n, (shape, dtype) in specs.items()}
        self._left = {n: math.prod(s) * d.itemsize for n, (s, d) in self._specs.items()}
        self._hashes = {n: hashlib.sha256() for n in self._specs}
        self._file_hash = hashlib.sha256()
        self._bytes = 0
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        self._fd = -1

    def __enter__(self) -> TensorFileWriter:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._fd = os.open(self._partial, flags, 0o666)
        try:
            self._put(memoryview(self._header()))
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a whole tensor, or the next of its row blocks; tensors in the order of the specs.

        Raises:
            ValueError: another tensor comes next, or dtype or rows do not match the spec.
            OSError: for example a full disk.
        """
        turn = next((n for n, left in self._left.items() if left), None)
        array = np.ascontiguousarray(array)
        if array.dtype != self._specs[name][1]:
            raise ValueError(f"{name}: {array.dtype}, expected {self._specs[name][1]}")
        if not array.nbytes:
            return
        if name != turn or array.nbytes > self._left[name]:
            raise ValueError(f"{name}: {array.nbytes} bytes, while {turn} is to be written")
        data = byte_view(array)
        self._hashes[name].update(data)
        self._put(data)
        self._left[name] -= array.nbytes

    def _header(self) -> bytes:
        entries, at = {}, 0
        for name, (shape, dtype) in self._specs.items():
            end = at + self._left[name]
            kind = DTYPE_NAMES[dtype]
            entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH)
        return len(text).to_bytes(_LENGTH, "little") + text

    def _put(self, data: memoryview) -> None:
        self._file_hash.update(data)
        self._bytes += data.nbytes
        while data.nbytes:
            data = data[os.write(self._fd, data[:_MAX_READ]) :]

    def _finish(self) -> None:
        unfinished = [n for n, left in self._left.items() if left]
        if unfinished:
            raise ValueError(f"{self.path}: {unfinished[0]} is not complete")
        os.fsync(self._fd)
        fd, self._fd = self._fd, -1
        os.close(fd)  # a network file system may report a full disk only here
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)
        self.record = {
            "bytes": self._bytes,
            "sha256": self._file_hash.hexdigest(),
            "tensors": {n: h.hexdigest() for n, h in self._hashes.items()},
        }

    def _discard(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
        with contextlib.suppress(OSError):
            self._partial.unlink()


def sync_folder(path: Path) -> None:
    """Flush a folder's directory entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_hash(path: Path) -> dict[str, Any]:
    """Return ``{"bytes", "sha256"}`` of a file."""
    with path.open("rb", buffering=0) as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return {"bytes": f.tell(), "sha256": digest}
