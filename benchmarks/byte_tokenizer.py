"""Write small byte-level tokenizers in every supported format, for models with random weights."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mquant_jax.models.tiktoken import byte_letters


def write_tokenizer(folder: Path, special: Sequence[str], first: int, **config: str) -> None:
    """Write tokenizer.json; its special tokens get the ids ``first``, ``first + 1``, ...

    ``config`` goes to tokenizer_config.json.
    """
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"<filler {i}>" for i in range(first - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_tiktoken(path: Path, count: int) -> None:
    """Write a tiktoken file: all bytes, then byte pairs up to ``count`` tokens (512 at most)."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes([200, i]) for i in range(count - 256)]
    lines = [base64.b64encode(t).decode() + f" {i}\n" for i, t in enumerate(tokens)]
    path.write_text("".join(lines), encoding="ascii")


def write_bpe(folder: Path) -> None:
    """Write vocab.json and merges.txt, with one special token after the regular ones."""
    letters = byte_letters()
    vocab = {letters[b]: b for b in range(256)} | {"he": 256, "ll": 257, "hell": 258}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "#version: 0.2\nh e\nl l\nhe ll\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    end = {"content": "<|endoftext|>", "special": True}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>",
              "added_tokens_decoder": {"259": end}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_sentencepiece(path: Path) -> int:
    """Write a tokenizer.model of control tokens, bytes and a few words; return its number of
    pieces."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces += [(f"<0x{i:02X}>", 6) for i in range(256)]
    pieces += [(word, 1) for word in ("he", "ll", "hell", "\u2581", "h", "e", "l", "o")]
    data = b""
    for rank, (name, kind) in enumerate(pieces):
        score = bytes([2 << 3 | 5]) + struct.pack("<f", -float(rank) if kind == 1 else 0.0)
        data += _field(1, _field(1, name.encode()) + score + bytes([3 << 3, kind]))
    path.write_bytes(data + _field(2, bytes([3 << 3, 2])) + _field(3, bytes([3 << 3, 0])))
    return len(pieces)


def _field(number: int, value: bytes) -> bytes:
    """Return a length-delimited protobuf field with fewer than 128 bytes of payload."""
    return bytes([number << 3 | 2, len(value)]) + value
