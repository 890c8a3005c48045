"""The verifier: what it measures, and when it fails."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import hf_to_flax
from convert.verify import main
from mquant_jax.eval.reference import errors, judge
from tests.hf_folders import GOLDENS, hf_folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    dst = tmp_path_factory.mktemp("verify") / "dst"
    assert hf_to_flax.main([str(GOLDENS / "public"), str(dst)]) == 0
    return dst


def _reference(to, **changes):
    """A copy of the golden's recorded arrays; ``changes`` replace outputs, ``None`` removes one."""
    to.mkdir()
    shutil.copyfile(GOLDENS / "public" / "inputs.safetensors", to / "inputs.safetensors")
    out = load_file(GOLDENS / "public" / "outputs.safetensors") | changes
    save_file({k: v for k, v in out.items() if v is not None}, to / "outputs.safetensors")
    return to


def _golden(name):
    return load_file(GOLDENS / "public" / "outputs.safetensors")[name]


def test_a_changed_weight_fails(tmp_path, capsys):
    def change(t):
        t["model.layers.1.mlp.down_proj.weight"] *= 1.1

    hf_to_flax.main([str(hf_folder(tmp_path / "src", change)), str(tmp_path / "dst")])
    capsys.readouterr()
    args = [str(tmp_path / "dst"), "--reference", str(GOLDENS / "public")]
    assert main([*args, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert result["arrays"]["hidden_1"]["rel"] < 1e-4 < result["arrays"]["hidden_2"]["rel"]


def test_one_greedy_token_decides(tmp_path, converted, capsys):
    greedy = _golden("greedy")
    greedy[0, -1] += 1
    reference = _reference(tmp_path / "ref", greedy=greedy)
    assert main([str(converted), "--reference", str(reference)]) == 1
    out = capsys.readouterr().out
    assert "greedy tokens equal: 93.8%" in out and out.endswith("FAILED\n")


def test_padding_is_not_compared(tmp_path, converted, capsys):
    mask = load_file(GOLDENS / "public" / "inputs.safetensors")["attention_mask"]
    assert (mask == 0).any()
    logits = _golden("logits")
    logits[mask == 0] = 1e9
    reference = _reference(tmp_path / "ref", logits=logits, greedy=None)
    assert main([str(converted), "--reference", str(reference), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["greedy_match"] is None


def test_nan_fails_and_is_valid_json(tmp_path, converted, capsys):
    logits = np.full_like(_golden("logits"), np.nan)
    reference = _reference(tmp_path / "ref", logits=logits, greedy=None)
    assert main([str(converted), "--reference", str(reference), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["arrays"]["logits"]["rel"] is None


def test_bad_references(tmp_path, converted, capsys):
    def fails(folder, word):
        assert main([str(converted), "--reference", str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and word in err

    fails(tmp_path / "nowhere", "no such folder")
    reference = _reference(tmp_path / "wrong", vision=np.zeros((3, 3), np.float32))
    fails(reference, "another model")
    (reference / "outputs.safetensors").write_bytes(b"x" * 20)
    fails(reference, "damaged")
    (reference / "outputs.safetensors").unlink()
    fails(reference, "no such file")
    empty = _reference(tmp_path / "empty")
    save_file({"other": np.zeros(2, np.float32)}, empty / "outputs.safetensors")
    fails(empty, "no array that can be compared")
    inputs = load_file(empty / "inputs.safetensors")
    inputs["input_ids"] = inputs["input_ids"] + 1000
    save_file(inputs, empty / "inputs.safetensors")
    fails(empty, "vocabulary")


def test_bad_checkpoint(tmp_path, capsys):
    assert main([str(tmp_path), "--reference", str(GOLDENS / "public")]) == 2
    assert "mquant.json" in capsys.readouterr().err


def test_quantised_checkpoints_report_unless_a_tolerance_is_given():
    result = {"arrays": {"logits": {"rel": 0.2}}, "greedy_match": 0.5}
    assert judge(result, None, is_float=False)
    assert judge(result, 0.3, is_float=False)
    assert not judge(result, 0.1, is_float=False)
    assert not judge(result, 0.3, is_float=True)
    assert judge({**result, "greedy_match": 1.0}, 0.3, is_float=True)


def test_errors_by_hand():
    got = errors(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    assert got == {"max_abs": 0.5, "rel": 0.1}


def test_a_rotated_checkpoint_is_judged_by_its_logits(tmp_path, capsys):
    recipe = tmp_path / "rotated.json"
    recipe.write_text('{"name": "rotated", "rotate": true}')
    dst = str(tmp_path / "dst")
    assert hf_to_flax.main([str(GOLDENS / "public"), dst, "--recipe", str(recipe)]) == 0
    capsys.readouterr()
    args = [dst, "--reference", str(GOLDENS / "public")]
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["arrays"]) == {"logits"} and result["greedy_match"] == 1.0
    assert {"embeds", "vision", "hidden_1"} <= set(result["other_basis"])
    assert main(args) == 0
    assert "not compared, because rotated" in capsys.readouterr().out


def _checks(capsys, *args):
    """Exit status, and the result as JSON (``None``: bad usage or input)."""
    status = main([*map(str, args), "--json"])
    captured = capsys.readouterr()
    assert (status == 2) == captured.err.startswith("error: ")
    return status, json.loads(captured.out) if status < 2 else None


def test_without_a_reference(tmp_path, converted, capsys):
    assert main([str(converted)]) == 0
    assert capsys.readouterr().out == "ok\n"
    assert _checks(capsys, converted) == (0, {"ok": True, "misfits": []})
    assert _checks(capsys, GOLDENS.parent / "checkpoint_v2") == (0, {"ok": True, "misfits": []})
    assert _checks(capsys, tmp_path / "nowhere")[0] == 2
    assert _checks(capsys, tmp_path)[0] == 2
    assert _checks(capsys, converted, "--rtol", 1)[0] == 2


def test_where_it_came_from(tmp_path, converted, capsys):
    assert _checks(capsys, converted, "--source", GOLDENS / "public")[0] == 0
    other = hf_folder(tmp_path / "src")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    (other / "model.safetensors").unlink()
    status, result = _checks(capsys, converted, "--source", other)
    assert status == 1 and not result["ok"] and len(result["misfits"]) == 2
    assert f"{other / 'config.json'}: is not the file" in result["misfits"][0]
    assert f"{other / 'model.safetensors'}: no such file" in result["misfits"][1]
    assert _checks(capsys, converted, "--source", tmp_path / "nowhere")[0] == 2
    old = GOLDENS.parent / "checkpoint_v2"
    status, result = _checks(capsys, old, "--source", GOLDENS / "public")
    assert status == 1 and "does not say which files" in result["misfits"][0]


def test_all_damage_is_listed(tmp_path, converted, capsys):
    dst = tmp_path / "dst"
    shutil.copytree(converted, dst)
    part = dst / "params" / "vision.merger.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    status, result = _checks(capsys, dst)
    assert status == 1 and len(result["misfits"]) == 1
    assert "damaged: tensor vision/merger/" in result["misfits"][0]
    (dst / "config.json").write_text((dst / "config.json").read_text() + " ")
    (dst / "params" / "language.embedding.safetensors").unlink()
    status, result = _checks(capsys, dst)
    assert status == 1 and len(result["misfits"]) >= 2
    (dst / "mquant.json").write_text("{}")
    status, result = _checks(capsys, dst)
    assert status == 1 and "format version None" in result["misfits"][0]


def test_weights_of_zero_fail(tmp_path, capsys):
    def zero(t):
        t["model.layers.1.mlp.down_proj.weight"][:] = 0

    hf_to_flax.main([str(hf_folder(tmp_path / "src", zero)), str(tmp_path / "dst")])
    capsys.readouterr()
    status, result = _checks(capsys, tmp_path / "dst")
    assert status == 1
    assert result["misfits"] == ["tensor language/layers/1/down_proj/kernel is zero everywhere"]
