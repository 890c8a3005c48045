"""Tokenizers from tiktoken files against a plain byte-pair encoder."""

from __future__ import annotations

import base64
import random

import pytest
import regex

from mquant_jax.errors import UserError
from mquant_jax.models.glm4v.processor import PATTERN
from mquant_jax.models.tiktoken import build_tokenizer, byte_letters, read_ranks

TEXT = "the cat sat on the mat, it's 12345 o'clock; naïve café 漢字 !!\n\n  hello   world 're THE "
SPECIAL = {"<|end|>": 700, "<|user|>": 600}


def random_ranks() -> dict[bytes, int]:
    """Ranks of every byte, then of random pieces of the text, each a pair of earlier ones."""
    rng, tokens, text = random.Random(0), [bytes([b]) for b in range(256)], TEXT.encode()
    known = set(tokens)
    while len(tokens) < 380:
        n = rng.randrange(2, 7)
        start = rng.randrange(len(text) - n)
        t = text[start : start + n]
        if t not in known and any(t[:i] in known and t[i:] in known for i in range(1, n)):
            known.add(t)
            tokens.append(t)
    return {t: i for i, t in enumerate(tokens)}


def encode_word(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Encode as a whole token, or merge the pair of lowest rank until none is left."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([b]) for b in word]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, 1 << 30) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        if pairs[i] == 1 << 30:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[p] for p in parts]


@pytest.mark.parametrize("text", [TEXT, TEXT[::-1], " \n a\t\r\n  b", "WE'RE 1234567 it'S", ""])
def test_the_same_tokens_as_a_plain_reading(text) -> None:
    ranks = random_ranks()
    tokenizer = build_tokenizer(ranks, PATTERN, SPECIAL)
    words = regex.findall(PATTERN, text)
    assert "".join(words) == text
    expected = [i for word in words for i in encode_word(word.encode(), ranks)]
    assert tokenizer.encode(text).ids == expected
    assert tokenizer.decode(expected) == text


def test_special_tokens_have_the_ids_that_they_were_given() -> None:
    tokenizer = build_tokenizer(random_ranks(), PATTERN, SPECIAL)
    assert tokenizer.encode("a<|user|>b<|end|>").ids == [97, 600, 98, 700]
    assert tokenizer.decode([97, 600, 98]) == "ab"
    assert len(set(byte_letters().values())) == 256


def test_files(tmp_path) -> None:
    path, ranks = tmp_path / "tokenizer.model", random_ranks()
    lines = [base64.b64encode(t) + b" %d" % i for t, i in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert read_ranks(path) == ranks
    for content, word in (
        (b"\n".join(lines[1:]), "a missing byte"),
        (b"\n".join([*lines, b"QUJD 5"]), "a repeated rank"),
        (b"QQ== 0\n\xff 1", ":2: expected"),
        (b"QQ==", ":1: expected"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=word):
            read_ranks(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_ranks(tmp_path / "none")
    with pytest.raises(UserError, match="<|user|>: id 5"):
        build_tokenizer(ranks, PATTERN, {"<|user|>": 5})
