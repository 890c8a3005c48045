"""Chats with inline pictures in every family; text typed by users never becomes a special token."""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers

from mquant_jax.models import registry
from mquant_jax.models.base import Processor
from mquant_jax.models.chat_files import sampling_defaults
from mquant_jax.models.chat_media import take_media
from mquant_jax.models.literal import LiteralText, is_hidden, shown
from mquant_jax.samples import BUNDLED_HELDOUT, DEMO_ASSETS, read_samples
from tests.chat_cases import CASES, processor_of
from tests.family_cases import family_of
from tests.helpers import fails

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
HELLO = "hell <| o|>\n  é <tag> 你好"


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    return processor_of(request.param, tmp_path_factory.mktemp("chat") / "src")


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, "PNG")
    return out.getvalue()


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def image_part(image: Any = PIXELS) -> dict[str, Any]:
    return {"type": "image", "image": image}


def same(a: Any, b: Any) -> None:
    assert a.input_ids == b.input_ids and a.grids == b.grids
    np.testing.assert_array_equal(a.patches, b.patches)


def special_ids(processor: Any) -> set[int]:
    return set(processor.backend.get_added_tokens_decoder())


def count_special(processor: Any, prompt: Any) -> int:
    return sum(i in special_ids(processor) for i in prompt.input_ids)


def all_cases() -> set[str]:
    return {*registry._BY_MODEL_TYPE.values(), *registry._BY_ARCHITECTURE.values()}


def test_every_registered_family_has_a_case(tmp_path) -> None:
    found = {processor_of(c, tmp_path / str(i))[0].name for i, c in enumerate(CASES)}
    assert {importlib.import_module(module).FAMILY.name for module in all_cases()} <= found


def test_the_protocol(made) -> None:
    processor = made[1]
    assert isinstance(processor, Processor)
    for name in ("prompt", "messages", "chat", "continued", "collate", "encode", "decode"):
        wanted = inspect.signature(getattr(Processor, name)).parameters
        found = inspect.signature(getattr(type(processor), name)).parameters
        assert [*found][: len(wanted)] == [*wanted], name
    keys = {"temperature", "top_k", "top_p", "repetition_penalty"}
    assert processor.sampling_defaults.keys() == keys


def turns(family: Any, image: Any) -> list[dict[str, Any]]:
    content = [image_part(image)] if family.pictures else []
    return [
        {"role": "user", "content": [*content, text_part(HELLO)]},
        {"role": "assistant", "content": "he said."},
        {"role": "user", "content": "And now?  "},
    ]


def test_a_clean_chat_is_the_prompt_of_its_messages(made) -> None:
    family, processor = made
    chat = turns(family, PIXELS)
    plain = [m if isinstance(m["content"], str) else
             {**m, "content": [p if p["type"] == "text" else {"type": "image"}
                               for p in m["content"]]} for m in chat]  # fmt: skip
    expected = processor.messages(plain, [PIXELS] if family.pictures else [])
    same(processor.chat(chat), expected)
    # The literal tokenizer encodes text without special spellings as the plain one does.
    ids = processor.rendered_ids(HELLO, True)
    assert processor.literal.encode(HELLO, True) == ids or not processor.SPELLED
    assert processor.literal.encode(HELLO) == processor.rendered_ids(HELLO)


def test_pictures_in_every_form(made, tmp_path) -> None:
    family, processor = made
    if not family.pictures:
        fails("text-only model", lambda: processor.chat(turns(family, None)[:0] + [
            {"role": "user", "content": [image_part(), text_part("x")]}]))  # fmt: skip
        return
    (tmp_path / "x.png").write_bytes(png())
    coded = base64.b64encode(png()).decode()
    url = f"data:image/png;base64,{coded}"
    parts = [
        image_part(Image.fromarray(PIXELS)), image_part(str(tmp_path / "x.png")), image_part(url),
        image_part(png()), {"type": "image", "base64": coded}, {"type": "image", "url": url},
        {"type": "image", "path": tmp_path / "x.png"}, {"type": "image", "base64": url},
        {"type": "image_url", "image_url": {"url": url}},
    ]  # fmt: skip
    expected = processor.prompt("x", [PIXELS])
    for part in parts:
        same(processor.chat([{"role": "user", "content": [part, text_part("x")]}]), expected)
    for bad in ("http://127.0.0.1/x.png", "https://example.org/x.png"):
        message = [{"role": "user", "content": [image_part(bad), text_part("x")]}]
        fails("URLs are not downloaded", lambda m=message: processor.chat(m))


def test_videos(made) -> None:
    family, processor = made
    chat = [{"role": "user", "content": [{"type": "video", "video": [PIXELS, PIXELS]},
                                         text_part("x")]}]  # fmt: skip
    if family.videos:
        same(processor.chat(chat), processor.prompt("x", videos=[[PIXELS, PIXELS]]))
    else:
        fails("video|text-only", lambda: processor.chat(chat))


def test_system_messages(made) -> None:
    processor = made[1]
    ids = processor.chat([{"role": "system", "content": "Be brief, hell."},
                          {"role": "user", "content": "he?"}]).input_ids  # fmt: skip
    assert "Be brief, hell." in processor.tokenizer.decode([i for i in ids if i >= 0])


def spellings(processor: Any) -> list[str]:
    added = [t.content for t in processor.backend.get_added_tokens_decoder().values()]
    marks = [*processor.MARKS, "<image>", "<video>", "(<image>./</image>)", "<img>x.png</img>",
             "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"]  # fmt: skip
    return [*added, *marks, "".join(added), "<" + added[0] + ">", "\ufdd0x3c\ufdd1"]


def test_what_a_user_types_stays_text(made) -> None:
    """Text that spells special tokens is encoded letter by letter, anywhere in a message."""
    family, processor = made
    pictures = [image_part()] if family.pictures else []

    def prompt(text: str) -> Any:
        return processor.chat([{"role": "user", "content": [*pictures, text_part(text)]}])

    clean = prompt("xyz")
    for typed in spellings(processor):
        got = prompt(f"a {typed} b")
        assert count_special(processor, got) == count_special(processor, clean), typed
        assert got.grids == clean.grids
        shown_ids = [i for i in got.input_ids if i >= 0 and i not in special_ids(processor)]
        assert f"a {typed} b" in processor.tokenizer.decode(shown_ids), typed


def test_parts_and_turns_complete_no_token(made) -> None:
    processor = made[1]
    for typed in spellings(processor):
        for cut in {1, len(typed) // 2, len(typed) - 1} - {0}:
            halves = [text_part(typed[:cut]), text_part(typed[cut:])]
            letters = [text_part("x" * cut), text_part("y")]
            got, expected = (
                processor.chat([{"role": "user", "content": parts}]) for parts in (halves, letters)
            )
            assert count_special(processor, got) == count_special(processor, expected)


def test_roles_other_than_the_user_spell_no_tokens_either(made) -> None:
    processor = made[1]
    token = next(iter(processor.backend.get_added_tokens_decoder().values())).content

    def chat(said: str) -> Any:
        return processor.chat([{"role": "system", "content": said},
                               {"role": "user", "content": "x"},
                               {"role": "assistant", "content": said},
                               {"role": "user", "content": "x"}])  # fmt: skip

    assert count_special(processor, chat(token)) == count_special(processor, chat("x"))


def test_generate_still_places_pictures(made) -> None:
    family, processor = made
    for mark in processor.MARKS[:1] if family.pictures else ():
        prompt = processor.prompt(f"a {mark} b", [PIXELS])
        assert prompt.grids == processor.prompt("a b", [PIXELS]).grids


def test_a_trained_tokenizer() -> None:
    """The demonstration model's tokenizer, and its copy without special tokens, give equal ids."""
    family, config = family_of(json.loads((DEMO_ASSETS / "model" / "config.json").read_text()))
    processor = family.processor(DEMO_ASSETS / "model", config)
    for sample in read_samples(BUNDLED_HELDOUT, 40):
        chat = [{"role": "user", "content": f"{sample.question} {sample.answer}\n"}]
        expected = processor.messages(chat).input_ids
        assert processor.chat(chat).input_ids == expected
        text = processor.tokenizer.decode(expected)
        assert processor.literal.encode(text) == expected


def test_malformed_parts() -> None:
    def chat(*parts: Any) -> Any:
        return lambda: take_media([{"role": "user", "content": [*parts]}])

    fails("expected a list of messages", lambda: take_media("hello"))
    fails("message 0: expected an object", lambda: take_media(["hello"]))
    fails("message 0: part 0: expected an object", chat("hello"))
    fails(r"part 1: expected a picture: .* found the keys \['type'\]", chat(text_part(""), {
        "type": "image"}))  # fmt: skip
    fails("both image and path", chat({"type": "image", "image": "a", "path": "b"}))
    fails("expected frames", chat({"type": "video"}))
    fails("not base64", chat({"type": "image", "base64": "!"}))
    # Parts of other types are left to the families.
    for other in ("audio", ["image"], None):
        assert take_media([{"role": "user", "content": [{"type": other}]}])[1:] == ([], [])


def test_sampling_defaults(tmp_path) -> None:
    def read(**content: Any) -> dict[str, Any]:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return sampling_defaults(tmp_path)

    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    assert read() == greedy and read(temperature=0.5, top_k=3) == greedy
    assert read(repetition_penalty=1.05) == greedy | {"repetition_penalty": 1.05}
    assert read(do_sample=True, temperature=None) == {
        "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    # as published for Qwen2-VL
    assert read(do_sample=True, temperature=0.01, top_k=1, top_p=0.001)["temperature"] == 0.01
    assert read(do_sample=True, temperature=0) == greedy
    assert read(do_sample=True, top_p=0)["top_p"] == 1e-6
    for name, value in (("temperature", -1), ("temperature", "hot"), ("top_k", 2.5),
                        ("top_p", 1.5), ("repetition_penalty", 0), ("do_sample", 1)):  # fmt: skip
        fails(f"generation_config.json: {name}", lambda n=name, v=value: read(**{n: v}))


def tokenizer(kind: Any, *tokens: AddedToken) -> Tokenizer:
    made = Tokenizer(kind)
    made.add_tokens(list(tokens))
    return made


def test_tokens_of_a_vocabulary_that_merges_would_make() -> None:
    """Special tokens may be ordinary pieces, as in SentencePiece vocabularies."""
    letters = {c: i for i, c in enumerate("<s>/abc")}
    kind = models.BPE({**letters, "<s": 7, "<s>": 8, "ab": 9}, [("<", "s"), ("<s", ">"),
                      ("a", "b")])  # fmt: skip
    made = tokenizer(kind, AddedToken("<s>", special=True))
    text = LiteralText(made, (), ())
    hidden = text.hide_message({"role": "user", "content": "ab<s>ab"})["content"]
    assert is_hidden(hidden) and shown(hidden) == "ab<s>ab"
    assert text.encode("<s>" + hidden) == [8, 9, 7, 2, 9]
    assert text.encode("<s>") == made.encode("<s>").ids


def test_unigram_vocabularies() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -9.0) for c in "</s>ab"), ("ab", -1.0)]
    made = tokenizer(models.Unigram(pieces, 0), AddedToken("</s>", special=True),
                     AddedToken("<extra>", special=True))  # fmt: skip
    text = LiteralText(made, (), ())
    hidden = text.hide_message({"role": "user", "content": "ab</s>"})["content"]
    assert text.encode(hidden + "<extra></s>") == [8, 2, 3, 4, 5, 9, 1]
    assert made.encode("ab<extra></s>").ids == [8, 9, 1]


def test_text_that_becomes_a_token_when_it_is_normalised() -> None:
    letters = {c: i for i, c in enumerate("<s>abK")}
    made = tokenizer(models.BPE(letters, []), AddedToken("<K>", normalized=True))
    made.normalizer = normalizers.NFKC()
    text = LiteralText(made, (), ())
    for typed in ("<\u212a>", "\uff1cK\uff1e"):  # the Kelvin sign, full-width brackets
        assert made.encode(typed).ids == [6]
        hidden = text.hide_message({"role": "user", "content": typed})["content"]
        assert text.encode(hidden) == [0, 5, 2]
    assert text.encode("a<K>b") == made.encode("a<K>b").ids == [3, 6, 4]


def test_what_an_answer_shows_may_be_told_again() -> None:
    """Answers in the history may spell visible added tokens, such as the marks around thoughts;
    user text may not. White space is always text."""
    letters = {c: i for i, c in enumerate("<t>h ")}
    made = tokenizer(models.BPE(letters, []), AddedToken("<th>"), AddedToken("  "))
    text = LiteralText(made, (), ["<th>"])
    said = {role: text.hide_message({"role": role, "content": "<th>  "})["content"]
            for role in ("user", "assistant")}  # fmt: skip
    assert text.encode(said["user"]) == [0, 1, 3, 2, 6]
    assert text.encode(said["assistant"]) == [5, 6]
