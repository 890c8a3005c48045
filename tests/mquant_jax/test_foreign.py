"""Folders that cannot be converted, links that leave the folder, endless files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import hf_to_flax
from mquant_jax.checkpoint.source import Reader
from mquant_jax.errors import UserError
from tests.helpers import fails
from tests.hf_folders import edit_index, hf_folder, shard


@pytest.fixture
def folder(tmp_path) -> Path:
    return hf_folder(tmp_path / "src")


def edit_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name.replace(old, new): value for name, value in tensors.items()}, path)


@pytest.mark.parametrize(
    ("found", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "quark"}, "quark"),
        ({"bits": 4}, "does not name"),
        ([4], "4"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_models_by_their_config(folder, found, method, key) -> None:
    edit_config(folder, **{key: found})
    fails(f"config.json: {key}: the weights are quantised already, by .*{method}.*float model",
          lambda: Reader(folder))  # fmt: skip
    edit_config(folder, **{key: None})
    edit_config(folder, text_config={key: found})
    fails(f"text_config.{key}", lambda: Reader(folder))


@pytest.mark.parametrize(
    ("new", "word"),
    [
        ("q_proj.qweight", "GPTQ or AWQ"),
        ("q_proj.qzeros", "GPTQ or AWQ"),
        ("q_proj.weight.absmax", "bitsandbytes"),
        ("q_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("q_proj.SCB", "bitsandbytes"),
        ("q_proj.weight_scale_inv", "FP8"),
        ("q_proj.weight_packed", "compressed-tensors"),
        ("q_proj.lora_A.weight", "merge_and_unload"),
        ("q_proj.lora_B.default.weight", "merge_and_unload"),
        ("q_proj.base_layer.weight", "merge_and_unload"),
        ("q_proj.lora_magnitude_vector", "merge_and_unload"),
    ],
)
def test_foreign_tensors_by_their_names(folder, new, word) -> None:
    rename(folder, "q_proj.weight", new)
    fails(f"tensor model.layers.*{new}.*{word}", lambda: Reader(folder))


def test_a_peft_prefix(folder) -> None:
    rename(folder, "model.layers.0", "base_model.model.model.layers.0")
    fails("tensor base_model.model.*merge it", lambda: Reader(folder))


def test_adapters(folder, tmp_path) -> None:
    text = json.dumps({"base_model_name_or_path": "Qwen/Qwen2-VL-2B", "peft_type": "LORA"})
    (folder / "adapter_config.json").write_text(text)
    fails("an adapter of 'Qwen/Qwen2-VL-2B'.*merge.*remove", lambda: Reader(folder))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text("{}")
    fails("adapter_config.json: an adapter, which", lambda: Reader(alone))


def test_a_head_that_differs_from_the_embedding_it_is_tied_to(folder, tmp_path, capsys) -> None:
    edit_config(folder, tie_word_embeddings=True)
    dst = str(tmp_path / "dst")
    assert hf_to_flax.main([str(folder), dst]) == 2
    err = capsys.readouterr().err
    assert "tie_word_embeddings true, but lm_head.weight differs from" in err
    assert "set it to false" in err and err.count("\n") == 1
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, path)
    assert hf_to_flax.main([str(folder), dst]) == 0


def test_unknown_keys_are_named_in_one_line(folder, tmp_path, capsys) -> None:
    edit_config(folder, **{f"note_{i}": i for i in range(12)})
    assert hf_to_flax.main([str(folder), str(tmp_path / "dst")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1
    assert "config.json" in err and "'note_0'" in err and "and 2 more" in err


def test_our_own_faults_are_not_called_the_configs(folder, tmp_path, monkeypatch) -> None:
    from mquant_jax.models import qwen2_vl

    def broken(hf):
        raise TypeError("our own")

    family = qwen2_vl.FAMILY
    object.__setattr__(family, "config_from_hf", broken)
    try:
        with pytest.raises(TypeError, match="our own"):
            hf_to_flax.main([str(folder), str(tmp_path / "dst")])
    finally:
        object.__setattr__(family, "config_from_hf", qwen2_vl.Qwen2VLConfig.from_hf)


def link(path: Path, to: str | Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def quick(word: str, folder: Path) -> None:
    start = time.monotonic()
    fails(word, lambda: Reader(folder))
    assert time.monotonic() - start < 5


def test_shards_are_regular_files_of_the_folder(folder, tmp_path) -> None:
    first, _ = shard(folder)
    kept = tmp_path / "kept.safetensors"
    first.rename(kept)
    link(first, "/dev/zero")
    quick("model-00001.*is a device", folder)
    link(first, kept)
    quick(f"model-00001.*is a link to {kept}.*copy the file here", folder)
    link(first, tmp_path / "nowhere")
    quick("model-00001.*cannot be read", folder)
    first.unlink()
    os.mkfifo(first)
    quick("model-00001.*is a device, pipe", folder)
    first.unlink()
    first.mkdir()
    quick("model-00001.*is a folder", folder)
    first.rmdir()
    kept.rename(folder / "elsewhere")
    link(first, "elsewhere")
    assert Reader(folder).tensors


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "adapter_config.json"])
def test_nothing_is_read_from_devices_and_pipes(folder, name) -> None:
    link(folder / name, "/dev/zero")
    if name == "adapter_config.json":
        assert Reader(folder).tensors
    else:
        quick(f"{name}.*is a device", folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name != "adapter_config.json":
        quick(f"{name}.*is a device, pipe", folder)


def test_the_layout_of_the_hub_cache(folder, tmp_path) -> None:
    model = tmp_path / "hub" / "models--a--b"
    blobs, snapshot = model / "blobs", model / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"hash{i}")
        link(snapshot / path.name, f"../../blobs/hash{i}")
    assert Reader(snapshot).tensors
    other = tmp_path / "hub" / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    target = os.path.realpath(snapshot / "model.safetensors")
    os.rename(target, other / "hash")
    link(snapshot / "model.safetensors", "../../../models--c--d/blobs/hash")
    quick("is a link to", snapshot)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "..", ".", "", "a/b", 3, None])
def test_index_files_name_plain_files(folder, name) -> None:
    shard(folder)
    edit_index(folder, **{"some.tensor": name})
    with pytest.raises(UserError, match=r"model.safetensors.index.json|folder") as e:
        Reader(folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_folders_no_system_can_have() -> None:
    for name in ("x" * 5000, "a\0b"):
        fails("no such folder", lambda name=name: Reader(name))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\xff\xfe{\x00}\x00", "not valid UTF-8"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b" " * (65 << 20), "larger than 64 MiB"),
        (b"null", "expected a JSON object"),
    ],
)
def test_hostile_json(folder, data, word) -> None:
    (folder / "config.json").write_bytes(data)
    quick(f"config.json: .*{word}", folder)


def test_a_byte_order_mark_is_no_matter(folder) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Reader(folder).config["model_type"] == "qwen2_vl"


def test_cogvlm2_without_stored_frequencies(tmp_path, capsys) -> None:
    """Missing frequencies are computed in float32 with base 500000."""
    from mquant_jax.checkpoint.reader import load_params
    from tests.helpers import GOLDENS

    src = tmp_path / "src"
    src.mkdir()
    golden = GOLDENS / "cogvlm2" / "public"
    (src / "config.json").write_bytes((golden / "config.json").read_bytes())
    tensors = load_file(golden / "model.safetensors")
    stored = [name for name in tensors if name.endswith("inv_freq")]
    save_file({k: v for k, v in tensors.items() if k not in stored}, src / "model.safetensors")
    assert hf_to_flax.main([str(src), str(tmp_path / "dst")]) == 0
    params, _ = load_params(tmp_path / "dst")
    got = params["language/layers/1/frequencies"]
    np.testing.assert_allclose(got, 500000.0 ** (-np.arange(8) / 8), rtol=1e-7)
    assert np.abs(got / tensors[stored[0]] - 1).max() < 1 / 128  # bfloat16's rounding
