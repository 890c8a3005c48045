"""DST appears complete or not at all, and other people's files are never touched."""

from __future__ import annotations

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest

from mquant_jax.checkpoint import rename
from mquant_jax.checkpoint import workspace as module
from mquant_jax.checkpoint.destination import check_destination
from mquant_jax.checkpoint.workspace import workspace
from mquant_jax.errors import UserError
from tests.workspaces import names, publish

ODD = ("[a]*?", "back\\slash", "sp ace ", "\"q'", "new\nline", "ü漢\u2028", "-x", "x" * 200, "%s{}")


@pytest.fixture(params=["kernel", "two renames"])
def renaming(request, monkeypatch):
    """With Linux's atomic rename, and without it."""
    if request.param != "kernel":
        monkeypatch.setattr(rename, "_renameat2", lambda *args: False)


@pytest.mark.parametrize("name", ODD)
def test_any_name(tmp_path, name):
    parent = tmp_path / name
    parent.mkdir()
    publish(parent / name)
    assert (parent / name / "mark").read_text() == "new"
    publish(parent / name, "newer", overwrite=True)
    assert (parent / name / "mark").read_text() == "newer"
    assert names(parent) == [name]


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(Path("dst"))
    assert names(tmp_path) == ["dst"]
    for dst in (".", "..", "dst/..", "dst/."):
        with pytest.raises(UserError, match="exists already"):
            publish(Path(dst))


def test_bad_places(tmp_path):
    def fails(dst, word):
        for call in (publish, lambda d: check_destination(d, "mark")):
            with pytest.raises(UserError, match=word):
                call(dst)

    fails(tmp_path / "no" / "dst", "no such folder; create it")
    fails(tmp_path / ("x" * 251), "would take 256 bytes; 255 are allowed")
    fails(tmp_path / ("ü" * 126), "would take 257 bytes")
    fails(tmp_path / ("x" * 300), "would take 305")
    fails(Path("/".join([str(tmp_path), *["y" * 200] * 25])), "cannot be used|no such folder")
    fails(tmp_path / "a\0b", "NUL")
    fails(tmp_path / "\ud800", "cannot be written")
    fails(Path("/"), "root of the file system")
    (tmp_path / "file").write_text("")
    fails(tmp_path / "file" / "dst", "no such folder")
    fails(tmp_path / "file", "exists already")
    assert names(tmp_path) == ["file"]


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # because root may write anywhere
    with pytest.raises(UserError, match="cannot be written; choose another DST"):
        publish(tmp_path / "dst")


def test_only_checkpoints_are_overwritten(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no checkpoint of ours"):
        publish(tmp_path / "dst", overwrite=True)
    assert (tmp_path / "dst" / "thesis.txt").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "full folder", "link", "checkpoint"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_stays(tmp_path, renaming, kind, overwrite):
    dst = tmp_path / "dst"
    with (
        pytest.raises(UserError, match="appeared while this conversion was running"),
        workspace(dst, "mark", overwrite=overwrite) as work,
    ):
        (work.result / "mark").write_text("new")
        if kind == "file":
            dst.write_text("theirs")
        elif kind == "link":
            dst.symlink_to(tmp_path / "nowhere")
        else:
            dst.mkdir()
        if kind == "full folder":
            (dst / "theirs").write_text("")
        if kind == "checkpoint":
            (dst / "mark").write_text("theirs")
        work.publish()
    assert names(tmp_path) == ["dst"]
    assert kind != "file" or dst.read_text() == "theirs"
    assert kind != "checkpoint" or (dst / "mark").read_text() == "theirs"
    assert kind != "folder" or names(dst) == []
    assert dst.is_symlink() == (kind == "link")


@pytest.mark.parametrize("change", ["replaced", "rewritten", "removed"])
def test_a_checkpoint_that_changes_meanwhile(tmp_path, renaming, change):
    dst = tmp_path / "dst"
    publish(dst, "old")

    def attempt():
        with workspace(dst, "mark", overwrite=True) as work:
            (work.result / "mark").write_text("new")
            if change == "rewritten":
                (dst / "mark").unlink()
                (dst / "mark").write_text("theirs")
            else:
                dst.rename(tmp_path / "away")
            if change == "replaced":
                dst.mkdir()
                (dst / "mark").write_text("theirs")
            work.publish()

    if change == "removed":
        attempt()
    else:
        with pytest.raises(UserError, match="was changed or replaced"):
            attempt()
    assert (dst / "mark").read_text() == ("new" if change == "removed" else "theirs")
    assert set(names(tmp_path)) <= {"dst", "away"}


def test_a_change_between_check_and_exchange(tmp_path, renaming, monkeypatch):
    """If DST was replaced at the last moment, the exchange is undone."""
    dst = tmp_path / "dst"
    publish(dst, "old")
    check, seen = module.identity, []

    def late(folder, marker):
        found = check(folder, marker)
        seen.append(folder)
        if len(seen) == 2:  # the first call is at the start
            dst.rename(tmp_path / "away")
            dst.mkdir()
            (dst / "mark").write_text("theirs")
        return found

    monkeypatch.setattr(module, "identity", late)
    with pytest.raises(UserError, match="was changed or replaced"):
        publish(dst, overwrite=True)
    assert (dst / "mark").read_text() == "theirs"
    assert names(tmp_path) == ["away", "dst"]


def test_links(tmp_path):
    (tmp_path / "disk").mkdir()
    publish(tmp_path / "disk" / "real", "old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    with pytest.raises(UserError, match="link: exists already"):
        publish(link)
    publish(link, "new", overwrite=True)
    assert link.is_symlink() and (link / "mark").read_text() == "new"
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["real"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="leads nowhere"):
            publish(tmp_path / "dangling", overwrite=overwrite)
        with pytest.raises(UserError, match="loop"):
            publish(tmp_path / "loop", overwrite=overwrite)


def _failing(monkeypatch, code):
    def fail(folder):
        raise OSError(code, os.strerror(code), str(folder))

    monkeypatch.setattr(module, "_sync", fail)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "larger than"),
        (errno.EIO, "input/output error"),
        (errno.EROFS, "read-only"),
    ],
)
def test_disk_errors_are_named(tmp_path, monkeypatch, code, word):
    _failing(monkeypatch, code)
    with pytest.raises(UserError, match=f"dst: not written: .*result: .*{word}"):
        publish(tmp_path / "dst")
    assert names(tmp_path) == []


@pytest.mark.parametrize("nth", range(1, 4))
def test_a_disk_that_is_full_at_the_start(tmp_path, monkeypatch, nth):
    calls, real = [], os.mkdir

    def mkdir(*args, **options):
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "full", args[0])
        real(*args, **options)

    with monkeypatch.context() as m:
        m.setattr(os, "mkdir", mkdir)
        with pytest.raises(UserError, match="the disk is full"):
            publish(tmp_path / "dst")
    assert names(tmp_path) == []


def test_space_is_looked_at_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with (
        pytest.raises(UserError, match="needs 11 bytes, the disk has 10 free"),
        workspace(tmp_path / "dst", "mark") as work,
    ):
        work.require(11)
    assert names(tmp_path) == []
