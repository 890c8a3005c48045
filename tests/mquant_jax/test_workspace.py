"""DST appears complete or not at all, and other people's files are never touched."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mquant_jax.checkpoint import rename
from mquant_jax.checkpoint import workspace as module
from mquant_jax.checkpoint.destination import check_destination
from mquant_jax.checkpoint.workspace import workspace
from mquant_jax.errors import UserError

ROOT = Path(__file__).parents[2]
ODD = ("[a]*?", "back\\slash", "sp ace ", "\"q'", "new\nline", "ü漢\u2028", "-x", "x" * 200, "%s{}")


def _publish(dst, content="new", **options):
    with workspace(dst, "mark", **options) as work:
        (work.result / "mark").write_text(content)
        work.publish()


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(params=["kernel", "two renames"])
def renaming(request, monkeypatch):
    """With Linux's atomic rename, and without it."""
    if request.param != "kernel":
        monkeypatch.setattr(rename, "_renameat2", lambda *args: False)


@pytest.mark.parametrize("name", ODD)
def test_any_name(tmp_path, name):
    parent = tmp_path / name
    parent.mkdir()
    _publish(parent / name)
    assert (parent / name / "mark").read_text() == "new"
    _publish(parent / name, "newer", overwrite=True)
    assert (parent / name / "mark").read_text() == "newer"
    assert _names(parent) == [name]


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _publish(Path("dst"))
    assert _names(tmp_path) == ["dst"]
    for dst in (".", "..", "dst/..", "dst/."):
        with pytest.raises(UserError, match="exists already"):
            _publish(Path(dst))


def test_bad_places(tmp_path):
    def fails(dst, word):
        for call in (_publish, lambda d: check_destination(d, "mark")):
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
    assert _names(tmp_path) == ["file"]


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # because root may write anywhere
    with pytest.raises(UserError, match="cannot be written; choose another DST"):
        _publish(tmp_path / "dst")


def test_only_checkpoints_are_overwritten(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no checkpoint of ours"):
        _publish(tmp_path / "dst", overwrite=True)
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
    assert _names(tmp_path) == ["dst"]
    assert kind != "file" or dst.read_text() == "theirs"
    assert kind != "checkpoint" or (dst / "mark").read_text() == "theirs"
    assert kind != "folder" or _names(dst) == []
    assert dst.is_symlink() == (kind == "link")


@pytest.mark.parametrize("change", ["replaced", "rewritten", "removed"])
def test_a_checkpoint_that_changes_meanwhile(tmp_path, renaming, change):
    dst = tmp_path / "dst"
    _publish(dst, "old")

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
    assert set(_names(tmp_path)) <= {"dst", "away"}


def test_a_change_between_check_and_exchange(tmp_path, renaming, monkeypatch):
    """If DST was replaced at the last moment, the exchange is undone."""
    dst = tmp_path / "dst"
    _publish(dst, "old")
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
        _publish(dst, overwrite=True)
    assert (dst / "mark").read_text() == "theirs"
    assert _names(tmp_path) == ["away", "dst"]


def test_links(tmp_path):
    (tmp_path / "disk").mkdir()
    _publish(tmp_path / "disk" / "real", "old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    with pytest.raises(UserError, match="link: exists already"):
        _publish(link)
    _publish(link, "new", overwrite=True)
    assert link.is_symlink() and (link / "mark").read_text() == "new"
    assert _names(tmp_path) == ["disk", "link"] and _names(tmp_path / "disk") == ["real"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="leads nowhere"):
            _publish(tmp_path / "dangling", overwrite=overwrite)
        with pytest.raises(UserError, match="loop"):
            _publish(tmp_path / "loop", overwrite=overwrite)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("bug"), UserError("bad")])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_failure_leaves_things_as_they_were(tmp_path, stop, overwrite, keep):
    dst = tmp_path / "dst"
    if overwrite:
        _publish(dst, "old")
    before = _names(tmp_path)
    with (
        pytest.raises(type(stop)) as e,
        workspace(dst, "mark", overwrite=overwrite, keep=lambda: keep) as work,
    ):
        (work.result / "mark").write_text("new")
        raise stop
    assert _names(tmp_path) == before + ["dst.work"] * keep
    text = f"{e.value} {getattr(e.value, '__notes__', '')}"
    assert (f"{work.folder}: --resume continues, --restart begins anew" in text) == keep
    assert not overwrite or (dst / "mark").read_text() == "old"


@pytest.mark.parametrize("renamed", [1, 2])
def test_an_interrupt_between_two_renames(tmp_path, monkeypatch, renamed):
    """An interrupt restores the old checkpoint, and keeps the new one if ``keep`` says so."""
    dst, plain, seen = tmp_path / "dst", Path.rename, []
    _publish(dst, "old")

    def interrupted(path, target):
        plain(path, target)
        seen.append(path)
        if len(seen) == renamed:
            raise KeyboardInterrupt

    monkeypatch.setattr(rename, "_renameat2", lambda *args: False)
    with monkeypatch.context() as m:
        m.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _publish(dst, overwrite=True, keep=lambda: True)
    if not dst.exists():  # as after a kill: the next start restores it
        with pytest.raises(UserError, match="exists already"):
            _publish(dst)
    assert (dst / "mark").read_text() in ("old", "new")


def test_stale_work(tmp_path):
    dst, work = tmp_path / "dst", tmp_path / "dst.work"
    with pytest.raises(RuntimeError), workspace(dst, "mark", keep=lambda: True) as first:
        (first.result / "part").write_text("finished")
        (first.result / "part2.partial").write_text("half")
        raise RuntimeError
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"dst\.work: .* --resume continues it, --restart"):
            _publish(dst, overwrite=overwrite)
    with pytest.raises(UserError, match="exclude each other"):
        _publish(dst, resume=True, restart=True)
    with (
        pytest.raises(UserError, match="other inputs"),
        workspace(dst, "mark", resume=True, keep=lambda: False) as second,
    ):
        assert second.resumed and _names(second.result) == ["part"]
        raise UserError("other inputs")
    assert (work / "result" / "part").read_text() == "finished"  # it may be hours of work
    with workspace(dst, "mark", resume=True) as third:
        (third.result / "mark").write_text("new")
        third.publish()
    assert _names(tmp_path) == ["dst"] and _names(dst) == ["mark", "part"]


def test_restart(tmp_path):
    with pytest.raises(RuntimeError), workspace(tmp_path / "dst", "m", keep=lambda: True) as work:
        (work.result / "part").write_text("finished")
        raise RuntimeError
    with workspace(tmp_path / "dst", "m", restart=True) as work:
        assert not work.resumed and _names(work.result) == []
        work.publish()
    assert _names(tmp_path) == ["dst"]
    _publish(tmp_path / "other", resume=True)
    _publish(tmp_path / "another", restart=True)
    assert _names(tmp_path) == ["another", "dst", "other"]


@pytest.mark.parametrize("content", ["file", "folder", "link"])
def test_a_work_folder_of_somebody_else(tmp_path, content):
    work = tmp_path / "dst.work"
    if content == "file":
        work.write_text("mine")
    elif content == "link":
        (tmp_path / "real").mkdir()
        work.symlink_to(tmp_path / "real")
    else:
        work.mkdir()
        (work / "lock").write_text("")
        (work / "thesis.txt").write_text("mine")
    before = _names(tmp_path)
    for options in ({}, {"resume": True}, {"restart": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="is in the way and is no work folder of ours"):
            _publish(tmp_path / "dst", **options)
    assert _names(tmp_path) == before
    assert content != "folder" or (work / "thesis.txt").read_text() == "mine"


def test_one_conversion_at_a_time(tmp_path):
    with workspace(tmp_path / "dst", "mark"):
        for options in ({}, {"resume": True}, {"restart": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=f"is running .process {os.getpid()}."):
                _publish(tmp_path / "dst", **options)
        _publish(tmp_path / "other")
    assert _names(tmp_path) == ["other"]


def test_a_kill_after_the_last_rename(tmp_path, monkeypatch):
    """DST is complete and only the work folder remains: resuming finds the result."""
    dst = tmp_path / "dst"
    with monkeypatch.context() as m:
        m.setattr(module, "_remove", lambda folder: None)
        _publish(dst)
    assert _names(tmp_path) == ["dst", "dst.work"]
    with workspace(dst, "mark", resume=True) as work:
        assert work.has_result(lambda: True)
    assert _names(tmp_path) == ["dst"] and (dst / "mark").read_text() == "new"


@pytest.mark.parametrize("left", [(), ("lock",), ("lock", "journal.jsonl", "states/x")])
def test_a_kill_while_the_work_folder_is_removed(tmp_path, left):
    """Whatever remains of the work folder, resuming recognises the result by its inputs."""
    dst, folder = tmp_path / "dst", tmp_path / "dst.work"
    _publish(dst)
    folder.mkdir()
    for name in left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mquant_jax conversion, process 1\n")
    with workspace(dst, "mark", resume=True) as work:
        assert work.has_result(lambda: True)
    assert _names(tmp_path) == ["dst"] and (dst / "mark").read_text() == "new"


def test_resume_does_not_replace_another_checkpoint(tmp_path):
    dst = tmp_path / "dst"
    _publish(dst)
    refused = pytest.raises(UserError, match="exists already and was made from other inputs")
    with refused, workspace(dst, "mark", resume=True) as work:
        work.has_result(lambda: False)
    with refused, workspace(dst, "mark", resume=True) as work:
        work.publish()
    assert _names(tmp_path) == ["dst"] and (dst / "mark").read_text() == "new"
    with workspace(dst, "mark", resume=True, overwrite=True) as work:
        assert not work.has_result(lambda: False)
        (work.result / "mark").write_text("newer")
        work.publish()
    assert (dst / "mark").read_text() == "newer"


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
        _publish(tmp_path / "dst")
    assert _names(tmp_path) == []


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
            _publish(tmp_path / "dst")
    assert _names(tmp_path) == []


def test_space_is_looked_at_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with (
        pytest.raises(UserError, match="needs 11 bytes, the disk has 10 free"),
        workspace(tmp_path / "dst", "mark") as work,
    ):
        work.require(11)
    assert _names(tmp_path) == []


PROGRAM = """
import sys, time
from pathlib import Path
from mquant_jax.cli_support import run_cli
from mquant_jax.checkpoint.workspace import workspace

def main(argv):
    with workspace(Path(argv[0]), "mark", keep=lambda: argv[1] == "keep") as work:
        (work.result / "mark").write_text("new")
        print("ready", flush=True)
        time.sleep(60)
    return 0

sys.exit(run_cli(main))
"""


# Restores the default handlers, because the shell that runs the tests may ignore signals.
HEARS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""


@pytest.mark.parametrize(
    ("name", "keep"),
    [("SIGTERM", "keep"), ("SIGTERM", "drop"), ("SIGHUP", "drop"), ("SIGINT", "keep"),
     ("SIGKILL", "drop")],
)  # fmt: skip
def test_signals(tmp_path, name, keep):
    args = [sys.executable, "-c", HEARS + PROGRAM, str(tmp_path / "dst"), keep]
    child = subprocess.Popen(
        args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(getattr(signal, name))
    _, err = child.communicate()
    kept = keep == "keep" or name == "SIGKILL"
    assert _names(tmp_path) == ["dst.work"] * kept
    if name != "SIGKILL":
        assert child.returncode == 130 and err.startswith("error: interrupted")
        assert err.count("\n") == 1 and ("--resume" in err) == kept
    _publish(tmp_path / "dst", restart=True)
    assert _names(tmp_path) == ["dst"]


def test_signals_that_are_ignored_stay_so(tmp_path):
    """As under nohup."""
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PROGRAM
    args = [sys.executable, "-c", program, str(tmp_path / "dst"), "drop"]
    child = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    child.terminate()
    child.communicate()
    assert child.returncode == 130 and _names(tmp_path) == []
