"""Interrupted conversions: failures, kills and signals, and what resuming and restarting do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mquant_jax.checkpoint import rename
from mquant_jax.checkpoint import workspace as module
from mquant_jax.checkpoint.workspace import workspace
from mquant_jax.errors import UserError
from tests.workspaces import names, publish

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("bug"), UserError("bad")])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_failure_leaves_things_as_they_were(tmp_path, stop, overwrite, keep):
    dst = tmp_path / "dst"
    if overwrite:
        publish(dst, "old")
    before = names(tmp_path)
    with (
        pytest.raises(type(stop)) as e,
        workspace(dst, "mark", overwrite=overwrite, keep=lambda: keep) as work,
    ):
        (work.result / "mark").write_text("new")
        raise stop
    assert names(tmp_path) == before + ["dst.work"] * keep
    text = f"{e.value} {getattr(e.value, '__notes__', '')}"
    assert (f"{work.folder}: --resume continues, --restart begins anew" in text) == keep
    assert not overwrite or (dst / "mark").read_text() == "old"


@pytest.mark.parametrize("renamed", [1, 2])
def test_an_interrupt_between_two_renames(tmp_path, monkeypatch, renamed):
    """An interrupt restores the old checkpoint, and keeps the new one if ``keep`` says so."""
    dst, plain, seen = tmp_path / "dst", Path.rename, []
    publish(dst, "old")

    def interrupted(path, target):
        plain(path, target)
        seen.append(path)
        if len(seen) == renamed:
            raise KeyboardInterrupt

    monkeypatch.setattr(rename, "_renameat2", lambda *args: False)
    with monkeypatch.context() as m:
        m.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publish(dst, overwrite=True, keep=lambda: True)
    if not dst.exists():  # as after a kill: the next start restores it
        with pytest.raises(UserError, match="exists already"):
            publish(dst)
    assert (dst / "mark").read_text() in ("old", "new")


def test_stale_work(tmp_path):
    dst, work = tmp_path / "dst", tmp_path / "dst.work"
    with pytest.raises(RuntimeError), workspace(dst, "mark", keep=lambda: True) as first:
        (first.result / "part").write_text("finished")
        (first.result / "part2.partial").write_text("half")
        raise RuntimeError
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"dst\.work: .* --resume continues it, --restart"):
            publish(dst, overwrite=overwrite)
    with pytest.raises(UserError, match="exclude each other"):
        publish(dst, resume=True, restart=True)
    with (
        pytest.raises(UserError, match="other inputs"),
        workspace(dst, "mark", resume=True, keep=lambda: False) as second,
    ):
        assert second.resumed and names(second.result) == ["part"]
        raise UserError("other inputs")
    assert (work / "result" / "part").read_text() == "finished"  # it may be hours of work
    with workspace(dst, "mark", resume=True) as third:
        (third.result / "mark").write_text("new")
        third.publish()
    assert names(tmp_path) == ["dst"] and names(dst) == ["mark", "part"]


def test_restart(tmp_path):
    with pytest.raises(RuntimeError), workspace(tmp_path / "dst", "m", keep=lambda: True) as work:
        (work.result / "part").write_text("finished")
        raise RuntimeError
    with workspace(tmp_path / "dst", "m", restart=True) as work:
        assert not work.resumed and names(work.result) == []
        work.publish()
    assert names(tmp_path) == ["dst"]
    publish(tmp_path / "other", resume=True)
    publish(tmp_path / "another", restart=True)
    assert names(tmp_path) == ["another", "dst", "other"]


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
    before = names(tmp_path)
    for options in ({}, {"resume": True}, {"restart": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="is in the way and is no work folder of ours"):
            publish(tmp_path / "dst", **options)
    assert names(tmp_path) == before
    assert content != "folder" or (work / "thesis.txt").read_text() == "mine"


def test_one_conversion_at_a_time(tmp_path):
    with workspace(tmp_path / "dst", "mark"):
        for options in ({}, {"resume": True}, {"restart": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=f"is running .process {os.getpid()}."):
                publish(tmp_path / "dst", **options)
        publish(tmp_path / "other")
    assert names(tmp_path) == ["other"]


def test_a_kill_after_the_last_rename(tmp_path, monkeypatch):
    """DST is complete and only the work folder remains: resuming finds the result."""
    dst = tmp_path / "dst"
    with monkeypatch.context() as m:
        m.setattr(module, "_remove", lambda folder: None)
        publish(dst)
    assert names(tmp_path) == ["dst", "dst.work"]
    with workspace(dst, "mark", resume=True) as work:
        assert work.has_result(lambda: True)
    assert names(tmp_path) == ["dst"] and (dst / "mark").read_text() == "new"


@pytest.mark.parametrize("left", [(), ("lock",), ("lock", "journal.jsonl", "states/x")])
def test_a_kill_while_the_work_folder_is_removed(tmp_path, left):
    """Whatever remains of the work folder, resuming recognises the result by its inputs."""
    dst, folder = tmp_path / "dst", tmp_path / "dst.work"
    publish(dst)
    folder.mkdir()
    for name in left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mquant_jax conversion, process 1\n")
    with workspace(dst, "mark", resume=True) as work:
        assert work.has_result(lambda: True)
    assert names(tmp_path) == ["dst"] and (dst / "mark").read_text() == "new"


def test_resume_does_not_replace_another_checkpoint(tmp_path):
    dst = tmp_path / "dst"
    publish(dst)
    refused = pytest.raises(UserError, match="exists already and was made from other inputs")
    with refused, workspace(dst, "mark", resume=True) as work:
        work.has_result(lambda: False)
    with refused, workspace(dst, "mark", resume=True) as work:
        work.publish()
    assert names(tmp_path) == ["dst"] and (dst / "mark").read_text() == "new"
    with workspace(dst, "mark", resume=True, overwrite=True) as work:
        assert not work.has_result(lambda: False)
        (work.result / "mark").write_text("newer")
        work.publish()
    assert (dst / "mark").read_text() == "newer"


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
    assert names(tmp_path) == ["dst.work"] * kept
    if name != "SIGKILL":
        assert child.returncode == 130 and err.startswith("error: interrupted")
        assert err.count("\n") == 1 and ("--resume" in err) == kept
    publish(tmp_path / "dst", restart=True)
    assert names(tmp_path) == ["dst"]


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
    assert child.returncode == 130 and names(tmp_path) == []
