"""Models by hub name: found in the local cache, or an error that tells how to get them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mquant_jax.checkpoint.hub import model_folder
from mquant_jax.commands.convert import main
from mquant_jax.commands.verify import main as verify
from mquant_jax.samples import DEMO_ASSETS
from tests.helpers import fails

NAME, REVISION = "Somebody/Demo-1.5", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A hub cache with the demo model in the hub's layout; network access fails."""

    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "home" / "hub" / "models--Somebody--Demo-1.5"
    snapshot = model / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    for file in (DEMO_ASSETS / "model").iterdir():
        blob = model / "blobs" / file.name.replace(".", "")
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_name_is_found_in_the_cache(cache, tmp_path, monkeypatch, capsys) -> None:
    assert model_folder(NAME) == model_folder(Path(NAME)) == cache
    assert main([NAME, str(tmp_path / "dst")]) == 0
    assert "qwen2_vl, recipe float" in capsys.readouterr().out
    assert main([NAME, "--dry-run"]) == 0
    assert verify([str(tmp_path / "dst"), "--source", NAME]) == 0
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    assert model_folder(NAME) == cache


def test_folders_go_first(cache, tmp_path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    assert model_folder(NAME) == Path(NAME)
    for path in (tmp_path, "/no/such/folder", "./no/such", "a/b/c", "../x/y", "one"):
        assert model_folder(path) == Path(path)


def test_a_model_that_is_not_there(cache, tmp_path) -> None:
    message = (
        r"Qwen/Qwen2-VL-2B: no such folder, .*home/hub has no .*`hf download Qwen/Qwen2-VL-2B`"
    )
    fails(message, lambda: main(["Qwen/Qwen2-VL-2B", str(tmp_path / "dst")]))
    fails(message, lambda: main(["Qwen/Qwen2-VL-2B", "--dry-run"]))
    (cache / "config.json").unlink()
    fails("hf download", lambda: model_folder(NAME))
