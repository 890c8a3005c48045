"""Checkpoint folders: exact, atomic, and checked when they are read."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from mquant_jax.checkpoint.manifest import content_hash, load_manifest
from mquant_jax.checkpoint.reader import load_params
from mquant_jax.checkpoint.writer import save
from mquant_jax.errors import CheckpointError, UserError
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
    params, manifest = load_params(tmp_path / "dst")
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


def _edit(folder, **changes):
    """Change mquant.json as somebody would who knows how it is hashed."""
    path = folder / "mquant.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest | {"sha256": content_hash(manifest)}))


def test_another_format_version_is_refused(tmp_path):
    _save(tmp_path / "dst")
    for version in (0, 4, "3", True, None):
        _edit(tmp_path / "dst", format_version=version)
        with pytest.raises(CheckpointError, match=f"version {version!r}, this program reads"):
            load_params(tmp_path / "dst")


def test_damage_is_named(tmp_path):
    dst = tmp_path / "dst"
    tensors = _save(dst)["tensors"]
    name = "vision/norm/weight"
    _edit(dst, tensors=tensors | {name: tensors[name] | {"shape": [4]}})
    with pytest.raises(CheckpointError, match=f"{name}: .* says F32 .4., found F32 .3."):
        load_params(dst, verify=False)
    _edit(dst, tensors=tensors | {"vision/other": tensors[name]})
    with pytest.raises(CheckpointError, match="vision/other: .* found nothing"):
        load_params(dst)
    (dst / "mquant.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_params(dst)
    (dst / "mquant.json").unlink()
    with pytest.raises(CheckpointError, match="holds no mquant.json"):
        load_params(dst)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_params(tmp_path / "nowhere")


def test_damaged_files_are_named(tmp_path):
    dst = tmp_path / "dst"
    _save(dst)
    path = dst / "params" / "language.embedding.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path}: damaged: tensor language/emb"):
        load_params(dst)
    load_params(dst, verify=False)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"damaged: expected {len(data)} bytes"):
        load_params(dst, verify=False)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name}: no such file"):
        load_params(dst)
