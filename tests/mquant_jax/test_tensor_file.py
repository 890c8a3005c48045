"""Safetensors files: compatible with the format's own library in both directions."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mquant_jax.checkpoint import tensor_file
from mquant_jax.checkpoint.tensor_file import DTYPE_NAMES, TensorFile, TensorFileWriter
from mquant_jax.errors import UserError
from tests.helpers import fails


def _arrays():
    rng = np.random.default_rng(0)
    kinds = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, np.uint8)
    out = {f"t/{np.dtype(k).name}": (rng.standard_normal((5, 3)) * 9).astype(k) for k in kinds}
    empty = np.zeros((0, 4), np.float32)
    return out | {"bool": np.array([True, False]), "scalar": np.array(2, np.float32), "e": empty}


def _write(path, arrays):
    with TensorFileWriter(path, {n: (a.shape, a.dtype) for n, a in arrays.items()}) as out:
        for name, array in arrays.items():
            out.write(name, array)
    return out.record


def _same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


def test_both_ways_with_the_formats_own_library(tmp_path):
    arrays = _arrays()
    save_file(arrays, tmp_path / "theirs", metadata={"format": "np"})
    with TensorFile(tmp_path / "theirs") as file:
        assert file.metadata == {"format": "np"} and file.entries.keys() == arrays.keys()
        for name, array in arrays.items():
            _same(file.read(name), array)
    record = _write(tmp_path / "ours", arrays)
    theirs = load_file(tmp_path / "ours")
    for name, array in arrays.items():
        _same(theirs[name], array)
        assert record["tensors"][name] == hashlib.sha256(array.tobytes()).hexdigest()
    data = (tmp_path / "ours").read_bytes()
    assert record["bytes"] == len(data)
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


def test_rows(tmp_path):
    table = np.arange(40, dtype=np.int32).reshape(10, 4)
    blocks = [table[:3], table[3:4], table[4:]]
    specs = {"a": ((10, 4), np.int32), "b": ((2,), np.float32)}
    with TensorFileWriter(tmp_path / "f", specs) as out:
        for block in blocks:
            out.write("a", block)
        out.write("b", np.ones(2, np.float32))
    file = TensorFile(tmp_path / "f")
    for start, stop in ((0, 10), (3, 5), (9, None), (None, 2), (5, 5), (4, 99), (-2, None)):
        _same(file.read("a", start, stop), table[start:stop])
    into = np.empty((2, 4), np.int32)
    file.read_into("a", into, 7)
    _same(into, table[7:9])
    with pytest.raises(ValueError, match="fewer"):
        file.read_into("a", into, 9)
    with pytest.raises(ValueError, match="contiguous"):
        file.read_into("a", into.T)
    with ThreadPoolExecutor(8) as pool:
        for row in pool.map(lambda i: file.read("a", i % 10, i % 10 + 1), range(200)):
            _same(row, table[row[0, 0] // 4 :][:1])
    file.close()


def test_what_is_not_written_as_announced(tmp_path):
    specs = {"a": ((2,), np.float32), "b": ((2,), np.float32)}
    good = np.ones(2, np.float32)

    def attempt(*writes):
        with TensorFileWriter(tmp_path / "f", specs) as out:
            for name, array in writes:
                out.write(name, array)

    for writes, word in (
        ([("b", good)], "while a is to be written"),
        ([("a", good), ("a", good)], "while b is"),
        ([("a", np.ones(3, np.float32))], "12 bytes"),
        ([("a", np.ones(2))], "float64, expected float32"),
        ([("a", good)], "b is not complete"),
    ):
        with pytest.raises(ValueError, match=word):
            attempt(*writes)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nth", range(4))
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, nth):
    (tmp_path / "f").write_text("older")
    calls, write = [], os.write

    def full(fd, data):
        calls.append(1)
        if len(calls) > nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:100])  # a short write, which must be continued

    monkeypatch.setattr(tensor_file.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        _write(tmp_path / "f", _arrays())
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "older"


def _raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_HEADERS = {
    "no json": (b"{", "not valid JSON"),
    "no utf-8": (b'{"\xff": 1}', "not valid JSON"),
    "list": (b"[]", "not a JSON object"),
    "nested": (b"[" * 100_000, "not valid JSON"),
    "twice": (b'{"a": {}, "a": {}}', "twice"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "no entry": ({"a": 3}, "needs exactly dtype"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, "needs exactly dtype"),
    "dtype": ({"a": _entry("F31")}, "has the dtype F31; known: F64"),
    "dtype type": ({"a": _entry([1])}, "has the dtype"),
    "negative": ({"a": _entry(shape=(-2,))}, "has the shape"),
    "float": ({"a": _entry(shape=(2.0,))}, "has the shape"),
    "bool": ({"a": _entry(shape=(True, 2))}, "has the shape"),
    "huge": ({"a": _entry(shape=(2**62, 2**62))}, "takes"),
    "huge in every message": ({"a": _entry(shape=(2**62,) * 60)}, "takes [0-9]{80}"),
    "axes": ({"a": _entry(shape=(2**62,) * 1000)}, "has 1000 axes; expected 64 at most"),
    "offsets": ({"a": _entry(offsets=(0, 8, 9))}, "has the shape"),
    "backward": ({"a": _entry(offsets=(8, 0))}, "takes 8 bytes, not -8"),
    "size": ({"a": _entry(offsets=(0, 4))}, "takes 8 bytes, not 4"),
    "gap": ({"a": _entry(), "b": _entry(offsets=(9, 17))}, "b leaves a gap"),
    "overlap": ({"a": _entry(), "b": _entry(offsets=(4, 12))}, "b overlaps"),
    "begin": ({"a": _entry(offsets=(4, 12))}, "a leaves a gap"),
    "truncated": ({"a": _entry(shape=(20,), offsets=(0, 80))}, "its tensors end at"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path, case):
    header, word = BAD_HEADERS[case]
    path = _raw(tmp_path / "f", header, bytes(8))
    fails(f"{path}: truncated or damaged safetensors file.*{word}", lambda: TensorFile(path))


def test_bad_files(tmp_path):
    path = tmp_path / "f"
    for data, word in (
        (b"", "no header"),
        (b"1234567", "no header"),
        ((1 << 40).to_bytes(8, "little"), "claims 1099511627776 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes"),
    ):
        path.write_bytes(data)
        fails(word, lambda: TensorFile(path))
    fails("no such file", lambda: TensorFile(tmp_path / "none"))
    fails("not a regular file", lambda: TensorFile(tmp_path))
    fails("not a regular file", lambda: TensorFile("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    fails("not a regular file", lambda: TensorFile(tmp_path / "pipe"))
    fails("cannot be read", lambda: TensorFile(tmp_path / "a\0b"))


def test_a_file_that_shrinks_is_noticed(tmp_path):
    _write(tmp_path / "f", {"a": np.ones(1000, np.float32)})
    file = TensorFile(tmp_path / "f")
    os.truncate(tmp_path / "f", 2000)
    fails("truncated: it ends at byte", lambda: file.read("a"))
    with pytest.raises(UserError):
        TensorFile(tmp_path / "f")


def test_files_are_closed(tmp_path):
    """When asked to, when forgotten, and without a word when the interpreter ends."""
    path = tmp_path / "t.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    before = os.listdir("/dev/fd")
    file = TensorFile(path)
    file.close()
    file.close()
    file = TensorFile(path)
    del file
    gc.collect()
    assert os.listdir("/dev/fd") == before
    code = "from mquant_jax.checkpoint.tensor_file import TensorFile; kept = TensorFile({!r})"
    run = [sys.executable, "-c", code.format(str(path))]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_dtype_of_the_format_that_numpy_has():
    assert {"F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL"} <= set(
        DTYPE_NAMES.values()
    )
