"""Special files, huge files and odd names are refused by every reader in one printable line."""

from __future__ import annotations

import json
import os

import pytest

import mquant_jax as mq
from mquant_jax.checkpoint.check import examine
from mquant_jax.checkpoint.manifest import content_hash, load_manifest
from mquant_jax.checkpoint.reader import load_params
from mquant_jax.checkpoint.source import Reader
from mquant_jax.checkpoint.writer import save
from mquant_jax.errors import CheckpointError, PromptTooLong, UserError
from mquant_jax.files import is_file, is_folder, read_json
from mquant_jax.models.chat_files import check_readable
from mquant_jax.presets import PRESETS
from mquant_jax.samples import read_samples
from tests.hf_folders import hf_folder


def checkpoint(folder, **side):
    for name, text in side.items():
        (folder.parent / f"{name}.json").write_text(text)
    files = [folder.parent / f"{name}.json" for name in side]
    what = dict(family="llama", hf_config={}, recipe=PRESETS["float"], tied_head=True, files=files)
    return save(folder, {}, **what)


@pytest.mark.parametrize("kind", [UserError, CheckpointError, PromptTooLong])
def test_messages_are_one_printable_line(kind) -> None:
    text = "a\nb\r\tc \x1b[31m \u2028 \ud800 é 漢"
    assert str(kind(text)) == "a b  c \\x1b[31m \\u2028 \\ud800 é 漢"
    assert str(kind()) == ""


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_names_that_no_file_can_have(tmp_path, name) -> None:
    assert not is_file(tmp_path / name) and not is_folder(tmp_path / name)
    for read in (load_manifest, mq.load, Reader, read_samples):
        with pytest.raises(UserError):
            read(tmp_path / name)
    manifest = checkpoint(tmp_path / "dst")
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    manifest["sha256"] = content_hash(manifest)
    (tmp_path / "dst" / "mquant.json").write_text(json.dumps(manifest))
    for verify in (True, "tensors", False):
        with pytest.raises(CheckpointError, match="no such file|no file name"):
            load_params(tmp_path / "dst", verify)
    assert examine(tmp_path / "dst")


def test_enormous_files_are_refused_by_their_size(tmp_path) -> None:
    """Sparse files of 1 TB are refused without reading or hashing any of their content."""
    folder = hf_folder(tmp_path / "src")
    checkpoint(tmp_path / "dst", tokenizer="{}")
    samples = tmp_path / "samples.jsonl"
    reads = {
        folder / "config.json": lambda: Reader(folder),
        folder / "tokenizer.json": lambda: check_readable(folder),
        tmp_path / "dst" / "tokenizer.json": lambda: load_params(tmp_path / "dst"),
        tmp_path / "dst" / "mquant.json": lambda: load_manifest(tmp_path / "dst"),
        samples: lambda: read_samples(samples),
    }
    for path, read in reads.items():
        path.touch()
        os.truncate(path, 1 << 40)
        with pytest.raises(UserError, match="larger than|edited or damaged"):
            read()
        path.unlink()


def test_a_damaged_table_of_the_source(tmp_path) -> None:
    manifest = checkpoint(tmp_path / "dst") | {"source": ["config.json"]}
    (tmp_path / "dst" / "mquant.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="source is damaged"):
        load_manifest(tmp_path / "dst", verify=False)


def test_json_of_a_checkpoint_is_read_like_all_other(tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(path) == {}
