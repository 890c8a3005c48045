"""The documentation: its commands and options exist, the commands of some pages run, the quoted
error messages occur in the code, and every page is in the site."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mquant_jax.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# Pages whose commands run in order in one folder; commands with placeholders are skipped.
RUN = ("quick_start.md", "choosing_a_recipe.md", "calibration_data.md", "performance.md")
PLACEHOLDER = re.compile(r"\b(SRC|DST|CKPT|FILE|DIR|mine\.json)\b|\[")
OTHERS = {"git", "source", "pre-commit", "ruff", "mkdocs", "cd", "curl"}  # external programs


def commands(page: Path) -> Iterator[str]:
    """The commands in a page's bash blocks, with continuation lines joined and comments removed."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text("utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.sub(r"\s#.*", "", line).split("&&"):
                if command.strip():
                    yield command.strip()


ALL = [(page, command) for page in PAGES for command in commands(page)]


def words_of(command: str) -> list[str]:
    """The command's words, without brackets around optional ones and without variable settings."""
    words = [word.strip("[]") for word in shlex.split(command)]
    return [w for i, w in enumerate(words) if not (i == 0 and re.match(r"[A-Z_]+=", w))]


def options_of(words: list[str]) -> list[str]:
    return [w.split("=")[0] for w in words if re.match(r"-{1,2}[a-z]", w)]


def source_of(module: str) -> str:
    """The source of a module, or of all modules of a package, and of their shared modules."""
    path = ROOT / module.replace(".", "/")
    files = [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else path.rglob("*.py")
    shared = (ROOT / "benchmarks" / "output.py", ROOT / "mquant_jax" / "cli_support.py")
    return "\n".join(f.read_text("utf-8") for f in (*files, *shared))


def check_module(module: str, words: list[str], capsys) -> None:
    """Check ``python -m MODULE WORDS``: the module exists and its source names the options."""
    if module == "mquant_jax":
        assert words[0] in COMMANDS, words
        with pytest.raises(SystemExit):
            main([words[0], "--help"])
        known = capsys.readouterr().out
    else:
        assert importlib.util.find_spec(module) is not None, module
        if module == "pytest":
            return
        known = source_of(module.replace("convert.verify", "mquant_jax.commands.verify"))
    for option in options_of(words):
        assert option == "--help" or re.search(rf"{option}\b", known), f"{module}: {option}"


def check_install(words: list[str]) -> None:
    """Check ``pip install -e ".[extra]"``: the extra exists."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for word in words:
        for extra in re.findall(r"\[([a-z,-]+)", word):
            assert set(extra.split(",")) <= set(known["optional-dependencies"]), extra


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{p.stem}: {c}" for p, c in ALL])
def test_commands_exist_and_take_their_options(page: Path, command: str, capsys) -> None:
    program, *words = words_of(command)
    if program.startswith("python"):
        assert words[0] == "-m", command
        if words[1] != "venv":
            check_module(words[1], words[2:], capsys)
    elif program == "pip":
        # shlex keeps the brackets of ".[extra]".
        check_install(shlex.split(command))
    elif program == "bash":
        script = re.sub(r"^DIR/tree/", "", words[0])
        text = (ROOT / script).read_text("utf-8")
        assert all(option in text for option in options_of(words)), command
    elif program.startswith(".ci/"):
        assert (ROOT / program).is_file(), command
    else:
        assert program in OTHERS, command


@pytest.mark.slow
def test_commands_run(tmp_path) -> None:
    """Pages run in the order of :data:`RUN`: the first makes the checkpoints that others use."""
    (tmp_path / "docs").mkdir()
    for page in RUN:
        for command in commands(DOCS / page):
            words = words_of(command)
            if words[0] != "python" or PLACEHOLDER.search(command):
                continue
            call = [sys.executable, *words[1:]]
            env = {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True,
                                  env={**os.environ, **env})  # fmt: skip
            assert done.returncode == 0, f"{page}: {command}\n{done.stderr[-2000:]}"


def test_error_messages_are_those_of_the_code() -> None:
    table = re.findall(r"^\| (`.*?) \|", (DOCS / "errors.md").read_text("utf-8"), re.M)
    assert len(table) > 8
    sources = "\n".join(
        re.sub(r'"\s*\n\s*f?"', "", p.read_text("utf-8"))  # joins adjacent string literals
        for top in ("mquant_jax", "models", "convert")
        for p in (ROOT / top).rglob("*.py")
    )
    for message in re.findall(r"`(.*?)`", " ".join(table)):
        for piece in message.split(" ... "):
            assert piece.removesuffix(" ...") in sources, message


def test_every_page_is_in_the_site() -> None:
    nav = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M))
    assert {p.name for p in DOCS.glob("*.md")} <= nav


def test_pictures_are_small_and_used() -> None:
    text = "\n".join(p.read_text("utf-8") for p in DOCS.glob("*.md"))
    for path in (DOCS / "figures").glob("*.png"):
        assert f"figures/{path.name}" in text and path.stat().st_size < 60_000, path
    for path in (DOCS / "reports").glob("*.html"):
        assert f"reports/{path.name}" in text and path.stat().st_size < 400_000, path
