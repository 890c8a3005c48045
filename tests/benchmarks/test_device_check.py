"""The device check without a device: steps that pass, fail or hang; the report; a rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import device_check
from benchmarks.device_check import STEPS, Step, check
from mquant_jax.cli_support import run_cli

ROOT = Path(__file__).parents[2]


def step(name: str, code: str, limit: float = 30, file: str | None = None) -> Step:
    command = ("-c", code, "{out}")
    return Step(name, limit, command, command, file)


WRITES = "import sys; open(sys.argv[1] + '/a.json', 'w').write('1')"
FAILS = "import sys; print('one'); sys.exit('no such kernel')"


def test_the_plan() -> None:
    assert [s.name for s in STEPS] == ["kernels", "product", "speed", "tune", "conversion"]
    assert sum(s.limit for s in STEPS) <= device_check.WHOLE < 480
    assert len(STEPS) + 2 <= 8  # files of OUT: one per step, report, log
    for s in STEPS:
        assert any("{out}/" + s.file in part for part in s.command)
        assert any("{out}/" + s.file in part for part in s.tiny)


def test_one_bad_step_does_not_stop_the_others(tmp_path, capsys) -> None:
    steps = [
        step("fails", FAILS),
        step("hangs", "import time; print('begun', flush=True); time.sleep(60)", limit=1),
        step("works", WRITES, file="a.json"),
    ]
    start = time.perf_counter()
    report = check(tmp_path, steps, "fails")
    assert time.perf_counter() - start < 20 and not report["ok"]
    assert report == json.loads((tmp_path / "report.json").read_text())
    fails, hangs, works = report["steps"]
    assert fails["outcome"] == "failed" and fails["exit_status"] == 1
    assert fails["tail"] == ["one", "no such kernel"]
    assert hangs["outcome"] == "out of time" and hangs["tail"] == ["begun"]
    assert works["outcome"] == "ok" and works["result"] == "a.json"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "log.txt", "report.json"]
    assert "no such kernel" in capsys.readouterr().out
    # --from keeps the results of the earlier steps.
    again = check(tmp_path, steps, "works")
    assert again["steps"][:2] == [fails, hangs] and again["steps"][2]["outcome"] == "ok"
    log = (tmp_path / "log.txt").read_text()
    assert log.count("--- works") == 2 and log.count("--- fails") == 1


def test_what_a_step_started_ends_with_it(tmp_path) -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time;"
        " time.sleep(60)']); open(sys.argv[1] + '/pid', 'w').write(str(p.pid)); p.wait()"
    )
    assert check(tmp_path, [step("hangs", code, limit=2)], "hangs")["ok"] is False
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")


def test_the_report_is_written_step_by_step(tmp_path) -> None:
    looks = (
        "import json, sys; r = json.load(open(sys.argv[1] + '/report.json'))\n"
        "print(len(r['steps']))"
    )
    report = check(tmp_path, [step("a", "pass"), step("b", looks), step("c", looks)], "a")
    assert report["ok"] and [s["tail"] for s in report["steps"]] == [[], ["1"], ["2"]]


def test_the_whole_has_a_limit(tmp_path) -> None:
    steps = [step("a", "import time; time.sleep(60)"), step("b", "pass")]
    a, b = check(tmp_path, steps, "a", whole=2)["steps"]
    assert a["outcome"] == "out of time" and a["limit"] == 2
    assert b["outcome"].startswith("not begun")


def test_usage(tmp_path, capsys) -> None:
    assert run_cli(device_check._run, ["x", "--from", "nowhere"]) == 2
    assert "kernels" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("[]")
    assert run_cli(device_check._run, [str(tmp_path), "--from", "tune"]) == 2
    assert "not a report" in capsys.readouterr().err


def test_the_bundle_names_what_the_package_needs() -> None:
    """Every requirement of pyproject.toml is in the bundle or comes with jax."""
    import tomllib

    listed = (ROOT / "benchmarks" / "device_wheels.txt").read_text().splitlines()
    names = {text.split("==")[0].replace("_", "-") for text in listed if not text.startswith("#")}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {text.split(">")[0].split("=")[0].strip() for text in wanted}
    assert wanted - names == {"jax", "numpy", "scipy"}  # jax brings the other two


@pytest.mark.slow
def test_rehearsal(tmp_path) -> None:
    """All steps run at the smallest sizes, from another folder, as on a device."""
    script = ROOT / "benchmarks" / "device_check.sh"
    env = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(script), "out", "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ok"] and report["tiny"]
    assert {s["result"] for s in report["steps"]} == {s.file for s in STEPS}
    assert len(os.listdir(tmp_path / "out")) <= 8
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["complete"]
