"""The eval command in processes: several hosts and devices, killed and resumed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import mquant_jax as mq
from mquant_jax.eval import hosts
from mquant_jax.eval.perplexity import LENGTH, Scorer
from mquant_jax.models.base import Prompt
from tests.helpers import fails

QUESTIONS = 32


@pytest.fixture(scope="module")
def checkpoint(demo_float):
    return demo_float


def start(checkpoint, out, *more, devices=1):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [
        sys.executable, "-m", "mquant_jax", "eval", str(checkpoint), "--limit", str(QUESTIONS),
        "--batch-size", "1", "--max-new-tokens", "4", "--out", str(out), "--json", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, "XLA_FLAGS": flags}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def kept(out):
    """Sorted answers of the only checkpoint, its result without times and devices, and the
    devices."""
    (folder,) = [path for path in out.iterdir() if path.is_dir()]
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result.pop("times")["seconds"] > 0
    devices = result.pop("devices")
    return sorted(lines), result, devices


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """An uninterrupted run on one device of one host."""
    out = tmp_path_factory.mktemp("whole")
    return json.loads(finished(start(checkpoint, out))), *kept(out)


def test_a_killed_run_goes_on_to_the_same_result(checkpoint, whole, tmp_path) -> None:
    process = start(checkpoint, tmp_path)
    answers = []
    while process.poll() is None and len(answers) < 2:
        time.sleep(0.01)
        files = list(tmp_path.glob("*/answers.jsonl"))
        answers = files[0].read_bytes().splitlines()[1:] if files else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not list(tmp_path.glob("*/result.json"))
    assert 2 <= len(files[0].read_bytes().splitlines()) - 1 < QUESTIONS
    again = json.loads(finished(start(checkpoint, tmp_path)))
    assert (again, *kept(tmp_path)) == whole


@pytest.mark.slow
def test_two_hosts_of_two_devices_share_the_questions(checkpoint, whole, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "2"]
    processes = [
        start(checkpoint, tmp_path / str(i), *cluster, "--process-id", str(i), devices=2)
        for i in range(2)
    ]
    first, second = map(finished, processes)
    assert second == "" and json.loads(first) == whole[0]
    answers, result, devices = kept(tmp_path / "0")
    assert (answers, result) == whole[1:3] and len(devices) == 4
    (shared,) = (tmp_path / "1").glob("*/answers-1.jsonl")
    assert sorted(shared.read_text(encoding="utf-8").splitlines()) == answers
    assert not (tmp_path / "1" / "evaluation.json").exists()


@pytest.mark.slow
def test_a_text_is_scored_the_same_on_any_number_of_devices(checkpoint, tmp_path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    more = ["--task", "perplexity", "--data", str(data)]
    processes = [start(checkpoint, tmp_path / str(n), *more, devices=n) for n in (1, 3)]
    one, three = [json.loads(finished(process)) for process in processes]
    assert one == three and one["n"] > 3
    model = mq.load(checkpoint)
    ids = model.processor.encode(data.read_text(encoding="utf-8"))[:LENGTH]
    batch = model.collate([Prompt(ids, [], np.zeros((0, 0), np.float32))])
    log_probs = jax.nn.log_softmax(model.module(batch)[0, -len(ids) : -1])
    wanted = -np.asarray(log_probs)[np.arange(len(ids) - 1), ids[1:]].sum()
    assert Scorer(model)([ids])[0] == pytest.approx(wanted, rel=1e-4)


def test_hosts_that_are_not_said_in_full() -> None:
    fails("go together", lambda: hosts.join(None, 2, None))
    fails("--process-id is 2; expected 0 to 2 - 1", lambda: hosts.join("127.0.0.1:1", 2, 2))
