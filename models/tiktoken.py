"""Tokenizers from a tiktoken file: one token per line, in base64, with its rank.

Rebuilt as a byte-level BPE of the ``tokenizers`` library. Such files contain neither the regular
expression that splits text into words nor the special tokens; the family provides them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mquant_jax.errors import UserError
from mquant_jax.files import read_bytes
from mquant_jax.schema import whole

_LONGEST = 2048  # base64 letters of the longest token; merges are found by trying all splits
_ID = whole(low=0, high=2**24)
Ranks = dict[bytes, int]


def read_ranks(path: Path) -> Ranks:
    """Return token -> rank (its id), in the order of the file.

    Raises:
        UserError: no such file, or a malformed line.
    """
    ranks: Ranks = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = _ID.read(int(rank), "rank")
        except (ValueError, binascii.Error, UserError) as e:
            raise UserError(f"{path}:{number}: expected a token in base64 and its rank") from e
        if len(token) > _LONGEST:
            raise UserError(f"{path}:{number}: a token of {len(token)} base64 letters; "
                            f"expected at most {_LONGEST}")  # fmt: skip
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks):
        raise UserError(f"{path}: not a tiktoken vocabulary: a missing byte or a repeated rank")
    return ranks


def byte_letters() -> dict[int, str]:
    """Return the letter that a byte-level BPE writes for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (b for b in range(256) if b not in plain)
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def build_tokenizer(ranks: Ranks, pattern: str, special: Mapping[str, int]) -> Tokenizer:
    """Build the tokenizer; ``<|...|>`` in a text are special tokens unless the caller disables it.

    Two tokens are merged if their concatenation is a token, the lowest rank first. Every split of
    a token into two others is therefore a merge.

    Args:
        pattern: regular expression of a word.
        special: special token -> id.

    Raises:
        UserError: a special token's id or text is taken.
    """
    letters = byte_letters()
    text = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    vocab = {text[token]: rank for token, rank in ranks.items()}
    taken = set(vocab.values())
    for name, i in special.items():
        if i in taken or name in vocab:
            raise UserError(f"special token {name}: id {i} or its text belongs to another token")
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [
            (ranks[token[:i]], ranks[token[i:]], token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks
        ]
        merges += [(text[left], text[right]) for *_, left, right in sorted(splits)]
    bpe = models.BPE(vocab | dict(special), merges, fuse_unk=False, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    names = sorted(special, key=special.__getitem__)
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return tokenizer
