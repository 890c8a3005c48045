"""An interrupted conversion resumes where it stopped and makes the same tensors."""

import dataclasses
import errno
import json
import shutil

import pytest

from mquant_jax.checkpoint.journal import Journal
from mquant_jax.checkpoint.tensor_file import TensorFileWriter
from mquant_jax.checkpoint.workspace import work_folder
from mquant_jax.errors import UserError
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.convert import convert
from tests.chat_cases import folder_of

RECIPE = dataclasses.replace(
    PRESETS["w4a8"],
    calibration=dataclasses.replace(PRESETS["w4a8"].calibration, max_samples=3),
)


class Killed(BaseException):
    """Simulates a kill: the result must not depend on cleanup code."""


def hashes(folder) -> dict[str, str]:
    manifest = json.loads((folder / "mquant.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["tensors"].items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Qwen2-VL with random weights."""
    return folder_of("qwen2_vl/public", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    dst = tmp_path_factory.mktemp("undisturbed") / "dst"
    convert(source, dst, RECIPE)
    return hashes(dst)


def killing(monkeypatch, after: int, before_writing: bool) -> None:
    """Raise :class:`Killed` at the ``after``-th journal record from now on."""
    append, count = Journal.append, 0

    def counted(self, record):
        nonlocal count
        count += 1
        if count == after and before_writing:
            raise Killed
        append(self, record)
        if count == after:
            raise Killed

    monkeypatch.setattr(Journal, "append", counted)


def test_a_conversion_that_is_stopped_again_and_again(
    source, tmp_path, monkeypatch, undisturbed
) -> None:
    dst, stops = tmp_path / "dst", 0
    while not dst.exists():
        with monkeypatch.context() as patch:
            killing(patch, 5 if stops else 2, before_writing=stops % 2 == 1)
            try:
                convert(source, dst, RECIPE, resume=True)
            except Killed:
                stops += 1
        assert {p.name for p in tmp_path.iterdir()} <= {"dst", "dst.work"}
    assert stops >= 4
    assert hashes(dst) == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]
    made = dst.stat().st_ino
    convert(source, dst, RECIPE, resume=True)  # as after a kill that came after the last rename
    other = dataclasses.replace(RECIPE, seed=5)
    with pytest.raises(UserError, match="exists already and was made from other inputs"):
        convert(source, dst, other, resume=True)
    assert dst.stat().st_ino == made and [p.name for p in tmp_path.iterdir()] == ["dst"]


def stopped(source, tmp_path, monkeypatch, recipe=RECIPE):
    """The folder of a conversion that was stopped during its rounding pass."""
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        write, count = TensorFileWriter.write, 0

        def failing(self, name, array):
            nonlocal count
            count += 1
            if count == 60:
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
            write(self, name, array)

        patch.setattr(TensorFileWriter, "write", failing)
        with pytest.raises(UserError, match="the disk is full.*--resume continues"):
            convert(source, dst, recipe)
    assert not dst.exists()
    return dst


@pytest.mark.slow
def test_a_full_disk_and_other_inputs(source, tmp_path, monkeypatch, undisturbed) -> None:
    dst = stopped(source, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="--resume continues it, --restart begins anew"):
        convert(source, dst, RECIPE, overwrite=True)
    other = dataclasses.replace(RECIPE, seed=5)
    with pytest.raises(UserError, match="recipe.seed .there 0, now 5."):
        convert(source, dst, other, resume=True)
    part = next((work_folder(dst) / "result" / "params").glob("*.safetensors"))
    kept = part.read_bytes()
    part.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match="is not as it was written.*--restart"):
        convert(source, dst, RECIPE, resume=True)
    part.write_bytes(kept)
    convert(source, dst, RECIPE, resume=True)
    assert hashes(dst) == undisturbed


def test_lost_states_are_named(source, tmp_path, monkeypatch) -> None:
    dst = stopped(source, tmp_path, monkeypatch)
    shutil.rmtree(work_folder(dst) / "states")
    with pytest.raises(UserError, match="states after .* are missing.*--restart"):
        convert(source, dst, RECIPE, resume=True)
