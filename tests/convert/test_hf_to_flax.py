"""The converter's command line: valid folders convert, invalid ones leave no files."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import verify
from convert.hf_to_flax import main
from mquant_jax.checkpoint import workspace
from mquant_jax.checkpoint.manifest import load_manifest
from mquant_jax.checkpoint.reader import load_params
from mquant_jax.loading import load_model
from mquant_jax.nn.params import get_params
from mquant_jax.numerics import QWeight
from tests.hf_folders import GOLDENS, hf_folder, shard

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", ["public", "public_video"])
def test_float_conversion_reproduces_the_reference(tmp_path, capsys, case):
    dst = tmp_path / "dst"
    assert main([str(GOLDENS / case), str(dst)]) == 0
    captured = capsys.readouterr()
    assert "recipe float" in captured.out and captured.err == ""
    assert verify.main([str(dst), "--reference", str(GOLDENS / case), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["greedy_match"] == 1.0
    layers = load_manifest(dst)["tensors"]
    hidden = {f"hidden_{i}" for i in range(4 if "language/layers/2/o_proj/kernel" in layers else 3)}
    assert set(result["arrays"]) == {"vision_pre", "vision", "embeds", "logits"} | hidden
    assert all(a["rel"] <= 1e-4 for a in result["arrays"].values())


def test_published_files_are_copied_as_they_are(tmp_path):
    src = hf_folder(tmp_path / "src")
    (src / "generation_config.json").write_text('{"x": 1}')
    assert main([str(src), str(tmp_path / "dst")]) == 0
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (src / name).read_bytes()


def test_bf16_shards_stay_bf16(tmp_path, capsys):
    def to_bf16(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    src = hf_folder(tmp_path / "src", to_bf16)
    expected = load_file(src / "model.safetensors")["model.embed_tokens.weight"]
    shard(src)
    assert main([str(src), str(tmp_path / "dst"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["dtype_counts"]) == ["bfloat16"]
    params, _ = load_params(tmp_path / "dst")
    np.testing.assert_array_equal(params["language/embedding"], expected)
    model = load_model(tmp_path / "dst", jnp.float32).model
    assert model.language.embedding.get_value().dtype == jnp.float32


def test_a_tied_checkpoint_needs_no_head(tmp_path, capsys):
    src = hf_folder(tmp_path / "src", lambda t: t.pop("lm_head.weight"), tie_word_embeddings=False)
    assert main([str(src), str(tmp_path / "dst")]) == 0
    assert capsys.readouterr().err.startswith("warning: config.json says the head is not tied")
    assert load_manifest(tmp_path / "dst")["tied_head"]
    assert load_model(tmp_path / "dst").model.language.cfg.tied_head


def test_weight_only_conversion(tmp_path, capsys):
    dst = tmp_path / "dst"
    options = _recipe(tmp_path, '{"name": "mine", "connector": {"w_bits": 4, "group_size": 64}}')
    assert main([str(GOLDENS / "public"), str(dst), *options]) == 0
    for storage, keep in (("int8", False), ("packed", True)):
        model = load_model(dst, keep_packed=keep).model
        kernels = {k: v for k, v in get_params(model).items() if isinstance(v, QWeight)}
        assert set(kernels) == {f"vision/merger/fc{i}/kernel" for i in (1, 2)}
        assert {k.storage for k in kernels.values()} == {storage}
    capsys.readouterr()
    args = [str(dst), "--reference", str(GOLDENS / "public"), "--json"]
    assert verify.main(args) == 0  # no tolerance applies to a quantised checkpoint
    assert 1e-3 < json.loads(capsys.readouterr().out)["arrays"]["vision"]["rel"] < 0.3


def _nan(t):
    t["visual.merger.ln_q.weight"][0] = np.nan


def _rename(t):
    t["odd.weight"] = t.pop("model.norm.weight")


def _recipe(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    return ["--recipe", str(path)]


BAD = {
    "no source": (None, {}, [], ["nowhere", "no such folder"]),
    "model type": ({}, {"model_type": "llama9"}, [], ["'llama9'", "qwen2_vl"]),
    "no model type": ({}, {"model_type": None}, [], ["model_type"]),
    "config key": ({}, {"rope_scaling": {}}, [], ["config.json", "mrope_section"]),
    "config value": ({}, {"hidden_size": "wide"}, [], ["config.json"]),
    "nan": ({"change": _nan}, {}, [], ["visual.merger.ln_q.weight", "NaN"]),
    "names": ({"change": _rename}, {}, [], ["odd.weight", "model.norm.weight"]),
    "shapes": ({}, {"vocab_size": 401}, [], ["lm_head.weight", "[401, 96]", "[400, 96]"]),
    "recipe name": ({}, {}, ["--recipe", "w3"], ["w3", "w4a8"]),
    "recipe key": ({}, {}, '{"bits": 4}', ["unknown key 'bits'", "calibration"]),
    "recipe value": ({}, {}, '{"vision": {"w_bits": 5}}', ["w_bits", "5"]),
    "recipe json": ({}, {}, "{", ["recipe.json", "not valid JSON"]),
    "group size": ({}, {}, '{"language": {"w_bits": 4, "group_size": 7}}', ["group_size 7"]),
    "calibration": ({}, {}, ["--calibration", "none.jsonl"], ["none.jsonl", "no such file"]),
    "option": ({}, {}, ["--bits", "4"], ["--bits", "--help"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, case):
    folder, config, options, words = BAD[case]
    src = tmp_path / "nowhere" if folder is None else hf_folder(
        tmp_path / "src", **folder, **config
    )  # fmt: skip
    if isinstance(options, str):
        options = _recipe(tmp_path, options)
    (tmp_path / "out").mkdir()
    assert main([str(src), str(tmp_path / "out" / "dst"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert list((tmp_path / "out").iterdir()) == []


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "dst"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_existing_destination_is_seen_before_the_weights(tmp_path, capsys, monkeypatch):
    (tmp_path / "dst").mkdir()
    monkeypatch.setattr("mquant_jax.ptq.convert.Reader", None)
    assert main([str(GOLDENS / "public"), str(tmp_path / "dst")]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([str(GOLDENS / "public"), str(tmp_path / "no" / "dst")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_full_disk(tmp_path, capsys, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workspace, "_sync", full)
    assert main([str(GOLDENS / "public"), str(tmp_path / "dst")]) == 2
    assert "disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# A conversion that pauses after writing everything, before the rename. It restores the default
# signal handlers, because the shell that runs the tests may ignore signals.
HELD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from convert.hf_to_flax import main
from mquant_jax.checkpoint import workspace
workspace._sync = lambda folder: time.sleep(600)
sys.exit(main())
"""


def _start(dst: Path, marker: str = "", *program: str) -> subprocess.Popen:
    """Start a conversion; return when ``marker`` exists in its work folder or it has ended."""
    command = [sys.executable, *(program or ("-m", "convert.hf_to_flax"))]
    command += [str(GOLDENS / "public"), str(dst)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while child.poll() is None and not (dst.parent / f"{dst.name}.work" / marker).exists():
        time.sleep(0.001)
    return child


LIMITED = """
import resource, sys
from convert.hf_to_flax import main
limit = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main())
"""


@pytest.mark.parametrize("limit", [10, 30_000, 300_000])
def test_files_may_not_grow_beyond_a_limit(tmp_path, limit):
    """Limits below the size of the lock file, of a middle part, and of the largest part."""
    args = [str(GOLDENS / "public"), str(tmp_path / "dst"), str(limit)]
    child = subprocess.run([sys.executable, "-c", LIMITED, *args], cwd=ROOT, capture_output=True,
                           text=True)  # fmt: skip
    assert child.returncode == 2 and child.stderr.count("\n") == 1
    assert "file system or the process limit (ulimit -f) allows" in child.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_destination(tmp_path, capsys):
    first = _start(tmp_path / "dst", "result/mquant.json", "-c", HELD)
    for option in ((), ("--overwrite",)):
        assert main([str(GOLDENS / "public"), str(tmp_path / "dst"), *option]) == 2
        assert f"is running (process {first.pid})" in capsys.readouterr().err
    assert (tmp_path / "dst.work" / "result" / "mquant.json").exists()
    first.terminate()
    first.communicate()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_killed_conversion_leaves_no_half_checkpoint(tmp_path, delay):
    dst = tmp_path / "dst"
    child = _start(dst)
    time.sleep(delay)
    child.kill()
    child.communicate()
    _whole_or_not_at_all(tmp_path)


@pytest.mark.slow
def test_kills_at_random_points(tmp_path):
    """Kill after random delays, counted from the first file, which appears after about a second."""
    rng = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / str(i)
        folder.mkdir()
        child = _start(folder / "dst")
        time.sleep(rng.uniform(0, 0.15 if i % 2 else 1.5))
        child.kill()
        child.communicate()
        _whole_or_not_at_all(folder)


def _whole_or_not_at_all(folder):
    if (folder / "dst").exists():
        load_params(folder / "dst")
    assert {p.name for p in folder.iterdir()} <= {"dst", "dst.work"}


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_a_terminated_conversion_cleans_up(tmp_path, number):
    child = _start(tmp_path / "dst", "result/mquant.json", "-c", HELD)
    child.send_signal(number)
    _, err = child.communicate()
    assert child.returncode == 130 and b"interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_terminated_at_any_time_leaves_all_or_nothing(tmp_path):
    dst = tmp_path / "dst"
    child = _start(dst)
    child.send_signal(signal.SIGTERM)
    child.communicate()
    left = list(tmp_path.iterdir())
    if child.returncode == 130:
        assert left in ([], [dst])
    else:  # it finished before the signal, or while exiting
        assert child.returncode in (0, -signal.SIGTERM) and left == [dst]
    if left:
        load_params(dst)
