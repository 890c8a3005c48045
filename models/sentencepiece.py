"""Read a tokenizer.model (SentencePiece, byte-pair encoding) into the tokenizers library.

For folders published without a tokenizer.json, such as InternLM2's. The file is a protobuf message.
The few fields needed are parsed here, without the protobuf library.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.files import read_bytes

_LONGEST = 1024  # characters of the longest piece; merges are found by trying all splits

BPE = 2  # trainer_spec.model_type
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # types of pieces
SPACE = "\u2581"


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The contents of a tokenizer.model.

    Attributes:
        names, scores, kinds: of each piece, in the order of ids.
        model_type: 1 unigram, 2 byte-pair encoding.
        charsmap: compiled character normalisation; empty: none.
        dummy_prefix: whether a space is prepended to every text.
    """

    names: list[str]
    scores: list[float]
    kinds: list[int]
    model_type: int
    charsmap: bytes
    dummy_prefix: bool


def read_pieces(path: Path) -> Pieces:
    """Read a tokenizer.model.

    Raises:
        UserError: not a SentencePiece model.
    """
    data = read_bytes(path)
    try:
        names, scores, kinds = [], [], []
        trainer: dict[int, Any] = {}
        normaliser: dict[int, Any] = {}
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                names.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                kinds.append(piece.get(3, 1))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normaliser = dict(_fields(value))
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as e:
        raise UserError(f"{path}: not a SentencePiece model: {e!r}") from e
    if not names:
        raise UserError(f"{path}: not a SentencePiece model: it has no pieces")
    longest = max(map(len, names))
    if longest > _LONGEST:
        raise UserError(f"{path}: a piece of {longest} characters; expected at most {_LONGEST}")
    return Pieces(
        names, scores, kinds, trainer.get(3, 1), normaliser.get(2, b""), bool(normaliser.get(3, 1))
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and raw value of each field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("truncated")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"field of kind {kind}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
        shift += 7


def merges_of(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all ways to join two pieces into a third, best piece first."""
    found = []
    for piece, i in vocab.items():
        halves = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        pairs = [(vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
        found += [(-scores[i], i, *pair) for pair in sorted(pairs)]
    return [pair[4:] for pair in sorted(found, key=_by_score)]


def _by_score(entry: tuple) -> tuple:
    return entry[:4]


def build_tokenizer(pieces: Pieces, added: Mapping[int, Mapping[str, Any]], bos: str | None):
    """A ``tokenizers.Tokenizer`` that splits text like SentencePiece.

    Args:
        added: tokens by id; they rename pieces, or have ids after the last piece.
        bos: the token before every text, if any.

    Raises:
        UserError: the model is not a byte-pair encoding.
    """
    import tokenizers as tk

    if pieces.model_type != BPE:
        raise UserError(f"tokenizer.model: kind {pieces.model_type} is not supported; known: BPE")
    names = list(pieces.names)
    for i in sorted(added):
        if i < len(names):
            names[i] = added[i]["content"]
    vocab = {name: i for i, name in enumerate(names)}
    unknown = next((names[i] for i, kind in enumerate(pieces.kinds) if kind == _UNKNOWN), None)
    plain = {n: i for n, i in vocab.items() if pieces.kinds[i] not in (_UNKNOWN, _CONTROL, _USER)}
    tokenizer = tk.Tokenizer(
        tk.models.BPE(
            vocab=vocab, merges=merges_of(plain, pieces.scores), unk_token=unknown, fuse_unk=True,
            byte_fallback=True,
        )
    )  # fmt: skip
    steps: list[Any] = [tk.normalizers.Replace(" ", SPACE)]
    back = [tk.decoders.Replace(SPACE, " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    if pieces.dummy_prefix:
        steps.insert(0, tk.normalizers.Prepend(SPACE))
        back.append(tk.decoders.Strip(" ", 1, 0))
    if pieces.charsmap:
        steps.insert(0, tk.normalizers.Precompiled(pieces.charsmap))
    tokenizer.normalizer = tk.normalizers.Sequence(steps)
    tokenizer.decoder = tk.decoders.Sequence(back)
    _add(tokenizer, pieces, names, added)
    if bos is not None and (first := tokenizer.token_to_id(bos)) is not None:
        tokenizer.post_processor = tk.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, first)]
        )
    return tokenizer


def _add(tokenizer, pieces: Pieces, names: Sequence[str], added: Mapping[int, Mapping]) -> None:
    """Add tokens that are matched before anything else, with the ids they must have."""
    import tokenizers as tk

    for i, kind in enumerate(pieces.kinds):
        if kind in (_CONTROL, _USER) and i not in added:
            special = kind == _CONTROL
            tokenizer.add_tokens([tk.AddedToken(names[i], normalized=False, special=special)])
    for i in sorted(added):
        while i >= len(names) and tokenizer.get_vocab_size() < i:  # ids are assigned in order
            tokenizer.add_tokens([f"<unused {tokenizer.get_vocab_size()}>"])
        keys = ("lstrip", "rstrip", "special", "single_word")
        flags = {k: bool(added[i].get(k, False)) for k in keys}
        tokenizer.add_tokens([tk.AddedToken(added[i]["content"], normalized=False, **flags)])
