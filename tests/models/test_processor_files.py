"""All layouts of processor files in model folders; errors name the file and key."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from benchmarks.fuzz.bed import family_of, processor_folder
from convert import hf_to_flax
from mquant_jax.errors import UserError
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.processor import Qwen2VLProcessor
from tests.helpers import GOLDENS, fails, golden
from tests.hf_folders import write_tokenizer

CASE = GOLDENS / "qwen2_vl" / "public"
CONFIG = Qwen2VLConfig.from_hf(golden("qwen2_vl", "public")[0])
SPECIAL = (
    "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|unused|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PICTURE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
TEXT_ONLY = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(CASE / name, folder / name)
    write_tokenizer(folder, SPECIAL, first=384, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "src"))


def write(path: Path, data) -> None:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def edit(path: Path, **keys) -> None:
    write(path, json.loads(path.read_text(encoding="utf-8")) | keys)


def prompt_of(folder: Path, **pictures):
    return Qwen2VLProcessor(folder, CONFIG).prompt(
        "Hi there", **(pictures or {"images": [PICTURE]})
    )


def same(a, b) -> None:
    assert a.input_ids == b.input_ids and a.grids == b.grids
    np.testing.assert_array_equal(a.patches, b.patches)


def test_transformers_5_saves_processor_config_alone(folder, made, tmp_path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    whole = {"processor_class": "Qwen2VLProcessor", "image_processor": settings,
             "video_processor": settings | {"min_pixels": 28 * 28 * 16}}  # fmt: skip
    write(folder / "processor_config.json", whole)
    same(prompt_of(folder), prompt_of(made))
    assert hf_to_flax.main([str(folder), str(tmp_path / "dst")]) == 0
    same(prompt_of(tmp_path / "dst"), prompt_of(made))
    frames = [PICTURE[:56, :56]] * 2
    assert prompt_of(folder, videos=[frames]).grids == [(1, 8, 8)]
    assert prompt_of(made, videos=[frames]).grids == [(1, 4, 4)]


def test_videos_may_have_settings_of_their_own(folder) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    path = folder / "video_preprocessor_config.json"
    write(path, settings | {"min_pixels": 28 * 28 * 16})
    assert prompt_of(folder, videos=[[PICTURE[:56, :56]] * 2]).grids == [(1, 8, 8)]
    write(path, settings | {"patch_size": 16})
    with pytest.raises(UserError, match="video_preprocessor_config.json: patch_size is 16"):
        prompt_of(folder, videos=[[PICTURE] * 2])


@pytest.mark.parametrize(
    "size",
    [
        {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 6},
        {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 6},
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_all_forms_of_size(folder, size, bare) -> None:
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings.pop("min_pixels"), settings.pop("max_pixels")
    write(path, settings | (dict(zip(("min_pixels", "max_pixels"), size.values(), strict=True))
                            if bare else {"size": size}))  # fmt: skip
    _, h, w = prompt_of(folder).grids[0]
    assert (h, w) == (4, 6)  # rounded from 5 x 6.4 patches
    edit(
        path, size={"min_pixels": 1, "max_pixels": 10**7}, min_pixels=28 * 28 * 30, max_pixels=10**6
    )
    _, h, w = prompt_of(folder).grids[0]
    assert h * w >= 120  # separate keys take precedence


def test_only_vocabulary_and_merges(folder, made, tmp_path) -> None:
    (folder / "tokenizer.json").unlink()
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"<filler {i}>" for i in range(384 - len(pieces))]
    write(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    write(folder / "merges.txt", "#version: 0.2\n")
    added = {str(384 + i): {"content": t, "special": True} for i, t in enumerate(SPECIAL)}
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer",
         added_tokens_decoder=added)  # fmt: skip
    same(prompt_of(folder), prompt_of(made))
    processor = Qwen2VLProcessor(folder, CONFIG)
    assert processor.encode("Grüße, 100 Äpfel!") == Qwen2VLProcessor(made, CONFIG).encode(
        "Grüße, 100 Äpfel!"
    )
    assert processor.decode([*processor.encode("Grüße"), 385]) == "Grüße"
    assert hf_to_flax.main([str(folder), str(tmp_path / "dst")]) == 0
    same(prompt_of(tmp_path / "dst"), prompt_of(made))
    write(folder / "added_tokens.json", {t: 384 + i for i, t in enumerate(SPECIAL)})
    edit(folder / "tokenizer_config.json", added_tokens_decoder=None)
    same(prompt_of(folder), prompt_of(made))
    edit(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    fails("tokenizer_config.json: tokenizer_class 'BertTokenizer'", lambda: prompt_of(folder))
    edit(folder / "tokenizer_config.json", tokenizer_class=None)
    write(folder / "added_tokens.json", {"<|image_pad|>": 391})
    fails("<.image_pad.>' has the id 391 in the tokenizer's files", lambda: prompt_of(folder))
    (folder / "merges.txt").unlink()
    fails("merges.txt: cannot be read: no such file", lambda: prompt_of(folder))


def test_merges_are_applied(folder) -> None:
    """Merges from merges.txt are applied in order."""
    (folder / "tokenizer.json").unlink()
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "Ġw"]
    write(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    write(folder / "merges.txt", "#version: 0.2\nh e\nl l\nhe ll\nĠ w\n")
    write(folder / "tokenizer_config.json", {})
    from mquant_jax.models.chat import ChatFolder

    ids = ChatFolder(folder, CONFIG).encode("hello world")
    assert [pieces[i] for i in ids] == ["hell", "o", "Ġw", "o", "r", "l", "d"]


TEMPLATES = {
    "jinja": {"chat_template.jinja": TEMPLATE},
    "json": {"chat_template.json": {"chat_template": TEMPLATE}},
    "json, named": {"chat_template.json": {"chat_template": {"default": TEMPLATE, "rag": "x"}}},
    "processor_config": {"processor_config.json": {"chat_template": TEMPLATE}},
    "tokenizer_config": {"tokenizer_config.json": {"chat_template": TEMPLATE}},
    "named": {"tokenizer_config.json": {"chat_template": [
        {"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]}},
    "one named": {"tokenizer_config.json": {"chat_template": [
        {"name": "chat", "template": TEMPLATE}]}},
    "jinja beside text-only": {"chat_template.jinja": TEMPLATE,
                               "tokenizer_config.json": {"chat_template": TEXT_ONLY}},
    "json beside text-only": {"chat_template.json": {"chat_template": TEMPLATE},
                              "tokenizer_config.json": {"chat_template": TEXT_ONLY}},
    "processor's beside text-only": {"processor_config.json": {"chat_template": TEMPLATE},
                                     "chat_template.jinja": TEXT_ONLY},
}  # fmt: skip


def write_all(folder: Path, files: dict) -> None:
    for name, data in files.items():
        if (folder / name).exists() and isinstance(data, dict):
            edit(folder / name, **data)
        else:
            write(folder / name, data)


@pytest.mark.parametrize("form", TEMPLATES)
def test_all_forms_of_chat_templates(folder, form) -> None:
    write_all(folder, TEMPLATES[form])
    processor = Qwen2VLProcessor(folder, CONFIG)
    ids = processor.prompt("Hi", [PICTURE]).input_ids
    text = processor.tokenizer.decode(ids).replace("<|image_pad|>", "")
    assert text == ("<|im_start|>user\n<|vision_start|><|vision_end|>Hi<|im_end|>\n"
                    "<|im_start|>assistant\n")  # fmt: skip
    FAMILY.check_processor(folder, CONFIG)


BAD_TEMPLATES = {
    "text-only": ({"chat_template.jinja": TEXT_ONLY}, "template"),
    "names": ({"chat_template.json": {"chat_template": {"a": "x", "b": "y"}}},
              "chat_template.json: chat_template has the names 'a', 'b'"),
    "dictionary": ({"chat_template.json": {"chat_template": {"default": {"x": 1}}}},
                   "expected a text"),
    "number": ({"tokenizer_config.json": {"chat_template": 7}}, "chat_template 7: expected a text"),
    "list of numbers": ({"tokenizer_config.json": {"chat_template": [1, 2]}}, "expected a text"),
    "list without names": ({"tokenizer_config.json": {"chat_template": [{"template": "x"}]}},
                           "expected a text"),
    "import": ({"chat_template.jinja": "{% import 'os' as os %}"}, "the chat template fails"),
    "zero": ({"chat_template.jinja": "{{ 1 / 0 }}"}, "the chat template fails: division by zero"),
    "syntax": ({"chat_template.jinja": "{% for %}"}, "chat_template.jinja: the chat"),
    "huge": ({"chat_template.jinja": "{{ 'a' * 9999999999 }}"}, "produces more than"),
    "raises": ({"chat_template.jinja": "{{ raise_exception('no\nuser') }}"}, "fails: no user"),
    "folder": ({}, "chat_template.json"),
}  # fmt: skip


@pytest.mark.parametrize("form", BAD_TEMPLATES)
def test_templates_that_are_none_stop_the_conversion(folder, tmp_path, capsys, form) -> None:
    files, word = BAD_TEMPLATES[form]
    write_all(folder, files)
    if form == "folder":
        (folder / "chat_template.json").mkdir()
    assert hf_to_flax.main([str(folder), str(tmp_path / "dst")]) == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1 and len(err) < 600
    assert not (tmp_path / "dst").exists()


HOSTILE_PICTURES = [
    ({"image_std": [0, 0, 0]}, r"image_std\[0\] 0: expected a number from 0.0001"),
    ({"image_std": [0.5, float("nan"), 0.5]}, r"image_std\[1\] nan"),
    ({"image_std": 0.5}, "image_std 0.5: expected a list of 3"),
    ({"image_mean": ["a", 0, 0]}, r"image_mean\[0\] 'a'"),
    ({"image_mean": [1e30, 0, 0]}, r"image_mean\[0\] 1e\+30"),
    ({"min_pixels": 10**12, "max_pixels": 10**12}, "min_pixels 1000000000000: expected"),
    ({"max_pixels": 2**40}, "max_pixels 1099511627776: expected"),
    ({"min_pixels": -1}, "min_pixels -1: expected"),
    ({"max_pixels": 1.5}, "max_pixels 1.5: expected"),
    ({"min_pixels": 10**6, "max_pixels": 10**4}, "pictures of at least 1000000 and at most 10000"),
    ({"size": {"shortest_edge": 10**12}, "min_pixels": None}, "size.shortest_edge 10000"),
    ({"size": [1]}, r"size \[1\]: expected an object"),
    ({"patch_size": "14"}, "patch_size '14'"),
    ({"patch_size": 16}, "patch_size is 16, the model's config has 14"),
    ({"rescale_factor": 0}, "rescale_factor 0"),
    ({"resample": 99}, "resample 99"),
    ({"do_resize": "no"}, "do_resize 'no'"),
]


@pytest.mark.parametrize(("keys", "word"), HOSTILE_PICTURES)
def test_preprocessor_configs_are_typed(folder, keys, word) -> None:
    edit(folder / "preprocessor_config.json", **keys)
    fails(f"preprocessor_config.json: {word}", lambda: FAMILY.check_processor(folder, CONFIG))


@pytest.mark.parametrize("eos", [1.5, "2", -1, 400, 2**70, [1, "x"], [True], {"a": 1}, [[1]]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_stop_ids_are_token_ids(folder, eos, name) -> None:
    path = folder / name
    write(path, (json.loads(path.read_text()) if path.exists() else {}) | {"eos_token_id": eos})
    fails(f"{name}: eos_token_id.*expected", lambda: Qwen2VLProcessor(folder, CONFIG).stop_ids)


def test_published_stop_ids(folder) -> None:
    write(folder / "generation_config.json", {"eos_token_id": [385, 384], "temperature": 0.1})
    assert Qwen2VLProcessor(folder, CONFIG).stop_ids == (385, 384)
    write(folder / "generation_config.json", {"eos_token_id": None})
    assert Qwen2VLProcessor(folder, CONFIG).stop_ids == (385,)  # config.json


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
             "generation_config.json", "chat_template.json", "special_tokens_map.json"],
)  # fmt: skip
@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"", "fifo", "zero"])
def test_damaged_files_are_said(folder, name, data) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if data == "fifo":
        os.mkfifo(path)
    elif data == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(data)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as e:
        FAMILY.check_processor(folder, CONFIG)
    assert "\n" not in str(e.value)


def test_a_tokenizer_that_was_forgotten(folder, tmp_path, capsys) -> None:
    (folder / "tokenizer.json").unlink()
    assert hf_to_flax.main([str(folder), str(tmp_path / "dst")]) == 2
    assert "tokenizer_config.json, but no tokenizer" in capsys.readouterr().err
    (folder / "tokenizer_config.json").unlink()
    assert hf_to_flax.main([str(folder), str(tmp_path / "dst")]) == 0  # weights only


def test_a_tokenizer_larger_than_the_embedding_is_said(folder, tmp_path, capsys) -> None:
    more = [f"<more {i}>" for i in range(9)]
    write_tokenizer(folder, (*SPECIAL, *more), first=384, eos_token="<|im_end|>")
    assert hf_to_flax.main([str(folder), str(tmp_path / "dst")]) == 0
    err = capsys.readouterr().err
    assert "2 ids outside the model's vocabulary of 400" in err and err.count("\n") == 1


@pytest.mark.parametrize("key", ["eos_token", "added_tokens_decoder"])
@pytest.mark.parametrize("name", ["bpe", "sentencepiece", "glm4v", "qwen2_vl"])
def test_what_the_tokenizers_library_raises_is_one_error(tmp_path, name, key) -> None:
    """The library rejects a lone surrogate; the error is the same for every kind of tokenizer."""
    processor_folder(tmp_path / "src", name)
    path = tmp_path / "src" / "tokenizer_config.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    data[key] = "\ud800" if key == "eos_token" else {"370": {"content": "\ud800"}}
    write(path, data)
    family, config = family_of(tmp_path / "src")
    if (name, key) in (("glm4v", "eos_token"),):  # its stop token is fixed
        family.check_processor(tmp_path / "src", config)
        return
    with pytest.raises(UserError, match=r"src.*(cannot be loaded|has the id)"):
        family.check_processor(tmp_path / "src", config)
