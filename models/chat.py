"""What processors share: the tokenizer and chat template of a model's folder.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mquant_jax.errors import UserError
from mquant_jax.files import read_json_if_any as read_json

KINDS = ("image", "video")
Message = Mapping[str, Any]


class ChatFolder:
    """Chats to text and tokens, tokens to text, as the files of a folder say.

    Args:
        folder: holds tokenizer.json or (SentencePiece) tokenizer.model, and as published
            tokenizer_config.json, generation_config.json and the chat template.
        config: the model's config.

    Raises:
        UserError: a needed file is missing; at first use: it is unreadable.
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    # What will do in the place of a needed file.
    INSTEAD: ClassVar[Mapping[str, str]] = {"tokenizer.json": "tokenizer.model"}

    def __init__(self, folder: str | Path, config: Any):
        self.folder, self.config = Path(folder), config
        for name in self.NEEDED:
            names = (name, self.INSTEAD.get(name, name))
            if not any((self.folder / n).is_file() for n in names):
                raise UserError(f"{self.folder / name}: no such file (the processor needs it)")

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer.

        The general class takes tokenizer.json as it is; those that AutoTokenizer chooses rebuild
        parts of it, such as how digits are split, by the name in tokenizer_config.json.
        """
        kind = import_transformers().PreTrainedTokenizerFast
        if not (self.folder / "tokenizer.json").is_file():
            return self._sentencepiece(kind)
        try:
            return kind.from_pretrained(self.folder, local_files_only=True)
        except Exception as e:  # the tokenizers library raises bare Exception
            raise UserError(f"{self.folder / 'tokenizer.json'}: cannot be loaded: {e}") from e

    def _sentencepiece(self, kind: Any):
        """The tokenizer of a folder with tokenizer.model alone."""
        from mquant_jax.models.sentencepiece import added_tokens, build_tokenizer, read_pieces

        config = read_json(self.folder / "tokenizer_config.json")
        special = read_json(self.folder / "special_tokens_map.json") | config
        names = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = special.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names[key] = token
        added = added_tokens(config, read_json(self.folder / "added_tokens.json"))
        pieces = read_pieces(self.folder / "tokenizer.model")
        bos = names.get("bos_token", "<s>") if config.get("add_bos_token", True) else None
        tokenizer = kind(tokenizer_object=build_tokenizer(pieces, added, bos), **names)
        tokenizer.chat_template = config.get("chat_template")
        return tokenizer

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The folder's Jinja template; ``None`` when it has none."""
        if self.tokenizer.chat_template:
            return self.tokenizer.chat_template
        template = read_json(self.folder / "chat_template.json").get("chat_template")
        return template if isinstance(template, str) else None

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: generation_config.json, config.json, then the tokenizer."""
        for name in ("generation_config.json", "config.json"):
            data = read_json(self.folder / name)
            eos = data.get("eos_token_id", (data.get("text_config") or {}).get("eos_token_id"))
            if eos is not None:
                return (eos,) if isinstance(eos, int) else tuple(eos)
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding token (any id does: padding is masked)."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, no special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens removed."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def render(self, chat: list[dict[str, Any]], template: str) -> str:
        """The text of a chat that the assistant is to go on with.

        Raises:
            UserError: the template fails.
        """
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                chat, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as e:
            raise UserError(f"{self.folder}: the chat template fails: {e}") from e


def import_transformers():
    """The library, imported late (it takes a second) and kept from advising to install torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def normalised(message: Any, index: int, placed: re.Pattern[str] | None) -> dict[str, Any]:
    """The message with its content as parts, placeholders in texts turned into parts.

    Args:
        index: its number, for error messages.
        placed: finds placeholders; its first group is the kind of part, ``image`` or ``video``.
            ``None``: texts stay whole.

    Raises:
        UserError: it is no message.
    """
    where = f"message {index}"
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise UserError(f'{where}: expected an object with "role" and "content"')
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in KINDS:
            parts.append({"type": kind})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.extend(_split(part["text"], placed) if placed else [dict(part)])
        else:
            raise UserError(f"{where}: a part must be text, image or video, found {part!r}")
    return {"role": message["role"], "content": parts}


def _split(text: str, placed: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    """A text as parts: what stands between placeholders, and the placeholders."""
    at = 0
    for match in placed.finditer(text):
        if match.start() > at:
            yield {"type": "text", "text": text[at : match.start()]}
        yield {"type": match[1]}
        at = match.end()
    if at < len(text):
        yield {"type": "text", "text": text[at:]}


def check_count(who: str, kind: str, places: int, pictures: Sequence[Any]) -> None:
    """
    Raises:
        UserError: there are not as many pictures as places for them.
    """
    if places != len(pictures):
        raise UserError(f"{who} {kind} placeholders, but {len(pictures)} {kind}s were given")
