"""The reader of Hugging Face folders, and the matching of tensor names."""

from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mquant_jax.checkpoint.plan import plan
from mquant_jax.checkpoint.source import Reader
from mquant_jax.errors import UserError
from mquant_jax.models.registry import family_for
from tests.hf_folders import edit_index, hf_folder, shard


def _plan(folder):
    reader = Reader(folder)
    family = family_for(reader.config)
    return plan(family, family.config_from_hf(reader.config), reader), reader


def test_reads_every_tensor_in_its_dtype(tmp_path):
    def to_bf16(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)

    folder = hf_folder(tmp_path / "src", to_bf16)
    reader, expected = Reader(folder), load_file(folder / "model.safetensors")
    assert list(reader.tensors) == sorted(expected)
    for name, values in expected.items():
        got = reader.read(name)
        assert got.dtype == values.dtype
        np.testing.assert_array_equal(got, values)


def test_shards_read_like_one_file(tmp_path):
    one, two = hf_folder(tmp_path / "one"), hf_folder(tmp_path / "two")
    shard(two)
    a, b = Reader(one), Reader(two)
    assert list(a.tensors) == list(b.tensors)
    for name in a.tensors:
        np.testing.assert_array_equal(a.read(name), b.read(name))


def _no_folder(f):
    shutil.rmtree(f)


def _no_config(f):
    (f / "config.json").unlink()


def _bad_config(f):
    (f / "config.json").write_text('{"model_type": ')


def _list_config(f):
    (f / "config.json").write_text("[]")


def _no_weights(f):
    (f / "model.safetensors").unlink()


def _pickle_only(f):
    (f / "model.safetensors").rename(f / "pytorch_model.bin")


def _truncated(f):
    path = f / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _garbage(f):
    (f / "model.safetensors").write_bytes(b"\xff" * 300)


def _empty(f):
    (f / "model.safetensors").write_bytes(b"")


def _missing_shard(f):
    shard(f)[1].unlink()


def _truncated_shard(f):
    path = shard(f)[1]
    path.write_bytes(path.read_bytes()[:5000])


def _index_lies(f):
    shard(f)
    edit_index(f, **{"no.such": "model-00001-of-00002.safetensors"})


def _index_escapes(f):
    shard(f)
    edit_index(f, **{"no.such": "../other.safetensors"})


def _duplicate(f):
    first, second = shard(f)
    tensors = load_file(second)
    name = next(iter(load_file(first)))
    save_file(tensors | {name: np.zeros(3, np.float32)}, second)


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (_no_folder, ["no such folder"]),
        (_no_config, ["config.json", "no such file"]),
        (_bad_config, ["config.json", "not valid JSON"]),
        (_list_config, ["config.json", "object", "list"]),
        (_no_weights, ["neither model.safetensors"]),
        (_pickle_only, ["pytorch_model.bin", "safetensors"]),
        (_truncated, ["model.safetensors", "truncated"]),
        (_garbage, ["model.safetensors", "damaged"]),
        (_empty, ["model.safetensors", "0 bytes"]),
        (_missing_shard, ["model-00002-of-00002.safetensors", "missing"]),
        (_truncated_shard, ["model-00002-of-00002.safetensors", "truncated"]),
        (_index_lies, ["index.json", "no.such"]),
        (_index_escapes, ["index.json", "plain file name"]),
        (_duplicate, ["stored twice"]),
    ],
)
def test_broken_folders_are_named(tmp_path, breakage, words):
    folder = hf_folder(tmp_path / "src")
    breakage(folder)
    with pytest.raises(UserError) as e:
        Reader(folder)
    for word in words:
        assert word in str(e.value)


def test_all_misfits_are_listed_at_once(tmp_path):
    def change(t):
        del t["model.norm.weight"]
        del t["visual.blocks.0.norm1.bias"]
        t["extra.weight"] = np.zeros(3, np.float32)
        t["visual.merger.ln_q.bias"] = np.zeros(5, np.float32)
        t["visual.merger.ln_q.weight"] = np.zeros(64, np.int32)

    with pytest.raises(UserError) as e:
        _plan(hf_folder(tmp_path / "src", change))
    message = str(e.value)
    assert "2 missing: model.norm.weight, visual.blocks.0.norm1.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "visual.merger.ln_q.bias (expected shape [64], found [5])" in message
    assert "visual.merger.ln_q.weight" in message and "found I32" in message


def test_long_lists_are_cut(tmp_path):
    def change(t):
        for i in range(25):
            t[f"extra.{i}"] = np.zeros(1, np.float32)

    with pytest.raises(UserError, match="25 unexpected: .*, and 15 more"):
        _plan(hf_folder(tmp_path / "src", change))


def test_inv_freq_is_ignored(tmp_path):
    def change(t):
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)

    todo, _ = _plan(hf_folder(tmp_path / "src", change))
    assert not any("inv_freq" in r.src for r in todo.rules)


@pytest.mark.parametrize("flag", [True, False])
def test_the_checkpoint_decides_whether_the_head_is_tied(tmp_path, flag):
    own, _ = _plan(hf_folder(tmp_path / "own", tie_word_embeddings=flag))
    assert not own.tied_head

    tied, _ = _plan(
        hf_folder(tmp_path / "tied", lambda t: t.pop("lm_head.weight"), tie_word_embeddings=flag)
    )
    assert tied.tied_head
    assert not any(r.dst.startswith("language/head") for r in tied.rules)


def test_in_memory_names_of_transformers_5(tmp_path):
    def rename(t):
        for name in list(t):
            if name.startswith("visual."):
                t[f"model.{name}"] = t.pop(name)
            elif name.startswith("model."):
                t[name.replace("model.", "model.language_model.", 1)] = t.pop(name)

    a, ra = _plan(hf_folder(tmp_path / "a"))
    b, rb = _plan(hf_folder(tmp_path / "b", rename))
    pa, pb = a.read(ra), b.read(rb)
    assert pa.keys() == pb.keys()
    for name in pa:
        np.testing.assert_array_equal(pa[name], pb[name])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused(tmp_path, value):
    def change(t):
        t["model.norm.weight"][3] = value

    todo, reader = _plan(hf_folder(tmp_path / "src", change))
    with pytest.raises(UserError, match=r"model\.norm\.weight holds 1 NaN or Inf"):
        todo.read(reader)
