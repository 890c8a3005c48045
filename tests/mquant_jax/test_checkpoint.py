"""Checkpoint folders: exact, written atomically, verified when read."""

from __future__ import annotations

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mquant_jax.checkpoint.manifest import content_hash, load_manifest
from mquant_jax.checkpoint.reader import Checkpoint, load_params
from mquant_jax.checkpoint.writer import CheckpointWriter, Rows, part_of, save
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


def test_parts_and_files(tmp_path):
    manifest = _save(tmp_path / "dst")
    assert {n: e["part"] for n, e in manifest["tensors"].items()} == {
        "language/embedding": "language.embedding",
        "language/layers/0/q_proj/kernel": "language.layers.0",
        "language/layers/1/q_proj/bias": "language.layers.1",
        "language/layers/1/q_proj/kernel": "language.layers.1",
        "vision/norm/weight": "vision.norm",
    }
    assert part_of("vision/resampler/layers/12/attn/kernel") == "vision.resampler.layers.12"
    assert part_of("bias") == "bias"
    stored = load_file(tmp_path / "dst" / "params" / "language.layers.0.safetensors")
    kernel = _params()["language/layers/0/q_proj/kernel"]
    np.testing.assert_array_equal(
        stored["language/layers/0/q_proj/kernel/values"], kernel.packed().values
    )
    np.testing.assert_array_equal(stored["language/layers/0/q_proj/kernel/scale"], kernel.scale)


def test_tables_delivered_by_rows(tmp_path):
    """Tables written in row blocks are read back as if written in one piece."""
    rng = np.random.default_rng(1)
    table = rng.standard_normal((50, 7)).astype(np.float32)
    weight = quantize_weight(table, 4)
    whole, blocks = CheckpointWriter(_made(tmp_path / "a")), CheckpointWriter(_made(tmp_path / "b"))

    def rows(start):
        return QWeight(
            weight.values[start : start + 16], weight.scale[start : start + 16], 7, 4, "int8"
        )

    starts = range(0, 50, 16)
    one = whole.write_part("t", {"t/x": table, "t/kernel": weight})
    other = blocks.write_part("t", {
        "t/x": Rows((50, 7), (table[i : i + 16] for i in starts), dtype=np.float32),
        "t/kernel": Rows((50, 7), map(rows, starts), bits=4),
    })  # fmt: skip
    assert json.loads(json.dumps(one)) == other
    assert blocks.holds(one)
    (tmp_path / "b" / one["file"]).write_bytes(b"x" * one["bytes"])
    assert not blocks.holds(one)
    (tmp_path / "b" / one["file"]).unlink()
    assert not blocks.holds(one)


def _made(folder):
    folder.mkdir()
    return folder


def _with(value, index=0):
    def change(array):
        array = np.array(array)
        array.reshape(-1)[index] = value
        return array

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_no_number_is_not_written(tmp_path, value, dtype):
    params = {"a/b": _with(value, -1)(np.ones((3, 5), dtype))}
    with pytest.raises(UserError, match="a/b: 1 of 15 values are NaN or Inf"):
        save(tmp_path / "d", params, family="x", hf_config={}, recipe=PRESETS["float"],
             tied_head=True)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, -1])
def test_scales_that_are_not_positive_are_not_written(tmp_path, value):
    weight = quantize_weight(np.ones((3, 4), np.float32), 8)
    weight = QWeight(weight.values, _with(value)(weight.scale), 4, 8, "int8")
    with pytest.raises(UserError, match="a/kernel: 1 of 3 weight scales are not positive"):
        save(tmp_path / "d", {"a/kernel": weight}, family="x", hf_config={},
             recipe=PRESETS["float"], tied_head=True)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_any_path_is_read_back(tmp_path):
    for name in ("[a]*?", "back\\slash", "new\nline", "ü漢", "-x", "x" * 200):
        dst = _made(tmp_path / name) / name
        _save(dst)
        assert load_params(dst)[0].keys() == _params().keys()
        with Checkpoint(dst) as checkpoint:
            assert checkpoint.names == sorted(_params())
            for tensor in checkpoint.names:
                checkpoint.read(tensor)


def _edit(folder, **changes):
    """Edit mquant.json and update its hash."""
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


def _small(dst, **changes):
    side = dst.parent / "tokenizer.json"
    side.write_text('{"a": 1}')
    params = {"a/b": np.arange(3, dtype=np.float32)}
    return save(dst, params, family="x", hf_config={"rope_theta": 10000}, recipe=PRESETS["float"],
                tied_head=True, files=[side], report={"x": 1}, **changes)  # fmt: skip


def _reads(dst, verify=True):
    with Checkpoint(dst, verify) as checkpoint:
        checkpoint.read("a/b")
    load_params(dst, verify)


def test_every_flipped_bit_is_noticed(tmp_path):
    dst = tmp_path / "dst"
    _small(dst)
    rng = np.random.default_rng(0)
    for path in sorted(p for p in dst.rglob("*") if p.is_file()):
        data = path.read_bytes()
        bits = range(8 * len(data)) if path.suffix == ".safetensors" else rng.choice(
            8 * len(data), min(60, 8 * len(data)), replace=False
        )  # fmt: skip
        for bit in bits:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            if path.name == "mquant.json" and _same_content(flipped, data):
                continue
            with pytest.raises(CheckpointError):
                load_params(dst)
        path.write_bytes(data)
    _reads(dst)


def _same_content(flipped, data):
    """Whether a flipped bit only changed white space in mquant.json."""
    try:
        return json.loads(flipped) == json.loads(data)
    except ValueError:
        return False


def test_edited_json_files(tmp_path):
    """Edited JSON files are accepted with ``verify="tensors"``; an edited mquant.json only without
    verification."""
    dst = tmp_path / "dst"
    _small(dst)
    for name in ("config.json", "tokenizer.json", "report.json"):
        before = (dst / name).read_bytes()
        (dst / name).write_text('{"rope_theta": 5}')
        with pytest.raises(CheckpointError, match=f'{name}: was edited.*verify="tensors"'):
            load_params(dst)
        for verify in ("tensors", False):
            _reads(dst, verify)
        (dst / name).write_bytes(before)
    (dst / "tokenizer.model").write_text("new")
    with pytest.raises(CheckpointError, match="tokenizer.model: was not there"):
        load_params(dst)
    _reads(dst, "tensors")
    (dst / "tokenizer.model").unlink()
    manifest = json.loads((dst / "mquant.json").read_text())
    manifest["recipe"]["seed"] = 7
    (dst / "mquant.json").write_text(json.dumps(manifest))
    for verify in (True, "tensors"):
        with pytest.raises(CheckpointError, match="mquant.json: was edited or damaged"):
            load_params(dst, verify)
    _reads(dst, False)


def test_extra_and_missing_files_are_all_listed(tmp_path):
    dst = tmp_path / "dst"
    _save(dst)
    (dst / "params" / "vision.norm.safetensors").unlink()
    (dst / "params" / "extra.safetensors").write_text("")
    (dst / "config.json").unlink()
    with pytest.raises(CheckpointError) as e:
        load_params(dst)
    for word in ("vision.norm.safetensors: no such file", "extra.safetensors: not one of",
                 "config.json: no such file"):  # fmt: skip
        assert word in str(e.value)
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        load_params(dst, False)


BAD_TABLES = {
    "no tensors": (lambda m: m.pop("tensors"), "tensors is missing"),
    "no parts": (lambda m: m.pop("parts"), "parts is missing"),
    "list": (lambda m: m.update(tensors=[]), "tensors is missing or damaged"),
    "no hash": (lambda m: m["tensors"]["a/b"].pop("sha256"), "tensors.a/b.sha256 is missing"),
    "no object": (lambda m: m["tensors"].update({"a/b": 3}), "tensors.a/b is no object"),
    "shape": (lambda m: m["tensors"]["a/b"].update(shape=[-1]), "shape is .-1."),
    "part": (lambda m: m["tensors"]["a/b"].update(part="z"), "not among the parts"),
    "bits": (lambda m: m["tensors"]["a/b"].update(bits=3), "tensors.a/b.in_features is missing"),
    "outside": (lambda m: m["parts"]["a.b"].update(file="../x"), "parts.a.b.file is '../x'"),
    "outside too": (lambda m: m["files"].update({"../x": m["files"]["config.json"]}), "no file na"),
    "size": (lambda m: m["parts"]["a.b"].update(bytes="3"), "parts.a.b.bytes is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TABLES)
def test_damaged_tables(tmp_path, case):
    change, word = BAD_TABLES[case]
    _small(tmp_path / "dst")
    path = tmp_path / "dst" / "mquant.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest | {"sha256": content_hash(manifest)}))
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=word):
            load_params(tmp_path / "dst", verify)


def test_ten_misfits_are_shown(tmp_path):
    params = {f"a/b{i}": np.ones(2, np.float32) for i in range(13)}
    save(tmp_path / "d", params, family="x", hf_config={}, recipe=PRESETS["float"], tied_head=True)
    for path in (tmp_path / "d" / "params").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="a.b8.*; and 3 more"):
        load_params(tmp_path / "d")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fails_at_any_step(tmp_path, monkeypatch, call):
    """A failing write gives one clear line; DST is complete or absent, and nothing else remains."""
    dst, real = tmp_path / "dst", getattr(os, call)
    side = _made(tmp_path / "side") / "tokenizer.json"
    side.write_text("{}")
    for nth in range(100):
        calls = []

        def fail(*args, calls=calls, nth=nth, **options):
            calls.append(1)
            if len(calls) == nth + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **options)

        with monkeypatch.context() as m:
            m.setattr(os, call, fail)
            try:
                _save(dst, files=[side], report={})
            except UserError as e:
                assert "reports an input/output error" in str(e)  # noqa: PT017
            else:
                break
        names = {p.name for p in tmp_path.iterdir()} - {"side"}
        if names:  # fsync of the parent failed, after the rename
            assert names == {"dst"} and call == "fsync"
            load_params(dst)
            _save(dst, files=[side], overwrite=True)
            return
    assert nth >= 4
    load_params(dst)
