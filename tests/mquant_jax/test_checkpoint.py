"""Checkpoint folders: exact, atomic, and checked when they are read."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mquant_jax.checkpoint import atomic
from mquant_jax.checkpoint import store as checkpoint
from mquant_jax.checkpoint.store import load_manifest, load_params, save
from mquant_jax.errors import UserError
from mquant_jax.numerics import QWeight, quantize_weight
from mquant_jax.presets import PRESETS


def _params():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 15)).astype(np.float32)
    return {
        "language/embedding": rng.standard_normal((7, 4)).astype(ml_dtypes.bfloat16),
        "language/layers/0/q_proj/kernel": quantize_weight(w, 4, 5),
        "language/layers/1/q_proj/kernel": quantize_weight(w, 8),
        "language/layers/1/q_proj/bias": rng.standard_normal(6).astype(np.float16),
        "vision/norm/weight": np.arange(3, dtype=np.float32),
    }


def _save(dst, **changes):
    what = dict(family="qwen2_vl", hf_config={"a": 1}, recipe=PRESETS["w4a16"], tied_head=True)
    return save(dst, _params(), **(what | changes))


def test_everything_comes_back_bit_for_bit(tmp_path):
    side = tmp_path / "tokenizer.json"
    side.write_text("{}")
    saved = _save(tmp_path / "dst", files=[side], report={"x": 1.0})
    params, manifest = load_params(tmp_path / "dst", verify_hashes=True)
    assert manifest == saved == load_manifest(tmp_path / "dst")
    assert (tmp_path / "dst" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == {"a": 1}
    assert json.loads((tmp_path / "dst" / "report.json").read_text()) == {"x": 1.0}
    assert params.keys() == _params().keys()
    for name, value in _params().items():
        got = params[name]
        if isinstance(value, QWeight):
            assert got.storage == ("packed" if value.bits == 4 else "int8")
            assert (got.bits, got.in_features) == (value.bits, value.in_features)
            np.testing.assert_array_equal(got.unpacked().values, value.values)
            np.testing.assert_array_equal(got.scale, value.scale)
        else:
            assert got.dtype == value.dtype
            np.testing.assert_array_equal(got, value)


def test_int4_takes_two_values_per_byte(tmp_path):
    manifest = _save(tmp_path / "dst")
    entry = manifest["tensors"]["language/layers/0/q_proj/kernel"]
    assert entry["dtype"] == "int4" and entry["shape"] == [6, 15] and entry["groups"] == 3
    assert entry["bytes"] == 6 * 8 + 6 * 3 * 4
    assert manifest["dtype_counts"] == {
        "bfloat16": 28, "int4": 90, "int8": 90, "float16": 6, "float32": 3
    }  # fmt: skip
    assert manifest["total_bytes"] == sum(e["bytes"] for e in manifest["tensors"].values())


def test_an_existing_folder_is_kept(tmp_path):
    dst = tmp_path / "dst"
    _save(dst)
    with pytest.raises(UserError, match="choose another DST or pass --overwrite"):
        _save(dst, tied_head=False)
    assert load_manifest(dst)["tied_head"] is True
    _save(dst, tied_head=False, overwrite=True)
    assert load_manifest(dst)["tied_head"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_overwrite_takes_checkpoints_only(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no checkpoint of ours"):
        _save(tmp_path / "dst", overwrite=True)
    assert (tmp_path / "dst" / "thesis.txt").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("bug"), OSError(5, "io")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_things_as_they_were(tmp_path, monkeypatch, stop, overwrite):
    if overwrite:
        _save(tmp_path / "dst")
    before = sorted(p.name for p in tmp_path.iterdir())

    def fail(folder):
        raise stop

    monkeypatch.setattr(atomic, "_sync", fail)
    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        _save(tmp_path / "dst", overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    if overwrite:
        load_params(tmp_path / "dst", verify_hashes=True)


@pytest.mark.parametrize("renamed", [1, 2])
def test_an_interrupt_between_the_renames(tmp_path, monkeypatch, renamed):
    """The old checkpoint comes back, or the new one stands; the other does not stay around."""
    dst, rename, seen = tmp_path / "dst", Path.rename, []
    _save(dst)

    def interrupted(path, target):
        rename(path, target)
        if dst in (path, target):
            seen.append(path)
            if len(seen) == renamed:
                raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _save(dst, overwrite=True)
    assert list(tmp_path.iterdir()) == [dst]
    load_params(dst, verify_hashes=True)


@pytest.mark.parametrize("slow", [False, True])
def test_an_interrupt_does_not_stop_threads_that_write(tmp_path, monkeypatch, slow):
    """Orbax's go on; a slow one makes the folder anew after it was removed."""

    def fill(folder, params, manifest):
        def write():
            if slow:
                while folder.exists():
                    time.sleep(0.01)
            else:
                time.sleep(0.1)
            (folder / "late").mkdir(parents=True)

        threading.Thread(target=write).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_fill", fill)
    monkeypatch.setattr(atomic, "PATIENCE", 1.0)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as m:
        m.setattr(atomic, "_sync", full)
        with pytest.raises(UserError, match=r"dst: the disk is full; .* needs \d+ bytes"):
            _save(tmp_path / "dst")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(UserError, match=r"needs \d+ bytes, the disk has 10 free"):
        _save(tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_killed_saves_left_is_removed(tmp_path):
    dead, mine = tmp_path / f".dst.partial-{_dead_pid()}", tmp_path / f".dst.partial-{os.getpid()}"
    alive = tmp_path / f".dst.partial-{os.getppid()}"
    other = tmp_path / f".dst2.partial-{_dead_pid()}"
    for folder in (dead, mine, alive, other):
        folder.mkdir()
    _save(tmp_path / "dst")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["dst", alive.name, other.name])


def test_a_checkpoint_moved_away_by_a_killed_overwrite_comes_back(tmp_path):
    _save(tmp_path / "dst")
    (tmp_path / "dst").rename(tmp_path / f".dst.old-{_dead_pid()}")
    with pytest.raises(UserError, match="exists already"):
        _save(tmp_path / "dst")
    load_params(tmp_path / "dst")


def _edit(folder, **changes):
    path = folder / "mquant.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_format_version_is_refused(tmp_path):
    _save(tmp_path / "dst")
    _edit(tmp_path / "dst", format_version=0)
    with pytest.raises(UserError, match="format version 0, this program reads 2"):
        load_params(tmp_path / "dst")


def test_damage_is_named(tmp_path):
    dst = tmp_path / "dst"
    manifest = _save(dst)
    tensors = manifest["tensors"]
    name = "vision/norm/weight"
    _edit(dst, tensors=tensors | {name: tensors[name] | {"sha256": "0"}})
    load_params(dst)
    with pytest.raises(UserError, match=f"{name} differs from its hash"):
        load_params(dst, verify_hashes=True)
    _edit(dst, tensors=tensors | {name: tensors[name] | {"shape": [4]}})
    with pytest.raises(UserError, match=f"{name}: .* shape"):
        load_params(dst)
    _edit(dst, tensors=tensors | {"vision/other": tensors[name]})
    with pytest.raises(UserError, match="vision/other is missing"):
        load_params(dst)
    (dst / "mquant.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_params(dst)
    (dst / "mquant.json").unlink()
    with pytest.raises(UserError, match="holds no mquant.json"):
        load_params(dst)
    with pytest.raises(UserError, match="no such folder"):
        load_params(tmp_path / "nowhere")


def test_damaged_files_are_named(tmp_path):
    dst = tmp_path / "dst"
    _save(dst)
    path = max((p for p in (dst / "params").rglob("*") if p.is_file()), key=os.path.getsize)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: damaged: differs from its hash"):
        load_params(dst, verify_hashes=True)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{path}: damaged: expected {len(data)} bytes"):
        load_params(dst)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: no such file"):
        load_params(dst)
