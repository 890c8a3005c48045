"""The wheel, built from the sdist, used in a folder whose files share names with our folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mquant_jax

ROOT = Path(__file__).parent.parent
SOURCES = ("mquant_jax", "models", "convert")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
USES_IT = """\
import mquant_jax as mq
import mquant_jax.models.registry
import models, convert
assert models.MINE and convert.MINE
assert "site" in mq.__file__ and "site" in mquant_jax.models.registry.__file__, mq.__file__
model = mq.load("converted")
picture = __import__("numpy").full((56, 56, 3), 200, "uint8")
print(repr(model.generate(images=[picture], prompt="what shape is it?", max_new_tokens=3)))
"""


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The unpacked wheel."""
    work = tmp_path_factory.mktemp("wheel")
    tree, site = work / "tree", work / "site"
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "heldout.npz")  # the largest asset
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    run("-c", "import setuptools.build_meta as b; b.build_sdist('../dist')", cwd=tree)
    (sdist,) = (work / "dist").iterdir()
    with tarfile.open(sdist) as tar:
        tar.extractall(work, filter="data")
    source = work / sdist.name.removesuffix(".tar.gz")
    run("-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation",
        "-w", str(work / "wheels"), ".", cwd=source)  # fmt: skip
    (wheel,) = (work / "wheels").iterdir()
    assert wheel.name == f"mquant_jax-{mquant_jax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.mark.slow
def test_the_wheel_holds_every_module(site) -> None:
    wanted = {"mquant_jax/py.typed", "mquant_jax/assets/gpu_blocks.json",
              "mquant_jax/serve/page.html"}  # fmt: skip
    for top in SOURCES:
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / top).rglob("*.py")}
        wanted |= {f"mquant_jax/{p}" if top == "models" else p for p in files}
    have = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    assert not wanted - have
    assert {p.split("/")[0] for p in have} == {
        "mquant_jax", "convert", f"mquant_jax-{mquant_jax.__version__}.dist-info"
    }  # fmt: skip


@pytest.mark.slow
def test_it_works_among_files_of_the_same_names(site, tmp_path) -> None:
    """Convert, load and generate; a user's ``models`` and ``convert`` are not taken for ours."""
    (tmp_path / "convert.py").write_text("MINE = True\n")
    (tmp_path / "models.py").write_text("MINE = True\n")
    (tmp_path / "mine.py").write_text(USES_IT)
    env = {"PYTHONPATH": str(site)}
    run("-W", "error", "-c", "import mquant_jax", cwd=tmp_path, **env)
    source = str(site / "mquant_jax" / "assets" / "demo" / "model")
    run("-m", "mquant_jax", "convert", source, "converted", cwd=tmp_path, **env)
    answer = run("mine.py", cwd=tmp_path, **env)
    assert answer.startswith("'")
    (tmp_path / "models.py").unlink()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("MINE = True\n")
    assert run("mine.py", cwd=tmp_path, **env) == answer
