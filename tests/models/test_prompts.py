"""Every family refuses token ids outside the vocabulary before the model runs."""

from types import SimpleNamespace

import numpy as np
import pytest

import mquant_jax as mq
from mquant_jax.errors import PromptError, PromptTooLong, UserError
from mquant_jax.models.base import Prompt
from mquant_jax.models.chat import ChatFolder
from mquant_jax.models.text import text_prompt
from tests.family_cases import family_of
from tests.helpers import golden, has_pictures
from tests.hf_folders import write_tokenizer

CASES = (
    "qwen2_vl/public", "qwen2_5_vl/public", "qwen_vl/public", "internvl/public", "internvl2/public",
    "llava/public", "minicpmv2_6/public", "glm4v/public", "cogvlm2/public", "llama/public",
    "qwen2/public", "qwen3_vl/public",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_family_refuses_ids_that_it_does_not_know(case) -> None:
    hf, inputs, _ = golden(*case.split("/"))
    family, config = family_of(hf)
    vocab = config.language.vocab_size
    assert family.collate(config, [text_prompt([1, vocab - 1 if "intern" not in case else 2])])
    for ids in ([1, vocab], [1, 10**12], [1, -2], [1, 2.0], [1, True], ["1"], [], np.array([1])):
        with pytest.raises(PromptError, match="prompt 1: "):
            family.collate(config, [text_prompt([1]), Prompt(ids, [], np.zeros((0, 0)))])
    ids = inputs["input_ids"].copy()
    row, column = np.argwhere(inputs["attention_mask"] == 1)[-1]
    ids[row, column] = vocab + 16
    with pytest.raises(PromptError, match=rf"{vocab + 16}.*vocabulary of {vocab}"):
        family.reference_batch(config, inputs | {"input_ids": ids})


@pytest.mark.parametrize("case", [c for c in CASES if has_pictures(c)])
def test_patches_that_do_not_fill_their_grids(case) -> None:
    family, config = family_of(golden(*case.split("/"))[0])
    prompt = family.example_prompt(config, 4, 56)
    short = Prompt(prompt.input_ids, prompt.grids, prompt.patches[:-1])
    with pytest.raises(PromptError, match="prompt 0: .* patches"):
        family.collate(config, [short])


@pytest.fixture
def folder(tmp_path) -> ChatFolder:
    write_tokenizer(tmp_path, ["<a>", "<b>", "<c>"], first=300)
    return ChatFolder(tmp_path, SimpleNamespace(language=SimpleNamespace(vocab_size=301)))


def test_a_tokenizer_larger_than_the_embedding(folder) -> None:
    assert folder.unknown_tokens == ["<b>", "<c>"]
    assert "2 ids outside the model's vocabulary of 301 ('<b>', '<c>')" in (
        folder.vocabulary_warning()
    )
    prompt = folder.made(folder.encode("x<a>"))
    assert folder.continued(prompt, "yes").input_ids[:2] == prompt.input_ids
    for call in (lambda: folder.made(folder.encode("x<b>")), lambda: folder.made([]),
                 lambda: folder.continued(prompt, "<c>"), lambda: folder.made([-1])):  # fmt: skip
        with pytest.raises(PromptError):
            call()
    folder.config.language.vocab_size = 303
    assert folder.vocabulary_warning() is None


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the list is empty"), (None, "found NoneType"), ("hi", "found str"),
        ({"role": "user", "content": "hi"}, "found dict"), ([None], "message 0"),
        ([{"role": "wizard", "content": "hi"}], "role 'wizard' is not one of system, user"),
        ([{"role": ["user"], "content": "hi"}], "role"), ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": None}], "content must be text or a list"),
        ([{"role": "user", "content": {"type": "text"}}], "content must be text or a list"),
        ([{"role": "user", "content": ["hi"]}], "a part must be"),
        ([{"role": "user", "content": "\ud83d"}], "message 0: character 0 .*surrogate"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "expected text, found int"),
    ],
)  # fmt: skip
def test_strange_conversations(folder, messages, words) -> None:
    with pytest.raises(UserError, match=words):
        folder.conversation(messages)


@pytest.mark.parametrize(
    "images",
    ["a.png", b"x", None, 3, {"a.png": 1}, {"a.png"}, np.zeros((4, 4, 3), np.uint8)],
)
def test_a_bare_picture_is_no_list(folder, images) -> None:
    with pytest.raises(mq.ImageError, match="images: expected a sequence of pictures"):
        folder.prompt("hi", images)
    with pytest.raises(mq.ImageError, match="videos: expected a sequence of clips"):
        folder.prompt("hi", [], images)


@pytest.mark.parametrize("text", [None, 3, b"hi", ["hi"], "\udfff"])
def test_a_prompt_is_text(folder, text) -> None:
    with pytest.raises(UserError, match="prompt: "):
        folder.prompt(text)


@pytest.mark.parametrize("make", ["prompt", "messages"])
def test_more_pictures_than_the_context_has_tokens(tmp_path, make) -> None:
    """Refused before any picture is opened: decoding twenty thousand takes minutes."""
    write_tokenizer(tmp_path, ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved|>"), first=368)
    family, config = family_of(golden("cogvlm2", "public")[0])
    processor = family.processor(tmp_path, config)
    most = config.language.max_positions
    pictures = ["nowhere.png"] * (most + 1)
    given = "Hello" if make == "prompt" else [{"role": "user", "content": "Hello"}]
    with pytest.raises(PromptTooLong, match=f"{most + 1} pictures.* context is {most} tokens"):
        getattr(processor, make)(given, pictures)
