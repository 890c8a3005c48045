"""``python -m mquant_jax serve`` in a separate process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mquant_jax import cli


@pytest.fixture(scope="module")
def place(random_float) -> Path:
    return random_float


def test_a_server_that_a_signal_ends(place) -> None:
    command = [sys.executable, "-m", "mquant_jax", "serve", str(place), "--port", "0", "--slots",
               "2", "--context", "256"]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONUNBUFFERED": ""}) as server:
        line = server.stdout.readline()
        assert line.startswith("serving dst on http://127.0.0.1:"), server.stderr.read()
        url = line.split()[-1]
        body = {"model": "dst", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 2
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    assert (server.returncode, out, err) == (0, "", "")


def test_bad_usage(place, capsys) -> None:
    for args, word in (
        ((), "checkpoint"), ((str(place), "--port", "99999"), "--port is 99999"),
        ((str(place), "--slots", "0"), "--slots is 0"), ((str(place / "x"), "--port", "0"), "x"),
        ((str(place), "--max-pixels", "-1"), "pixels is -1"),
    ):  # fmt: skip
        assert cli.main(["serve", *args]) == 2
        err = capsys.readouterr().err
        assert word in err and len(err.splitlines()) == 1, err


def test_an_open_door_is_warned_about(place, capsys, monkeypatch) -> None:
    monkeypatch.delenv("MQUANT_API_KEY", raising=False)
    args = ["serve", str(place / "none"), "--host", "0.0.0.0", "--port", "0"]
    assert cli.main(args) == 2
    assert "without an --api-key" in capsys.readouterr().err
    assert cli.main([*args, "--api-key", "x"]) == 2
    assert "without an --api-key" not in capsys.readouterr().err


def test_the_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    out = capsys.readouterr().out
    for word in ("/v1/chat/completions", "/metrics", "curl", "MQUANT_API_KEY", "docs/serving.md"):
        assert word in out
