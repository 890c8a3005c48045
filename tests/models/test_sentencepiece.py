"""Reading tokenizer.model without SentencePiece: file parsing, encoding and decoding."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from mquant_jax.errors import UserError
from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.models.internvl.processor import InternVLProcessor
from mquant_jax.models.sentencepiece import merges_of, read_pieces
from tests.helpers import golden

WORDS = ("he", "ll", "hell", "hello", "\u2581wor", "ld", "wor", "or", "\u2581hello", "\u2581w")
CHARACTERS = "\u2581helowrd"


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a varint or length-delimited bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def write_model(path: Path, dummy_prefix: bool = False, model_type: int = 2) -> list[str]:
    """Write a small SentencePiece model; return its pieces in id order."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces += [(f"<0x{i:02X}>", 6) for i in range(256)]
    pieces += [(w, 1) for w in sorted(WORDS, key=len)] + [(c, 1) for c in CHARACTERS]
    pieces += [("[UNUSED_0]", 4)]
    data = b""
    for rank, (name, kind) in enumerate(pieces):
        score = varint(2 << 3 | 5) + struct.pack("<f", -float(rank) if kind == 1 else 0.0)
        data += field(1, field(1, name.encode()) + score + field(3, kind))
    data += field(2, field(3, model_type)) + field(3, field(3, int(dummy_prefix)))
    path.write_bytes(data)
    return [name for name, _ in pieces]


@pytest.fixture
def folder(tmp_path) -> Path:
    names = write_model(tmp_path / "tokenizer.model")
    first = len(names)
    added = {t: first + i for i, t in enumerate(("<|im_start|>", "<img>", "</img>"))}
    added |= {"<IMG_CONTEXT>": first + 5}  # skips two ids
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    renamed = {"content": "<|im_end|>", "special": True, "lstrip": False}
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "</s>",
              "added_tokens_decoder": {str(first - 1): renamed}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def processor(folder: Path) -> InternVLProcessor:
    return InternVLProcessor(folder, InternVLConfig.from_hf(golden("internvl2", "public")[0]))


def test_text_is_split_by_rank(folder) -> None:
    p = processor(folder)
    tokens = p.tokenizer.convert_ids_to_tokens
    assert tokens(p.encode("hello world")) == ["hello", "\u2581wor", "ld"]
    assert tokens(p.encode("hellé")) == ["hell", "<0xC3>", "<0xA9>"]
    assert tokens(p.encode("hello<|im_end|> hello")) == ["hello", "<|im_end|>", "\u2581hello"]
    for text in ("hello world", " hello  world é", "x"):
        assert p.decode(p.encode(text)) == text


def test_ids_and_the_first_token(folder) -> None:
    p = processor(folder)
    vocab = p.tokenizer.get_vocab()
    first = len(read_pieces(folder / "tokenizer.model").names)
    assert vocab["<IMG_CONTEXT>"] == p.image_token_id == first + 5
    assert (vocab["<img>"], vocab["<|im_end|>"]) == (first + 1, first - 1)
    assert p.stop_ids == (first - 1,) and p.pad_id == 2
    ids = p.prompt("hello").input_ids
    assert ids[:2] == [1, vocab["<|im_start|>"]]  # InternLM2 prepends BOS


def test_a_dummy_prefix_comes_and_goes(folder) -> None:
    write_model(folder / "tokenizer.model", dummy_prefix=True)
    p = processor(folder)
    ids = p.encode("hello world")
    assert p.tokenizer.convert_ids_to_tokens(ids)[0] == "\u2581hello"
    assert p.decode(ids) == "hello world"


def test_merges_by_hand() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "abb": 3, "bb": 4}
    merges = merges_of(vocab, [0, 0, -1, -3, -2])
    assert merges == [("a", "b"), ("b", "b"), ("a", "bb"), ("ab", "b")]


def test_bad_files(folder) -> None:
    path = folder / "tokenizer.model"
    write_model(path, model_type=1)
    with pytest.raises(UserError, match="known: BPE"):
        processor(folder).encode("x")
    for damaged in (path.read_bytes()[:-2], b"", b"\xff\xfe no model"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            processor(folder).encode("x")
    path.unlink()
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        processor(folder)
