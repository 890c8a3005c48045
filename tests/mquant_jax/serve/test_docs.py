"""The examples in docs/serving.md work unchanged."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import mquant_jax as mq
from mquant_jax.commands.serve import _parser
from mquant_jax.runtime.engine import Engine
from tests.chat_cases import folder_of
from tests.mquant_jax.serve.running import served

TEXT = (Path(mq.__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", "")
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    (place / "out").mkdir()
    mq.convert(folder_of("qwen2_vl/public", place / "src"), place / "out" / "w4a8")
    Image.new("RGB", (60, 40)).save(place / "cat.png")
    return place


def test_the_python_examples(place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    chat, client, warm = PYTHON
    model = mq.load("out/w4a8")
    names: dict[str, object] = {}
    exec(chat.replace("model.chat(messages)", "model.chat(messages, max_new_tokens=4)"), names)
    assert capsys.readouterr().out
    names["messages"] = [{"role": "user", "content": "Hello"}]
    exec(warm.replace("1024", "64"), names)
    assert capsys.readouterr().out
    with (
        Engine(model, slots=2, context=512) as engine,
        served(model, engine, name="w4a8") as (url, _),
    ):
        exec(client.replace("max_tokens=64", "max_tokens=4").replace(HERE, url), {})
    assert capsys.readouterr().out


def test_the_shell_examples() -> None:
    from mquant_jax.serve.wire import read_request

    lines = [shlex.split(line) for line in SHELL.splitlines() if line]
    (serve,) = (line for line in lines if line[:4] == ["python", "-m", "mquant_jax", "serve"])
    assert _parser().parse_args(serve[4:]).port == 8000
    (curl,) = (line for line in lines if line[0] == "curl")
    assert json.loads(curl[curl.index("-d") + 1])["model"] == "w4a8"
    assert read_request(curl[curl.index("-d") + 1].encode(), "w4a8", 0).options


def test_every_option_and_field_is_told() -> None:
    from mquant_jax.serve.wire import REQUEST

    for field in REQUEST.fields:
        assert f"`{field}`" in TEXT or field == "stream_options", field
    for option in re.findall(r"--[a-z][a-z-]+", TEXT.partition("## Evaluation")[0]):
        assert option in _parser().format_help() or option == "--image", option
