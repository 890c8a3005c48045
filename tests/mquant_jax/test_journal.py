"""The journal of a conversion: complete records survive, torn ones are ignored."""

from __future__ import annotations

import errno
import os

import pytest

from mquant_jax.checkpoint import journal as module
from mquant_jax.checkpoint.journal import Journal
from tests.helpers import fails

HEADER = {"source": {"model.safetensors": {"sha256": "ab"}}, "recipe": {"w_bits": 4}, "tool": "1"}


def _filled(path, count=3):
    journal = Journal(path)
    journal.start(HEADER)
    for i in range(count):
        journal.append({"part": f"p\u2028{i}"})
    return journal


def test_records_come_back(tmp_path):
    records = _filled(tmp_path / "j").records
    assert records[0] == HEADER and len(records) == 4
    again = Journal(tmp_path / "j")
    again.start(HEADER)
    assert again.records == records


def test_a_torn_line_at_any_byte_is_cut_off(tmp_path):
    path = tmp_path / "j"
    records = _filled(path).records
    data = path.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(data)):
        path.write_bytes(data[:end])
        journal = Journal(path)
        assert journal.records == records[:-1]
        journal.append(records[-1])
        assert path.read_bytes() == data
    path.write_bytes(data[:last] + b"\0" * 20 + b"\n")  # as some file systems leave after a crash
    assert Journal(path).records == records[:-1]


def test_damage_before_the_end_is_an_error(tmp_path):
    path = tmp_path / "j"
    _filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{x}\n", *lines[2:]]))
    fails("line 2 is damaged; begin anew with --restart", lambda: Journal(path))


def test_other_inputs_are_named(tmp_path):
    _filled(tmp_path / "j")
    other = {
        "source": {"model.safetensors": {"sha256": "cd"}, "config.json": {"sha256": "e"}},
        "recipe": {"w_bits": 8},
        "tool": "1",
    }
    with pytest.raises(module.UserError) as e:
        Journal(tmp_path / "j").start(other)
    text = str(e.value)
    assert 'source.model.safetensors.sha256 (there "ab", now "cd")' in text
    assert "recipe.w_bits (there 4, now 8)" in text and "source.config.json" in text
    assert "tool" not in text and "--restart" in text


def test_a_full_disk_records_nothing(tmp_path, monkeypatch):
    journal = _filled(tmp_path / "j")
    write = os.write

    def full(fd, data):
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "full")
        return write(fd, data[:5])

    with monkeypatch.context() as m:
        m.setattr(module.os, "write", full)
        with pytest.raises(OSError, match="full"):
            journal.append({"part": "a long name"})
    assert len(journal.records) == 4
    assert Journal(tmp_path / "j").records == journal.records
    journal.append({"part": "next"})
    assert Journal(tmp_path / "j").records == journal.records
